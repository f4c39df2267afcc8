"""Log-probability of the next token from hidden states, version 3: the loop of version 2 inside one Triton program.

A program owns BLOCK_N rows and walks the whole vocabulary: a tile of logits is a matrix product in its registers, is
folded into m and s, and is gone. Nothing of size V is ever written, not even a slice: 8 bytes a row leave the chip.

Why it is not the last version: N / BLOCK_N programs must feed the whole GPU (64 for N = 4096, half of an H100), and
each reads all of weight, so weight comes from memory or cache N / BLOCK_N times. kernels/seq_logprob.py gives each tile
a program of its own and adds up what they found afterwards. Backward is version 2's.

Lesson: lessons/08_never_build_the_logits.md       Tests: tests/test_lesson_kernels_seq_logprob.py
"""

import torch
from torch import Tensor

from kernels.backend import choose, tl, triton
from lessons.kernels.seq_logprob_v2 import _TokenLogprob

# 64 x 128 fp32 sums: 64 registers in each of 4 x 32 threads. Two stages of (64 + 128) x 64 operands in bf16 are 49 KB.
BLOCK_N, BLOCK_V, BLOCK_C = 64, 128, 64


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, targets_ptr, logp_ptr, lse_ptr, N, V, C,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Equation (2) of version 2 for BLOCK_N rows."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # int64: V * C passes 2**31
    y = tl.load(targets_ptr + n, mask=n < N, other=-1)  # (BLOCK_N,)
    m = tl.full((BLOCK_N,), -3.0e38, tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    z_y = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            # both operands are masked: beyond a row stands the next one, and 0 * nan = nan
            h_mask = (n[:, None] < N) & (c[None, :] < C)
            h = tl.load(hidden_ptr + n[:, None] * C + c[None, :], mask=h_mask, other=0.0)  # (BLOCK_N, BLOCK_C)
            w_mask = (v[None, :] < V) & (c[:, None] < C)
            w_ptr = weight_ptr + v[None, :].to(tl.int64) * C + c[:, None]
            w = tl.load(w_ptr, mask=w_mask, other=0.0)  # (BLOCK_C, BLOCK_V)
            z = tl.dot(h, w, z, input_precision="ieee")  # (BLOCK_N, BLOCK_V)
        z_y += tl.sum(tl.where(v[None, :] == y[:, None], z, 0.0), axis=1)  # (BLOCK_N,) in one tile only
        z = tl.where(v[None, :] < V, z, -float("inf"))  # exp makes it 0
        top = tl.maximum(m, tl.max(z, axis=1))  # (BLOCK_N,)
        s = s * tl.exp(m - top) + tl.sum(tl.exp(z - top[:, None]), axis=1)  # (BLOCK_N,)
        m = top
    lse = m + tl.log(s)
    tl.store(logp_ptr + n, z_y - lse, mask=n < N)
    tl.store(lse_ptr + n, lse, mask=n < N)


def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    choose("triton", hidden)  # says what is missing where Triton cannot run
    N, C = hidden.shape
    logp, lse = torch.empty((2, N), dtype=torch.float32, device=hidden.device)  # (N,), (N,)
    _forward_kernel[(triton.cdiv(N, BLOCK_N),)](
        hidden.contiguous(), weight.contiguous(), targets, logp, lse, N, len(weight), C,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_C=BLOCK_C, num_warps=4, num_stages=2,
    )  # fmt: skip
    return logp, lse


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> logp (N,) float32; differentiable in hidden and weight."""
    return _TokenLogprob.apply(hidden, weight, targets, forward)
