"""Exercise 8. Joining what the tiles found: the last step of a log-prob whose tiles were computed side by side.

Every tile i of a row has looked at its own share of the other tokens (the target is in none of them), and left

    m[i] = max z        s[i] = sum exp(z - m[i])                    a tile without any token leaves m = -inf, s = 0

Tiles were finished in any order, and no maximum was known before. Join them to the log-prob of the target, whose logit
is z_y, with all the digits it has: equation (3) of the lesson. Yours to decide: relative to which maximum the sums are
added, and what becomes of a row that has tiles without tokens, or (V = 1) no other token at all. Its logp is then 0.

Make this pass:  python -m pytest lessons/exercises/test_ex08.py        (about 5 lines)

Hint: look up what torch makes of -inf - -inf, exp(-inf), log(0) and logsigmoid(inf) before you write a case for each.
"""

from torch import Tensor


def join(z_y: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """z_y (N,), m (N, tiles), s (N, tiles), all fp32 -> logp (N,)."""
    raise NotImplementedError("exercise 8: lessons/exercises/ex08.py")
