"""Log-probability of one chosen token per row of logits, version 3: the row in tiles, walked once.

A running maximum m and a running sum s of exp(x - m). When a tile raises the maximum, the sum so far is rescaled:

    m_new = max(m, max x)            s_new = s exp(m - m_new) + sum exp(x - m_new)                          (2)

Every logit is read once, whatever V is: 2 N V bytes forward in bf16, and 4 N V backward (read, written). At 3.0 TB/s
and N = 8192, V = 151,936 that is 0.83 ms and 1.66 ms; arithmetic is free beside it. (2) is the online softmax; flash
attention is the same two lines with a matrix product behind them.

Backward gets a program for every tile of every row: also a single row keeps a whole GPU busy.

Sections as in version 1, which has the reference and the checks.
Lesson: lessons/06_your_first_triton_kernel.md       Tests: tests/test_lesson_kernels_token_logp.py
Source: online softmax, arXiv:1805.02867.
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
    """One walk, equation (2)."""
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2**31 at n = 14k, V = 152k
    row = logits_ptr + n * stride_n
    m = -3.4028234663852886e38  # the lowest fp32 number, not -inf: after a tile of only -inf, -inf + inf would be nan
    s = 0.0  # with a plain 0 the loop would carry an integer, and the compiler refuses to change its type
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), axis=0)
        m = m_new
    lse = m + tl.log(s)
    chosen = tl.load(row + tl.load(targets_ptr + n)).to(tl.float32)
    tl.store(logp_ptr + n, chosen - lse)
    tl.store(lse_ptr + n, lse)


@triton.jit
def _backward_kernel(dlogits_ptr, dlogp_ptr, logits_ptr, targets_ptr, lse_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """dlogits[n, v] = dlogp[n] (1[v == target] - exp(logits[n, v] - lse[n])), one program per tile."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
    hit = (v == tl.load(targets_ptr + n)).to(tl.float32)  # (BLOCK_V,)
    dx = tl.load(dlogp_ptr + n) * (hit - tl.exp(x - tl.load(lse_ptr + n)))  # (BLOCK_V,)
    tl.store(dlogits_ptr + n * V + v, dx, mask=v < V)


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
        grid = (N, triton.cdiv(V, BLOCK_V))
        if N:
            _backward_kernel[grid](
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
