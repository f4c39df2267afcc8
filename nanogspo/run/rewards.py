"""The rewards of a run: which functions, with which weights, in how many processes, and what became of each call.

    with Rewards(["reward.py:f=0.7", "format=0.3"], timeout=10) as rewards:
        rewards.probe(group)                       ends the run if a reward cannot work at all
        scores = rewards(groups, step)             never does

A reward given as text runs in worker processes (run/worker.py), which are killed at the time limit and replaced. One
given as a function runs here, in the main thread (if it is async, in others), and a slow one is warned about. One
in TRL's form is called once for a group; if that fails or is late, once for each of its answers, so that a bad answer
costs only itself.

A value that is left out (nan) is counted under what became of it:

    failed      raised, or returned something that is no value
    late        no answer within the time limit, which is that of one call
    died        its process ended: os._exit, a segmentation fault, out of memory
    not_finite  nan, infinite, or too large for the arithmetic of training
    none        None: no opinion

All but the last are printed once for each reward, with the answer, by process 0 on stdout and by others on stderr; the
counts of each step are in its facts.

Reading order: Rewards.__call__, _run, _ask, _scores.        Tests: tests/test_rewards.py
"""

import dataclasses
import itertools
import math
import queue
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanogspo.distributed import tell
from nanogspo.inputs import shown, some
from nanogspo.run.worker import Pool
from nanogspo.tasks.rewards import REFERENCES, Group, Mean, Reward, Scores, parse, reference

THREADS = 32  # calls of async functions that wait at the same time
LARGEST = 1e18  # float32 must hold its square: rewards are divided by their standard deviation


class Job(NamedTuple):
    """One call."""

    reward: int
    group: int
    answers: tuple[int, ...]


