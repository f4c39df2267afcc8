"""Log-probability of one chosen token per row of logits, version 1: a whole row at once.

    logp[n] = logits[n, targets[n]] - logsumexp_v logits[n, v]                                              (1)

    1. reference    plain torch: equation (1). Also the CPU backend; all versions share it.
    2. kernels      Triton: one program per row, and the program holds its whole row. Limit: V <= 16384, see MAX_V.
    3. autograd     saves logits, targets and one float a row, never the softmax.
    4. entry        token_logp

Bytes, forward: N V logits read, once; 4 N written. Nothing else of size (N, V) exists, which is the point: plain torch
in bf16 writes an fp32 copy of the logits and reads it back, more than once.

Lesson: lessons/06_your_first_triton_kernel.md       Tests: tests/test_lesson_kernels_token_logp.py
Shapes: N rows (= tokens), V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import choose, tl, triton

# A multiprocessor has 65,536 registers: 128 for each of 512 threads. 16384 fp32 numbers take 32 of them, and as many
# again for the exponentials. V = 151,936, rounded up, would ask for 512: what does not fit is spilled to slow memory.
MAX_V = 16384
WARPS = 16  # 512 threads

# ----------------------------------------------------------------------------
# 1. reference


def reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation (1) in torch: (N, V), (N,) -> (N,) float32 (float64 for float64)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()  # 8 bits of mantissa cannot sum 150k terms
    chosen = logits.gather(1, targets[:, None]).squeeze(1)  # (N,)
    return chosen - logits.logsumexp(dim=1)  # (N,)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _forward_kernel(logits_ptr, targets_ptr, logp_ptr, lse_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """Program n computes logp[n], and lse[n] for backward. The maximum is taken out so that exp cannot overflow."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2**31 at n = 14k, V = 152k
    v = tl.arange(0, BLOCK_V)  # (BLOCK_V,) a power of two, so some of it may lie behind the row's end
    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
    m = tl.max(x, axis=0)
    lse = m + tl.log(tl.sum(tl.exp(x - m), axis=0))  # exp(-inf) = 0: what is behind the end does not count
    chosen = tl.load(logits_ptr + n * stride_n + tl.load(targets_ptr + n)).to(tl.float32)
    tl.store(logp_ptr + n, chosen - lse)
    tl.store(lse_ptr + n, lse)


@triton.jit
def _backward_kernel(dlogits_ptr, dlogp_ptr, logits_ptr, targets_ptr, lse_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """dlogits[n, v] = dlogp[n] (1[v == target] - softmax[v]),  softmax[v] = exp(logits[n, v] - lse[n])."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
    softmax = tl.exp(x - tl.load(lse_ptr + n))  # (BLOCK_V,)
    hit = (v == tl.load(targets_ptr + n)).to(tl.float32)  # (BLOCK_V,)
    tl.store(dlogits_ptr + n * V + v, tl.load(dlogp_ptr + n) * (hit - softmax), mask=v < V)


# ----------------------------------------------------------------------------
# 3. autograd


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        N, V = logits.shape
        logp, lse = torch.empty((2, N), dtype=torch.float32, device=logits.device)  # (N,), (N,)
        block = triton.next_power_of_2(V)
        if N:
            _forward_kernel[(N,)](logits, targets, logp, lse, logits.stride(0), V, BLOCK_V=block, num_warps=WARPS)
        ctx.save_for_backward(logits, targets, lse)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp):
        logits, targets, lse = ctx.saved_tensors
        N, V = logits.shape
        dlogits = torch.empty((N, V), dtype=logits.dtype, device=logits.device)  # (N, V)
        block = triton.next_power_of_2(V)
        if N:
            _backward_kernel[(N,)](
                dlogits, dlogp.contiguous(), logits, targets, lse, logits.stride(0), V, BLOCK_V=block, num_warps=WARPS
            )
        return dlogits, None


# ----------------------------------------------------------------------------
# 4. entry


def token_logp(logits: Tensor, targets: Tensor, *, backend: str | None = None) -> Tensor:
    """Log-probability that each row of logits gives to its target. Equation (1).

    logits   (N, V) bf16, fp16 or fp32, contiguous along V; V at most 16384 for Triton; carries a gradient
    targets  (N,)   int64 in [0, V)
    backend  None | "torch" | "triton", as kernels/backend.py says
    returns  (N,)   float32; differentiable in logits

    Raises ValueError when shapes, strides or targets do not fit.
    """
    check(logits, targets)
    if choose(backend, logits) == "torch":
        return reference(logits, targets)
    if logits.shape[1] > MAX_V:
        raise ValueError(f"got V = {logits.shape[1]}, want at most {MAX_V}: a row has to fit in registers; take v2")
    return _TokenLogp.apply(logits, targets)


def check(logits: Tensor, targets: Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"got logits and targets of shapes {shapes}, want (N, V) and (N,); check the reshape")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"got logits with strides {logits.stride()}, want 1 along V; call .contiguous() first")
    if len(targets) and not (0 <= int(targets.min()) and int(targets.max()) < logits.shape[1]):
        span = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"got targets from {span}, want 0 <= target < {logits.shape[1]}; wrong tokenizer?")
