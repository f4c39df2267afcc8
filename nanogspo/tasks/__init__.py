"""Where problems and rewards come from.

    task    = get_task("addition")
    problem = task.train_problem(n, seed)      the n-th draw, a pure function of (n, seed): a data cursor is one int
    score   = task.reward(problem, "85")       dense, in [0, 1], and 1 exactly when task.exact(problem, "85")
    held    = task.held_out(500)               never drawn for training, whatever the seed

Read next: base.py (what a task is), addition.py (a finite pool, walked in epochs), reverse.py (too many words to list,
so each draw is its own dice), jsonl.py (not a task but a file: SFT rows). A new task is a file and its class in TASKS.

Tests: tests/test_tasks.py
"""

from nanogspo.tasks.addition import Addition
from nanogspo.tasks.base import Task
from nanogspo.tasks.reverse import Reverse

TASKS = {task.name: task for task in (Addition, Reverse)}


def get_task(name: str, size: int | None = None) -> Task:
    """The task called `name`; `size` is its difficulty (digits, or letters), None takes the task's own default.

    Raises ValueError for a name that is no task, or a size the task cannot have.
    """
    if name not in TASKS:
        raise ValueError(f"got task {name!r}, want one of {', '.join(TASKS)}; pass one of these as --task")
    return TASKS[name]() if size is None else TASKS[name](size)
