"""Exercise 17. The delta rule for a chunk of tokens at once.

A loop over tokens, without gates, for one head:

    S <- S + k[t] (beta[t] (v[t] - k[t] S))^T          out[t] = q[t] S

Within the chunk the corrections u[t] = beta[t] (v[t] - k[t] S) depend on each other: u[t] needs what the tokens j < t
have written, (k[t] . k[j]) u[j] each. That is a triangular system. Solve it, and neither Python nor the GPU has a loop.

Make this pass:  python -m pytest lessons/exercises/test_ex17.py        (about 8 lines)

Hints: (I + A) u = beta (v - k S), where A has beta[t] (k[t] . k[j]) below its diagonal. torch.linalg.solve_triangular
takes upper=False and unitriangular=True. A query sees its own token's correction, too.
"""

from torch import Tensor


def delta_chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """q, k (T, dk), v (T, dv), beta (T,), S (dk, dv) before the chunk -> out (T, dv), and S behind it."""
    raise NotImplementedError("exercise 17: lessons/exercises/ex17.py")
