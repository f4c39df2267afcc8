"""Exercise 14. What of a reward is for free: the best answer that has not seen the question.

    mean(answer) = mean over rows of reward(answer, row)      rows on which the reward abstains (None) are not counted
    answer       = "", then again and again with the piece appended that raises the mean most

The search ends when no piece raises the mean, or after `most` pieces. A value is a number, None, or a dict of numbers
that counts with its sum. If the reward abstains on all rows, the mean is 0.

Make this pass:  python -m pytest lessons/exercises/test_ex14.py        (about 12 lines)

Hints: one answer for all rows, so the row must not enter the choice. What does an abstention counted as 0 do to the
search, and what does a piece that changes nothing do to the length of the answer?
"""

from collections.abc import Callable, Sequence


def blind_answer(reward: Callable, rows: list[dict], pieces: Sequence[str], most: int) -> tuple[str, float]:
    """reward(answer, row), the rows, the texts an answer is made of, how many at most -> (answer, its mean)."""
    raise NotImplementedError("exercise 14: lessons/exercises/ex14.py")
