"""Wrong edits of nanogspo/run/worker.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/worker.py"
MUTANTS = {
    "tests/test_worker.py": [
        ("    os.dup2(2, 1)\n", "", "what a child prints is taken for an answer"),
        ("    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)\n", "", "a function that reads its stdin reads the messages"),
        ('[sys.executable, "-P", "-m"', '[sys.executable, "-m"', "a json.py in the working folder is imported"),
        ("                    os.killpg(self.process.pid, signal.SIGKILL)", "                    pass", "what it started lives on"),
        ('if reply.get("kind") in ("late", "died"):', 'if reply.get("kind") == "died":', "a late process goes on and answers the next question"),
        ("            os.killpg(0, signal.SIGKILL)", "            return", "a process without its caller stays"),
        ("        faulthandler.dump_traceback_later(seconds, exit=True)\n", "", "a process that keeps the lock stays"),
        ("        faulthandler.cancel_dump_traceback_later()\n", "        faulthandler.dump_traceback_later(0.01, exit=True)\n", "a process without work ends"),
        ("self._messages.put(None)", "None", "the thread of a process that has ended stays"),
    ],
    "tests/test_rewards.py": [
        (":= self._workers[k]) and worker.alive:", ":= self._workers[k]):", "a dead process is asked again"),
        ("        if self._closed:\n", "        if False:\n", "a process is started after the end"),
    ],
    "tests/test_environments.py": [
        ("            for worker in filter(None, self._workers):\n                worker.kill()\n", "", "processes are left behind"),
    ],
}  # fmt: skip
