"""nanogspo/run/doctor.py: noise is measured as it is, and each of fourteen planted faults is named in one sentence.

Run: python -m pytest tests/test_doctor.py
"""

import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from nanogspo import tiny
from nanogspo.config import TrainConfig, check, parse
from nanogspo.packing import Example, score
from nanogspo.run import doctor
from nanogspo.run.doctor import (
    Noise,
    Watch,
    auto_clip,
    diagnose,
    kernel_gap,
    noise_floor,
    packed,
    padded,
    render,
)
from nanogspo.run.log import read_rows
from nanogspo.storage.state import Progress
from train import run

SMALL = "--threads 1 --task addition --task-size 2 --max-new-tokens 4 --no-control --eval-size 0 --warm-until 2"
SMALL += " --prompts-per-rollout 4 --group-size 4 --save-every 1000 --warmup-updates 0 --batch-size 16"
HEALTHY = {"lr": 5e-5, "clip_low": 3e-4, "clip_high": 4e-4, "lora_r": 16, "dtype": "fp32", "model": "a/model"}
FACTS = {"usual_lr": 5e-5, "template": True, "stops": True}


def config_of(*flags):
    return parse(TrainConfig, [*SMALL.split(), *map(str, flags)], "train.py")[0]


def examples_of(lengths, prompt=20):
    """Answers of these lengths to one prompt that is long enough to be shared."""
    g = torch.Generator().manual_seed(1)
    shown = torch.randint(2, 14, (prompt,), generator=g).tolist()
    return [Example.answered(shown, torch.randint(2, 14, (n,), generator=g).tolist()) for n in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# the noise floor


@pytest.fixture(scope="module")
def models():
    _, model = tiny.build("0123456789+=", seed=0)
    _, rounded = tiny.build("0123456789+=", seed=0)
    return model, rounded.to(torch.bfloat16)


def test_every_way_of_scoring_gives_an_answer_its_own_log_probs(models):
    """Micro-batches that are sorted, shared and cut; padded rows, whole and in parts: fp32 sums in another order, which
    are about twenty roundings of numbers up to 4 apart."""
    examples = examples_of([3, 1, 7, 2, 7])
    ways = [packed(models[0], examples, 64, 0.7)[0], *(padded(models[0], examples, n, 0.7)[0] for n in (60, 10**6))]
    for e, *three in zip(examples, *ways, strict=True):
        hidden = models[0](torch.tensor([e.tokens]))[0]
        logp = (models[0].logits(hidden) / 0.7).log_softmax(-1)
        first = e.loss_mask.index(True)
        want = [logp[t - 1, e.tokens[t]].item() for t in range(first, len(e.tokens))]
        for got in three:
            assert got.tolist() == pytest.approx(want, abs=1e-5)


def test_the_noise_floor_is_the_mean_over_an_answers_tokens(monkeypatch):
    """With log-probs that we make up: answer n, when it is padded, is -0.03 n off at one token, 0.01 n at the other."""
    calls, zeros = [], [torch.zeros(2) for _ in range(101)]
    made_up = [torch.tensor([-0.03 * n, 0.01 * n]) for n in range(101)]
    monkeypatch.setattr(doctor, "packed", lambda *given: calls.append(given) or (zeros, []))
    monkeypatch.setattr(doctor, "padded", lambda *given: calls.append(given) or (made_up, []))
    noise = noise_floor("model", examples_of([2] * 101), 64, 0.7)
    assert len(calls) == 3 and all(given[2:] == (64, 0.7) for given in calls)
    assert (noise.same, noise.answers, noise.length) == (0.0, 101, 2.0)
    assert (noise.p50, noise.p99, noise.token) == pytest.approx((0.5, 0.99, 3.0))  # answers 50, 99, and token 100


def test_twice_alike_is_exactly_0_and_bf16_is_noisier_than_the_papers_range(models):
    """What lesson 18 is about. bf16 rounds a hidden state at 2^-9, fp32 at 2^-24: the noise of answers of 4 tokens is
    above 3e-4 in the one, and a hundred times below in the other."""
    examples = examples_of([4] * 24)
    fp32, bf16 = (noise_floor(model, examples, 4096, 1.0) for model in models)
    assert fp32.same == bf16.same == 0
    assert 0 < fp32.p99 < 3e-6 and 3e-4 < bf16.p99 < 0.1
    assert fp32.p50 <= fp32.p99 <= fp32.token
    assert "exactly 0," in str(fp32) and "want exactly 0" in str(dataclasses.replace(fp32, same=1e-3))


def test_the_auto_range_is_twice_the_noise_and_never_below_the_papers():
    assert auto_clip(0.0) == auto_clip(1.5e-4) == pytest.approx((3e-4, 4e-4))
    assert auto_clip(0.003) == pytest.approx((0.006, 0.008))
    # normal noise: p99 of |x| is 2.58 deviations, so the range begins at 5.15: 3 in ten million leave it
    assert math.erfc(2 * 2.576 / math.sqrt(2)) < 1e-6


@pytest.mark.parametrize("model, want", [("tiny", (3e-4, 4e-4)), ("noisy", (0.02, 0.08 / 3))])
def test_clip_auto_is_measured_once_saved_and_used(tmp_path, monkeypatch, capsys, model, want):
    measured = []

    def measure(*args):
        measured.append(args)
        p99 = 0.01 if model == "noisy" else 1e-7
        return Noise(0.0, 0.1, 0.001, p99 if len(measured) == 1 else 0.5, 16, 4.0)

    monkeypatch.setattr(doctor, "noise_floor", measure)
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *a, **k: None)
    flags = ["--clip", "auto", "--steps", 5, "--warm-steps", 0, "--lr", "1e-3", "--out", tmp_path / "run"]
    run(config_of(*flags))
    [note] = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("doctor") == "noise"]
    assert (note["clip_low"], note["clip_high"]) == pytest.approx(want)
    assert len(measured) == 1 and len(measured[0][1]) == 16
    config, _ = parse(TrainConfig, ["--resume", str(tmp_path / "run"), "--steps", "12"], "train.py")
    seen, real = [], sys.modules["train"].policy_loss
    monkeypatch.setattr("train.policy_loss", lambda *a, **clip: seen.append(clip) or real(*a, **clip))
    run(config)  # measures anew, to warn; the range stays
    assert len(seen) == 7 and all((c["clip_low"], c["clip_high"]) == pytest.approx(want) for c in seen)
    notes = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("doctor") == "noise"]
    assert notes == [note] and "clip -" in capsys.readouterr().out


