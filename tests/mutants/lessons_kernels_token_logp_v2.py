"""Wrong edits of lessons/kernels/token_logp_v2.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "lessons/kernels/token_logp_v2.py"
MUTANTS = {
    "tests/test_lesson_kernels_token_logp.py": [
        (
            "        top = tl.maximum(top, tl.load(row + v",
            '        top = tl.maximum(-float("inf"), tl.load(row + v',
            "the maximum of the last tile only",
        ),
        ("        total += tl.exp(", "        total = tl.exp(", "the sum of the last tile only"),
    ],
}
