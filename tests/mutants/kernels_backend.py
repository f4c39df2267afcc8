"""Wrong edits of kernels/backend.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/backend.py"
MUTANTS = {
    "tests/test_backend.py": [
        ("    return torch.version.hip is None and ", "    return ", "an MI250 is taken for an H100"),
        (
            "    finally:\n        torch.backends.mkldnn.matmul.fp32_precision = before\n",
            "    finally:\n        pass\n",
            "every later fp32 product is rounded to bf16",
        ),
        (
            "    try:\n        yield\n    finally:\n",
            "    yield\n    if True:\n",
            "the same, after an exception",
        ),
        (
            "    if wanted:\n        torch.backends",
            "    if True:\n        torch.backends",
            "fp32 operands lose 16 of their bits",
        ),
    ],
    "tests/test_glu.py": [
        (
            "return x if x.stride(-1) == 1 else x.contiguous()",
            "return x",
            "a transposed projection read as if it were not",
        ),
    ],
    "tests/test_rope.py": [
        (
            "return x if x.stride(-1) == 1 else x.contiguous()",
            "return x",
            "an expanded upstream gradient read as if its channels were neighbours",
        ),
    ],
}
