"""A task of your own: problems that a program makes, so that training never runs out of them.

    python train.py --model Qwen/Qwen3-0.6B --task examples/task.py
    python train.py --task examples/task.py --task-size 2 --max-new-tokens 3      the tiny model, no download

train_problem is a function of n and the seed and nothing else: a resumed run asks for the same problems. Whoever draws
them keeps training and held-out problems apart; here a hash does (nanogspo/tasks/base.py).
"""

import random

from nanogspo.tasks.base import Problem, first_distinct, is_held_out


class Largest:
    characters = "0123456789,>"  # only the tiny model asks: its vocabulary

    def __init__(self, size: int = 5):
        self.size = size  # numbers to choose from; --task-size

    def draw(self, dice: random.Random, held_out: bool) -> str:
        while is_held_out(text := ",".join(str(dice.randrange(100)) for _ in range(self.size))) != held_out:
            pass
        return text

    def problem(self, text: str) -> Problem:
        asked = [{"role": "user", "content": f"Which is the largest of {text}? Answer with the number alone."}]
        return Problem(text=text + ">", messages=asked, answer=str(max(map(int, text.split(",")))))

    def train_problem(self, n: int, seed: int) -> Problem:
        return self.problem(self.draw(random.Random(f"{seed}/{n}"), held_out=False))

    def held_out(self, count: int) -> list[Problem]:
        texts = first_distinct(lambda n: self.draw(random.Random(f"held out/{n}"), held_out=True), count)
        return [self.problem(text) for text in texts]

    def reward(self, problem: Problem, answer: str) -> float:
        return float(answer.strip() == problem.answer)
