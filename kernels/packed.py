"""What packed weights have in common, whatever their format: kernels/nf4.py, kernels/int8.py.

    y = x W^T         W = the codes decoded: fp32 inside, rounded once to x's dtype            (1)
    dx = dy W         W is decoded again; it is frozen and has no gradient                     (2)

A format is a dataclass of tensors, and three things that only it can say: how codes are decoded in torch, how by its
Triton kernel, and which kernel multiplies a few rows of x and decodes as it goes. Beyond MAX_ROWS, and where 16 does
not divide K (rows that do not start on 16 bytes are read byte by byte), (1) decodes into memory first.

Tests: tests/test_nf4.py, tests/test_int8.py
Shapes: N x K weights; M rows of a product.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import FLOATS, choose, triton

MAX_ROWS = 64  # of x in a product kernel: beyond, registers run out, and decoding once pays for itself
BLOCK_N = 16  # rows of weights in a program, the least tl.dot takes: 64 programs for N = 1024, on a GPU of 132 units
# Weights of each row in a step, 16 for each of 128 threads; 256 of NF4 spill on sm_90. fp32 has no tensor cores to
# feed: all operands of a step lie in registers.
BLOCK_K = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}


class Packed:
    """The base of the formats' dataclasses. They have codes (whose device is that of all), a shape, and

    decoders  backend -> function (q, out), which writes the weights into out and returns it
    product   (BLOCK_K) -> the Triton kernel y, x, *tensors, M, N, K, strides of x; its tensors; keywords of its own
    """

    decoders: dict[str, Callable]
    product: Callable[[int], tuple]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: x.to(device) for name, x in self.tensors.items()})

    def dequantize(self, dtype: torch.dtype, *, out: Tensor | None = None, backend: str | None = None) -> Tensor:
        """The weights that the codes stand for, rounded once to dtype: dequantize_nf4 and dequantize_int8 say more."""
        if dtype not in FLOATS:
            raise ValueError(f"got dtype {dtype}, want bfloat16, float16 or float32; convert the result")
        shape, device = tuple(self.shape), self.codes.device
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=device)
        elif out.shape != shape or out.dtype != dtype or not out.is_contiguous() or out.device != device:
            raise ValueError(
                f"got out {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}, want a contiguous "
                f"{shape} {dtype} on {device}; leave it out to have one made"
            )
        chosen = backend if backend == "cuda" and backend in self.decoders else choose(backend, self.codes)
        with torch.no_grad():
            return self.decoders[chosen](self, out)

    def matmul(self, x: Tensor, *, backend: str | None = None) -> Tensor:
        """x @ W.T, differentiable in x: nf4_matmul and int8_matmul say more."""
        if x.dtype not in FLOATS or x.device != self.codes.device:
            want = f"want one of {FLOATS} on {self.codes.device}; convert it"
            raise ValueError(f"got x of {x.dtype} on {x.device}, {want}")
        if x.ndim != 2 or len(self.shape) != 2 or x.shape[1] != self.shape[1]:
            shapes = f"x {tuple(x.shape)} and weights {tuple(self.shape)}"
            raise ValueError(f"got {shapes}, want (M, K) and (N, K); reshape x")
        return _Matmul.apply(x, self, choose(backend, x))


class _Matmul(torch.autograd.Function):
    """Saves nothing but q: backward decodes again. Weights are frozen, so only x has a gradient."""

    @staticmethod
    def forward(ctx, x, q, backend):
        ctx.q, ctx.backend = q, backend
        (M, K), N = x.shape, q.shape[0]
        if backend == "torch" or M > MAX_ROWS or K % 16:
            return x @ q.dequantize(x.dtype, backend=backend).T  # (M, N)
        y, block_k = x.new_empty((M, N)), BLOCK_K[x.dtype]
        if M:  # a grid of 0 programs is an error
            kernel, tensors, keywords = q.product(block_k)
            # stages: x of two steps ahead is on its way, 4 KB a step for 16 rows of bf16
            kernel[(triton.cdiv(N, BLOCK_N),)](
                y, x, *tensors, M, N, K, x.stride(0), x.stride(1),
                BLOCK_M=max(16, triton.next_power_of_2(M)), BLOCK_N=BLOCK_N, BLOCK_K=block_k,
                num_warps=4, num_stages=3, **keywords,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy @ ctx.q.dequantize(dy.dtype, backend=ctx.backend), None, None  # (M, K)