class Rewards(Pool):
    """Raises ValueError for a reward that cannot be: an unknown name, a signature that fits neither form."""

    def __init__(
        self,
        rewards: Sequence[str | Callable],
        weights: Sequence[float] | None = None,
        *,
        timeout: float = 10.0,
        workers: int = 0,
        state: Callable[[], dict] | None = None,
    ):
        """rewards  texts as tasks/rewards.py::parse reads them, or functions
        weights  one each; they go before those in the texts
        timeout  seconds for one call
        workers  processes; 0: as many as there are cores, at most 8
        state    what TRL's functions find in trainer_state, beside global_step
        """
        specs = [parse(reward) if isinstance(reward, str) else None for reward in rewards]
        self._rewards = [f if isinstance(f, str) else Reward(f) for f in rewards]
        names = [spec.name if spec else f.name for spec, f in zip(specs, self._rewards, strict=True)]
        self.names = [name if name not in names[:k] else f"{name}_{k + 1}" for k, name in enumerate(names)]
        self.weights = list(weights) if weights else [spec.weight if spec else 1.0 for spec in specs]
        if len(self.weights) != len(specs):
            raise ValueError(f"got {len(self.weights)} weights for {len(specs)} rewards, want one each")
        self._batch: dict[str, bool] = {}  # of the texts: whether they have TRL's form, as the processes say
        self.timeout, self._state = timeout, state
        texts = [reward for reward in self._rewards if isinstance(reward, str)]
        super().__init__("nanogspo.tasks.rewards:serve", texts, workers, THREADS)
        self._idle = queue.LifoQueue()  # the one used last is taken first, and others start only when they are needed
        for k in range(len(self._workers)):
            self._idle.put(k)
        self._quiet, self._told = False, set()

    def probe(self, group: Group) -> None:
        """Try each reward on four texts: the group's answers first, then a right answer, none, a number, a sentence.

        Raises ValueError for a file that cannot be imported, a signature that fits neither form, four failures.
        """
        right = [reference(group.row)] if any(group.row.get(name) is not None for name in REFERENCES) else ["Yes"]
        texts = [*group.answers, *right, "", "42", "One sentence,\nand another."][:4]
        ids = [*group.ids, *([0] * max(1, len(text)) for text in texts[len(group.ids) :])][:4]
        self._quiet = True
        scores = self([dataclasses.replace(group, answers=texts, ids=ids)], 0)
        self._quiet = False
        for k, name in enumerate(self.names):
            errors = [note["failed"][name] for note in scores.notes if name in note.get("failed", ())]
            if len(errors) == len(texts):
                kind = "text" if isinstance(group.prompt, str) else "lists of messages"
                form = f"; completions are {kind}, as the prompt is" if self._is_batch(k) else ""
                late = f"reward/{name}/late" in scores.facts
                what = "raise --reward-timeout" if late else f"correct it (columns: {some(group.row)}{form})"
                raise ValueError(f"reward {name} failed on all four texts it was tried on, first: {errors[0]}; {what}")

    def __call__(self, groups: list[Group], step: int) -> Scores:
        """The values of all answers. Once the first process has started, this returns whatever a reward does."""
        state = (self._state() if self._state else {}) | {"global_step": step}
        jobs = []
        for k in range(len(self.names)):
            for g, group in enumerate(groups):
                whole = tuple(range(len(group.answers)))
                jobs += [Job(k, g, part) for part in ([whole] if self._is_batch(k) else zip(whole))]
        done = self._run(jobs, groups, state)
        again = [job for job in jobs if "error" in done[job] and len(job.answers) > 1]
        for job in again:
            del done[job]
        done |= self._run([job._replace(answers=(j,)) for job in again for j in job.answers], groups, state)
        return self._scores(groups, done)

    def _is_batch(self, k: int) -> bool:
        """Starts the first process, if it is about a file."""
        if isinstance(reward := self._rewards[k], Reward):
            return reward.batch
        if reward not in self._batch and "error" in (reply := self._ask(None)):
            raise ValueError(reply["error"])
        return self._batch[reward]

    def _run(self, jobs: list[Job], groups: list[Group], state: dict) -> dict[Job, dict]:
        def part(job: Job) -> Group:
            group, batch = groups[job.group], self._is_batch(job.reward)
            ids = [group.ids[j] for j in job.answers if batch]
            return dataclasses.replace(group, answers=[group.answers[j] for j in job.answers], ids=ids)

        replies = {}
        for job in jobs:
            if isinstance(reward := self._rewards[job.reward], str):
                message = {"reward": reward, "group": vars(part(job)), "state": state}
                replies[job] = self._threads.submit(self._ask, message)
            elif reward.waits:
                replies[job] = self._threads.submit(self._call, job.reward, part(job), state)
        # the others are at work while this thread runs its own
        own = {job: self._call(job.reward, part(job), state) for job in jobs if job not in replies}
        return {job: own.get(job) or replies[job].result() for job in jobs}

    def _call(self, k: int, group: Group, state: dict) -> dict:
        start = time.monotonic()
        reply = self._rewards[k](group, state)
        if (seconds := time.monotonic() - start) > self.timeout:
            self._tell(k, "slow", f"took {seconds:.1f} s, more than {self.timeout:g} s, and nothing ends it here")
        return {"kind": "failed"} | reply

    def _ask(self, message: dict | None) -> dict:
        """A call in an idle process, or in a new one. With None: what a process says when it has started."""
        k = self._idle.get()
        try:
            begun = self._begin(k)
            self._batch = begun.get("value", self._batch)
            if "error" in begun or message is None:
                return begun
            reply = self._workers[k].ask(message, self.timeout)
            return {"kind": "failed"} | reply.get("value", reply)
        finally:
            self._idle.put(k)

    def _scores(self, groups: list[Group], done: dict[Job, dict]) -> Scores:
        texts = [answer for group in groups for answer in group.answers]
        first = [0, *itertools.accumulate(len(group.answers) for group in groups)]
        values = [[math.nan] * len(self.names) for _ in texts]
        notes, extras = [{"rewards": dict.fromkeys(self.names)} for _ in texts], [{} for _ in texts]
        found, counts, samples = defaultdict(list), Counter(), {}
        for (k, g, part), reply in done.items():
            name = self.names[k]
            for metric, value in reply.get("metrics", ()):
                found[metric] += [value] if math.isfinite(value) else []
            for at, j in enumerate(part):
                i = first[g] + j
                extras[i] |= {column: listed[at] for column, listed in reply.get("extra", {}).items()}
                said = reply["values"][at] if "values" in reply else None
                values[i][k], kind = _total(said) if "values" in reply else (math.nan, reply["kind"])
                if not kind:
                    notes[i]["rewards"][name] = said
                    parts = said if isinstance(said, dict) else {}
                    for key, value in [("", values[i][k]), *((f"/{key}", value) for key, value in parts.items())]:
                        found[f"reward/{name}{key}"] += [] if value is None else [value]
                    continue
                counts[f"reward/{name}/{kind}"] += 1
                if kind != "none":
                    why = notes[i].setdefault("failed", {})[name] = reply.get(
                        "error", f"got {said}, want finite numbers"
                    )
                    samples.setdefault((k, kind), f"{why}, for the answer {shown(texts[i])}")
        for k, name in enumerate(self.names):
            if counts[f"reward/{name}/none"] == len(texts):
                self._tell(k, "none", f"got None for all {len(texts)} answers, want numbers; is a `return` missing?")
        for (k, kind), sample in samples.items():
            self._tell(k, kind, f"{counts[f'reward/{self.names[k]}/{kind}']} of {len(texts)} answers {kind}: {sample}")
        means = {name: Mean.of(listed) for name, listed in found.items() if listed}
        notes = [extra | note for extra, note in zip(extras, notes, strict=True)]
        return Scores(values, self.weights, means | counts, notes)

    def _tell(self, k: int, kind: str, text: str) -> None:
        """Once for each reward and kind."""
        if not self._quiet and (k, kind) not in self._told:
            self._told.add((k, kind))
            tell(f"reward {self.names[k]}: {text}")


def _total(said: float | dict | None) -> tuple[float, str]:
    """(value, "") or (nan, kind). A dict counts with its sum, without parts that are None."""
    parts = [part for part in (said.values() if isinstance(said, dict) else [said]) if part is not None]
    if not parts:
        return math.nan, "none"
    total = sum(parts)
    return (total, "") if all(abs(x) < LARGEST for x in (total, *parts)) else (math.nan, "not_finite")
