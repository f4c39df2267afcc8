import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load
from nanogspo.run.log import RunLog, read_rows

ex00 = load("ex00")


def written_and_read(folder, rewards=(), evaluations=()) -> list[dict]:
    """The rows of a run, by way of the real file: NaN becomes null, SFT rows have no reward."""
    with RunLog(folder, steps=1, quiet=True) as log:
        log.step({"step": 1, "algo": "sft", "phase": "sft", "loss": 3.0})
        for step, reward in enumerate(rewards, start=2):
            log.step({"step": step, "algo": "gspo", "phase": "gspo", "reward": reward})
        for phase, right in evaluations:
            log.evaluation(step=9, phase=phase, successes=right, count=100)
    return read_rows(folder / "metrics.jsonl")


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30))
def test_gain_is_last_quarter_minus_first(tmp_path_factory, hundredths):
    rewards = [h / 100 for h in hundredths]
    n = max(1, len(rewards) // 4)
    want = math.fsum(rewards[-n:]) / n - math.fsum(rewards[:n]) / n
    got = ex00.gain(written_and_read(tmp_path_factory.mktemp("run"), rewards))
    assert got == pytest.approx(want, abs=1e-12)  # sums of at most 7 numbers below 1: error below 7 * 2**-53


def test_gain_leaves_out_what_was_not_finite(tmp_path):
    rewards = [0.1, math.nan, 0.1, 0.1, 0.1, math.inf, 0.5, 0.5, 0.5, 0.5]
    assert ex00.gain(written_and_read(tmp_path, rewards)) == pytest.approx(0.4)


def test_gain_counts_grpo_and_not_the_control():
    rows = [{"algo": "grpo", "reward": 0.2}, {"algo": "grpo", "reward": 0.3}, {"algo": "sft", "phase": "control"}]
    assert ex00.gain(rows) == pytest.approx(0.1)


@pytest.mark.parametrize("right, want", [(20, False), (34, False), (60, True), (5, False)])
def test_clearly_better_needs_a_gap_between_intervals(tmp_path, right, want):
    rows = written_and_read(tmp_path, evaluations=[("sft", 20), ("gspo", right)])
    assert ex00.clearly_better(rows, "gspo", "sft") is want


def test_the_last_evaluation_of_a_phase_counts(tmp_path):
    rows = written_and_read(tmp_path, evaluations=[("sft", 90), ("sft", 20), ("gspo", 20), ("gspo", 90)])
    assert ex00.clearly_better(rows, "gspo", "sft") is True
    assert ex00.clearly_better(rows, "sft", "gspo") is False


def test_a_missing_evaluation_is_named(tmp_path):
    rows = written_and_read(tmp_path, evaluations=[("sft", 20)])
    with pytest.raises(ValueError, match="control"):
        ex00.clearly_better(rows, "control", "sft")
