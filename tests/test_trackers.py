"""nanogspo/run/trackers.py: each tracker gets the numbers of metrics.jsonl; the real packages where they are installed.

Run: python -m pytest tests/test_trackers.py
"""

import contextlib
import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest

from nanogspo.run.log import RunLog
from nanogspo.run.trackers import numbers, open_tracker
from tests.test_log import GSPO, SFT

ROWS = [
    {**SFT, "step": 1, "phase": "sft"},
    {"step": 1, "phase": "sft", "eval_exact": 0.25},
    {**GSPO, "step": 2, "phase": "gspo", "ratio_hist": [1, 2], "reward": None},
    {"step": 2, "doctor": "noise", "says": "loud", "noise_p99": 1e-3},
]


def needs(package):
    there = importlib.util.find_spec(package)
    return pytest.mark.skipif(not there, reason=f"no {package} here: pip install -r requirements-extra.txt")


def log_rows(tracker, folder):
    with contextlib.ExitStack() as held:
        track = open_tracker(tracker, "a project", folder, {"lr": 1e-4}, held)
        log = held.enter_context(RunLog(folder, steps=2, quiet=True, tracker=track))
        for row in ROWS:
            log.step(row) if "algo" in row else log._note(row)


def test_numbers_are_told_by_phase():
    assert numbers(ROWS[1]) == {"sft/eval_exact": 0.25} and numbers(ROWS[3]) == {"noise_p99": 1e-3}
    told = numbers(ROWS[2])
    assert told["gspo/loss"] == GSPO["loss"] and not {"gspo/ratio_hist", "gspo/reward", "gspo/step", "gspo/algo"} & set(
        told
    )


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_trackers_own(tmp_path, monkeypatch, tracker):
    """With a stand-in: what init, log and finish are given."""
    calls = []
    note = lambda name: lambda *args, **given: calls.append((name, args, given))  # noqa: E731
    stand_in = SimpleNamespace(**{name: note(name) for name in ("init", "log", "finish")})
    monkeypatch.setitem(sys.modules, tracker, stand_in)
    for _ in range(2):
        log_rows(tracker, tmp_path / "run")
    inits = [given for name, _, given in calls if name == "init"]
    assert [name for name, _, _ in calls] == ["init", *["log"] * 4, "finish"] * 2
    assert inits[0] == inits[1] and inits[0]["project"] == "a project" and inits[0]["config"] == {"lr": 1e-4}
    assert inits[0]["name"].startswith("run") and inits[0]["resume"] == "allow"
    assert [given["step"] for name, _, given in calls if name == "log"] == [1, 1, 2, 2] * 2
    log_rows(tracker, tmp_path / "other")
    mine, other = (({k: i.get(k) for k in ("id", "name")}) for i in (inits[0], calls[12][2]))
    assert mine["id"] != other["id"] if tracker == "wandb" else mine["name"] != other["name"]


def test_no_tracker_and_no_package(tmp_path, monkeypatch):
    assert open_tracker("none", "p", tmp_path, {}, contextlib.ExitStack()) is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--tracker wandb without the package wandb .*requirements-extra.txt"):
        open_tracker("wandb", "p", tmp_path, {}, contextlib.ExitStack())


def test_a_tracker_that_refuses_is_one_line(tmp_path, monkeypatch):
    def init(**settings):
        raise KeyError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    line = r"^--tracker wandb: KeyError: .api_key not configured\\n\(no-tty\).; want that mended \(a login\?\), or"
    with pytest.raises(ValueError, match=line):
        open_tracker("wandb", "p", tmp_path, {}, contextlib.ExitStack())


@needs("tensorboard")
def test_tensorboard_reads_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    want = {k: v for row in ROWS for k, v in numbers(row).items()}
    assert set(events.Tags()["scalars"]) == set(want)
    for name, value in want.items():
        [event] = events.Scalars(name)
        assert event.value == pytest.approx(value) and event.step == (1 if name.startswith("sft/") else 2)


@needs("wandb")
def test_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_rows("wandb", tmp_path)
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while b"noise_p99" not in (content := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)  # a process of wandb's own writes it, and may be behind
    assert b"gspo/loss" in content and b"sft/eval_exact" in content and b"noise_p99" in content


@needs("trackio")
def test_trackio_writes_its_data_base(tmp_path, monkeypatch):
    import sqlite3

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    log_rows("trackio", tmp_path / "run")
    [file] = (tmp_path / "trackio").rglob("*.db")
    found = sqlite3.connect(file).execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in found] == [1, 1, 2, 2]
    assert json.loads(found[2][1])["gspo/loss"] == GSPO["loss"]
