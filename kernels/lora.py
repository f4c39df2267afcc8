"""A frozen linear layer, plain or packed, with or without a LoRA update: one autograd function for all of them.

    y  = x W^T + b + h B^T        h = s x A^T                      (1)        W frozen; A (R, in), B (out, R) in fp32
    dx = dy W + dh A              dh = s dy B                      (2)
    dA = dh^T x                   dB = dy^T h                      (3)

The update is multiplied in fp32 whatever x is, and y and dx are rounded once: A and B move by 1e-6 to 1e-4 of
themselves an update, which bf16 matmuls would not see. In torch that takes fp32 copies of x, y and dy, and an addmm
that first copies its input. But bf16 x and dy need no copy: tensor cores multiply bf16 and sum in fp32, and only the
thin operand (A, B, h, dh: R columns) is fp32. It is split into two bf16 halves, side by side in one matrix:

    high = bf16(a)        low = bf16(a - high)        |a - high - low| <= 2^-17 |a|                              (4)
    x a^T = x high^T + x low^T                        one bf16 matmul with 2 R columns, fp32 out, halves added

Bytes a token and layer of the adapters (seven linears of Qwen3-0.6B, R = 16), as tests/test_lora_kernel.py counts them:

                  torch          here
    forward       447 KB         72 KB
    backward      606 KB        138 KB       together 19.9 %; the base matmuls read x and write y, 45 KB

The file reads top to bottom:

    1. reference    plain torch in fp32, for fp32 and fp16 models and for CPUs.
    2. kernels      Triton, bf16: (4) for a thin matmul's result, and y += h B^T in place, rounded once.
    3. autograd     saves x, A and B (without an adapter nothing); h is computed again, W unpacked again.
    4. entry        frozen_linear: the name other files import.

Left out: dropout (nanogspo/lora.py adds it in torch), gradients of W, gradients of gradients.

Lesson: lessons/11_lora_and_sft.md       Tests: tests/test_lora_kernel.py
Shapes: N rows (= all tokens), R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.backend import choose, inner, same_device, tl, triton
from kernels.packed import Packed

# Up to so many rows a GPU multiplies straight from the packed weights: a decoding step waits for memory, and they are a
# quarter as long. The choice looks at the shape and never at whether gradients are on: old and new log-probs are scored
# in equal shapes, so on equal paths, and the first ratio is exactly 1. 64 is what the kernels take, and arithmetic: at
# 64 rows unpacking moves 4.5 bytes a weight, and these 0.52. It was not timed.
SMALL = 64

# 64 x 128 fp32 sums are 64 registers for each of 128 threads; with 64 columns of h and B at once sm_80 spills
BLOCK_N, BLOCK_F, MAX_BLOCK_R = 64, 128, 32
BLOCK = 1024  # numbers of a thin matrix in a program

Weight = Tensor | Packed

# ----------------------------------------------------------------------------
# 1. reference


def _add_reference(y: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale h b, in fp32, rounded once to y's dtype."""
    return torch.addmm(y.float(), h, b, alpha=scale).to(y.dtype)


