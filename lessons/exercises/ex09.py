"""Exercise 9. A differentiable entropy bonus at the price of two matmuls, when its weight is known in advance.

At the first update of a rollout the ratio is 1, so what each token's logp and entropy will be multiplied with, c and e,
is known *before* forward. Then one weighted sum over weight holds both gradients:

    direction[n] = d (c[n] logp[n] + e[n] entropy[n]) / d hidden[n] = dz[n] @ weight

    dz[v] = -p[v] (c + e (log p[v] + entropy))                                     v != y
    dz[y] = c (1 - p[y]) - e p[y] (logp + entropy)

Make this pass:  python -m pytest lessons/exercises/test_ex09.py        (about 8 lines)

The tests have confident tokens, 1 - p[y] = 1e-12, and want three digits of each row, where log_softmax in fp32 gives a
logp of 0. Yours to decide: how logp is computed, how 1 - p[y] and the p[v] of the others follow from it, and of which
parts the entropy is summed.

Hint: lesson 08, equation (3).
"""

from torch import Tensor


def direction(hidden: Tensor, weight: Tensor, targets: Tensor, c: Tensor, e: Tensor) -> Tensor:
    """hidden (N, C), weight (V, C), both fp32, targets (N,), c (N,), e (N,) -> (N, C), without autograd."""
    raise NotImplementedError("exercise 9: lessons/exercises/ex09.py")
