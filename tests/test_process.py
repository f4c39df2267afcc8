"""nanogspo/run/process.py: one folder, one run, whoever starts when; and how a run is asked to stop.

Run: python -m pytest tests/test_process.py
"""

import errno
import os
import re
import signal
import subprocess
import sys

import pytest

from nanogspo.config import ROOT, TrainConfig
from nanogspo.run import process
from nanogspo.run.process import LOCK, hold, run_folder

HOLDER = """
import sys
from nanogspo.config import TrainConfig
from nanogspo.run.process import run_folder
try:
    with run_folder(TrainConfig(out=sys.argv[1])) as folder:
        print(folder, flush=True)
        sys.stdin.read()
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def holders(tmp_path):
    """start(out) -> a process in tmp_path that holds its folder until its stdin is closed."""
    started = []

    def start(out=""):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, out], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def refused(**flags):
    with pytest.raises(ValueError) as error, run_folder(TrainConfig(**flags)):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_let_go_when_its_run_ends_or_fails(tmp_path, monkeypatch):
    """From Python, where the process goes on after the run."""
    monkeypatch.chdir(tmp_path)
    for flags in ({"out": "run"}, {"out": "run"}, {"resume": "run"}, {}, {"model": "a/b", "algo": "sft"}):
        with pytest.raises(KeyError), run_folder(TrainConfig(**flags)) as folder:
            assert f"being written by another run (process {os.getpid()})" in refused(out=str(folder))
            raise KeyError
        assert [*folder.iterdir()] == []
    assert {str(f) for f in tmp_path.glob("*/*")} == {str(tmp_path / "runs" / name) for name in ("tiny", "b-sft")}


def test_no_place_for_runs_is_one_line(tmp_path, monkeypatch):
    """A link to a disk that is not there, or a file: each name below it would seem to be taken, without end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "absent")
    assert "cannot make the folder runs (" in refused()
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").touch()
    assert "cannot make the folder runs (" in refused()


def test_runs_started_at_once_get_a_folder_each_or_one_line(tmp_path, holders):
    """Three without --out: three folders. Three with the same --out: one has it, two are told so."""
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / LOCK).write_text("1")  # left by a start that was killed: taken again, by one of them
    (tmp_path / "runs" / "tiny-2").mkdir()
    (tmp_path / "runs" / "tiny-2" / "metrics.jsonl").touch()
    automatic, same = [holders() for _ in range(3)], [holders("shared") for _ in range(3)]
    folders = {child.stdout.readline().strip() for child in automatic}
    assert {folder.replace("\\", "/") for folder in folders} == {"runs/tiny", "runs/tiny-3", "runs/tiny-4"}
    [owner] = [child for child in same if child.stdout.readline()]  # the others say nothing and end
    for child in same:
        if child is not owner:
            _, err = child.communicate(timeout=60)
            assert child.returncode == 2 and err.count("\n") == 1
            # between its lock and its number a process holds the folder, and nobody can tell which it is
            assert re.search(rf"shared is being written by another run \(process ({owner.pid}|not known yet)\)", err)
    assert f"being written by another run (process {owner.pid})" in refused(out=str(tmp_path / "shared"))
    assert "being written" in refused(resume=str(tmp_path / "shared"))
    owner.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    owner.wait()
    with run_folder(TrainConfig(out=str(tmp_path / "shared"))):  # the lock has gone with its process
        assert (tmp_path / "shared" / LOCK).read_text() == str(os.getpid())
    for child in automatic:
        assert child.communicate("", timeout=60) == ("", "") and child.returncode == 0
    assert not [*(tmp_path / "runs").rglob(LOCK)]


def test_nothing_is_written_into_a_folder_of_somebody_else(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").touch()
    before = os.stat(tmp_path).st_mtime_ns
    assert "holds another run or other files" in refused(out=str(tmp_path))
    assert "which is a file" in refused(out=str(tmp_path / "thesis.txt"))
    assert "no folder here" in refused(resume=str(tmp_path / "absent"))
    assert os.stat(tmp_path).st_mtime_ns == before and os.listdir(tmp_path) == ["thesis.txt"]

    (tmp_path / "run").mkdir()
    lock = process._lock

    def another_run_was_faster(file):  # it took the folder, wrote and ended after this one had looked
        (tmp_path / "run" / "metrics.jsonl").touch()
        return lock(file)

    monkeypatch.setattr(process, "_lock", another_run_was_faster)
    assert "holds another run" in refused(out=str(tmp_path / "run"))


def test_a_lock_on_a_file_that_is_gone_holds_nothing(tmp_path, monkeypatch):
    """The run before ended, and removed the file, between this one's opening it and locking it."""
    lock, opened = process._lock, []

    def removed_meanwhile(file):
        if not opened:
            os.unlink(tmp_path / LOCK)
        opened.append(file)
        return lock(file)

    monkeypatch.setattr(process, "_lock", removed_meanwhile)
    with hold(tmp_path):
        assert len(opened) == 2
        assert "being written" in refused(out=str(tmp_path))
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(process.fcntl is None, reason="no flock here: Windows locks by another call")
def test_without_locks_one_line_says_so(tmp_path, monkeypatch, capsys):
    """Automatic names are then kept apart by being made anew each time, not by emptiness."""

    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(process.fcntl, "flock", unsupported)
    monkeypatch.chdir(tmp_path)
    with run_folder(TrainConfig(out="run")):
        assert capsys.readouterr().out.count("this file system has no locks") == 1
    with run_folder(TrainConfig()) as one, run_folder(TrainConfig()) as other:
        assert (one.name, other.name) == ("tiny", "tiny-2")


# ----------------------------------------------------------------------------
# being asked to stop


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here: Windows ends a program with its console")
def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise(capsys):
    """A second SIGHUP or SIGTERM changes nothing (a terminal and its shell send one each), a second Ctrl-C ends it."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in (signal.SIGHUP, signal.SIGINT):  # a shell starts `train.py &` in a script with the second ignored
            signal.signal(number, signal.SIG_IGN)
        stop = process.StopRequest()
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
            assert not stop
            signal.signal(number, lambda *_: None)  # not the default, which would end the tests
        stop = process.StopRequest()
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                pytest.fail("stopped at once")
            assert stop
        assert capsys.readouterr().err.count("stopping after") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_full_disk_is_said_before_a_model_is_read(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"\.lock: cannot be written .*; want free space on its disk"), hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
