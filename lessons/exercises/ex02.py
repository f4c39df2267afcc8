"""Exercise 2. Attention as it is defined: one query, one head at a time, in plain loops.

Make this pass:  python -m pytest lessons/exercises/test_ex02.py        (about 12 lines)

Hints: query t reads keys first .. t, and head h reads key/value head h // (H // K). The order is: q . k, times scale,
cap, softmax over the keys that are left, times v. Keys you never look at need no mask.
"""

from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
    """Causal attention of one row.

    q        (T, H, D);  k, v  (T, K, D), with H a multiple of K
    window   keys a query keeps, its own included; 0: all before it and its own
    softcap  cap * tanh(score / cap); 0: none
    returns  (T, H, D)
    """
    raise NotImplementedError("exercise 2: lessons/exercises/ex02.py")
