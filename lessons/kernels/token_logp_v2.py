"""Log-probability of one chosen token per row of logits, version 2: the row in tiles, walked twice.

    m       = max_v logits[n, v]                                    first walk
    lse     = m + log sum_v exp(logits[n, v] - m)                   second walk
    logp[n] = logits[n, targets[n]] - lse                                                                   (1)

Any V, with the registers of one tile. The price: every logit is read twice. A row of 151,936 in bf16 is 304 KB, more
than the 256 KB of fast memory beside each multiprocessor, so the second walk reads from L2 or beyond.

Sections as in version 1, which has the reference and the checks.
Lesson: lessons/06_your_first_triton_kernel.md       Tests: tests/test_lesson_kernels_token_logp.py
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import choose, tl, triton
from lessons.kernels.token_logp_v1 import check, reference

BLOCK_V = 4096  # 256 threads with 16 logits each: two 16-byte loads in bf16, the widest a thread can ask for
WARPS = 8

# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _forward_kernel(logits_ptr, targets_ptr, logp_ptr, lse_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """Two walks: the maximum, then the sum. Each thread keeps its own of both; they are combined once, at the end."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2**31 at n = 14k, V = 152k
    row = logits_ptr + n * stride_n
    top = tl.full((BLOCK_V,), -float("inf"), tl.float32)  # (BLOCK_V,)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        top = tl.maximum(top, tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32))  # (BLOCK_V,)
    m = tl.max(top, axis=0)
    total = tl.zeros((BLOCK_V,), tl.float32)  # (BLOCK_V,)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        total += tl.exp(tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32) - m)  # (BLOCK_V,)
    lse = m + tl.log(tl.sum(total, axis=0))
    chosen = tl.load(row + tl.load(targets_ptr + n)).to(tl.float32)
    tl.store(logp_ptr + n, chosen - lse)
    tl.store(lse_ptr + n, lse)


@triton.jit
def _backward_kernel(dlogits_ptr, dlogp_ptr, logits_ptr, targets_ptr, lse_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """dlogits[n, v] = dlogp[n] (1[v == target] - exp(logits[n, v] - lse[n])), one program per row."""
    n = tl.program_id(0).to(tl.int64)
    lse, dlogp, target = tl.load(lse_ptr + n), tl.load(dlogp_ptr + n), tl.load(targets_ptr + n)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
        hit = (v == target).to(tl.float32)  # (BLOCK_V,)
        tl.store(dlogits_ptr + n * V + v, dlogp * (hit - tl.exp(x - lse)), mask=v < V)


# ----------------------------------------------------------------------------
# 3. autograd


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        N, V = logits.shape
        logp, lse = torch.empty((2, N), dtype=torch.float32, device=logits.device)  # (N,), (N,)
        if N:
            _forward_kernel[(N,)](logits, targets, logp, lse, logits.stride(0), V, BLOCK_V=BLOCK_V, num_warps=WARPS)
        ctx.save_for_backward(logits, targets, lse)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp):
        logits, targets, lse = ctx.saved_tensors
        N, V = logits.shape
        dlogits = torch.empty((N, V), dtype=logits.dtype, device=logits.device)  # (N, V)
        if N:
            _backward_kernel[(N,)](
                dlogits, dlogp.contiguous(), logits, targets, lse, logits.stride(0), V, BLOCK_V=BLOCK_V, num_warps=WARPS
            )
        return dlogits, None


# ----------------------------------------------------------------------------
# 4. entry


def token_logp(logits: Tensor, targets: Tensor, *, backend: str | None = None) -> Tensor:
    """As in version 1, for any V."""
    check(logits, targets)
    if choose(backend, logits) == "torch":
        return reference(logits, targets)
    return _TokenLogp.apply(logits, targets)
