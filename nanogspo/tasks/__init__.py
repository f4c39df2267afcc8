"""Where problems and rewards come from.

    task    = get_task("addition")
    problem = task.train_problem(n, seed)      the n-th draw, a pure function of (n, seed): a data cursor is one int
    score   = task.reward(problem, "85")       dense, in [0, 1], and 1 exactly when task.exact(problem, "85")
    held    = task.held_out(500)               never drawn for training, whatever the seed

Read next: base.py (what a task is), addition.py (a finite pool, walked in epochs), reverse.py (too many words to list,
so each draw is its own dice), countdown.py (an equation, and its form), gsm8k.py, reasoning_gym.py; prompts.py (rows of
one's own for RL); jsonl.py (no task but SFT rows). rows.py reads files and data sets, forms.py what a row says. A new
task is a file and its class in TASKS. Countdown's reward goes up to 1.1: being right and being in form add up.

Tests: tests/test_tasks.py, and a file for each of the later ones
"""

from nanogspo.tasks.addition import Addition
from nanogspo.tasks.base import Task
from nanogspo.tasks.countdown import Countdown
from nanogspo.tasks.gsm8k import Gsm8k
from nanogspo.tasks.reasoning_gym import ReasoningGym
from nanogspo.tasks.reverse import Reverse

TASKS = {task.name: task for task in (Addition, Reverse, Countdown)}
NAMED = {"gsm8k": Gsm8k, "reasoning_gym": ReasoningGym}  # built from what follows the colon: gsm8k:FILE


def get_task(name: str, size: int | None = None) -> Task:
    """The task called `name`; `size` is its difficulty (digits, or letters), None takes the task's own default.

    gsm8k and reasoning_gym take more behind a colon: gsm8k:FILE, reasoning_gym:NAME.

    Raises ValueError for a name that is no task, or a size the task cannot have.
    """
    kind, _, argument = name.partition(":")
    if kind in NAMED:
        if size is not None:
            raise ValueError(f"got size {size} for {name}, which has none; leave --task-size out")
        return NAMED[kind](argument)
    if name not in TASKS:
        raise ValueError(f"got task {name!r}, want one of {', '.join([*TASKS, *NAMED])}; pass one of these as --task")
    return TASKS[name]() if size is None else TASKS[name](size)
