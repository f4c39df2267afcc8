"""Wrong edits of kernels/nf4.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/nf4.py"
MUTANTS = {
    "tests/test_nf4.py": [
        (
            "return (code[:-1] + code[1:]) / 2",
            "return (code[:-1].double() + code[1:].double()).mul(0.5).float().nextafter(code[1:])",
            "thresholds that are not the fp32 midpoints",
        ),
        (
            '"PIECE": piece, "enable_fp_fusion": False}',
            '"PIECE": piece}',
            "the product fuses the two roundings of a scale",
        ),
        (
            "BLOCKS=blocks,\n        num_warps=4, enable_fp_fusion=False,",
            "BLOCKS=blocks,\n        num_warps=4,",
            "decoding fuses the two roundings of a scale",
        ),
        (
            "a.clamp_min(1e-38).reciprocal()[:, None]",
            "a.reciprocal()[:, None]",
            "a block of zeros divides by 0 and its codes are no longer 0",
        ),
        (
            "scaled[-1] = x[-1] / a[-1]",
            "pass",
            "a short last block multiplies by the reciprocal, and one code in thousands moves",
        ),
        (
            "(code[:, :1] << 4) | code[:, 1:]",
            "(code[:, 1:] << 4) | code[:, :1]",
            "the low half of a byte comes first",
        ),
        (
            "/ 2 * 10.0 ** (e - 6)  # (2^e,)",
            "/ 2 * 10.0 ** (e - 7)  # (2^e,)",
            "the decades of the 8-bit map are one too low",
        ),
        (
            "position = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().int()",
            "position = ((scaled + 1) * 0.5).double() * 65535",
            "scales go to the nearest code, and not by way of 65,536 positions",
        ),
        (
            "return q.code2[stored.int()] * q.absmax2[group] + q.offset",
            "return torch.addcmul(q.offset.double(), q.code2[stored.int()].double(), q.absmax2[group].double()).float()",
            "the two roundings of a scale become one, as a fused multiply-add",
        ),
        (
            "torch.arange(first, last, device=stored.device) // NESTED",
            "torch.arange(last - first, device=stored.device) // NESTED",
            "every chunk starts again at the first absmax2",
        ),
        ("values[whole * size :].mul_(a[-1])", "pass", "the weights of a short last block are not scaled"),
        (
            "tl.join(codes >> 4, codes & 15)",
            "tl.join(codes & 15, codes >> 4)",
            "the kernel unpacks the low half first",
        ),
        ("b // 256, mask=mask, other=0.0)", "b // 64, mask=mask, other=0.0)", "absmax2 of the wrong group"),
        ("mask=i < n)", "mask=i < n + 1)", "the kernel writes one number beyond out"),
        (
            "mask=(k < K)[:, None] & (m < M)[None, :],",
            "mask=(k < K + 1)[:, None] & (m < M)[None, :],",
            "the product reads beyond a row of x",
        ),
        (
            "(n[:, None] * K + piece[None, :]) // SIZE",
            "n[:, None] * (K // SIZE) + piece[None, :] // SIZE",
            "scales of rows that do not start with a block",
        ),
        (
            ".to(x.dtype)  # (BLOCK_N, BLOCK_K) the very bits of dequantize_nf4",
            ".to(tl.bfloat16).to(x.dtype)  # (BLOCK_N, BLOCK_K)",
            "the product rounds its weights to bf16 whatever x is",
        ),
    ],
}
