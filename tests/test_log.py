"""nanogspo/run/log.py: the files a run leaves, and what a killed and resumed run finds in them.

Run: python -m pytest tests/test_log.py
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.config import TrainConfig
from nanogspo.run.log import RunLog, read_rows, step_line, summary, wilson_interval

GSPO = {
    "algo": "gspo",
    "reward": 0.31,
    "loss": -0.002,
    "ratio_mean": 1.0,
    "ratio_min": 0.9998,
    "ratio_max": 1.0004,
    "truncated_frac": 0.25,
    "zero_spread_frac": 0.125,
    "clip_low_frac": 0.01,
    "clip_high_frac": 0.02,
    "entropy": 0.7,
    "answer_len": 5.1,
    "step_s": 2.1,
}
SFT = {"algo": "sft", "loss": 1.25, "token_accuracy": 0.5, "tokens_per_s": 12345.6, "step_s": 0.25}


def text_of(folder, name="metrics.jsonl"):
    return (folder / name).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------
# the interval


@given(n=st.integers(1, 1000), data=st.data())
def test_wilson_bounds_solve_their_equation(n, data):
    """Each bound p, unless it is 0 or 1, lies exactly z standard errors from the share: equation (1), not solved."""
    successes = data.draw(st.integers(0, n))
    share, (low, high) = successes / n, wilson_interval(successes, n)
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            # both sides come from a handful of float64 operations on numbers up to 1: 1e-12 is thousands of roundings
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-12)
    assert (low > 0) == (successes > 0) and (high < 1) == (successes < n)


@given(n=st.integers(0, 1000), data=st.data())
def test_wilson_is_symmetric(n, data):
    """Counting failures instead of successes mirrors the interval."""
    successes = data.draw(st.integers(0, n))
    (low, high), (other_low, other_high) = wilson_interval(successes, n), wilson_interval(n - successes, n)
    assert (other_low, other_high) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_known_values():
    """4 of 20 by hand: z^2 = 3.8415, so (0.2 + 0.0960 +- sqrt(0.16 * 0.19207 + 0.19207^2 / 4)) / 1.19207."""
    assert wilson_interval(4, 20) == pytest.approx((0.0807, 0.4160), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for successes, n in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"got {successes} successes of {n}, want"):
            wilson_interval(successes, n)


# ----------------------------------------------------------------------------
# files

not_finite = st.sampled_from([math.nan, math.inf, -math.inf])  # too rare among all floats to be drawn by chance
numbers = st.one_of(
    not_finite, st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=4), st.none()
)


@given(st.lists(st.dictionaries(st.text(max_size=4), numbers, max_size=4), max_size=4))
def test_every_row_is_strict_json(tmp_path_factory, rows):
    """NaN and infinities become null: a bare NaN is no JSON, and most readers stop at the first one."""
    folder = tmp_path_factory.mktemp("run")
    with RunLog(folder, steps=1, quiet=True) as log:
        for row in rows:
            log.step({**GSPO, **row, "algo": "gspo", "step": 3})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = text_of(folder).split("\n")
    assert lines.pop() == "" and len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        got = json.loads(line, parse_constant=refuse)
        for key, value in row.items():
            if key not in ("algo", "step"):
                finite = not isinstance(value, float) or math.isfinite(value)
                assert got[key] == (value if finite else None)


def test_tensors_and_numpy_scalars_are_numbers(tmp_path):
    with RunLog(tmp_path, steps=1, quiet=True) as log:
        log.step({"step": 1, "algo": "sft", "loss": torch.tensor(0.5), "x": [torch.tensor(math.nan), numpy.float32(2)]})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "algo": "sft", "loss": 0.5, "x": [None, 2.0]}]


def test_samples_keep_their_text(tmp_path):
    sample = {"step": 1, "prompt": "47+38=", "answer": "Zażółć\n\u2028 ", "reward": 0.5}  # U+2028 ends a line for some
    with RunLog(tmp_path, steps=1, quiet=True) as log:
        log.samples([sample, sample])
    assert read_rows(tmp_path / "samples.jsonl") == [sample, sample]
    assert text_of(tmp_path, "samples.jsonl").count("\n") == 2


def test_evaluation_row(tmp_path):
    with RunLog(tmp_path, steps=1, quiet=True) as log:
        row = log.evaluation(step=7, phase="sft", successes=31, count=100, eval_reward=0.6)
        log.evaluation(step=8, phase="sft", successes=0, count=0)
    low, high = wilson_interval(31, 100)
    want = {"step": 7, "phase": "sft", "eval_exact": 0.31, "eval_low": low, "eval_high": high, "eval_count": 100}
    assert row == want | {"eval_reward": 0.6}
    assert read_rows(tmp_path / "metrics.jsonl")[0] == row
    assert read_rows(tmp_path / "metrics.jsonl")[1]["eval_exact"] is None


def test_a_killed_run_keeps_its_rows(tmp_path):
    program = (
        "import os, signal; from nanogspo.run.log import RunLog\n"
        f"log = RunLog({str(tmp_path)!r}, steps=9, quiet=True)\n"
        "for step in range(3): log.step({'step': step, 'algo': 'sft'})\n"
        "log.samples([{'step': 2}]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 2}]


@given(steps=st.integers(0, 6), resume=st.integers(0, 6), half=st.booleans())
def test_resuming_drops_what_comes_after(tmp_path_factory, steps, resume, half):
    """Rows up to the step are kept byte for byte; a half-written last line goes; what follows is appended."""
    folder = tmp_path_factory.mktemp("run")
    with RunLog(folder, steps=6, quiet=True) as log:
        for step in range(1, steps + 1):
            log.step({**SFT, "step": step, "loss": 0.1 * step})
            log.samples([{"step": step, "answer": "é"}])
    before = {name: text_of(folder, name) for name in ("metrics.jsonl", "samples.jsonl")}
    if half:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "lo')
    with RunLog(folder, steps=6, resume_step=resume, quiet=True) as log:
        log.step({**SFT, "step": resume + 1})
    kept = min(steps, resume)
    assert text_of(folder).splitlines()[:-1] == before["metrics.jsonl"].splitlines()[:kept]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [*range(1, kept + 1), resume + 1]
    assert text_of(folder, "samples.jsonl").splitlines() == before["samples.jsonl"].splitlines()[:kept]
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "samples.jsonl"]  # no temporary file


def test_a_row_that_is_there_is_found_and_a_change_is_noted_once(tmp_path, capsys):
    """Whoever is killed after a row, or in the middle of its last byte, does not write it again, or onto its line."""
    with RunLog(tmp_path, steps=4) as log:
        log.step({"step": 1, "algo": "sft", "phase": "sft"})
        log.evaluation(step=1, phase="sft", successes=1, count=2)
        assert log.has(step=1, phase="sft", eval_count=2) and not log.has(step=1, phase="sft", eval_count=3)
    file = tmp_path / "metrics.jsonl"
    rows = read_rows(file)
    file.write_bytes(file.read_bytes()[:-1])
    for _ in range(2):
        with RunLog(tmp_path, steps=4, resume_step=1) as log:
            assert log.has(step=1, phase="sft", eval_count=2) and not log.has(algo="sft")
            log.changed(1, ["--lr (1 -> 2)", "data"])
        assert "goes on with what has changed: --lr (1 -> 2), data" in capsys.readouterr().out
        assert read_rows(file) == [*rows, {"step": 1, "accepted_changes": ["--lr (1 -> 2)", "data"]}]
    with RunLog(tmp_path, steps=4, resume_step=0) as log:
        assert not log.has(step=1)


@pytest.mark.parametrize("line", ["[1]", "3", '{"step": "2"}', '{"step": null}'])
def test_what_is_no_row_of_ours_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: got broken JSON, want a row"):
        RunLog(tmp_path, steps=4, resume_step=1)


def test_a_new_run_starts_empty(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path / "deep" / "er", steps=1, quiet=True) as log:
            log.step({**SFT, "step": 1})
    assert len(read_rows(tmp_path / "deep" / "er" / "metrics.jsonl")) == 1


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: got broken JSON, want a row; delete the line"):
        RunLog(tmp_path, steps=1, resume_step=2, quiet=True)
    assert text_of(tmp_path).startswith('{"step": 1}\n{"st\n')  # and nothing was lost by looking
    assert read_rows(tmp_path / "missing.jsonl") == []


# ----------------------------------------------------------------------------
# console


def test_step_lines():
    assert step_line({**GSPO, "step": 40}) == (
        "step   40 | reward 0.31 | trunc 0.25 | 0-spread 0.12 | loss -0.002"
        " | ratio 1.000 ±0.0004 | clip 0.03 | len    5.1 | 2.1 s"
    )
    assert step_line({**SFT, "step": 12345}, width=6) == (
        "step  12345 | loss  1.2500 | accuracy 0.500 |    12,346 tokens/s | 0.2 s"
    )


@pytest.mark.parametrize("base", [GSPO, SFT])
def test_columns_stay_in_place(base):
    """The bars stand under each other from step 1 to 9999, for numbers of either sign, and for NaN."""
    lines = [step_line({**base, "step": step, "loss": loss}) for step in (1, 9999) for loss in (0.5, 1.25, math.nan)]
    lines += [step_line({**SFT, "step": 1, "loss": 11.9})] if base is SFT else []  # ln 151,936: an untrained Qwen
    lines += [step_line({**base, "step": 2, "reward": None, "answer_len": 4096.0, "tokens_per_s": 1e6})]
    lines += [step_line({**GSPO, "step": 3, "loss": -0.25})] if base is GSPO else []
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1


@pytest.mark.parametrize("low, high", [(math.nan, 1.0), (1.0, math.nan), (None, 1.0)])
def test_a_ratio_of_nan_is_shown(low, high):
    """max(0.0, nan) is 0.0 in Python: a broken ratio would look like a perfect one."""
    assert "| unrewarded 0.25 |" in step_line({**GSPO, "step": 1, "unrewarded_frac": 0.25})
    assert "±nan" in step_line({**GSPO, "step": 1, "ratio_min": low, "ratio_max": high})


def test_console_is_plain_lines_without_a_terminal(tmp_path, capsys):
    with RunLog(tmp_path / "a", steps=2) as log:
        log.evaluation(step=0, phase="start", successes=2, count=500)
        log.step({**GSPO, "step": 1})
        log.say("done")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "eval    0 | start   | exact   0.4% | 95 % interval 0.1% to 1.4% | 2 of 500",
        step_line({**GSPO, "step": 1}),
        "done",
    ]
    assert err == ""
    with RunLog(tmp_path / "b", steps=2, quiet=True) as log:
        log.step({**GSPO, "step": 1})
        log.say("done")
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_that_ends_where_the_run_does(tmp_path, monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # draw every update
    with RunLog(tmp_path, steps=4, resume_step=2) as log:
        for step in (3, 4):
            log.step({**GSPO, "step": step})
    assert out.getvalue().splitlines() == [step_line({**GSPO, "step": step}) for step in (3, 4)]
    assert "2/4" in err.getvalue() and "4/4" in err.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_rollout_says_how_far_it_is(tmp_path, monkeypatch, terminal):
    """10,000 steps of 10 ms: a line every half a minute in a log, the bar once a second on a terminal, and no word
    about a rollout that is shorter. It ends when the run is to stop."""
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    clock = iter(range(10**6))
    monkeypatch.setattr("nanogspo.run.log.time", SimpleNamespace(monotonic=lambda: next(clock) / 100))
    with RunLog(tmp_path, steps=4) as log:
        for steps in (10_000, 90):
            stop = []
            on_step = log.sampling(64, stop)
            assert not any(on_step(64 * n // steps, n) for n in range(1, steps + 1))
            if steps == 10_000:
                stop.append("Ctrl-C")
                assert on_step(64, steps)
                said = out.getvalue(), err.getvalue()
        assert (out.getvalue(), err.getvalue()) == said  # the short one
        if terminal:
            assert not out.getvalue() and 90 < err.getvalue().count("sampled ") <= 100
            log.step({**GSPO, "step": 1})
            assert "sampled" not in err.getvalue().split("\r")[-1]
        else:
            words = "sampled {} of 64 answers (running: {} tokens)"
            assert out.getvalue().splitlines() == [words.format(64 * n // 10_000, n) for n in (3000, 6000, 9000)]
            assert not err.getvalue()


def test_the_doctors_sentences_are_said_once_in_a_run_however_often_it_is_resumed(tmp_path, capsys):
    for resume_step in (None, 4):
        with RunLog(tmp_path, steps=9, resume_step=resume_step) as log:
            assert [row["step"] for row in log.updates("gspo")] == [3] * bool(resume_step)
            log.step({**GSPO, "step": 3})
            log.step({**SFT, "step": 3})
            log.says(4, "noise", "very noisy", noise_p99=0.5)
            log.says(4, "noise", "very noisy", noise_p99=0.5)
    said = [line for line in capsys.readouterr().out.splitlines() if "step" not in line]
    assert said == ["very noisy"]
    notes = [row for row in read_rows(tmp_path / "metrics.jsonl") if "doctor" in row]
    assert notes == [{"step": 4, "doctor": "noise", "says": "very noisy", "noise_p99": 0.5}]


def test_held_out_rows_and_answers(tmp_path, capsys):
    answer = {"prompt": "a" * 150 + "\n" + "b" * 150, "answer": "c", "reward": None, "reference": "d"}
    with RunLog(tmp_path, steps=1) as log:
        log.held_out(step=7, phase="sft", loss=1.25, accuracy=0.5, count=20)
        log.answers(7, [answer])
    assert capsys.readouterr().out.splitlines() == [
        "eval    7 | sft     | loss  1.2500 | accuracy 0.500 | 20 held-out rows",
        f"   prompt  '{'a' * 60} ... {'b' * 130}'",
        "   answer  'c'",
        "reference  'd'",
    ]
    row = {"step": 7, "phase": "sft", "eval_loss": 1.25, "eval_token_accuracy": 0.5, "eval_count": 20}
    assert read_rows(tmp_path / "metrics.jsonl") == [row]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 7, **answer}]


def test_what_a_run_prints_last_can_be_pasted(tmp_path):
    """Quoted for a shell; and of the tiny model, which is saved nowhere else, the whole model is there."""
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    for config, flags in [
        (TrainConfig(lora_r=4), f"--model '{folder}/model'"),
        (TrainConfig(model="my models/m", lora_r=4), f"--model 'my models/m' --adapter '{folder}/adapter'"),
        (TrainConfig(model="my models/m", lora_r=0), f"--model '{folder}/model'"),
    ]:
        last = summary(config, folder, None, "1+1=", 1.0).splitlines()[-1]
        assert last.startswith(f"try it: python sample.py {flags} ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_is_said_with_the_file(tmp_path, name):
    """By the row, and once more as the file is closed: that error is the one that is printed."""
    (tmp_path / name).symlink_to("/dev/full")
    said = f"{name}: cannot be written .*No space left on device.*; want free space on its disk"
    log = RunLog(tmp_path, steps=1, quiet=True)
    with pytest.raises(OSError, match=said):
        log._row({"step": 1}) if name == "metrics.jsonl" else log.samples([{"step": 1}])
    with pytest.raises(OSError, match=said):
        log.close()
