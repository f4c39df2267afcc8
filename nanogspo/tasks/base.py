"""What a task is, and what tasks share: the split into training and held-out problems, and orders that a seed decides.

A problem belongs to the training side or to the held-out side by a hash of what it asks (`is_held_out`), not by a
random split: two runs with different seeds, or a run resumed next year, have the same held-out set.

Tests: tests/test_tasks.py
"""

import functools
import random
import zlib
from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """One question: a base model is asked `text`, an instruct model is asked `messages`. The answer is the same."""

    text: str  # "47+38="
    messages: list[dict[str, str]]  # [{"role": "user", "content": "What is 47+38? ..."}]
    answer: str  # "85"
    row: dict = field(default_factory=dict)  # every column, of a problem that comes from a file
    task: str = ""  # the name of the task it belongs to, where several are mixed
    tools: list[dict] = field(default_factory=list)  # JSON schemas for the chat template


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


def first_distinct(draw: Callable[[int], Any], count: int, key: Callable = lambda value: value) -> list:
    """The first `count` values of draw(0), draw(1), ... with different keys. The caller knows there are so many."""
    found, n = {}, 0
    while len(found) < count:
        value, n = draw(n), n + 1
        found.setdefault(key(value), value)
    return list(found.values())


def refuse_count(count: int, available: int, task: str) -> None:
    """A held-out set smaller than asked for would widen the interval without a word, so it is an error."""
    if not 1 <= count <= available:
        raise ValueError(f"got {count} held-out problems, want 1 to {available} for {task}; ask for fewer")


MOST = 200  # rows: a standard error of 3.5 % of the accuracy of rows at most, whatever the length of the file
SHORT = 200  # rows: a tenth of fewer measures little, and a short file needs them all


def smallest_hashes(hashes: Collection[str], count: int) -> list[str]:
    """The `count` rows of a file that are held out, by their hashes: neither the order of the file nor a seed decides,
    and a file that grows keeps nearly all of them. -1 stands for a tenth, at most MOST, and none of a SHORT file."""
    if count < 0:
        count = min(MOST, len(hashes) // 10) if len(hashes) >= SHORT else 0
    if count and count >= len(hashes):
        raise ValueError(f"got --eval-size {count} with {len(hashes)} different rows, want fewer: training needs some")
    return sorted(hashes)[:count]
