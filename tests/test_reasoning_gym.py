"""nanogspo/tasks/reasoning_gym.py with the package, and with a stand-in where the package is not installed.

Run: python -m pytest tests/test_reasoning_gym.py
"""

import random
import sys
import types

import pytest

from nanogspo.tasks import get_task
from nanogspo.tasks.base import is_held_out


class Items:
    def __init__(self, questions):
        self.questions = questions

    def __getitem__(self, i):
        question = random.Random(i).choice(self.questions)
        return {"question": question, "answer": question.upper(), "metadata": {"i": i}}

    def score_answer(self, answer, entry):
        return {entry["answer"]: 1.0, "": 0.0}[answer] if answer != "half" else 0.5


@pytest.fixture
def stand_in(monkeypatch):
    made = {"words": Items([f"word{n}?" for n in range(400)]), "few": Items(["a", "b"]), "broken": None}

    def create_dataset(name, seed, size):
        if not made[name]:
            raise AssertionError("no\nsettings")
        return made[name]

    package = types.SimpleNamespace(create_dataset=create_dataset, factory=types.SimpleNamespace(DATASETS=made))
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)


def test_sides_and_draws(stand_in):
    task = get_task("reasoning_gym:words")
    train, held = [task.train_problem(n, 0) for n in range(200)], task.held_out(10)
    assert not any(is_held_out(p.row["question"]) for p in train) and all(is_held_out(p.row["question"]) for p in held)
    assert len({p.text for p in held}) == 10 and task.held_out(4) == held[:4] and len({p.text for p in train}) > 100
    assert train[:20] == [task.train_problem(n, 0) for n in range(20)] != [task.train_problem(n, 1) for n in range(20)]
    assert train[0].text.startswith(train[0].row["question"]) and train[0].messages[0]["content"] in train[0].text


def test_the_last_answer_is_scored(stand_in):
    task = get_task("reasoning_gym:words")
    problem = task.train_problem(0, 0)
    right = problem.row["answer"]
    texts = [problem.answer, f" {right}\n", f"<answer>x</answer><answer>\n{right} </answer> yes", f"so {right}"]
    assert [task.reward(problem, text) for text in texts] == [1, 1, 1, 0]  # the scorer fails on the last
    assert task.reward(problem, "half") == 0.5 and not task.exact(problem, "half") and task.exact(problem, right)


def test_what_cannot_be_drawn(stand_in, monkeypatch):
    with pytest.raises(ValueError, match="got task reasoning_gym:wrods, want one of its names: broken, few, words"):
        get_task("reasoning_gym:wrods")
    with pytest.raises(ValueError, match=r"got reasoning_gym:broken, which cannot be made \(no settings\)"):
        get_task("reasoning_gym:broken")
    with pytest.raises(ValueError, match="got only training questions in 1000 draws of reasoning_gym:few"):
        get_task("reasoning_gym:few").held_out(1)
    with pytest.raises(ValueError, match="got 300 held-out problems, want at most [0-9]+ for reasoning_gym:words"):
        get_task("reasoning_gym:words").held_out(300)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="task reasoning_gym:words without the package .*requirements-extra.txt"):
        get_task("reasoning_gym:words")


@pytest.mark.parametrize("name", ["basic_arithmetic", "spell_backward", "leg_counting"])
def test_the_real_package(name):
    pytest.importorskip("reasoning_gym", reason="no reasoning-gym here: pip install -r requirements-extra.txt")
    task = get_task(f"reasoning_gym:{name}")
    train, held = [task.train_problem(n, 0) for n in range(20)], task.held_out(5)
    assert all(task.reward(p, p.answer) == 1 for p in train + held)
    assert not {p.text for p in train} & {p.text for p in held} and task.reward(train[0], "soup") < 1
