"""What a task is, and what tasks share: the split into training and held-out problems, and orders that a seed decides.

A problem belongs to the training side or to the held-out side by a hash of what it asks (`is_held_out`), not by a
random split: two runs with different seeds, or a run resumed next year, have the same held-out set.

Tests: tests/test_tasks.py
"""

import functools
import random
import zlib
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Problem:
    """One question: a base model is asked `text`, an instruct model is asked `messages`. The answer is the same."""

    text: str  # "47+38="
    messages: list[dict[str, str]]  # [{"role": "user", "content": "What is 47+38? ..."}]
    answer: str  # "85"
    row: dict = field(default_factory=dict, hash=False, compare=False)  # own columns


class Task(Protocol):
    """What train.py asks of a task. Nothing inherits from this: it is the list of members, for readers."""

    name: str
    characters: str  # every character of text and answer: the alphabet of the tiny model's tokenizer

    def train_problem(self, n: int, seed: int) -> Problem: ...

    def held_out(self, count: int) -> list[Problem]: ...

    def reward(self, problem: Problem, answer_text: str) -> float: ...

    def exact(self, problem: Problem, answer_text: str) -> bool: ...


def is_held_out(key: str) -> bool:
    """About one key in ten, the same ones in every process: Python's own hash() of a string is salted anew in each."""
    return zlib.crc32(key.encode()) % 10 == 0


@functools.lru_cache(maxsize=4)  # the epoch being read, and the one after it while a rollout straddles the boundary
def shuffled(size: int, stream: str) -> array:
    """The numbers 0 .. size-1 in an order that only `stream` decides. 9,000 take 5 ms, 900,000 half a second."""
    order = array("I", range(size))
    random.Random(stream).shuffle(order)  # a str seed goes through SHA-512: neighbouring streams share nothing
    return order


def first_distinct(draw: Callable[[int], Hashable], count: int) -> list:
    """The first `count` different values of draw(0), draw(1), ... The caller knows that there are so many."""
    found, n = {}, 0
    while len(found) < count:
        found[draw(n)] = None
        n += 1
    return list(found)


def refuse_count(count: int, available: int, task: str) -> None:
    """A held-out set smaller than asked for would widen the interval without a word, so it is an error."""
    if not 1 <= count <= available:
        raise ValueError(f"got {count} held-out problems, want 1 to {available} for {task}; ask for fewer")
