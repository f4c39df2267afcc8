"""Wrong edits of kernels/rms_norm.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/rms_norm.py"
MUTANTS = {
    "tests/test_rms_norm.py": [
        (
            "h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)",
            "h = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()",
            "the same number in other bits: a CPU run no longer gives what it gave",
        ),
        (
            "rstd = tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)",
            "rstd = tl.rsqrt(tl.sum(x * x, axis=1) / BLOCK_W + eps)",
            "the mean over the tile's padding as well",
        ),
        (
            "        x = total.to(tl.float32)  # (ROWS, BLOCK_W) what is",
            "        x = x + delta  # (ROWS, BLOCK_W) what is",
            "the norm of the sum before it was rounded, not of what later layers read",
        ),
        (
            "y = h.to(y_ptr.dtype.element_ty).to(tl.float32) * weight",
            "y = h * weight",
            "Llama's norm without its first rounding",
        ),
        (
            "        y = h * (1.0 + weight)",
            "        y = h.to(y_ptr.dtype.element_ty).to(tl.float32) * (1.0 + weight)",
            "Gemma's norm rounded twice",
        ),
        (
            "        scale = 1.0 + scale",
            "        scale = scale",
            "backward forgets that Gemma stores the weight minus 1",
        ),
        ("dx = rstd * (dh - h * along)", "dx = rstd * dh", "rstd taken for a constant"),
        ("along = tl.sum(dh * h, axis=1)", "along = tl.sum(dy * h, axis=1)", "the projection before the weight"),
        (
            "            dweight += dy * h",
            "            dweight = dy * h",
            "only the last tile of a program reaches dweight",
        ),
        ("            dweight += dy * h", "            dweight += dh * h", "the weight in its own gradient"),
        ("n = (p * tiles + i) * ROWS", "n = (p + tiles * i) * ROWS", "programs take each other's rows"),
        (
            "dx += tl.load(dsum_ptr + n[:, None] * stride_dsum",
            "dx += tl.load(dsum_ptr + n[:, None] * stride_dy",
            "the strides of one upstream gradient used for the other",
        ),
        (
            "return dsum, dsum if want_ddelta else None, None, None, None",
            "return None, None, None, None, None",
            "no gradient where only the sum is used",
        ),
        (
            "n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64",
            "n = tl.program_id(0).to(tl.int64) * (ROWS - ROWS // 4) + tl.arange(0, ROWS)  # (ROWS,) int64",
            "tiles that overlap leave the last rows unwritten",
        ),
    ],
}
