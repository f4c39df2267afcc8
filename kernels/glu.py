"""The gate of a gated MLP: an activation of one projection times the other, in one pass over memory.

    y = act(gate) * up          act(g) = g * sigmoid(v)                       (1)
    v = g                                         silu: SwiGLU (Llama, Qwen)  (2)
    v = 2 sqrt(2 / pi) (g + 0.044715 g^3)         gelu_tanh: GeGLU (Gemma)    (3)

(3) is the usual 0.5 g (1 + tanh(v / 2)), because 0.5 (1 + tanh(x)) = sigmoid(2 x). The sigmoid is the better side of
the identity: at g = -5.5 tanh rounds to -1 in fp32 and 1 + tanh has no digit left. And Triton has no tanh of its own.

The work is moving bytes: about 10 FLOPs a number, 2 a byte. As torch operations a token moves 10 F bytes of bf16
forward (activation: read, write; product: read, read, write) and 18 F backward, and keeps act(gate), 2 F, in between.
Bytes a token, bf16, which divided by the memory's bandwidth are the floor:

                  reads                    writes                together       Qwen3-0.6B, F = 3072
    forward       gate, up                 y                     6 F            18.4 KB
    backward      dy, gate, up             dgate, dup            10 F           30.7 KB

The file reads top to bottom:

    1. reference    plain torch, bit for bit what the model has always computed. Also the CPU backend.
    2. kernels      Triton. fp32 inside, one rounding at the end, where the reference rounds act(gate) as well.
    3. autograd     glues them together; saves gate and up, and computes the activation again.
    4. entry        glu: the name other files import.

Left out: the exact (erf) GELU and ReLU^2, which none of our families uses; the projections themselves (their matrix
products are cuBLAS's); gradients of gradients (the reference has them).

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_glu.py
Shapes: N rows (= all tokens), F width of the MLP.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.backend import FLOATS, choose, or_torch, rows, same_device, tl, triton

# 1024 numbers on 128 threads are 8 each: one load of 16 bytes in bf16. 16 such programs fill a multiprocessor's 2048
# threads, with 64 KB in flight, three times what hides the latency of an H100's memory.
BLOCK_F = 1024
ACTIVATIONS = ("silu", "gelu_tanh")

# ----------------------------------------------------------------------------
# 1. reference


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Equation (1) in torch: (..., F), (..., F) -> (..., F)."""
    act = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")  # (..., F)
    return act * up  # (..., F)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _sigmoids(g, GELU: tl.constexpr):
    """sigmoid(v), sigmoid(-v) and dv / dg of (2) or (3), for any finite g.

    exp sees only numbers below 0, so nothing overflows; and 1 - sigmoid(v) is never a subtraction.
    """
    v = g
    slope = tl.zeros_like(g) + 1.0
    if GELU:
        # |v| is 142 at g = 12: the sigmoid is 0 or 1 in fp32, and stays so. Without the clamp g^3 is inf from 1e13 on.
        c = tl.minimum(tl.maximum(g, -12.0), 12.0)
        v = 1.5957691216057308 * c * (1.0 + 0.044715 * c * c)  # 2 sqrt(2 / pi)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * c * c)
    e = tl.exp(-tl.abs(v))
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(v >= 0, near, far), tl.where(v >= 0, far, near), slope


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, stride_gate, stride_up, F, GELU: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """(1) for BLOCK_F numbers of one row."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * F passes 2^31 at 175k tokens of F = 12288
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # (BLOCK_F,)
    g = tl.load(gate_ptr + n * stride_gate + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)
    u = tl.load(up_ptr + n * stride_up + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)
    p, _, _ = _sigmoids(g, GELU)
    tl.store(y_ptr + n * F + f, (g * p * u).to(y_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dy, stride_gate, stride_up, F,
    GELU: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """With p = sigmoid(v) and q = sigmoid(-v) = 1 - p, whose derivative in v is p q:

    dup = dy g p
    dgate = dy up (p + g p q dv/dg)
    """
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)  # (BLOCK_F,)
    dy = tl.load(dy_ptr + n * stride_dy + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)
    g = tl.load(gate_ptr + n * stride_gate + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)
    u = tl.load(up_ptr + n * stride_up + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)
    p, q, slope = _sigmoids(g, GELU)
    dup = dy * (g * p)  # (BLOCK_F,)
    dgate = dy * u * (p + g * p * q * slope)  # (BLOCK_F,)
    tl.store(dup_ptr + n * F + f, dup.to(dup_ptr.dtype.element_ty), mask=f < F)
    tl.store(dgate_ptr + n * F + f, dgate.to(dgate_ptr.dtype.element_ty), mask=f < F)


# ----------------------------------------------------------------------------
# 3. autograd


class _GLU(torch.autograd.Function):
    """Saves gate and up, 4 F bytes a token in bf16, which the projections' outputs are anyway; nothing of its own."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)  # (..., F) contiguous, whatever gate is
        ctx.shape, ctx.gelu = gate.shape, activation == "gelu_tanh"
        gate, up = rows(gate), rows(up)  # (N, F), (N, F)
        ctx.save_for_backward(gate, up)
        N, F = gate.shape
        if N:  # a grid of 0 programs is an error
            # FMAs are off: their default changes between versions of Triton, and with it the bits
            _forward_kernel[(N, triton.cdiv(F, BLOCK_F))](
                gate, up, y, gate.stride(0), up.stride(0), F,
                GELU=ctx.gelu, BLOCK_F=BLOCK_F, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        N, F = gate.shape
        dy = rows(dy)  # (N, F)
        dgate = torch.empty(ctx.shape, dtype=gate.dtype, device=gate.device)  # (..., F)
        dup = torch.empty_like(dgate)  # (..., F)
        if N:
            _backward_kernel[(N, triton.cdiv(F, BLOCK_F))](
                dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), F,
                GELU=ctx.gelu, BLOCK_F=BLOCK_F, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        return dgate, dup, None


# ----------------------------------------------------------------------------
# 4. entry


def glu(gate: Tensor, up: Tensor, *, activation: str, backend: str | None = None) -> Tensor:
    """One projection, through an activation, opens and shuts the other.

        y = act(gate) * up

    gate, up    (..., F) bf16, fp16 or fp32 (torch: fp64 too), one shape and dtype, any strides; carry gradients
    activation  "silu" | "gelu_tanh"
    backend     "torch" | "triton" | None, which is Triton on a GPU and torch elsewhere
    returns     (..., F) dtype of gate, contiguous from Triton; differentiable in gate and up

    Every number is computed by itself: bits do not depend on the batch.

    Raises ValueError when shapes, dtypes or the activation do not fit.

    Source: GLU variants, arXiv:2002.05202; recomputing the activation in backward: Liger swiglu.py (in place; ours is
    not). Elsewhere: vLLM silu_and_mul; Unsloth fast_lora.py fuses it with the LoRA products.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"got activation {activation!r}, want one of {', '.join(ACTIVATIONS)}")
    if gate.shape[-1:].numel() == 0 or gate.ndim == 0 or gate.shape != up.shape:
        raise ValueError(f"got gate {tuple(gate.shape)} and up {tuple(up.shape)}, want one shape (..., F), F > 0")
    if gate.dtype != up.dtype or not gate.is_floating_point():
        raise ValueError(f"got gate {gate.dtype} and up {up.dtype}, want one float dtype; cast with .to(gate.dtype)")
    same_device(gate=gate, up=up)
    unfit = "" if gate.dtype in FLOATS else f"{gate.dtype} for Triton, want bf16, fp16 or fp32"
    chosen = or_torch(choose(backend, gate), backend, unfit)
    return glu_reference(gate, up, activation) if chosen == "torch" else _GLU.apply(gate, up, activation)  # (..., F)