def test_clip_auto_is_gspos():
    with pytest.raises(ValueError, match="got --clip auto with grpo, want --algo gspo"):
        check(config_of("--clip", "auto", "--algo", "grpo"))


@pytest.mark.parametrize("rate, said", [(29.9, "not measured"), (30.1, "noise floor of 8 answers")])
def test_a_slow_model_is_not_measured_at_the_start(models, rate, said):
    """Of 10 answers to a prompt of 18 every one is taken, 20 tokens each; three passes over 200 tokens in 2 s are
    300 tokens a second."""
    lines = []
    log = SimpleNamespace(say=lines.append, says=lambda step, what, text, **more: lines.append(text))
    watch = Watch(config_of(), FACTS, log, Progress(), [])
    rollout = SimpleNamespace(examples=examples_of([2] * 10, prompt=18), times={"scoring_tokens_per_s": 10 * rate})
    for _ in range(2):
        watch.measure(models[0], rollout)
    assert len(lines) == 1 and said.replace("8", "10") in lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# sentences


def rollouts(*changes, updates=4, **always):
    """Rows of a healthy run, a dict of changes for each rollout; "later" changes all but its first update."""
    rows = []
    for n, change in enumerate(changes):
        facts = {"reward": 0.3 + 0.1 * n, "reward_std": 0.3, "exact": 0.2, "zero_spread_frac": 0.2}
        facts |= {"truncated_frac": 0.05, "entropy": max(0.2, 0.7 - 0.05 * n), "sampler_gap_mean": 1e-6}
        facts |= {"loss": 1e-9} | always | change
        later = facts.pop("later", {})
        first = {"ratio_min": 1.0, "ratio_max": 1.0, "reward_s": 0.01}
        rows.append({**facts, **first})
        rows += [{**facts, "ratio_min": 0.999, "ratio_max": 1.001, **later} for _ in range(updates - 1)]
    return rows


