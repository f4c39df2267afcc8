"""Where environments run: in worker processes, or, those given from Python, in this process.

    environments = Environments("examples/calculator.py:Calculator", timeout=10)
    replies = environments(requests)          one turn of many episodes; tasks/environments.py says what these are
    environments.close()

An episode's turns go to the same process, where its object lives. A process that is late or ends is replaced, and the
new one replays the other episodes that it had, each when its next turn is due.        Tests: tests/test_environments.py
"""

import copy
import time

from nanogspo.distributed import tell
from nanogspo.run.worker import Pool
from nanogspo.tasks.environments import Environment, play


class Environments(Pool):
    """Worker processes. source: FILE.py:Class. timeout: seconds of one call of reset or step."""

    def __init__(self, source: str, timeout: float = 10.0, workers: int = 0):
        super().__init__("nanogspo.tasks.environments:serve", source, workers)
        self.timeout = timeout
        self._known: list[set] = [set() for _ in self._workers]  # episodes that have an object in each
        if "error" in (reply := self._begin(0)):  # a file that cannot be imported ends the run before it begins
            self.close()
            raise ValueError(reply["error"])

    def __call__(self, requests: list[dict]) -> list[dict]:
        """A reply to each request. Whatever an environment does, this returns."""
        shares = [[] for _ in self._workers]
        for n, request in enumerate(requests):
            shares[sum(request["id"][1:]) % len(shares)].append((n, request))
        parts = self._threads.map(self._share, range(len(shares)), shares)
        replies = {n: reply for part in parts for n, reply in part}
        return [replies[n] for n in range(len(requests))]

    def _share(self, k: int, share: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
        return [(n, self._ask(k, request)) for n, request in share]

    def _ask(self, k: int, request: dict) -> dict:
        episode = tuple(request["id"])
        if begun := self._begin(k):
            self._known[k] = set()
            if "error" in begun:
                return {"failed": begun["error"]}
        calls = 1 if episode in self._known[k] else 1 + len(request["history"])  # of a replay
        reply = self._workers[k].ask(request, self.timeout * calls)
        self._known[k] = {other for other in self._known[k] if other[0] == episode[0]} | {episode}
        return reply.get("value") or {"failed": f"{'step' if request['history'] else 'reset'}: {reply['error']}"}


class OwnEnvironments:
    """In this process. given: a class, or an object that is copied for each episode."""

    def __init__(self, given: type[Environment] | Environment, timeout: float = 10.0):
        self._make = given if isinstance(given, type) else lambda: copy.deepcopy(given)
        self._live, self.timeout, self._told = {}, timeout, False

    def __call__(self, requests: list[dict]) -> list[dict]:
        began = time.monotonic()
        replies = [play(self._make, self._live, copy.deepcopy(request)) for request in requests]
        seconds = (time.monotonic() - began) / max(1, len(requests))
        if seconds > self.timeout and not self._told:
            self._told = True
            tell(f"the environment took {seconds:.1f} s a call, and nothing ends it here; FILE.py:Class has a limit")
        return replies

    def close(self) -> None:
        self._live.clear()
