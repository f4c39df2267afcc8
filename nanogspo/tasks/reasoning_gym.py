"""The hundred tasks of the package reasoning-gym: `--task reasoning_gym:NAME`, such as reasoning_gym:basic_arithmetic.

Problems are its own, drawn by item number; scores are its `score_answer`, from 0 to 1, of what stands in the last
<answer>...</answer>, or of the whole text. A question belongs to a side by its hash. A data set of few questions is
refused once no new one is found.

Source: github.com/open-thought/reasoning-gym.      Tests: tests/test_reasoning_gym.py
"""

import random
import re

from nanogspo.inputs import optional
from nanogspo.tasks.base import Problem, is_held_out
from nanogspo.templates import one_line

ITEMS = 10**6  # item numbers to draw from; the package makes an item when it is asked for
TRIES = 1000  # draws for one problem of a side, which 1.1 or 10 should find


class ReasoningGym:
    characters = "".join(map(chr, range(32, 127))) + "\n"

    def __init__(self, name: str = ""):
        gym = optional("reasoning_gym", f"task reasoning_gym:{name}")
        known = gym.factory.DATASETS
        if name not in known:
            raise ValueError(f"got task reasoning_gym:{name}, want one of its names: {', '.join(sorted(known))}")
        self.name = f"reasoning_gym:{name}"
        try:
            self._items = gym.create_dataset(name, seed=0, size=ITEMS)
        except Exception as error:  # two of them have fewer items, or need settings
            raise ValueError(f"got {self.name}, which cannot be made ({one_line(error)}), want another") from error

    def train_problem(self, n: int, seed: int) -> Problem:
        return self._draw(f"{seed}/{n}", held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        found, n = {}, 0
        while len(found) < count:
            if n > TRIES + 10 * count:
                raise ValueError(f"got {count} held-out problems, want at most {len(found)} for {self.name}")
            problem, n = self._draw(f"held-out/{n}", held_out=True), n + 1
            found.setdefault(problem.text, problem)
        return list(found.values())

    def reward(self, problem: Problem, answer_text: str) -> float:
        answers = re.findall(r"<answer>(.*?)</answer>", answer_text, re.DOTALL)
        try:
            return float(self._items.score_answer((answers or [answer_text])[-1].strip(), problem.row))
        except Exception:  # a scorer that cannot read what a model wrote
            return 0.0

    def exact(self, problem: Problem, answer_text: str) -> bool:
        return self.reward(problem, answer_text) >= 1

    def _draw(self, stream: str, *, held_out: bool) -> Problem:
        dice = random.Random(stream)
        for _ in range(TRIES):
            row = self._items[dice.randrange(ITEMS)]
            if is_held_out(row["question"]) == held_out:
                request = f"{row['question']}\n\nGive the final answer between <answer> and </answer>."
                answer = f"<answer>{row['answer']}</answer>" if row["answer"] is not None else ""
                return Problem(f"{request}\n", [{"role": "user", "content": request}], answer, row)
        raise ValueError(f"got only {'training' if held_out else 'held-out'} questions in {TRIES} draws of {self.name}")