def names(rows, p99=1e-7, facts=FACTS, **settings):
    found = diagnose(rows, TrainConfig(**HEALTHY | settings), **facts | {"p99": p99})
    assert all(re.fullmatch(r"[^\n]{30,260}", sentence) for sentence in found.values())
    return set(found) - {"loss"}


FAULTS = {
    "lora rate": dict(rows=[], lr=1e-6),
    "template": dict(rows=[], facts=FACTS | {"template": False}),
    "stop": dict(rows=rollouts({}, truncated_frac=1.0), facts=FACTS | {"stops": False}),
    "clip": dict(rows=[], p99=3.1e-4),
    "truncated": dict(rows=rollouts({}, truncated_frac=1.0)),
    "length": dict(rows=rollouts({}, {}, {}, truncated_frac=0.4)),
    "no reward": dict(rows=rollouts({}, {}, {}, reward=0.0, reward_std=0.0, zero_spread_frac=1.0, exact=0.0)),
    "spread": dict(rows=rollouts({}, {}, {}, zero_spread_frac=0.75)),
    "equal": dict(rows=rollouts({}, zero_spread_frac=1.0, reward=1.0, reward_std=0.0)),
    "sampler": dict(rows=rollouts({}, sampler_gap_mean=0.05)),
    "reward": dict(rows=rollouts({}, {}, {}, reward=0.5)),
    "ratio": dict(rows=rollouts({}, {}, {}, later={"ratio_min": 1.0, "ratio_max": 1.0 + 1e-7})),
    "entropy": dict(rows=rollouts({}, {"reward": 0.2}, {"reward": 0.25, "entropy": 0.05})),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_alone_within_three_rollouts(name):
    assert names(**FAULTS[name]) == {name}


def test_a_healthy_run_has_no_fault_and_asks_why_its_loss_is_0():
    many = rollouts(*[{"reward": 0.3 + 0.02 * n} for n in range(30)])
    solved = rollouts({}, {}, {}, exact=0.97, zero_spread_frac=0.9, reward=0.98, entropy=0.01)
    noisy = rollouts({}, {}, {}, sampler_gap_mean=0.05)
    for rows in ([], many, many[:1], solved, rollouts({}, {}, {}, truncated_frac=0.3)):
        assert names(rows) == set()
    assert names(noisy, dtype="bf16") == names(many, p99=3e-4) == names(many, lr=1.1e-5) == set()
    assert names(many, lora_r=0, lr=1e-6) == names(many, model="tiny", facts=FACTS | {"template": False}) == set()
    assert "watch the reward and the ratio" in diagnose(many, TrainConfig(**HEALTHY), **FACTS)["loss"]
    warned = diagnose(many[:1], TrainConfig(**HEALTHY), **FACTS)
    assert set(warned) == {"loss"} and "loss" not in diagnose(FAULTS["equal"]["rows"], TrainConfig(**HEALTHY), **FACTS)


def test_what_an_environment_refuses_is_not_advised():
    """Its problems have no answers that --warm-steps could imitate."""
    for name in ("no reward", "truncated"):
        others = {"task": "sales"}, {"environment": "mine.py:Mine"}
        configs = [TrainConfig(**HEALTHY | other) for other in ({}, *others)]
        said = [diagnose(FAULTS[name]["rows"], config, **FACTS)[name] for config in configs]
        assert "--warm-steps" in said[0] and "--max-new-tokens" in said[0]
        for text in said[1:]:
            assert "--warm-steps" not in text and "--max-new-tokens" in text and "  " not in text and ", ," not in text


def test_a_reward_that_only_jitters_is_named_after_twenty_rollouts():
    jitter = rollouts(*[{"reward": 0.5 + 0.05 * (-1) ** n} for n in range(20)])
    rising = rollouts(*[{"reward": 0.3 + 0.02 * n + 0.05 * (-1) ** n} for n in range(20)])
    assert names(jitter) == {"reward"} and names(jitter[:-4]) == names(rising) == set()


def test_other_faults_are_refused_before_a_run_starts():
    for flags, words in ((["--lora-r", 8, "--lora-dropout", 0.05], "dropout"), (["--top-k", 50], "--top-k")):
        with pytest.raises(ValueError, match=words):
            check(config_of(*flags))


def sentences_of(folder, *flags):
    run(config_of("--out", folder, *flags))
    return {row["doctor"]: row["says"] for row in read_rows(folder / "metrics.jsonl") if "doctor" in row}


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *a, **k: None)


