"""Eight-bit weights: int8, a byte a number and one scale for each row.

    scale[n] = max_k |w[n, k]| / 127        code = round(w / scale), ties to even, in [-127, 127]
    w'[n, k] = code[n, k] * scale[n]        off by at most half a step, scale[n] / 2                       (1)

One scale a row is the simplest scheme that keeps a matrix product exact in form: y[m, n] = scale[n] * sum_k x code. We
still round code * scale to x's dtype first, so that every path multiplies with the very same weights.

The file reads top to bottom:

    1. reference    plain torch, a few rows at a time. Equation (1). Also the CPU backend.
    2. kernels      Triton: dequantise, and a product of few rows that decodes as it goes.
    3. entry        quantize_int8, dequantize_int8, int8_matmul: the names other files import.

kernels/packed.py chooses among them, launches the product and saves nothing but the codes for its backward.

Decoding reads 1 byte a weight and writes 2 (bf16). The product for M rows reads the 1 byte and does 2 M FLOP a weight.

Left out: int8 activations (a product of int8 by int8), outlier columns in fp16 (LLM.int8), a Triton kernel for
quantising (a model is quantised once; torch does it on either device).

Lesson: lessons/10_four_bits.md       Tests: tests/test_int8.py
Shapes: N rows of K weights; M rows of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import FLOATS, same_device, tl, triton
from kernels.packed import Packed

CHUNK = 2**19  # weights handled at a time: an fp32 copy of a chunk is 2 MB, whatever the size of the tensor


@dataclass(frozen=True, eq=False)
class Int8Tensor(Packed):
    """A quantised matrix.

    codes  (N, K) int8
    scale  (N,) float32

    Raises ValueError when the two do not fit.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self):
        codes, scale = self.codes, self.scale
        right = codes.ndim == 2 and codes.dtype == torch.int8 and codes.is_contiguous()
        if not right or scale.shape != codes.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"got codes {tuple(codes.shape)} {codes.dtype} and scale {tuple(scale.shape)} {scale.dtype}, want "
                "contiguous (N, K) int8 and (N,) float32; do both come from one matrix?"
            )
        same_device(codes=codes, scale=scale)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def decoders(self) -> dict[str, Callable]:
        return {"torch": _dequantize, "triton": _dequantize_triton}

    def product(self, block_k: int) -> tuple:
        return _matmul_kernel, (self.codes, self.scale), {}


# ----------------------------------------------------------------------------
# 1. reference


