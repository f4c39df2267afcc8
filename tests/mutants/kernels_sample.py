"""Wrong edits of kernels/sample.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/sample.py"
MUTANTS = {
    "tests/test_kernel_sample.py": [
        ("    possible = p > 0\n", "    possible = p >= 0\n", "a token of probability 0 is drawn"),
        ("(ends > target), i, LAST)", "(ends >= target), i, LAST)", "a uniform of 0 draws a token before the first"),
        ("tl.where(i == place, ends - p, 0.0)", "tl.where(i == place, ends, 0.0)", "the place in a block is lost"),
        ('tl.where(peak == -float("inf"), 0.0, peak)', "peak", "a block of banned tokens makes the row nan"),
        ("s = s * tl.exp(peaks - top)", "s = s * tl.exp(top - top)", "blocks are not scaled to one maximum"),
        ("e = tl.exp(z - tl.max(z, axis=0))", "e = tl.exp(z * 0.0)", "tokens of a block are equally likely"),
        (
            "(N, V), cold = logits.shape, 1.0 / temperature",
            "(N, V), cold = logits.shape, 1.0",
            "the temperature is forgotten",
        ),
        ("fraction * inside[:, -1:]", "fraction", "the reference looks for a part of a block in a part of all"),
    ],
    "tests/test_rollout.py": [
        ("right=True)", "right=False)", "a token of probability 0 is drawn at uniform 0"),
        (
            "inside.masked_fill_(columns >= V, 0.0).cumsum_(-1)",
            "inside.cumsum_(-1)",
            "the last token stands for what is missing of its block",
        ),
        (
            "target - F.pad(cumulative, (1, 0))",
            "target - F.pad(cumulative, (0, 1))",
            "each block searched from the end of it",
        ),
        ("- best + likeliest.log()", "- best", "log-probs that are not normalised"),
        (
            "return token.squeeze(1), (z.gather(1, token) - best + likeliest.log()).squeeze(1)",
            "return token.squeeze(1), logits.log_softmax(-1).gather(1, token).squeeze(1)",
            "log-prob kept at another temperature than it was drawn with",
        ),
    ],
}
