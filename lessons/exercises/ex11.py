"""Exercise 11. Two adapters of one layer as one: what both add to W, in a single A, B and scale.

    scale * B A  =  scale1 * B1 A1  +  scale2 * B2 A2

Make this pass:  python -m pytest lessons/exercises/test_ex11.py        (about 4 lines)

The ranks may differ. Do not form the (out, in) products: for Qwen3-0.6B they are 48 times as large as the adapters.
Hint: write B1 A1 and B2 A2 as sums over their inner index. What does that index have to run over in B A?
"""

from torch import Tensor

Adapter = tuple[Tensor, Tensor, float]  # A (r, in) float32, B (out, r) float32, scale = alpha / r


def stack(first: Adapter, second: Adapter) -> Adapter:
    """One adapter of rank r1 + r2. Its scale is 1.0: the two scales have to go somewhere else."""
    raise NotImplementedError("exercise 11: lessons/exercises/ex11.py")
