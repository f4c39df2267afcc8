"""Exercise 10. Where do the 16 numbers of NF4 come from? Make them, for any number of bits.

Trained weights are close to normal. A code of b bits has 2^b values; each should stand for an equally likely range, so
they are quantiles of the normal distribution at evenly spaced probabilities. Three facts bend that a little. -1, 0 and
1 must be exact. With 0 among them, 2^b values cannot be symmetric: the positive side gets one value more than the
negative. And the quantile at probability 1 is infinite, so the probabilities end just below it, for 4 bits at

    p_last = 1 - (1 / 30 + 1 / 32) / 2 = 0.9677        30 = 2 * 15, 32 = 2 * 16

On each side they go from 1/2, whose quantile is 0, to p_last in equal steps. Yours to decide: how many steps each side
takes, how 0 comes in once and not three times, what all is divided by, and what 15 and 16 are for b bits.

Make this pass:  python -m pytest lessons/exercises/test_ex10.py        (about 7 lines)

Hint: torch.special.ndtri is the quantile function; work in float64.

Source: QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from torch import Tensor


def normal_float(bits: int = 4) -> Tensor:
    """(2^bits,) float64, rising from -1 to 1."""
    raise NotImplementedError("exercise 10: lessons/exercises/ex10.py")
