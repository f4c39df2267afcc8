"""Several tasks in one run, and what a task of the user's own may leave out.

    task = mix([addition, mine], [0.4, 0.3])       of ten problems 5.7 are addition's and 4.3 mine, in a fixed order

Tests: tests/test_mix.py
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from nanogspo.tasks.base import Problem, Task


class Mix:
    """Tasks by their shares. The n-th problem is the next one of the task that lags furthest behind its share, so the
    order is the same in every run, and each task's own problems come in its own order, epoch after epoch."""

    def __init__(self, tasks: Sequence[Task], shares: Sequence[float]):
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks):
            names = ", ".join(task.name for task in tasks)
            raise ValueError(f"got tasks {names}, want each name once; rename one (its `name`)")
        self.shares = {name: share / sum(shares) for name, share in zip(self.tasks, shares, strict=True)}
        self.name = "+".join(self.tasks)
        self.characters = "".join(sorted({c for task in tasks for c in getattr(task, "characters", "")}))
        self._turns, self._counts = [], Counter()  # (name, its own n) of every problem so far

    def train_problem(self, n: int, seed: int) -> Problem:
        while len(self._turns) <= n:
            total = len(self._turns) + 1
            name = max(self.shares, key=lambda name: self.shares[name] * total - self._counts[name])
            self._turns.append((name, self._counts[name]))
            self._counts[name] += 1
        name, own = self._turns[n]
        return dataclasses.replace(self.tasks[name].train_problem(own, seed), task=name)

    def held_out(self, count: int) -> list[Problem]:
        """Equally many of each task, the first ones one more where it does not come out even."""
        found = []
        for i, (name, task) in enumerate(self.tasks.items()):
            own = count // len(self.tasks) + (i < count % len(self.tasks))
            found += [dataclasses.replace(problem, task=name) for problem in (task.held_out(own) if own else [])]
        return found

    def reward(self, problem: Problem, answer_text: str) -> float:
        return self.tasks[problem.task].reward(problem, answer_text)


def part(task: Task, problem: Problem) -> Task:
    """The one of several tasks that a problem belongs to."""
    return task.tasks[problem.task] if isinstance(task, Mix) else task


def is_right(task: Task | None, problem: Problem, answer_text: str, reward: float) -> bool:
    """Whether an answer counts as right: what the task says, and where it has no `exact`, whether the reward is 1 or
    more."""
    own = part(task, problem)
    return bool(own.exact(problem, answer_text)) if hasattr(own, "exact") else reward >= 1


def own_metrics(task: Task, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, float]:
    """Means of what tasks with `metrics` say of answers besides."""
    found = {}
    for problem, text in zip(problems, texts, strict=True):
        own = part(task, problem)
        for key, value in own.metrics(problem, text).items() if hasattr(own, "metrics") else ():
            found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}
