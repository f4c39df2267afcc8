"""Wrong edits of kernels/packed.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/packed.py"
MUTANTS = {
    "tests/test_nf4.py": [
        (
            "return dy @ ctx.q.dequantize(dy.dtype, backend=ctx.backend), None, None",
            "return dy @ ctx.q.dequantize(torch.bfloat16, backend=ctx.backend).to(dy.dtype), None, None",
            "backward uses other weights than forward",
        ),
    ],
    "tests/test_int8.py": [
        (
            "backend=ctx.backend), None, None  # (M, K)",
            "backend=ctx.backend) * 0.99, None, None  # (M, K)",
            "the gradient is off by a percent",
        ),
    ],
}
