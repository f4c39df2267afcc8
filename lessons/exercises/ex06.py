"""Exercise 6. The entropy of each row of logits, in one walk over the row: your own Triton kernel.

    p = softmax(logits[n])          entropy[n] = -sum_v p[v] log p[v]

Make this pass:  python -m pytest lessons/exercises/test_ex06.py        (about 10 lines)

With m the maximum, s = sum exp(x - m) as in the lesson, and one more running sum, a = sum exp(x - m) (x - m):

    log p[v] = (x[v] - m) - log s           so          entropy = log s - a / s

Yours to decide: what becomes of a when the maximum rises from m to m_new (write x - m_new as (x - m) + (m - m_new)), in
which order a and s are updated, what the sums start from, and what a tile's masked lanes add to a.

Hint: lessons/kernels/token_logp_v3.py::_forward_kernel is the walk. 0 * -inf is nan.
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton


@triton.jit
def _entropy_kernel(logits_ptr, entropy_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    """Which row, m, s and a, the walk, one store."""


def row_entropy(logits: Tensor) -> Tensor:
    """(N, V) finite logits, bf16, fp16 or fp32, contiguous along V -> (N,) float32."""
    raise NotImplementedError("exercise 6: lessons/exercises/ex06.py; delete this line when the kernel is written")
    N, V = logits.shape
    entropy = torch.full((N,), float("nan"), device=logits.device)  # (N,) what the kernel forgets stays nan
    _entropy_kernel[(N,)](logits, entropy, logits.stride(0), V, BLOCK_V=1024)
    return entropy
