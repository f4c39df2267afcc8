import math

import pytest

from lessons.exercises import load

pushing_fraction = load("ex19").pushing_fraction


def row(trained=0.8, low=0.1, high=0.15, algo="gspo"):
    return {"step": 1, "algo": algo, "trained_frac": trained, "clip_low_frac": low, "clip_high_frac": high}


def test_the_example():
    assert pushing_fraction([row()]) == pytest.approx(0.6)


def test_a_clip_is_a_share_of_those_with_an_advantage():
    assert pushing_fraction([row(0.5, 0.5, 0.5)]) == 0 and pushing_fraction([row(0.5, 0, 0)]) == 0.5


def test_only_updates_of_rl_count():
    sft = {"step": 1, "algo": "sft", "loss": 1.0}
    evaluation = {"step": 0, "phase": "start", "eval_exact": 0.1}
    said = {"step": 1, "doctor": "loss", "says": "a loss near 0 is expected"}
    assert pushing_fraction([evaluation, sft, said, row(), row(1.0, 0, 0)]) == pytest.approx(0.8)
    assert math.isnan(pushing_fraction([sft, evaluation]))


def test_what_is_not_finite_pushes_nothing():
    assert pushing_fraction([row(), row(low=None)]) == pytest.approx(0.3)
    assert pushing_fraction([row(algo="grpo")]) == pytest.approx(0.6)
