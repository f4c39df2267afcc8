"""Where problems and rewards come from.

    task    = get_task("addition")
    problem = task.train_problem(n, seed)      the n-th draw, a pure function of (n, seed): a data cursor is one int
    score   = task.reward(problem, "85")       dense, in [0, 1], and 1 exactly when task.exact(problem, "85")
    held    = task.held_out(500)               never drawn for training, whatever the seed

    task    = build_task(("addition=0.7", "mine.py=0.3"))       what --task says: shipped tasks and own ones, mixed

Read next: base.py (what a task is), addition.py (a finite pool, walked in epochs), reverse.py (too many words to list,
so each draw is its own dice), countdown.py (an equation, and its form), gsm8k.py, reasoning_gym.py; prompts.py (rows of
one's own for RL), conversation.py (customers who want something); jsonl.py (no task but SFT rows). rows.py reads files
and data sets, forms.py what a row says. A new task is a file and its class in TASKS. Countdown's reward goes up to 1.1:
being right and being in form add up.

Tests: tests/test_tasks.py, and a file for each of the later ones
"""

import difflib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from nanogspo.inputs import import_file
from nanogspo.tasks.addition import Addition
from nanogspo.tasks.base import Task
from nanogspo.tasks.conversation import SHIPPED, Conversations
from nanogspo.tasks.countdown import Countdown
from nanogspo.tasks.gsm8k import Gsm8k
from nanogspo.tasks.mix import Mix
from nanogspo.tasks.reasoning_gym import ReasoningGym
from nanogspo.tasks.reverse import Reverse

TASKS = {task.name: task for task in (Addition, Reverse, Countdown)}
# built from what follows the colon: gsm8k:FILE
NAMED = {"gsm8k": Gsm8k, "reasoning_gym": ReasoningGym, "conversation": Conversations}


def get_task(name: str, size: int | None = None) -> Task:
    """The task called `name`; `size` is its difficulty (digits, or letters), None takes the task's own default.

    Some take more behind a colon: gsm8k:FILE, reasoning_gym:NAME, conversation:FILE.yaml.

    Raises ValueError for a name that is no task, or a size the task cannot have.
    """
    kind, _, argument = ("conversation", ":", name) if name in SHIPPED else name.partition(":")
    if kind in NAMED:
        if size is not None:
            raise ValueError(f"got size {size} for {name}, which has none; leave --task-size out")
        return NAMED[kind](argument)
    if name not in TASKS:
        known = [*TASKS, *NAMED, *SHIPPED]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "pass one of these, or FILE.py, as --task"
        raise ValueError(f"got task {name!r}, want one of {', '.join(known)}; {hint}")
    return TASKS[name]() if size is None else TASKS[name](size)


def build_task(names: Sequence[str], size: int | None = None) -> Task:
    """The task, or the mix of tasks, that --task names: NAME or FILE.py[:Class], with =SHARE if there are several."""
    tasks, shares = [], []
    for text in names:
        name, share = re.fullmatch(r"(.*?)(?:=([0-9.]+))?", text, re.DOTALL).groups()
        tasks.append(own_task(name, size) if re.search(r"\.py(:|$)", name) else get_task(name, size))
        shares.append(float(share or 1))
        if shares[-1] <= 0:
            raise ValueError(f"got --task {text}, want a share of more than 0")
    return tasks[0] if len(tasks) == 1 else Mix(tasks, shares)


NEEDED = ("train_problem", "held_out", "reward")


def own_task(text: str, size: int | None = None) -> Task:
    """The task in a file of the user's own, FILE.py or FILE.py:Class: its class is called without arguments, or, if it
    takes any, with --task-size. What it needs is train_problem, held_out and reward (base.Task); `name` and `exact` may
    be left out, and `characters` unless the model is the tiny one."""
    path, _, wanted = text.rpartition(":") if text.rpartition(":")[0].endswith(".py") else (text, "", "")
    module = import_file(path, "--task")
    fit = [k for k, v in vars(module).items() if isinstance(v, type) and all(hasattr(v, name) for name in NEEDED)]
    fit = [name for name in fit if getattr(module, name).__module__ == module.__name__]  # not what it imports
    if wanted not in fit if wanted else len(fit) != 1:
        got = f"{wanted!r}, which is none of them" if wanted else f"{len(fit)} of them"
        want = f"want a class with {', '.join(NEEDED)} (there is {', '.join(fit) or 'none'})"
        raise ValueError(f"{path}: got {got}, {want}; pass --task {path}:Class")
    make = getattr(module, wanted or fit[0])
    task = make() if size is None or not inspect.signature(make).parameters else make(size)
    if not hasattr(task, "name"):
        task.name = Path(path).stem
    return task
