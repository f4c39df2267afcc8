"""Exercise 2. Attention as it is defined: one query, one head at a time, in plain loops, RoPE included.

Equations (2) to (7) of the lesson, from projected q, k and v to the output. Yours to decide: which of the three are
turned, which two channels turn together and which way, where the cap goes, and which keys are left to query t.

Make this pass:  python -m pytest lessons/exercises/test_ex02.py        (about 15 lines)

Hint: a key that is never looked at needs no mask.
"""

from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Causal attention of one row, whose tokens have the positions 0 .. T - 1.

    q        (T, H, D);  k, v  (T, K, D), with H a multiple of K; before RoPE
    f        (D / 2,) by how much each pair turns from one position to the next
    window   keys a query keeps, its own included; 0: all before it and its own
    softcap  cap * tanh(score / cap); 0: none
    returns  (T, H, D)
    """
    raise NotImplementedError("exercise 2: lessons/exercises/ex02.py")
