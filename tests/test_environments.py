"""nanogspo/run/environments.py and tasks/environments.py: one turn of many episodes, in processes that may be lost.

Run: python -m pytest tests/test_environments.py
"""

import time

import pytest

from nanogspo import distributed
from nanogspo.run.environments import Environments, OwnEnvironments
from nanogspo.tasks.environments import play

SAYS = [{"role": "assistant", "content": "x" * n} for n in (1, 2, 3)]
FILE = """
import os, time

class Asks:
    tools = None

    def reset(self, row, seed):
        self.row, self.turns = row, 0
        print("a line that belongs on stderr")
        return [{"role": "user", "content": f"{row['ask']} {seed}"}]

    def step(self, message):
        self.turns += 1
        said = {"role": "user", "content": f"{os.getpid()}"}
        if self.turns == self.row.get("turn"):
            if self.row["do"] == "hang":
                time.sleep(60)
            os._exit(3) if self.row["do"] == "die" else self.row["missing"]
        return [said], self.turns == 3, len(message["content"])
"""


def requests(rows, turn, rollout=0):
    return [{"id": [rollout, rollout, n], "row": row, "seed": n, "history": SAYS[:turn]} for n, row in enumerate(rows)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "asks.py").write_text(FILE)
    return f"{tmp_path / 'asks.py'}:Asks"


class Counts:
    """Gives the number of its steps as reward; all that is made is in `made`."""

    made = []

    def __init__(self):
        self.made.append("new")

    def reset(self, row, seed):
        self.turns, self.last = 0, row.pop("turns")
        return [{"role": "user", "content": f"seed {seed}"}]

    def step(self, message):
        self.made.append("step")
        self.turns += 1
        return [message], self.turns == self.last, self.turns


def test_a_replaced_process_replays_an_episode():
    """The reply depends on the request alone; with its object at hand, only the last step is made."""

    def ask(live, turn, rollout=0):
        Counts.made.clear()
        (request,) = requests([{"turns": 3}], turn, rollout)
        return play(Counts, live, request)

    live, replies = {}, []
    for turn in range(4):
        replies.append(ask(live, turn))
        assert Counts.made == ["step" if turn else "new"]
    assert [reply["reward"] for reply in replies] == [None, 1.0, 2.0, 3.0]
    assert [reply["done"] for reply in replies] == [False, False, False, True] and live == {}
    for turn in range(4):
        assert ask({}, turn) == replies[turn] and Counts.made == ["new"] + ["step"] * turn
    assert ask(live, 1) == replies[1]
    assert ask(live, 3) == replies[3] and Counts.made == ["new"] + ["step"] * 3  # it has been elsewhere for a turn
    ask(live, 1)
    ask(live, 0, rollout=5)
    assert set(live) == {(5, 5, 0)}  # the objects of an earlier rollout are let go


@pytest.mark.parametrize("given", [Counts, Counts()])
def test_each_episode_has_an_object_and_a_row_of_its_own(given, capsys, monkeypatch):
    rows = [{"turns": 2}] * 2
    environments = OwnEnvironments(given)
    found = [environments(requests(rows, turn)) for turn in range(3)]
    assert [[reply["reward"] for reply in replies] for replies in found] == [[None] * 2, [1.0] * 2, [2.0] * 2]
    assert found[0][1]["messages"] == [{"role": "user", "content": "seed 1"}] and rows == [{"turns": 2}] * 2
    assert capsys.readouterr().out == ""
    environments = OwnEnvironments(given, timeout=-1.0)
    for turn in range(2):
        environments(requests(rows, turn))
    slow = "the environment took 0.0 s a call, and nothing ends it here"
    assert capsys.readouterr().out.count(slow) == 1
    environments.close()
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # whose stdout is closed
    OwnEnvironments(given, timeout=-1.0)(requests(rows, 0))
    assert f"process 1: {slow}" in capsys.readouterr().err


def test_processes_that_are_late_or_end_cost_their_episode_only(source, capfd):
    rows = [{"ask": "a"}, {"ask": "b", "turn": 2, "do": "hang"}, {"ask": "c", "turn": 2, "do": "die"}]
    rows += [{"ask": "d", "turn": 1, "do": "raise"}, {"ask": "e"}, {"ask": "f"}]
    environments = Environments(source, timeout=1.0, workers=2)
    try:
        assert [r["messages"][0]["content"] for r in environments(requests(rows, 0))] == [
            f"{row['ask']} {n}" for n, row in enumerate(rows)
        ]
        first = environments(requests(rows, 1))
        assert first[3]["failed"].startswith("step: KeyError: 'missing' (asks.py:")
        first[3] = first[5]
        pids = [reply["messages"][0]["content"] for reply in first]
        assert pids[0] == pids[2] == pids[4] != pids[1] == pids[5]  # an episode keeps its process
        assert [reply["reward"] for reply in first] == [1.0] * 6 and not any(reply["done"] for reply in first)
        began = time.monotonic()
        second = environments(requests(rows, 2))
        assert time.monotonic() - began < 20  # the limit, twice a start of Python
        assert second[1] == {"failed": "step: no answer within 1 s"}
        assert second[2] == {"failed": "step: its process ended (exit code 3)"}
        for n in (0, 4, 5):  # the last two are replayed by new processes
            assert second[n]["reward"] == 2.0
            assert (second[n]["messages"][0]["content"] == pids[n]) == (n == 0)
        assert environments._known[0] == {(0, 0, 4)}  # the new process has only what it has replayed
        third = environments(requests(rows, 3))
        assert [third[n]["done"] and third[n]["reward"] for n in (0, 4, 5)] == [3.0] * 3
        assert capfd.readouterr().out == ""
    finally:
        environments.close()
    assert all(not worker.alive for worker in environments._workers if worker)


def test_a_replay_has_the_time_of_all_its_steps(source):
    environments = Environments(source, timeout=3.0, workers=1)
    asked = []
    try:
        (request,) = requests([{"ask": "a"}], 2)
        environments._workers[0].ask = lambda message, seconds: asked.append(seconds) or {"value": {"done": True}}
        for history in (0, 2, 2):
            environments([request | {"history": SAYS[:history]}])
        environments([request | {"id": [9, 9, 9]}])
        assert asked == [3.0, 3.0, 3.0, 9.0] and environments._known == [{(9, 9, 9)}]
    finally:
        environments.close()


@pytest.mark.parametrize(
    ("text", "name", "refusal"),
    [
        ("import nothing_like_it", "A", "got ModuleNotFoundError: No module named 'nothing_like_it' .*, want a file"),
        ("class B: pass", "A", r"got no function or class A, want one of B"),
        ("class A: pass", "A", r"got no class with reset and step, want reset\(row, seed\)"),
    ],
)
def test_a_file_that_has_no_environment_is_refused(tmp_path, text, name, refusal):
    (tmp_path / "it.py").write_text(text)
    with pytest.raises(ValueError, match=refusal):
        Environments(f"{tmp_path / 'it.py'}:{name}", workers=1)
