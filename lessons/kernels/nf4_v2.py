"""NF4, version 2: the first Triton kernel one writes. One program per block of 64 weights.

    program b:   32 bytes -> 32 high halves, 32 low halves -> 2 x 32 look-ups, times one scale

Nothing of size n exists any more but the codes and the result. What is still slow:

    a block is 32 bytes, one for each thread of a warp: a program spends more time on starting than on decoding
    high halves go to even addresses, low halves to odd ones: every 32 bytes of memory are written twice, half each time
    scales are decoded before, by torch: five more launches, that move 49 bytes a block; version 3 moves 1

Lesson: lessons/10_four_bits.md       Tests: tests/test_lesson_kernels_nf4.py
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton
from kernels.nf4 import NF4Tensor
from lessons.kernels.nf4_v1 import scales


@triton.jit
def _dequantize_kernel(out_ptr, codes_ptr, scales_ptr, codebook_ptr, n, SIZE: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)  # int64: b * SIZE passes 2**31
    byte = b * (SIZE // 2) + tl.arange(0, SIZE // 2)  # (SIZE / 2,)
    codes = tl.load(codes_ptr + byte, mask=byte * 2 < n, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + b)
    high = tl.load(codebook_ptr + (codes >> 4)) * scale  # (SIZE / 2,)
    low = tl.load(codebook_ptr + (codes & 15)) * scale  # (SIZE / 2,)
    tl.store(out_ptr + 2 * byte, high.to(out_ptr.dtype.element_ty), mask=2 * byte < n)
    tl.store(out_ptr + 2 * byte + 1, low.to(out_ptr.dtype.element_ty), mask=2 * byte + 1 < n)


def dequantize(q: NF4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q.shape in dtype."""
    out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    grid = (len(q.absmax),)
    _dequantize_kernel[grid](out, q.codes, scales(q), q.codebook, out.numel(), SIZE=q.block_size, num_warps=1)
    return out
