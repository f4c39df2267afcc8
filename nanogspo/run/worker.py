"""A process that runs what users wrote: it may hang, raise, print, or end itself, and costs nobody but its caller a
wait of known length. Imports no torch.

    worker = Worker("nanogspo.tasks.rewards:serve")
    worker.ask(["reward.py:f"], seconds=60)      {"value": [False]}      serve(["reward.py:f"]) in the process
    worker.ask({...}, seconds=10)                {"value": {...}}        what serve handed back, called with {...}
                                                 {"error": "...", "kind": "failed" | "late" | "died"}

`serve` is given the first message and returns (reply, function); the function answers every later one. It runs in the
process's main thread, where signal.alarm works. One line of JSON there, one back; a value that JSON does not have
arrives as its str(). The function may print (it goes to stderr) and read its stdin (which is empty).

A process that is late is killed, with those that it started where there are process groups. If the caller is gone,
the pipe closes, and the process ends whatever its function does: at once, or, if the function keeps Python's lock (as a
regular expression that backtracks does), GRACE seconds after its limit by faulthandler's timer, which needs no lock.

A `Pool` holds several, begins each when it is first needed, and begins it anew when it has ended.

Spawned and read by threads, without fork or select, so that CUDA and Windows work.     Tests: tests/test_worker.py
"""

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
START = 60.0  # seconds for a process to start and import the file
MOST_WORKERS = 8
GRACE = 5.0  # seconds; the caller's own kill, at the limit, must come first


class Worker:
    """The caller's side. One thread at a time may ask."""

    def __init__(self, serve: str):
        """serve  MODULE:FUNCTION of this package"""
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # in a group of its own: Ctrl-C is for the caller
        apart = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
        self.process = subprocess.Popen(
            # -P: a json.py in the working folder is not Python's
            [sys.executable, "-P", "-m", "nanogspo.run.worker", serve],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths},
            encoding="utf-8", **apart,
        )  # fmt: skip
        self.alive = True
        self._messages, self._replies = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._talk, daemon=True).start()

    def ask(self, message: Any, seconds: float) -> dict:
        """Its reply, after `seconds` at most: reads and writes that block are left to the other thread."""
        self._messages.put(json.dumps([seconds + GRACE, message], default=str))
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            reply = {"error": f"no answer within {seconds:g} s", "kind": "late"}
        if reply.get("kind") in ("late", "died"):
            self.kill()
            if reply["kind"] == "died":
                reply["error"] += f" (exit code {self.process.returncode})"
        return reply

    def kill(self) -> None:
        if self.alive:
            self.alive = False
            if hasattr(os, "killpg"):
                with contextlib.suppress(OSError):  # all have ended
                    os.killpg(self.process.pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            self._messages.put(None)

    def _talk(self) -> None:
        with contextlib.suppress(OSError, ValueError), self.process.stdout, self.process.stdin:
            while message := self._messages.get():
                self.process.stdin.write(message + "\n")
                self.process.stdin.flush()
                self._replies.put(json.loads(self.process.stdout.readline()))  # ValueError: it ended, or within a line
        self._replies.put({"error": "its process ended", "kind": "died"})


class Pool(contextlib.AbstractContextManager):
    """Workers, and threads that ask them."""

    def __init__(self, serve: str, first: Any, workers: int = 0, threads: int = 0):
        """serve    MODULE:FUNCTION, and the first message that each process gets
        workers  processes; 0: as many as there are cores, at most 8
        threads  0: as many as there are processes
        """
        count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self._workers: list[Worker | None] = [None] * count
        self._threads = ThreadPoolExecutor(threads or count)
        self._serve, self._first, self._closed = serve, first, False

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, those that are in a call too."""
        self._closed = True
        for _ in range(2):  # again for one that was just being started
            for worker in filter(None, self._workers):
                worker.kill()
            self._threads.shutdown(cancel_futures=True)

    def _begin(self, k: int) -> dict:
        """The reply of the k-th process to the first message, if it has to be started; {} if it is there."""
        if self._closed:
            return {"error": "closed", "kind": "failed"}
        if (worker := self._workers[k]) and worker.alive:
            return {}
        worker = self._workers[k] = Worker(self._serve)
        reply = worker.ask(self._first, START)
        if "error" in reply:
            worker.kill()
            if reply["kind"] != "failed":  # it hung or ended while it imported what users wrote
                files = ", ".join([self._first] if isinstance(self._first, str) else self._first)
                reply["error"] = f"{files}: {reply['error']} while it was imported; want a file that can be imported"
        return reply


def main(serve: str) -> NoReturn:
    """The process: what its caller sends and reads gets file descriptors that users' code does not know."""
    source = os.fdopen(os.dup(0), encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    faulthandler.enable()  # a segmentation fault shows where
    messages = queue.SimpleQueue()

    def read() -> None:
        for line in source:
            messages.put(json.loads(line))
        if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with those that it started
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    module, _, name = serve.partition(":")
    function, begun = getattr(importlib.import_module(module), name), False
    while True:
        seconds, message = messages.get()
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            value = function(message)
            if not begun:
                (value, function), begun = value, True
            reply = json.dumps({"value": value}, default=str)
        except Exception as error:
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            reply = json.dumps({"error": text, "kind": "failed"})
        faulthandler.cancel_dump_traceback_later()
        sink.write(reply + "\n")
        sink.flush()


if __name__ == "__main__":
    main(sys.argv[1])
