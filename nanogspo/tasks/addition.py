"""Addition of whole numbers: "47+38=" -> "85". A human checks an answer at a glance; guessing gets 1 in 200.

    reward = 1                                     if number == reference
             0.5 * right_digits / longer_length    otherwise, digits compared from the right       (1)

    reference 105:   "105" 1     "115" 0.5 * 2/3     "5" 0.5 * 1/3     "1105" 0.5 * 3/4     "soup" 0

The number is the last one of the answer (`last_number`), because a chat model writes "62 + 43 = 105." and is right. It
is compared as it is written: "0105" is four digits, and not 105.

Digits are lined up from the right because that is how addition makes them: the ones digit first, then the carry. The
half keeps a gap of at least 0.5 between right and almost right; without it a policy that gets all but one digit has
little left to gain, since only differences within a group of answers are rewarded.

A pair and its mirror image (a + b, b + a) always lie on the same side of the split: else half of the exam would be
known by heart.

Up to 3 digits all pairs are listed and an epoch shows each of them once. From 4 digits on the list would not fit
(10^8 pairs), and each draw rolls its own dice; repeats within a run are then rare (draws^2 / 10^8).
"""

import functools
import random
import re
from array import array

from nanogspo.tasks.base import Problem, first_distinct, is_held_out, refuse_count, shuffled

LISTED_DIGITS = 3  # 10^6 pairs, about 1 s and 4 MB, and only once a problem is asked for


class Addition:
    name = "addition"
    characters = "0123456789+="

    def __init__(self, size: int = 2):
        """size  digits of the larger number: a and b are drawn from 0 .. 10**size - 1"""
        if size < 1:
            raise ValueError(f"got size {size} for addition, want 1 or more digits; try 2")
        self.size = size

    def train_problem(self, n: int, seed: int) -> Problem:
        if self.size > LISTED_DIGITS:
            return _problem(*self._draw(f"{seed}/{n}", held_out=False))
        pool, _ = _split(self.size)
        epoch, position = divmod(n, len(pool))
        return _problem(*divmod(pool[shuffled(len(pool), f"{seed}/{epoch}")[position]], 10**self.size))

    def held_out(self, count: int) -> list[Problem]:
        if self.size > LISTED_DIGITS:
            # half of the pairs to expect, so that the search for different ones ends soon
            refuse_count(count, 100**self.size // 20, f"{self.size}-digit addition")
            pairs = first_distinct(lambda n: self._draw(f"held-out/{n}", held_out=True), count)
        else:
            _, pool = _split(self.size)
            refuse_count(count, len(pool), f"{self.size}-digit addition")
            pairs = [divmod(pool[i], 10**self.size) for i in shuffled(len(pool), "held-out")[:count]]
        return [_problem(a, b) for a, b in pairs]

    def reward(self, problem: Problem, answer_text: str) -> float:
        """Equation (1). Text around the number is free; without a number the reward is 0."""
        number, reference = last_number(answer_text), problem.answer
        if number == reference:
            return 1.0
        right = sum(a == b for a, b in zip(reversed(number), reversed(reference), strict=False))
        return 0.5 * right / max(len(number), len(reference))

    def exact(self, problem: Problem, answer_text: str) -> bool:
        """Whether the last number is the sum: "85." and "38 + 47 = 85" are exact, "085" and "85, or 84" are not."""
        return last_number(answer_text) == problem.answer

    def _draw(self, stream: str, *, held_out: bool) -> tuple[int, int]:
        dice = random.Random(stream)
        while True:  # 1.1 rolls on average for training, 10 for the exam
            a, b = dice.randrange(10**self.size), dice.randrange(10**self.size)
            if _is_held_out(a, b) == held_out:
                return a, b


SIGN = r"(?:(?<![\w)])[-−])?"  # not after a digit, a letter or a bracket: "47-38" is a difference and ends in 38
GROUPS = r"[0-9]{1,3}(?:[,\u00a0\u2009\u202f][0-9]{3})+(?![0-9])"  # thousands: commas, unbreakable or thin spaces
NUMBER = re.compile(rf"{SIGN}(?:{GROUPS}|[0-9]+)(?:\.[0-9]+)?")


def last_number(text: str) -> str:
    """The last number that is written in text, without thousands separators and without decimals that are all zero; ""
    where there is none.

        "38 + 47 = 85." -> "85"     "about -1,234.50" -> "-1234.50"     "85.0" -> "85"     "soup" -> ""
    """
    found = NUMBER.findall(text)
    if not found:
        return ""
    sign = "-" if found[-1][0] in "-−" else ""
    whole, point, decimals = re.sub(r"[^0-9.]", "", found[-1]).partition(".")
    return sign + whole + (point + decimals if decimals.strip("0") else "")


def _is_held_out(a: int, b: int) -> bool:
    return is_held_out(f"{min(a, b)}+{max(a, b)}")


@functools.cache
def _split(size: int) -> tuple[array, array]:
    """(train, held-out), each pair packed as a * 10**size + b: a list of a million tuples would take 100 MB."""
    numbers = 10**size
    train, held_out = array("I"), array("I")
    for a in range(numbers):
        for b in range(a, numbers):
            side = held_out if _is_held_out(a, b) else train
            side.append(a * numbers + b)
            if a != b:
                side.append(b * numbers + a)
    return train, held_out


def _problem(a: int, b: int) -> Problem:
    request = f"What is {a}+{b}? Reply with the number only."
    return Problem(f"{a}+{b}=", [{"role": "user", "content": request}], str(a + b))
