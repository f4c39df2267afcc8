"""Exercise 16. Sort, multiply, put back: a layer of experts with one matmul for each expert that has rows.

    out[t] = sum over j of weights[t, j] * (experts[index[t, j]] @ x[t])

A loop over tokens would read an expert's matrix once for each token. A loop over experts reads it once, for all tokens
that meet it. Also return the load: how many rows each expert had.

Make this pass:  python -m pytest lessons/exercises/test_ex16.py        (about 12 lines)

Hints: number the pairs (t, j) as t * k + j; `argsort(stable=True)` of the flattened index makes an expert's pairs
neighbours. pair // k is the token. `index_add_` adds rows to the tokens that they came from. Use no experts[e] of an
expert without rows: the test counts.
"""

from torch import Tensor


def mixture(x: Tensor, experts, index: Tensor, weights: Tensor) -> tuple[Tensor, list[int]]:
    """x (T, C), experts: E matrices (F, C), index and weights (T, k) -> out (T, F), the load of each expert."""
    raise NotImplementedError("exercise 16: lessons/exercises/ex16.py")