def _row_slices(N: int, K: int) -> list[slice]:
    height = max(1, CHUNK // max(1, K))
    return [slice(n, min(n + height, N)) for n in range(0, N, height)]


def _quantize(w: Tensor, codes: Tensor, scale: Tensor) -> None:
    tiny = torch.finfo(torch.float32).tiny  # 0 / tiny is 0: a row of zeros gets scale 0 and codes 0, and never nan
    for rows in _row_slices(*w.shape):
        x = w[rows].float()  # (r, K)
        absmax = x.abs().amax(1)  # (r,)
        if not absmax.isfinite().all():
            n, k = (~x.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"got {x[n, k].item()} at w[{rows.start + n}, {k}], want finite weights; is the file ok?")
        scale[rows] = absmax / 127
        codes[rows] = (x / scale[rows].clamp_min(tiny)[:, None]).round_().clamp_(-127, 127).to(torch.int8)  # (r, K)


def _dequantize(q: Int8Tensor, out: Tensor) -> Tensor:
    for rows in _row_slices(*q.shape):
        out[rows] = q.codes[rows].float().mul_(q.scale[rows, None])  # (r, K) rounded once, to out's dtype
    return out


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _dequantize_kernel(out_ptr, codes_ptr, scale_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[n, k] = codes[n, k] * scale[n] for a tile of BLOCK_N rows"""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,) int64: N * K may pass 2^31
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    mask = (n < N)[:, None] & (k < K)[None, :]  # (BLOCK_N, BLOCK_K)
    i = n[:, None] * K + k[None, :]  # (BLOCK_N, BLOCK_K)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)  # (BLOCK_N,)
    w = tl.load(codes_ptr + i, mask=mask, other=0).to(tl.float32) * scale[:, None]  # (BLOCK_N, BLOCK_K)
    tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_kernel(
    y_ptr, x_ptr, codes_ptr, scale_ptr, M, N, K, stride_m, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[:, n] = sum_k x[:, k] W[n, k] for BLOCK_N rows of weights and all rows of x: each weight is decoded once.

    The product is W x^T, weights on the left: then the instruction, 16 rows by 8 columns, is the same for any M, and k
    runs in the same order, so that the bits of a row of x do not depend on how many there are.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    m = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        x = tl.load(
            x_ptr + k[:, None] * stride_k + m[None, :].to(tl.int64) * stride_m,
            mask=(k < K)[:, None] & (m < M)[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_M)
        codes = tl.load(
            codes_ptr + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0
        )  # (BLOCK_N, BLOCK_K)
        w = (codes.to(tl.float32) * scale[:, None]).to(x.dtype)  # (BLOCK_N, BLOCK_K) the bits of dequantize_int8
        acc = tl.dot(w, x, acc, input_precision="ieee")
    y = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]  # (BLOCK_N, BLOCK_M)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def _dequantize_triton(q: Int8Tensor, out: Tensor) -> Tensor:
    (N, K), block_n, block_k = q.shape, 8, 256  # 2048 weights, 16 for each of 128 threads: one load of 16 bytes
    grid = (triton.cdiv(N, block_n), triton.cdiv(K, block_k))
    _dequantize_kernel[grid](out, q.codes, q.scale, N, K, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4)
    return out


# ----------------------------------------------------------------------------
# 3. entry


def quantize_int8(w: Tensor) -> Int8Tensor:
    """One byte a weight, one scale a row. Equation (1).

    w        (N, K) bfloat16, float16 or float32, finite, K >= 1
    returns  Int8Tensor on w's device

    Raises ValueError for another shape or dtype, and NaN or infinity.
    """
    if w.dtype not in FLOATS:
        raise ValueError(f"got w of {w.dtype}, want bfloat16, float16 or float32; is it quantised?")
    if w.ndim != 2 or w.numel() == 0:
        raise ValueError(f"got w of shape {tuple(w.shape)}, want (N, K) and at least one weight; reshape it")
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(len(w), dtype=torch.float32, device=w.device)
    _quantize(w.detach(), codes, scale)
    return Int8Tensor(codes, scale)


def dequantize_int8(
    q: Int8Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The weights that the codes stand for. Equation (1): fp32 inside, rounded once to dtype.

    q        an Int8Tensor (N, K)
    dtype    bfloat16, float16 or float32
    out      (N, K) dtype, contiguous: written to and returned; None allocates
    backend  "torch" | "triton" | None = triton on a GPU, else torch: the same bits
    returns  (N, K) dtype

    Raises ValueError when out or dtype do not fit.
    """
    return q.dequantize(dtype, out=out, backend=backend)


def int8_matmul(x: Tensor, q: Int8Tensor, *, backend: str | None = None) -> Tensor:
    """x @ W.T for quantised weights.

        y[m, n] = sum_k x[m, k] W[n, k]        W = dequantize_int8(q, x.dtype), sums in fp32

    x        (M, K) bfloat16, float16 or float32; carries a gradient
    q        an Int8Tensor (N, K)
    backend  "torch" | "triton" | None = triton on a GPU, else torch
    returns  (M, N) in x's dtype; differentiable in x. Not made for autocast, which knows the torch path alone

    With triton and M <= 64 weights are decoded on the fly, and a row of the result has the same bits whatever the other
    rows are and however many. Beyond, and where 16 does not divide K, they are decoded into memory first, as in torch.

    Raises ValueError when shapes, dtypes or devices do not line up.
    """
    return q.matmul(x, backend=backend)
