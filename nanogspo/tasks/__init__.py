"""Where problems and rewards come from.

    task    = get_task("addition")
    problem = task.train_problem(n, seed)      the n-th draw, a pure function of (n, seed): a data cursor is one int
    score   = task.reward(problem, "85")       dense, in [0, 1], and 1 exactly when task.exact(problem, "85")
    exam    = task.held_out(500)               never drawn for training, whatever the seed

A problem belongs to the training side or to the held-out side by a hash of what it asks (`is_held_out`), not by a
random split: two runs with different seeds, or a run resumed next year, agree on what the exam is.

Read next: addition.py (a finite pool, walked in epochs), reverse.py (too many words to list, so each draw is its own
dice), jsonl.py (not a task but a file: SFT rows). Left out: a registry. A new task is a file and its name in get_task.

Tests: tests/test_tasks.py
"""

import functools
import random
import zlib
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Problem:
    """One question: a base model is asked `text`, an instruct model is asked `messages`. The answer is the same."""

    text: str  # "47+38="
    messages: list[dict[str, str]]  # [{"role": "user", "content": "What is 47+38? ..."}]
    answer: str  # "85"


class Task(Protocol):
    """What train.py asks of a task. Nothing inherits from this: it is the list of members, for readers."""

    name: str
    characters: str  # every character of text and answer: the alphabet of the tiny model's tokenizer

    def train_problem(self, n: int, seed: int) -> Problem: ...

    def held_out(self, count: int) -> list[Problem]: ...

    def reward(self, problem: Problem, answer_text: str) -> float: ...

    def exact(self, problem: Problem, answer_text: str) -> bool: ...


def get_task(name: str, size: int | None = None) -> Task:
    """The task called `name`; `size` is its difficulty (digits, or letters), None takes the task's own default.

    Raises ValueError for a name that is no task, or a size the task cannot have.
    """
    from nanogspo.tasks.addition import Addition  # here and not above: these files import Problem from this one
    from nanogspo.tasks.reverse import Reverse

    tasks = {task.name: task for task in (Addition, Reverse)}
    if name not in tasks:
        raise ValueError(f"got task {name!r}, want one of {', '.join(tasks)}; pass one of these as --task")
    return tasks[name]() if size is None else tasks[name](size)


# ----------------------------------------------------------------------------
# what the tasks share


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
    """An exam shorter than the one asked for would quietly widen its interval, so it is an error."""
    if not 1 <= count <= available:
        raise ValueError(f"got {count} held-out problems, want 1 to {available} for {task}; ask for fewer")
