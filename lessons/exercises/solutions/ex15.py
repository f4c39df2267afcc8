def training_rows(turns: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[bool]]]:
    rows = []
    for prompt, sampled in turns:
        if not rows or prompt[: len(rows[-1][0])] != rows[-1][0]:
            rows.append(([], []))
        tokens, mask = rows[-1]
        new = prompt[len(tokens) :]
        tokens += new + sampled
        mask += [False] * len(new) + [True] * len(sampled)
    return rows
