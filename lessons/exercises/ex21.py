"""Exercise 21. A loss of an unknown system: what is inside?

You are given a function

    loss(logp, old_logp, advantages, lengths) -> a number
        logp, old_logp   (M,) float64, of every scored token; the answers stand end to end
        advantages       (N,) float64, one for each answer
        lengths          (N,) int64

and nothing of its source. It is the clipped loss of lesson 12 for a ratio per token or per answer, averaged over
answers (mean of means) or over tokens, with a clip of unknown width. Say which, by calling it.

Make this pass:  python -m pytest lessons/exercises/test_ex21.py        (about 10 lines)

Hints: on-policy the ratios are 1, whatever the level. The loss is then minus an average of advantages, and with answers
of unequal length the two averages differ. For the level: move one token up and another token of the same answer down by
the same amount. The answer's mean log-ratio stays 0. A negative advantage and one token far up is never clipped.
"""

from collections.abc import Callable


def look_inside(loss: Callable) -> tuple[str, str]:
    """("token" or "answer" for the ratio, "tokens" or "answers" for the average)."""
    raise NotImplementedError("exercise 21: lessons/exercises/ex21.py")
