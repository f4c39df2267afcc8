"""RMSNorm, forward, version 2: one kernel, which walks its row twice.

    rstd = 1 / sqrt(mean_w x[w]^2 + eps)                                    first walk
    y[w] = weight[w] * round(x[w] * rstd)                                   second walk

One launch, and rstd never leaves the chip. The kernel still loads the row twice, 6 W bytes in all, but the second time
it is probably in the cache of its multiprocessor: 16 rows of W = 1024 are 32 KB, and there are 256. Probably: the cache
belongs to everybody, and at W = 8192 sixteen rows are 256 KB. Nothing in the code says that it works.

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_lesson_kernels_rms_norm.py
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton

BLOCK_W = 1024  # 128 threads with 8 numbers each: one 16-byte load in bf16


@triton.jit
def _kernel(x_ptr, weight_ptr, y_ptr, W, eps, BLOCK_W: tl.constexpr):
    """One program per row; two walks over its tiles."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * W passes 2^31 at 2M rows of 1024
    square = tl.zeros((BLOCK_W,), dtype=tl.float32)  # (BLOCK_W,)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)  # (BLOCK_W,)
        x = tl.load(x_ptr + n * W + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
        square += x * x
    rstd = tl.rsqrt(tl.sum(square, axis=0) / W + eps)
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)  # (BLOCK_W,)
        x = tl.load(x_ptr + n * W + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
        h = (x * rstd).to(y_ptr.dtype.element_ty).to(tl.float32)  # (BLOCK_W,)
        weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
        tl.store(y_ptr + n * W + w, (h * weight).to(y_ptr.dtype.element_ty), mask=w < W)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x (N, W) contiguous, weight (W,) -> (N, W) in x's dtype, rounded in Llama's order. No gradient."""
    N, W = x.shape
    y = torch.empty_like(x)  # (N, W)
    if N:
        _kernel[(N,)](x, weight, y, W, eps, BLOCK_W=BLOCK_W, num_warps=4, enable_fp_fusion=False)
    return y
