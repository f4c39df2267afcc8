"""One's own task, data and reward, from the command line and from Python: train.py with examples/, the tiny model."""

import math
import pathlib

import pytest

from nanogspo.config import TrainConfig
from nanogspo.run.log import read_rows
from nanogspo.tasks import build_task
from nanogspo.tasks.base import Problem
from train import run

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = {
    "model": "tiny", "lora_r": 0, "max_new_tokens": 3, "prompts_per_rollout": 4, "group_size": 4, "batch_size": 4,
    "updates_per_rollout": 2, "steps": 4, "eval_size": 6, "seed": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)


class Same:
    """The least a task has: no name, no `exact`; only the tiny model needs its characters."""

    characters = "abc>"

    def train_problem(self, n, seed):
        return Problem("abc"[n % 3] + ">", [], "abc"[n % 3])

    def held_out(self, count):
        return [self.train_problem(n, 0) for n in range(count)]

    def reward(self, problem, answer_text):
        return float(answer_text == problem.answer)


def test_from_python_with_plain_objects(tmp_path):
    def is_short(answer, row):
        return None if "a" in answer else float(len(answer) < 2)

    def is_letter(completions, answer, **kwargs):  # TRL's form; prompts are messages
        return [float(c[0]["content"][:1] == a) for c, a in zip(completions, answer, strict=True)]

    config = TrainConfig(**SMALL, out=str(tmp_path / "run"))
    folder, metrics = run(config, task=Same(), rewards=[is_short, is_letter], weights=[0.7, 0.3])
    assert folder == tmp_path / "run" and metrics["step"] == 4
    assert {"reward/is_short", "reward/is_letter", "eval_reward", "eval_exact"} <= metrics.keys()
    samples = read_rows(folder / "samples.jsonl")
    assert len(samples) == 2 * 16
    for row in samples:
        short, letter = row["rewards"]["is_short"], row["rewards"]["is_letter"]
        assert (short is None) == ("a" in row["answer"])
        assert row["reward"] == pytest.approx(letter if short is None else 0.7 * short + 0.3 * letter)
        assert letter == float(row["answer"][:1] == row["prompt"][0])
    assert any(row["rewards"]["is_short"] is None for row in samples)


def test_answers_without_a_reward_are_left_out_of_training(tmp_path):
    """Reward functions that abstain on every second answer, by None or by nan: the same run."""

    def run_with(name, value):
        seen = []

        def sometimes(answer, row):
            seen.append(answer)
            return value if len(seen) % 2 else float(len(answer) % 2)

        folder, metrics = run(TrainConfig(**SMALL, out=str(tmp_path / name)), task=Same(), rewards=[sometimes])
        return metrics, folder

    (none, folder), (nan, other) = run_with("none", None), run_with("nan", math.nan)
    assert none["unrewarded_frac"] == nan["unrewarded_frac"] == 0.5
    assert none["reward/sometimes/none"] > 0 and nan["reward/sometimes/not_finite"] > 0
    saved = pathlib.Path("model", "model.safetensors")
    assert (folder / saved).read_bytes() == (other / saved).read_bytes()
    rows = [row for row in read_rows(folder / "samples.jsonl") if row["reward"] is None]
    assert rows and all(row["advantage"] is None for row in rows)


def test_examples_are_what_the_readme_says(tmp_path):
    task = build_task((str(ROOT / "examples" / "task.py"),), 2)
    seen = {task.train_problem(n, 0).text for n in range(200)}
    assert not seen & {problem.text for problem in task.held_out(50)}
    problem = task.train_problem(0, 0)
    assert task.reward(problem, problem.answer + "\n") == 1 and task.reward(problem, "") == 0
    names = {"task": (str(ROOT / "examples" / "task.py"), "addition=0.5"), "task_size": 2}
    _, metrics = run(TrainConfig(**SMALL | names | {"max_new_tokens": 4}, out=str(tmp_path / "two")))
    assert {"reward/task", "reward/addition", "exact/task", "eval_exact/task", "eval_exact/addition"} <= metrics.keys()


def test_a_run_without_weights_to_read_returns_nothing(tmp_path, capsys):
    assert run(TrainConfig(**SMALL, plan_only=True, out=str(tmp_path / "run")), task=Same()) is None
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="got --reward and functions from Python, want one of them"):
        run(TrainConfig(**SMALL, reward="exact", out=str(tmp_path / "run")), task=Same(), rewards=[len])
    assert not (tmp_path / "run").exists()
