"""Wrong edits of nanogspo/packing.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/packing.py"
MUTANTS = {
    "tests/test_packing.py": [
        ("targets += [own[t + 1] for t in hits]", "targets += [own[t] for t in hits]", "a token predicts itself"),
        (
            "examples[last].prefix == prefix:",
            "examples[last].prefix[:SHARE_PROMPT_FROM] == prefix[:SHARE_PROMPT_FROM]:",
            "prompts that part late are taken for one",
        ),
        (
            "scored += [len(tokens) + t for t in hits]",
            "scored += [len(tokens) + t + 1 for t in hits]",
            "the hidden state that has seen the token predicts it",
        ),
        (
            "return self.tokens[: self.loss_mask.index(True, 1) - 1]",
            "return self.tokens[: self.loss_mask.index(True, 1)]",
            "the prompt's last token shared as well: nothing is left to predict an answer's first",
        ),
        (
            "self.loss_mask.index(True, 1) - 1]",
            "self.loss_mask.index(True) - 1]",
            "a first token marked as scored ends the prompt before it begins",
        ),
        (
            "            if used + new + prefix * (not begun) > max_tokens:\n",
            "            if used + new > max_tokens:\n",
            "a prompt more than the memory was planned for",
        ),
        (
            "                used, begun = 0, False\n",
            "                used = 0\n",
            "a family split by the budget goes on without its prompt in another's",
        ),
        (
            "                used, begun = used + prefix, True\n",
            "                begun = True\n",
            "prompts cost nothing",
        ),
        ("            used += new\n", "            used += new + 1\n", "a budget that is not used up"),
        (
            " and examples[last].prefix == prefix:",
            " and len(examples[last].prefix) == len(prefix):",
            "another prompt of the same length is shared",
        ),
        ("while len(prefix) >= SHARE_PROMPT_FROM and", "while", "a piece of attention for a prompt of two tokens"),
        (
            "prefix, parent = examples[family[0]].prefix, len(lengths)",
            "prefix, parent = examples[family[0]].prefix, 0",
            "every answer reads the first family's prompt",
        ),
        ("            parents.append(parent)\n", "            parents.append(-1)\n", "answers without their prompt"),
        (
            "            tokens += own[:-1]\n            lengths.append(len(own) - 1)\n",
            "            tokens += own\n            lengths.append(len(own))\n",
            "a token in each example that predicts nothing",
        ),
        (
            "own, mask = e.tokens[len(prefix) :], e.loss_mask[len(prefix) :]",
            "own, mask = e.tokens[len(prefix) :], e.loss_mask",
            "the mask of the prompt over the answer",
        ),
        (
            "torch.tensor([i for family in families for i in family])",
            "torch.tensor(sorted(i for family in families for i in family))",
            "advantages of other answers, once they are sorted by length",
        ),
        (
            "segments=batch.segments, linear=linear)[0, batch.scored]",
            "segments=None)[0, batch.scored]",
            "a packed row is read as one sequence",
        ),
        ("temperature=temperature, softcap=cap,", "softcap=cap,", "sampled at one temperature, scored at another"),
        (
            "not any(e.loss_mask[1:])",
            "not any(e.loss_mask)",
            "an example whose only scored token has nothing before it",
        ),
        (
            "[False] * len(prompt) + [True] * len(answer)",
            "[False] * len(prompt) + [True] * (len(answer) - 1) + [False]",
            "the stop token is not scored",
        ),
        (
            "+ [s.cu_seqlens, s.prefix, s.positions]",
            "+ [s.prefix, s.cu_seqlens, s.positions]",
            "segments and their prompts exchanged",
        ),
        ("non_blocking=True", "non_blocking=False", "the CPU waits for every micro-batch"),
        (
            "Segments(cu_seqlens.int(), prefix.int(),",
            "Segments(cu_seqlens, prefix,",
            "other dtypes on a GPU, where kernels want int32",
        ),
    ],
}
