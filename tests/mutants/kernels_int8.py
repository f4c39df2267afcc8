"""Wrong edits of kernels/int8.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/int8.py"
MUTANTS = {
    "tests/test_int8.py": [
        (
            "scale[rows] = absmax / 127",
            "scale[rows] = absmax / 128",
            "steps too small: the largest weight of a row is clipped",
        ),
        (".round_().clamp_(-127, 127)", ".add_(0.5).floor_().clamp_(-127, 127)", "ties go up and not to even"),
        ("tiny = torch.finfo(torch.float32).tiny", "tiny = 1e-4", "rows of small weights count as rows of zeros"),
        ("x.abs().amax(1)  # (r,)", "x.abs().amax().expand(len(x))  # (r,)", "one scale for all rows of a chunk"),
        (
            "tl.load(codes_ptr + i, mask=mask, other=0).to(tl.float32) * scale[:, None]",
            "tl.load(codes_ptr + i, mask=mask, other=0).to(tl.float32)",
            "the kernel forgets the scale",
        ),
        (
            "tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=mask)",
            "tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K + 1)[None, :])",
            "the kernel writes one number beyond out",
        ),
        (
            "mask=(k < K)[:, None] & (m < M)[None, :],",
            "mask=(k < K + 1)[:, None] & (m < M)[None, :],",
            "the product reads beyond a row of x",
        ),
        (
            "w = (codes.to(tl.float32) * scale[:, None]).to(x.dtype)",
            "w = (codes.to(tl.float32).to(x.dtype) * scale[:, None].to(x.dtype))",
            "the product rounds scales before it multiplies",
        ),
    ],
}