def test_a_healthy_run_names_nothing(tmp_path, no_picture, capsys):
    """As the default run does it: SFT first, then RL with something to compare in most groups."""
    flags = "--warm-steps 50 --steps 12 --lr 3e-4 --warm-lr 2e-3 --prompts-per-rollout 8".split()
    assert set(sentences_of(tmp_path / "run", *flags)) == {"noise", "loss"}
    out = capsys.readouterr().out
    assert out.count("a loss near 0 is expected") == out.count("noise floor of 32 answers") == 1


def test_sick_runs_name_their_fault(tmp_path, no_picture, monkeypatch):
    """From untrained weights, at a rate of nothing, with answers that are scored at another temperature."""
    said = sentences_of(tmp_path / "cold", *"--warm-steps 0 --steps 12 --lr 1e-12".split())
    assert "stand still at lr 1.0e-12" in said["ratio"]
    at_one = lambda model, batch, *, temperature=1.0, linear=None: score(model, batch)  # noqa: E731
    monkeypatch.setattr("train.score", at_one)
    monkeypatch.setattr("nanogspo.experience.score", at_one)
    said = sentences_of(tmp_path / "hot", *"--warm-steps 0 --steps 1 --temperature 2".split())
    assert "another temperature" in said["sampler"]


# ---------------------------------------------------------------------------------------------------------------------
# --check


def test_the_kernel_is_compared_where_triton_runs(models):
    """In the interpreter here. fp32 sums of 128 products in another order."""
    [example] = examples_of([5])
    text = kernel_gap(models[0], example, 1.0)
    assert text.endswith(" a token at most") and float(text.split()[0]) < 1e-5


def test_a_sample_is_shown_with_its_mask():
    tokenizer, _ = tiny.build("0123456789+=", seed=0)
    ids = tokenizer.encode("12+7=19")
    example = Example(ids, [False] * 5 + [True, False])
    assert render(example, tokenizer, False) == "12+7=[[1]]9"
    assert render(example, tokenizer, True) == "12+7=\033[32m1\033[0m9"


@pytest.mark.parametrize("algo", ["gspo", "sft"])
def test_check_prints_what_it_found_and_leaves_nothing(tmp_path, monkeypatch, capsys, algo):
    monkeypatch.chdir(tmp_path)
    assert run(config_of("--check", "--algo", algo, "--lora-r", 8, "--lr", "1e-7")) is None
    lines = capsys.readouterr().out.splitlines()[5:]
    starts = ["noise floor of", "Triton's log-prob kernel"]
    starts += ["sampler against scorer", "clip -3.0e-04"] * (algo == "gspo")
    starts += ["lr 1.0e-07 is a rate of full", "one sample"]
    assert [
        line for line, start in zip(lines[-len(starts) - 1 :], starts, strict=False) if not line.startswith(start)
    ] == []
    assert re.fullmatch(r"\d\d\+\d\d=\[\[.+\]\]", lines[-1])
    assert list(tmp_path.iterdir()) == []
    floats = [float(x) for x in re.findall(r"(\d\.\d?e?-?\d*) a token at most", "\n".join(lines))]
    assert floats and max(floats) < 1e-4
