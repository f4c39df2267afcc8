"""Log-probability of the next token from hidden states, version 1: write down the formula.

    logits = hidden @ weight.T            logp[n] = logits[n, y] - logsumexp_v logits[n, v]                     (1)

Autograd does the rest. For N = 8192, V = 151,936 each matrix is 5 GB in fp32, and backward holds three of them: the
log-softmax, its gradient and the logits' gradient. The model itself is 1.2 GB.

Lesson: lessons/08_never_build_the_logits.md       Tests: tests/test_lesson_kernels_seq_logprob.py
Shapes: N rows, C model width, V vocabulary.
"""

import torch
from torch import Tensor


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> logp (N,) float32; differentiable in hidden and weight."""
    logits = hidden.float() @ weight.float().T  # (N, V)
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)  # (N,)
