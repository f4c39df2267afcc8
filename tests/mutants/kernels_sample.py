"""Wrong edits of kernels/sample.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/sample.py"
MUTANTS = {
    "tests/test_kernel_sample.py": [
        ("    possible = p > 0\n", "    possible = p >= 0\n", "a token of probability 0 is drawn"),
        ("(ends > target), i, LAST)", "(ends >= target), i, LAST)", "a uniform of 0 draws a token before the first"),
        ("tl.where(i == place, ends - p, 0.0)", "tl.where(i == place, ends, 0.0)", "the place in a block is lost"),
        (
            'tl.where(peak == -float("inf"), 0.0, peak)',
            "peak",
            "a block of banned tokens makes the row nan",
        ),
        ("s = s * tl.exp(peaks - top)", "s = s * tl.exp(top - top)", "blocks are not scaled to one maximum"),
        ("e = tl.exp(z - tl.max(z, axis=0))", "e = tl.exp(z * 0.0)", "tokens of a block are equally likely"),
        (
            "(N, V), cold = logits.shape, 1.0 / temperature",
            "(N, V), cold = logits.shape, 1.0",
            "the temperature is forgotten",
        ),
        ("fraction * inside[:, -1:]", "fraction", "the reference looks for a part of a block in a part of all"),
    ],
}
