"""Wrong edits of kernels/attention.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/attention.py"
MUTANTS = {
    "tests/test_attention.py": [
        (
            "torch.logaddexp(whole, part_lse)",
            "torch.maximum(whole, part_lse)",
            "pieces join by the larger lse alone",
        ),
        (
            "lead + i + n - low > bound else 0",
            "lead + i + n - low > bound + 1 else 0",
            "a piece one key too long is not masked",
        ),
        (
            "min(lengths[i], window - 1)",
            "min(lengths[i], window - 2)",
            "the last token that sees the prompt does not",
        ),
        ("(key > query - piece.window)", "(key >= query - piece.window)", "the window is one key too wide"),
        ("t = x.abs().mul_(-2).exp_()", "t = x.abs().mul_(-1).exp_()", "another slope of the soft-cap"),
        (
            "_blocks(whole, *block).add_(part)",
            "_blocks(whole, *block).copy_(part)",
            "the last answer alone trains the prompt",
        ),
        ("rescale = tl.exp2(m - m_new)", "rescale = tl.exp2(m - m)", "sums are not rescaled to a new maximum"),
        (
            "reach = first + OWNED - 1 + window",
            "reach = first + window",
            "queries at the window's edge do not reach the keys",
        ),
        (
            "for g in range(GROUP):",
            "for g in range(1):",
            "only the first query head of a group trains its key head",
        ),
        (
            "family_end[parent] = starts[i + 1]",
            "family_end[parent] = starts[parent + 1]",
            "answers do not train their prompt",
        ),
        ("m + tl.log2(s), mask", "m, mask", "the lse is the maximum"),
        ("tl.store(dq_ptr + at, dq * scale,", "tl.store(dq_ptr + at, dq,", "dq without the scores' factor"),
        ("m = tl.full((OWNED,), -1e30,", 'm = tl.full((OWNED,), -float("inf"),', "a first tile of nothing is nan"),
        (
            "(key[:, None] <= query[None, :])",
            "(key[:, None] < query[None, :])",
            "a key is not trained by its own query",
        ),
        (
            "is_hopper(q) and width == 128 and options.softcap is None else 64",
            "is_hopper(q) and width == 128 else 64",
            "an H100 spills under a soft-cap",
        ),
        (
            "tl.minimum(reach, last), last)",
            "reach, last)",
            "under a window, each part walks to the end of the window",
        ),
        (
            "if slot < 0:",
            "if slot < 1:",
            "the first part is stored as the whole",
        ),
        (
            "min(first + part * count, last)",
            "first + part * (count - 1)",
            "parts of a prompt's queries overlap",
        ),
        (
            "max(1, min(parts, PART_TILES // n_tiles))",
            "max(1, parts)",
            "a long prompt has parts without limit, a megabyte each",
        ),
        ("(parent != i - 1 and prefix[i - 1] != parent)", "False", "answers may stand anywhere"),
    ],
}
