"""Exercise 08. Where do the 16 numbers of NF4 come from? Make them, for any number of bits.

Trained weights are close to normal. A code of b bits has 2^b values; each should stand for an equally likely range, so
they are quantiles of the normal distribution. Three wishes bend that a little: 0 must be exact, -1 and 1 must be exact,
and there is no quantile at probability 1, which is infinite. QLoRA does it like this:

    p_last = 1 - (1 / (2 (2^b - 1)) + 1 / (2 2^b)) / 2            a probability just below 1: 0.9677 for 4 bits
    right  = quantile(p) for p = p_last down to 1/2 in 2^(b-1) equal steps,       without the last, which is 0
    left   = -quantile(p) for p = p_last down to 1/2 in 2^(b-1) - 1 equal steps,  without the last, which is 0
    values = left, 0, right, sorted, divided by the largest

One step less on the left: 7 + 1 + 8 = 16 values.

Make this pass:  python -m pytest lessons/exercises/test_ex08.py        (about 7 lines)

Hints: torch.special.ndtri is the quantile function; torch.linspace(a, b, steps + 1) has `steps` steps; work in float64.

Source: QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from torch import Tensor


def normal_float(bits: int = 4) -> Tensor:
    """(2^bits,) float64, rising from -1 to 1."""
    raise NotImplementedError("exercise 08: lessons/exercises/ex08.py")
