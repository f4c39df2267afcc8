"""NF4, version 1: the definition, by table, in plain torch.

    a[b] = max |w| in block b        code = the nearest of 16 numbers to w / a[b]        w' = codebook[code] * a[b]

Right, and wasteful: quantising builds a matrix of n x 16 distances, 64 bytes for each weight of 2 bytes; dequantising
goes through memory with int64 indices, values in fp32 and a scale for every weight: 70 bytes read and written a weight.

The nearest number is found by distance here and by thresholds in kernels/nf4.py: a weight half-way between two, give or
take a rounding, may get the other one. That is no worse, but they are not the bytes of a checkpoint.

Lesson: lessons/10_four_bits.md       Tests: tests/test_lesson_kernels_nf4.py
Shapes: n weights, b blocks.
"""

import torch
from torch import Tensor

from kernels.nf4 import NF4, NF4Tensor


def quantize(w: Tensor, block_size: int = 64) -> NF4Tensor:
    """Plain scales; a whole number of blocks. (n,) or any shape, float -> NF4Tensor."""
    codebook = torch.tensor(NF4)  # (16,)
    x = w.float().view(-1, block_size)  # (b, block_size)
    absmax = x.abs().amax(1)  # (b,)
    scaled = x / absmax[:, None]  # (b, block_size)
    code = (scaled.flatten()[:, None] - codebook).abs().argmin(1)  # (n,) from distances (n, 16)
    packed = (code[0::2] << 4 | code[1::2]).to(torch.uint8)[:, None]  # (n / 2, 1) the first code in the high half
    return NF4Tensor(packed, absmax, tuple(w.shape), w.dtype, block_size, codebook)


def scales(q: NF4Tensor) -> Tensor:
    """fp32, (b,). One number for the mean, one for 256 blocks, a byte for each: the product first, then the sum."""
    if not q.nested:
        return q.absmax
    product = q.code2[q.absmax.long()] * q.absmax2.repeat_interleave(256)[: len(q.absmax)]  # (b,) rounded
    return product + q.offset  # (b,) and rounded again


def dequantize(q: NF4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """q.shape in dtype."""
    byte = q.codes.flatten().long()  # (n / 2,)
    code = torch.stack([byte >> 4, byte & 15], 1).flatten()  # (n,)
    a = scales(q).repeat_interleave(q.block_size)  # (n,)
    n = torch.Size(q.shape).numel()
    return (q.codebook[code][:n] * a[:n]).view(q.shape).to(dtype)
