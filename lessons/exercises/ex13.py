"""Exercise 13. Attention of one prompt and its answers, in pieces, so that the prompt's keys are taken once.

    packed row   | prompt | answer | answer | ...        segments of these lengths, one behind the other
    a query sees the keys of its own segment up to itself, and if it is an answer's, all keys of the prompt

    lse = log(exp lse_a + exp lse_b)        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

`piece` below gives out and lse of one piece. Write what calls it, and joins what it gives. No mask over the whole row,
and no copy of the prompt: the test counts the scores that are computed. Gradients come from autograd, and the prompt's
are then sums over its answers without a line of yours.

Make this pass:  python -m pytest lessons/exercises/test_ex13.py        (about 10 lines)

Yours to decide: which pieces there are, and what a row without answers needs. x.split(lengths) cuts a row into its
segments, and torch.cat joins what became of them.

Hint: torch.logaddexp(a, b) is log(exp a + exp b) for scores of any size; exp by itself is inf from 89 on in fp32, and
710 in float64.

Source: lessons/13_packing.md, equation (3); Hydragen, arXiv:2402.05099.
"""

import torch
from torch import Tensor


def piece(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Queries (T, H, D) over keys and values (J, H, D), all of them or (T = J) up to their own: out (T, H, D), lse
    (T, H)."""
    scores = torch.einsum("thd,jhd->thj", q, k)  # (T, H, J)
    if causal:
        hidden = torch.ones(len(q), len(k)).triu(1).bool()[:, None]  # (T, 1, J)
        scores = scores.masked_fill(hidden, -torch.inf)  # (T, H, J)
    return torch.einsum("thj,jhd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def group_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """q, k, v (S, H, D); lengths of the prompt and of its answers, each 1 or more, S in all -> out (S, H, D)."""
    raise NotImplementedError("exercise 13: lessons/exercises/ex13.py")
