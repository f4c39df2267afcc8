"""Wrong edits of kernels/lora.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/lora.py"
MUTANTS = {
    "tests/test_lora_kernel.py": [
        (
            "(w - high.to(tl.float32)).to(tl.bfloat16), mask=c < C)",
            "(w - w).to(tl.bfloat16), mask=c < C)",
            "A and B rounded to bf16",
        ),
        (
            "total = scale * (high_sum + tl.load(sums_ptr + at + R, mask=i < count, other=0.0))",
            "total = scale * high_sum",
            "the low half's sum left out",
        ),
        (
            "(total - high.to(tl.float32)).to(tl.bfloat16), mask=i < count)",
            "(total - total).to(tl.bfloat16), mask=i < count)",
            "h and dh rounded to bf16",
        ),
        ("        acc = tl.dot(low, b_high, acc)\n", "", "the low half of h left out of y"),
        ("        acc = tl.dot(high, b_low, acc)\n", "", "the low half of B left out of y"),
        (
            "total = tl.load(y, mask=inside, other=0.0).to(tl.float32) + acc",
            "total = tl.load(y, mask=inside, other=0.0).to(tl.float32) + acc.to(tl.bfloat16).to(tl.float32)",
            "the update rounded before it is added",
        ),
        (
            "y = y_ptr + n[:, None] * stride_y + f[None, :]",
            "y = y_ptr + n[:, None] * F + f[None, :]",
            "rows of a wider matrix written as if they touched",
        ),
        ("y = inner(y)  # (N, F)", "y = y", "columns written as if they were rows"),
        (
            "_thin(x, A, frozen.scale), B)",
            "_thin(x, A, 1.0), B)",
            "y without alpha / r on a GPU",
        ),
        ("dh = _thin(dy, B.T, scale)", "dh = _thin(dy, B.T, 1.0)", "dA and dx without alpha / r on a GPU"),
        ("return dh, dA[:R] + dA[R:], ", "return dh, dA[:R], ", "dA out of bf16 dh"),
        (
            'return self.backend == "triton" and x.dtype == torch.bfloat16',
            'return self.backend == "triton"',
            "fp32 models rounded to bf16 on a GPU",
        ),
    ],
    "tests/test_lora.py": [
        ("dh = dy @ B * scale  # (N, R)", "dh = dy @ B  # (N, R)", "dA and the adapter's dx without alpha / r"),
        ("dy.T @ (x @ A.T * scale)", "dy.T @ (x @ A.T)", "dB without alpha / r"),
        ("_add_reference(dx, dh, A, 1.0)", "_add_reference(dx, dh, A, frozen.scale)", "alpha / r twice in dx"),
        (
            "return dh, dh.T @ x, ",
            "return dh, (dh.bfloat16().T @ x.bfloat16()).float(), ",
            "dA out of bf16 products: a sum over all tokens, rounded to 8 bits",
        ),
        (
            "ctx.save_for_backward(x, A, B)",
            "ctx.save_for_backward(x.float(), A, B)",
            "a copy of x in fp32 for every adapter, as autograd would keep it",
        ),
        (
            "torch.addmm(y.float(), h, b, alpha=scale).to(y.dtype)",
            "torch.addmm(y, h.to(y.dtype), b.to(y.dtype), alpha=scale)",
            "the update multiplied in bf16",
        ),
    ],
    "tests/test_quant.py": [
        (
            "return dy @ frozen.dense(dy.dtype) if",
            "return dy @ frozen.dense(torch.float16).to(dy.dtype) if",
            "backward through other weights than forward",
        ),
        (
            "        y = frozen.linear(x, bias)  # (..., out)\n",
            "        y = frozen.linear(x, bias)  # (..., out)\n        ctx.save_for_backward(frozen.dense(x.dtype))\n",
            "every layer's wide weight alive until the backward pass",
        ),
        ("SMALL = 64", "SMALL = 16", "17 rows unpack every layer at every step"),
        ("return (y if bias is None else y + bias).view", "return y.view", "a decoded layer loses its bias"),
    ],
}
