"""Prompts of one's own for RL: a row is a `prompt`, text or messages, and columns for the reward to read.

    {"prompt": "What is 2+2?", "answer": "4", "level": 1}
    {"prompt": [{"role": "user", "content": "Hi"}], "system": "Be brief.", "tools": [{"type": "function", ...}]}

The side of a prompt is decided as for SFT rows (base.smallest_hashes): by a hash of its turns without the system turn,
so a prompt that comes several times is on one side only, and once in the held-out set. Every epoch has its own order.

A reward function is given the whole row. `answer` is the first text among the row's answer, solution, ground_truth and
completion; without a reward function the reward is 1 for saying exactly that. There is no `exact`: what is right is
the reward function's to say.

Tests: tests/test_prompts.py
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable

from nanogspo.inputs import named
from nanogspo.tasks.base import Problem, shuffled, smallest_hashes
from nanogspo.tasks.forms import asked_in, tools_of, with_system
from nanogspo.tasks.rewards import REFERENCES


class PromptRows:
    """left_out   how many prompts were too long: they are never cut, which would ask something else
    repeats       how many rows are on neither side, because they repeat a held-out prompt"""

    def __init__(self, rows: Iterable[tuple[str, dict]], *, name: str = "data", held_out: int = -1, system: str = ""):
        """
        rows      what read_rows gives: (where, row)
        held_out  how many different prompts are never trained on; -1: a tenth, as for SFT rows
        system    text of a system turn for rows that have none
        """
        self.name, self.left_out, self._held_out = name, 0, held_out
        self._rows = [(where, *_problem(where, row, system)) for where, row in rows]
        self.leave_out(lambda problem: False)

    def leave_out(self, too_long: Callable[[Problem], bool]) -> None:
        """Without the prompts that are too long, counted in left_out; then the sides are chosen anew."""
        kept = []
        for where, key, problem in self._rows:
            with named(where):  # a template may not take these messages
                kept += [] if too_long(problem) else [(where, key, problem)]
        self.left_out += len(self._rows) - len(kept)
        if not kept:
            count = len(self._rows)
            raise ValueError(f"got {count} prompts, all too long, want some to train on; raise --max-prompt-tokens")
        self._rows = kept
        first = {}  # key -> problem
        for _, key, problem in self._rows:
            first.setdefault(key, problem)
        chosen = dict.fromkeys(smallest_hashes(first, self._held_out))
        self._exam = [first[key] for key in chosen]
        self._train = [problem for _, key, problem in self._rows if key not in chosen]
        self.repeats = len(self._rows) - len(self._train) - len(self._exam)

    @property
    def characters(self) -> str:
        said = [p.text + p.answer + "".join(str(m.get("content")) for m in p.messages) for _, _, p in self._rows]
        return "".join(sorted(set().union(*said)))

    def train_problem(self, n: int, seed: int) -> Problem:
        epoch, i = divmod(n, len(self._train))
        return self._train[shuffled(len(self._train), f"{seed}-{epoch}")[i]]

    def held_out(self, count: int = -1) -> list[Problem]:
        """The first `count` held-out problems, -1 for all."""
        if count > len(self._exam):
            do = "lower --eval-size, of which each task has an equal part"
            raise ValueError(f"got {count} held-out prompts, want at most the {len(self._exam)} of {self.name}; {do}")
        return self._exam[:count] if count >= 0 else [*self._exam]

    def reward(self, problem: Problem, answer_text: str) -> float:
        return float(problem.answer != "" and answer_text.strip() == problem.answer.strip())


class Episodes:
    """What an environment is asked without --data: always the same empty problem. The environment draws by its seed."""

    name, characters = "episodes", ""

    def train_problem(self, n: int, seed: int) -> Problem:
        return Problem("", [{"role": "user", "content": ""}], "")

    def held_out(self, count: int) -> list[Problem]:
        return [self.train_problem(n, 0) for n in range(count)]

    def reward(self, problem: Problem, answer_text: str) -> float:
        return math.nan  # only the environment knows


def _problem(where: str, row: dict, system: str) -> tuple[str, Problem]:
    """(hash of what is asked, problem)."""
    with named(where):
        prompt = row.get("prompt")
        if prompt is None:
            raise ValueError(f"got a row with {', '.join(map(repr, row)) or 'no keys'}, want a prompt; rename the keys")
        turns = asked_in(prompt)
        if turns[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"got a prompt that ends in a turn of {turns[-1]['role']}, want a user's; drop that turn")
        messages, tools = with_system(turns, row.get("system") or ""), tools_of(row)
        if messages[0]["role"] != "system":
            messages = with_system(messages, system)
    asked = json.dumps([turn for turn in turns if turn["role"] != "system"], sort_keys=True)
    text = prompt if isinstance(prompt, str) else ""
    answer = next((row[key] for key in REFERENCES if isinstance(row.get(key), str)), "")
    return hashlib.sha256(asked.encode()).hexdigest(), Problem(text, messages, answer, row, tools=tools)
