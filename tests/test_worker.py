"""nanogspo/run/worker.py: a process that may hang, die or print, and ends with its caller.

Run: python -m pytest tests/test_worker.py
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nanogspo.config import ROOT
from nanogspo.run.worker import Worker

SERVE = """
import os, re, subprocess, sys, time

def serve(message):
    if message == "refuse":
        raise ValueError("got nothing to serve")
    print("hello to nobody")
    return "ready", answer

def answer(message):
    if message == "print":
        print("not JSON")
        os.write(1, b"nor this")
        subprocess.run([sys.executable, "-c", "print('nor that')"])
        return sys.stdin.read()
    if message == "die":
        os._exit(3)
    if message == "child":
        return subprocess.Popen(["sleep", "60"]).pid
    if message == "hang":
        time.sleep(60)
    if message == "raise":
        raise KeyError("a")
    if message == "exit":
        sys.exit(5)
    return {"said": message, "torch": "torch" in sys.modules, "set": {1}}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "served.py").write_text(SERVE)
    (tmp_path / "json.py").write_text("raise SystemExit('not the JSON that was meant')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.chdir(tmp_path)
    workers = []

    def begin(message="go"):
        workers.append(Worker("served:serve"))
        return workers[-1], workers[-1].ask(message, 30)

    yield begin
    for worker in workers:
        worker.kill()


def gone(pid, seconds=20.0):
    """Whether the process ends in this time; one that has ended and that nobody waits for is gone too."""
    for _ in range(int(seconds * 50)):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_what_is_printed_is_no_answer(start, capfd):
    """Prints of Python, of the file descriptor and of a child go to stderr; stdin is empty, and not the messages."""
    worker, ready = start()
    assert ready == {"value": "ready"}
    assert worker.ask("print", 10) == {"value": ""}
    assert worker.ask({"é\ud800": 1}, 10)["value"] == {"said": {"é\ud800": 1}, "torch": False, "set": "{1}"}
    assert capfd.readouterr().out == ""


def test_what_raises_is_told_and_goes_on(start):
    worker, _ = start()
    assert worker.ask("raise", 10) == {"error": "KeyError: 'a'", "kind": "failed"}
    time.sleep(0.3)  # without work
    assert worker.ask("hello", 10)["value"]["said"] == "hello"
    assert start("refuse")[1] == {"error": "got nothing to serve", "kind": "failed"}


def test_a_late_process_is_killed_at_its_limit_and_its_children_too(start):
    worker, _ = start()
    child = worker.ask("child", 10)["value"]
    begin = time.monotonic()
    assert worker.ask("hang", 0.3) == {"error": "no answer within 0.3 s", "kind": "late"}
    assert time.monotonic() - begin < 20  # it hangs for 60 s
    assert not worker.alive and worker.process.returncode == -signal.SIGKILL
    assert gone(child)


def test_a_process_that_is_killed_leaves_no_thread_and_no_pipe(start):
    worker, _ = start()
    worker.kill()
    for _ in range(1000):
        if worker.process.stdout.closed:
            break
        time.sleep(0.01)
    assert worker.process.stdin.closed and worker.process.stdout.closed


def test_a_process_that_ends_itself_is_told_at_once(start):
    worker, _ = start()
    assert worker.ask("die", 30) == {"error": "its process ended (exit code 3)", "kind": "died"}
    assert not worker.alive


@pytest.mark.skipif(os.name == "nt", reason="looks at /proc")
@pytest.mark.parametrize(
    "hang, grace",
    [("time.sleep(60)", 5), ("import re; re.match('(a+)+$', 'a' * 60 + 'b')", -59)],
    ids=["sleeps", "keeps the lock"],
)
def test_a_killed_caller_leaves_no_process(tmp_path, hang, grace):
    """kill -9 of the caller. A backtracking expression keeps Python's lock, so that no other thread runs: that process
    ends by its timer, after the limit of 60 s and GRACE, here -59."""
    (tmp_path / "served.py").write_text(
        f"import time\ndef serve(message):\n    return None, answer\ndef answer(message):\n    {hang}\n"
    )
    caller = textwrap.dedent(f"""
        from nanogspo.run import worker
        w = worker.Worker("served:serve")
        w.ask(None, 30)
        print(w.process.pid, flush=True)
        worker.GRACE = {grace}
        w.ask(None, 60)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen([sys.executable, "-c", caller], env=environment, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    time.sleep(0.3)  # until it is within its function
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(pid)