def _gradients_reference(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dh (N, R), dA (R, in), dB (out, R)."""
    dy, x = dy.float(), x.float()  # (N, out), (N, in)
    dh = dy @ B * scale  # (N, R)
    return dh, dh.T @ x, dy.T @ (x @ A.T * scale)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _split_kernel(w_ptr, out_ptr, stride_r, stride_c, R, C, BLOCK: tl.constexpr):
    """BLOCK numbers of one row of w (R, C) fp32 -> the same of [high; low] (2 R, C) bf16: (4)."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    w = tl.load(w_ptr + r * stride_r + c.to(tl.int64) * stride_c, mask=c < C, other=0.0)  # (BLOCK,)
    high = w.to(tl.bfloat16)  # (BLOCK,)
    tl.store(out_ptr + r * C + c, high, mask=c < C)
    tl.store(out_ptr + (r + R) * C + c, (w - high.to(tl.float32)).to(tl.bfloat16), mask=c < C)


@triton.jit
def _halves_kernel(sums_ptr, out_ptr, scale, count, R: tl.constexpr, BLOCK: tl.constexpr):
    """[high sums | low sums] (N, 2 R) fp32 -> scale times their total, as the halves of (4), (N, 2 R) bf16."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,) of N * R numbers
    at = i // R * (2 * R) + i % R  # (BLOCK,)
    high_sum = tl.load(sums_ptr + at, mask=i < count, other=0.0)  # (BLOCK,)
    total = scale * (high_sum + tl.load(sums_ptr + at + R, mask=i < count, other=0.0))  # (BLOCK,)
    high = total.to(tl.bfloat16)  # (BLOCK,)
    tl.store(out_ptr + at, high, mask=i < count)
    tl.store(out_ptr + at + R, (total - high.to(tl.float32)).to(tl.bfloat16), mask=i < count)


@triton.jit
def _add_kernel(
    y_ptr, h_ptr, b_ptr, stride_y, stride_bf, stride_br, N, F, R,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[n, f] += sum_r h[n, r] b[f, r] for a tile of y; h (N, 2 R) in halves, b (F, R) fp32 and split here.

    low x low, at most 2^-16 of the product, is left out.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,) int64: N * F may pass 2^31
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # (BLOCK_F,)
    acc = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)  # (BLOCK_R,)
        h = h_ptr + n[:, None] * (2 * R) + r[None, :]  # (BLOCK_N, BLOCK_R)
        inside = (n < N)[:, None] & (r < R)[None, :]  # (BLOCK_N, BLOCK_R)
        high = tl.load(h, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_R)
        low = tl.load(h + R, mask=inside, other=0.0)  # (BLOCK_N, BLOCK_R)
        b = b_ptr + f[None, :].to(tl.int64) * stride_bf + r[:, None] * stride_br  # (BLOCK_R, BLOCK_F)
        b = tl.load(b, mask=(r < R)[:, None] & (f < F)[None, :], other=0.0)  # (BLOCK_R, BLOCK_F)
        b_high = b.to(tl.bfloat16)  # (BLOCK_R, BLOCK_F)
        b_low = (b - b_high.to(tl.float32)).to(tl.bfloat16)  # (BLOCK_R, BLOCK_F)
        acc = tl.dot(low, b_high, acc)
        acc = tl.dot(high, b_low, acc)
        acc = tl.dot(high, b_high, acc)
    y = y_ptr + n[:, None] * stride_y + f[None, :]  # (BLOCK_N, BLOCK_F)
    inside = (n < N)[:, None] & (f < F)[None, :]  # (BLOCK_N, BLOCK_F)
    total = tl.load(y, mask=inside, other=0.0).to(tl.float32) + acc  # (BLOCK_N, BLOCK_F)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a b of bf16 matrices with fp32 sums, in fp32. A CPU has no such matmul: there the operands are widened."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _thin(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """scale x w^T for bf16 x (N, in) and fp32 w (R, in), as halves (N, 2 R)."""
    (R, C), N = w.shape, len(x)
    halves = torch.empty((2 * R, C), dtype=torch.bfloat16, device=x.device)  # (2 R, in)
    _split_kernel[(R, triton.cdiv(C, BLOCK))](
        w, halves, w.stride(0), w.stride(1), R, C, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
    )
    sums = _mm(x, halves.T)  # (N, 2 R)
    out = torch.empty_like(sums, dtype=torch.bfloat16)  # (N, 2 R)
    if N:  # a grid of 0 programs is an error
        _halves_kernel[(triton.cdiv(N * R, BLOCK),)](
            sums, out, scale, N * R, R=R, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return out


def _add(y: Tensor, h: Tensor, b: Tensor) -> Tensor:
    """y + h b^T for bf16 y (N, F), halves h (N, 2 R) and fp32 b (F, R) of any strides. Writes into y and returns it; a
    y whose rows are not contiguous is copied first."""
    (N, F), R = y.shape, b.shape[1]
    y = inner(y)  # (N, F)
    if N:
        _add_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F))](
            y, h, b, y.stride(0), b.stride(0), b.stride(1), N, F, R,
            BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, BLOCK_R=min(MAX_BLOCK_R, max(16, triton.next_power_of_2(R))),
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _gradients(dy: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dh as halves (N, 2 R), dA (R, in), dB (out, R): (2) and (3), without fp32 copies of dy and x."""
    dh = _thin(dy, B.T, scale)  # (N, 2 R)
    dA = _mm(dh.T, x)  # (2 R, in)
    dB = _mm(dy.T, _thin(x, A, scale))  # (out, 2 R)
    R = len(A)
    return dh, dA[:R] + dA[R:], dB[:, :R] + dB[:, R:]


# ----------------------------------------------------------------------------
# 3. autograd


@dataclass(frozen=True)
class _Frozen:
    """What has no gradient. backend: "torch" or "triton"."""

    weight: Weight
    scale: float
    backend: str

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, (out, in): as it is, or unpacked into dtype."""
        if isinstance(self.weight, Tensor):
            return self.weight.detach()
        return self.weight.dequantize(dtype, backend=self.backend)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, (..., out)."""
        if isinstance(self.weight, Tensor) or self.backend == "torch" or x.shape[:-1].numel() > SMALL:
            return functional.linear(x, self.dense(x.dtype), bias)  # (..., out)
        y = self.weight.matmul(x.reshape(-1, x.shape[-1]), backend=self.backend)  # (N, out)
        return (y if bias is None else y + bias).view(*x.shape[:-1], y.shape[1])  # (..., out)

    def narrow(self, x: Tensor) -> bool:
        """Whether the update is multiplied by part 2."""
        return self.backend == "triton" and x.dtype == torch.bfloat16


class FrozenLinear(torch.autograd.Function):
    """Base and update together. Autograd would keep x in fp32 for every adapter, 7 copies a layer; this keeps x itself,
    which other layers keep too, and computes h again. W is kept as it is stored, in no second copy."""

    @staticmethod
    def forward(ctx, x, bias, A, B, frozen):
        ctx.frozen = frozen
        y = frozen.linear(x, bias)  # (..., out)
        if A is None:
            return y
        ctx.save_for_backward(x, A, B)
        shape, y, x = y.shape, y.reshape(-1, len(B)), x.reshape(-1, A.shape[1])  # (N, out), (N, in)
        if frozen.narrow(x):
            y = _add(y, _thin(x, A, frozen.scale), B)  # (N, out)
        else:
            y = _add_reference(y, x.float() @ A.T, B.T, frozen.scale)  # (N, out)
        return y.view(shape)  # (..., out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        frozen, (dx_wanted, dbias_wanted, *_) = ctx.frozen, ctx.needs_input_grad
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if dbias_wanted else None  # (out,)
        saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
        if not saved:
            return dy @ frozen.dense(dy.dtype) if dx_wanted else None, dbias, None, None, None
        x, A, B = saved
        shape, dy, x = x.shape, dy.reshape(-1, len(B)), x.reshape(-1, A.shape[1])  # (N, out), (N, in)
        narrow, dx = frozen.narrow(x), None
        dh, dA, dB = (_gradients if narrow else _gradients_reference)(dy, x, A, B, frozen.scale)
        if dx_wanted:
            dx = dy @ frozen.dense(dy.dtype)  # (N, in)
            dx = (_add(dx, dh, A.T) if narrow else _add_reference(dx, dh, A, 1.0)).view(shape)  # (..., in)
        return dx, dbias, dA, dB, None


# ----------------------------------------------------------------------------
# 4. entry


def frozen_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose weight is not trained, and the LoRA update beside it.

        y = x W^T + bias + scale (x A^T) B^T

    x        (..., in) bfloat16, float16 or float32; carries a gradient
    weight   (out, in) tensor of x's dtype, or an NF4Tensor or Int8Tensor of that shape
    bias     (out,) x's dtype, or None; carries a gradient
    A, B     (R, in), (out, R) float32, or None, both; carry gradients
    backend  "torch" | "triton" | None = triton on a GPU, else torch
    returns  (..., out) in x's dtype; differentiable in x, bias, A and B

    Packed weights: up to SMALL rows on a GPU they are decoded inside the matmul, otherwise unpacked into x's dtype for
    this matmul and dropped after it; the bits of W are the same.

    Raises ValueError when A and B do not fit x and the weight, or are not fp32, or tensors are on several devices.

    Source: LoRA, arXiv 2106.09685, equation 3; QLoRA, arXiv 2305.14314. Splitting fp32 in bf16 parts: arXiv 1904.06376.
    Elsewhere: Unsloth fast_lora.py rounds A and B to bf16.
    """
    if (A is None) != (B is None):
        raise ValueError("got one of A and B, want both or neither")
    if A is not None:
        wanted = ((len(A), x.shape[-1]), (weight.shape[0], len(A)))
        if (tuple(A.shape), tuple(B.shape)) != wanted or not A.dtype == B.dtype == torch.float32:
            raise ValueError(
                f"got A {tuple(A.shape)} {A.dtype} and B {tuple(B.shape)} {B.dtype} beside a weight "
                f"{tuple(weight.shape)}, want (R, in) and (out, R) in float32; cast with .float()"
            )
        same_device(x=x, A=A, B=B)
    return FrozenLinear.apply(x, bias, A, B, _Frozen(weight, scale, choose(backend, x)))  # (..., out)
