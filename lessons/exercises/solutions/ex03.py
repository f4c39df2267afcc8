"""Solution of exercise 3."""

from pathlib import Path

from nanogspo.checkpoint import read_header, read_tensor, weight_files


def changed(a: str | Path, b: str | Path) -> dict[str, float]:
    where = [
        {name: (file, entry) for file in weight_files(Path(folder)) for name, entry in read_header(file)[0].items()}
        for folder in (a, b)
    ]
    if alone := sorted(where[0].keys() ^ where[1].keys()):
        raise ValueError(f"got {', '.join(alone)} in one folder only, want the same tensors in both")
    gaps = {}
    for name in where[0]:
        pair = []
        for file, entry in (folder[name] for folder in where):
            with open(file, "rb") as opened:
                pair.append(read_tensor(opened, entry).float())
        gap = (pair[0] - pair[1]).abs().max().item()
        if gap:
            gaps[name] = gap
    return gaps
