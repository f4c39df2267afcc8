"""One's own task, data and reward, from the command line and from Python: train.py with examples/, the tiny model."""

import dataclasses
import math
import pathlib
import signal

import pytest

from nanogspo.config import TrainConfig
from nanogspo.run.log import RunLog, read_rows
from nanogspo.tasks import build_task
from nanogspo.tasks.base import Problem
from train import Trainer, run

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
    assert not any(name.endswith("/") for name in metrics)  # a single task has no metrics of its own
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
    with pytest.raises(ValueError, match="got 'Qwen/Qwen3-0.6B' as the configuration, want run.TrainConfig"):
        run("Qwen/Qwen3-0.6B")
    assert not (tmp_path / "run").exists()


def test_rows_with_functions_from_python(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "abc", "most": 2}\n' * 3)
    config = TrainConfig(**SMALL | {"eval_size": 0}, data=str(tmp_path / "rows.jsonl"), task="jsonl")

    def short(answer, row):
        return float(len(answer) < row["most"])

    folder, metrics = run(dataclasses.replace(config, out=str(tmp_path / "run")), rewards=[short])
    assert metrics["step"] == 4 and "reward/short" in metrics
    with pytest.raises(ValueError, match="no --reward"):
        run(config)


def test_what_python_gave_is_needed_to_go_on(tmp_path):
    config = TrainConfig(**SMALL, task="addition", task_size=1, out=str(tmp_path / "run"))

    def short(answer, row):
        return float(len(answer) < 2)

    run(config, rewards=[short])
    more = dataclasses.replace(config, resume=config.out, steps=6)
    with pytest.raises(ValueError, match="python/short"):
        run(more)
    assert run(more, rewards=[short])[1]["step"] == 6


def test_signals_are_as_they_were_after_a_run(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(TrainConfig(**SMALL, out=str(tmp_path / "run")), task=Same())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_functions_may_log_under_any_name(tmp_path):
    def logs(completions, trainer_state, log_extra, log_metric, **kwargs):
        for name in ("step", "loss", "reward", "exact", "count", "sampling_rounds"):
            log_metric(name, 77.0)
        log_metric("own", trainer_state.global_step / trainer_state.max_steps)
        log_extra("answer", ["mine"] * len(completions))
        log_extra("half", ["\ud83d"] * len(completions))  # what JSON calls half a character
        return [float(len(c[0]["content"])) for c in completions]

    folder, metrics = run(TrainConfig(**SMALL, out=str(tmp_path / "run")), task=Same(), rewards=[logs])
    assert metrics["step"] == 4 and metrics["own"] == 3 / 4 and metrics["sampling_rounds"] == 1
    assert 77 not in (metrics[name] for name in ("loss", "reward", "eval_exact", "eval_count", "eval_reward"))
    rows = read_rows(folder / "samples.jsonl")
    assert all(row["half"] == "\ud83d" and row["answer"] != "mine" for row in rows)


def test_patience_ends_a_resumed_run_where_it_ends_the_whole_one(tmp_path, monkeypatch):
    """Killed after the evaluation that ends it, before another state is saved."""
    sizes = SMALL | {"steps": 20, "eval_every": 2, "save_every": 2, "patience": 1, "keep_best": True, "lr": 1e-12}
    config, saves = TrainConfig(**sizes, out=str(tmp_path / "run")), []
    save = Trainer.save_state

    def killed(self, path=None):
        saves.append(self.progress.step)
        if len(saves) == 3:
            raise KeyboardInterrupt
        save(self, path)

    monkeypatch.setattr(Trainer, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, task=Same())
    assert saves == [2, 4, 4] and (tmp_path / "run" / "best" / "model").is_dir()
    resumed = dataclasses.replace(config, resume=config.out)
    assert run(resumed, task=Same())[1]["step"] == 4
    assert run(dataclasses.replace(resumed, patience=0, steps=6), task=Same())[1]["step"] == 6


def test_weights_of_several_saves_are_kept_and_older_ones_pruned(tmp_path):
    sizes = SMALL | {"lora_r": 2, "steps": 12, "save_every": 2, "keep_saves": 3, "warm_steps": 0}
    folder, _ = run(TrainConfig(**sizes, out=str(tmp_path / "run")), task=Same())
    kept = {path.name: path / "adapter" / "adapter_model.safetensors" for path in (folder / "saves").iterdir()}
    assert sorted(map(int, kept)) == [8, 10, 12]
    last = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert [kept[name].read_bytes() == last for name in ("8", "10", "12")] == [False, False, True]


def test_an_evaluation_without_any_reward_is_no_result(tmp_path):
    log = RunLog(tmp_path, steps=1, quiet=True)
    for step, reward in ((1, 0.5), (2, math.nan), (3, 0.25)):
        log.evaluation(step=step, phase="gspo", successes=0, count=1, eval_reward=reward)
    log.changed(3, ["--seed"])
    assert log.results("gspo") == [0.5, 0.25]
    log.close()
    assert RunLog(tmp_path, steps=1, resume_step=3, quiet=True).results("gspo") == [0.5, 0.25]


def test_a_task_that_lacks_what_a_run_needs_is_one_line(tmp_path):
    class Few(Same):
        def held_out(self, count):
            return super().held_out(count)[:5]

    with pytest.raises(ValueError, match="got 5 held-out problems, want 6; lower --eval-size"):
        run(TrainConfig(**SMALL), task=Few())
    Few.characters = ""
    with pytest.raises(ValueError, match="a task without `characters`"):
        run(TrainConfig(**SMALL), task=Few())


def test_a_class_without_arguments_takes_no_size(tmp_path):
    """configs/tiny.yaml has a --task-size for the shipped task."""
    lines = "train_problem = held_out = reward = print\n    size = 0\n"
    (tmp_path / "own.py").write_text(f"class A:\n    {lines}\nclass B(A):\n    def __init__(self, n): self.size = n")
    assert build_task([f"{tmp_path}/own.py:A"], 5).size == 0 and build_task([f"{tmp_path}/own.py:B"], 5).size == 5
