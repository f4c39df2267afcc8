"""RMSNorm, forward, version 1: two kernels, one for the sum and one for the scaling.

    rstd[n] = 1 / sqrt(mean_w x[n, w]^2 + eps)                              first kernel
    y[n, w] = weight[w] * round(x[n, w] * rstd[n])                          second kernel

The obvious split: a number that needs the whole row, then work that is free for every element. But between the two
kernels the row has left the chip, so it is read again.

Bytes a row, bf16: 2 W + 4 for the first, 2 W + 4 + 2 W for the second: 6 W + 8, where 4 W would do. (Not counted here
and in kernels/rms_norm.py: the weight, which all rows share and the cache keeps.)

No gradients in these versions: backward is in kernels/rms_norm.py, and reads and writes by the same rules.
Lesson: lessons/07_counting_bytes.md       Tests: tests/test_lesson_kernels_rms_norm.py
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton

BLOCK_W = 1024  # 128 threads with 8 numbers each: one 16-byte load in bf16


@triton.jit
def _rstd_kernel(x_ptr, rstd_ptr, W, eps, BLOCK_W: tl.constexpr):
    """One program per row, which it walks in tiles."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * W passes 2^31 at 2M rows of 1024
    square = tl.zeros((BLOCK_W,), dtype=tl.float32)  # (BLOCK_W,)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)  # (BLOCK_W,)
        x = tl.load(x_ptr + n * W + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
        square += x * x
    tl.store(rstd_ptr + n, tl.rsqrt(tl.sum(square, axis=0) / W + eps))


@triton.jit
def _scale_kernel(x_ptr, weight_ptr, rstd_ptr, y_ptr, W, BLOCK_W: tl.constexpr):
    """One program per tile: rows on axis 0, columns on axis 1."""
    n = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)  # (BLOCK_W,)
    x = tl.load(x_ptr + n * W + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
    h = (x * tl.load(rstd_ptr + n)).to(y_ptr.dtype.element_ty).to(tl.float32)  # (BLOCK_W,)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
    tl.store(y_ptr + n * W + w, (h * weight).to(y_ptr.dtype.element_ty), mask=w < W)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x (N, W) contiguous, weight (W,) -> (N, W) in x's dtype, rounded in Llama's order. No gradient."""
    N, W = x.shape
    y = torch.empty_like(x)  # (N, W)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)  # (N,)
    if N:
        _rstd_kernel[(N,)](x, rstd, W, eps, BLOCK_W=BLOCK_W, num_warps=4, enable_fp_fusion=False)
        grid = (N, triton.cdiv(W, BLOCK_W))
        _scale_kernel[grid](x, weight, rstd, y, W, BLOCK_W=BLOCK_W, num_warps=4, enable_fp_fusion=False)
    return y
