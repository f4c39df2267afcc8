"""NF4, version 3: a tile of 4096 weights in a program, scales decoded on the way, halves joined before they are stored.

    program p:   64 blocks: 64 scales from 64 bytes, 2048 bytes -> (64, 32) -> joined (64, 32, 2) -> (64, 64)

One launch, and every byte is moved once: 0.5 + 1 / 64 + 4 / 16384 read and 2 written for a weight in bf16. What is left
for kernels/nf4.py, which is this with two changes:

    the mask `byte * 2 < n` hides from the compiler that 16 bytes in a row are in or out together: it loads one by one.
    Compared with a count of bytes, which it knows to be a multiple of 16, it loads 16 at once
    look-ups are addresses to load from; as a gather they stay on the chip, also where the product kernel needs them

Lesson: lessons/10_four_bits.md       Tests: tests/test_lesson_kernels_nf4.py
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton
from kernels.nf4 import NF4Tensor

TILE = 4096  # weights a program decodes, 32 for each of 128 threads


@triton.jit
def _dequantize_kernel(
    out_ptr,
    codes_ptr,
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    codebook_ptr,
    n,
    NESTED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    scale = tl.load(absmax_ptr + b, mask=b * SIZE < n, other=0)  # (BLOCKS,)
    if NESTED:
        scale = tl.load(code2_ptr + scale.to(tl.int32))
        scale = scale * tl.load(absmax2_ptr + b // 256, mask=b * SIZE < n, other=0.0)  # rounded here,
        scale = scale + tl.load(offset_ptr)  # and here: see enable_fp_fusion below
    byte = b[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]  # (BLOCKS, SIZE / 2)
    codes = tl.load(codes_ptr + byte, mask=byte * 2 < n, other=0).to(tl.int32)
    high, low = tl.load(codebook_ptr + (codes >> 4)), tl.load(codebook_ptr + (codes & 15))
    w = tl.reshape(tl.join(high, low), (BLOCKS, SIZE)) * scale[:, None]  # (BLOCKS, SIZE)
    i = b[:, None] * SIZE + tl.arange(0, SIZE)[None, :]  # (BLOCKS, SIZE)
    tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=i < n)


def dequantize(q: NF4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q.shape in dtype."""
    out = torch.empty(q.shape, dtype=dtype, device=q.codes.device)
    blocks = max(1, TILE // q.block_size)
    nested = (q.absmax2, q.code2, q.offset) if q.nested else (q.absmax,) * 3  # not read where scales are plain
    _dequantize_kernel[(triton.cdiv(len(q.absmax), blocks),)](
        out,
        q.codes,
        q.absmax,
        *nested,
        q.codebook,
        out.numel(),
        NESTED=q.nested,
        SIZE=q.block_size,
        BLOCKS=blocks,
        num_warps=4,
        enable_fp_fusion=False,  # a * b + c stays two instructions, two roundings
    )
    return out
