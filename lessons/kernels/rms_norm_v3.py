"""RMSNorm, forward, version 3: the row stays in registers.

    y = weight * round(x * rsqrt(mean x^2 + eps))

One program per row, and a block as wide as the row: what was loaded for the sum is still there for the scaling. 4 W
bytes, by construction. What is left is the heads of a qk-norm: a row of 128 numbers gives each of 256 threads half a
number to load, 1 byte where it could ask for 16, and there are 196,608 such programs in 8192 tokens of Qwen3-0.6B.
kernels/rms_norm.py lets 32 such rows share a program.

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_lesson_kernels_rms_norm.py
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton


@triton.jit
def _kernel(x_ptr, weight_ptr, y_ptr, W, eps, BLOCK_W: tl.constexpr):
    """One program per row, one tile per program."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * W passes 2^31 at 2M rows of 1024
    w = tl.arange(0, BLOCK_W)  # (BLOCK_W,)
    x = tl.load(x_ptr + n * W + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / W + eps)
    h = (x * rstd).to(y_ptr.dtype.element_ty).to(tl.float32)  # (BLOCK_W,)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)  # (BLOCK_W,)
    tl.store(y_ptr + n * W + w, (h * weight).to(y_ptr.dtype.element_ty), mask=w < W)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x (N, W) contiguous, weight (W,) -> (N, W) in x's dtype, rounded in Llama's order. No gradient."""
    N, W = x.shape
    y = torch.empty_like(x)  # (N, W)
    if N:
        block = 1 << (W - 1).bit_length()  # the power of two Triton wants
        _kernel[(N,)](x, weight, y, W, eps, BLOCK_W=block, num_warps=8, enable_fp_fusion=False)
    return y
