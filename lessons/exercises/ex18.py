"""Exercise 18. How many answers does rounding alone clip?

No weight has moved. Each of an answer's L tokens has a log-ratio of normal noise, independent, with mean 0 and standard
deviation sigma. GSPO's log(ratio) is their mean: normal, with standard deviation sigma / sqrt(L).

    outside(0.06, 64, 3e-4, 4e-4)  = 0.96        bf16 scored in another batch shape, short answers
    outside(0.003, 64, 3e-4, 4e-4) = 0.36
    outside(0.001, 64, 3e-4, 4e-4) = 0.01

The second question turns it round: how long do answers have to be for at most `share` of them to leave the range?

Make this pass:  python -m pytest lessons/exercises/test_ex18.py        (about 8 lines)

Hints: the ratio is exp of the mean, so the range is log(1 - low) to log(1 + high). math.erf gives the normal
distribution: P(x < z deviations) = (1 + erf(z / sqrt(2))) / 2. Doubling finds a length that is enough, halving the
least.
"""


def outside(sigma: float, length: int, low: float, high: float) -> float:
    """The probability that an unmoved answer's ratio is below 1 - low or above 1 + high."""
    raise NotImplementedError("exercise 18: lessons/exercises/ex18.py")


def length_needed(sigma: float, low: float, high: float, share: float) -> int:
    """The smallest length at which at most `share` of the answers leave the range."""
    raise NotImplementedError("exercise 18: lessons/exercises/ex18.py")
