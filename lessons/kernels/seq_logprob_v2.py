"""Log-probability of the next token from hidden states, version 2: a slice of the vocabulary at a time.

Forward walks the slices with a running maximum m and a running sum s of exp(z - m), the online softmax:

    m' = max(m, max z)            s' = s exp(m - m') + sum exp(z - m')            logp = z_y - m - log s            (2)

and forgets every slice. Backward makes them again, for

    dz[v] = (1[v == y] - p[v]) dlogp            dhidden = dz @ weight            dweight = dz.T @ hidden            (3)

Products of 2 N V C operations: one forward; three backward, two with a frozen weight. Memory: N * WIDTH logits.

Two things are still wrong with it, and lesson 09 is about them: dz is formed as onehot - p, which loses the digits of
confident tokens, and with a frozen weight one of the three products is not needed.

Lesson: lessons/08_never_build_the_logits.md       Tests: tests/test_lesson_kernels_seq_logprob.py
Source: online softmax, arXiv:1805.02867; recomputing in backward, arXiv:2411.09009 (CCE).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDTH = 4096  # columns of a slice: 134 MB of fp32 logits at N = 8192


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> logp (N,), lse (N,), fp32: equation (2)."""
    m = torch.full(hidden.shape[:1], torch.finfo(torch.float32).min)  # (N,) not -inf: -inf + inf is nan
    s, z_y = torch.zeros_like(m), torch.zeros_like(m)  # (N,), (N,)
    for start in range(0, len(weight), WIDTH):
        z = hidden.float() @ weight[start : start + WIDTH].float().T  # (N, v)
        column = targets - start  # (N,)
        inside = (column >= 0) & (column < z.shape[1])  # (N,)
        found = z.gather(1, column.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)  # (N,)
        z_y = torch.where(inside, found, z_y)  # (N,)
        top = torch.maximum(m, z.amax(1))  # (N,)
        s = s * (m - top).exp() + (z - top[:, None]).exp().sum(1)  # (N,)
        m = top
    lse = m + s.log()  # (N,)
    return z_y - lse, lse


class _TokenLogprob(torch.autograd.Function):
    """Saves hidden, weight, targets and one float a row."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, run):
        logp, lse = run(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, lse)
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp):
        hidden, weight, targets, lse = ctx.saved_tensors
        dhidden = torch.zeros(hidden.shape)  # (N, C) fp32 until all slices are in
        dweight = torch.empty_like(weight)  # (V, C)
        for start in range(0, len(weight), WIDTH):
            w = weight[start : start + WIDTH].float()  # (v, C)
            p = (hidden.float() @ w.T - lse[:, None]).exp().to(hidden.dtype)  # (N, v) bf16 in, bf16 kept
            onehot = (torch.arange(start, start + len(w)) == targets[:, None]).to(p.dtype)  # (N, v)
            dz = ((onehot - p) * dlogp[:, None].to(p.dtype)).float()  # (N, v)
            dhidden += dz @ w  # (N, C)
            if ctx.needs_input_grad[1]:
                dweight[start : start + WIDTH] = dz.T @ hidden.float()  # (v, C)
        return dhidden.to(hidden.dtype), dweight if ctx.needs_input_grad[1] else None, None, None


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> logp (N,) float32; differentiable in hidden and weight."""
    return _TokenLogprob.apply(hidden, weight, targets, forward)
