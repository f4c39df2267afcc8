"""The evaluations of a run: made once each, also by a resumed run; the weights of the best one; and when to give up.

Tests: tests/test_train.py, tests/test_own.py
"""

import dataclasses
import math
import pathlib

from nanogspo import distributed, policy, sharding
from nanogspo.data import Data
from nanogspo.evaluation import examine, held_out_loss, sample_answers
from nanogspo.run.log import RunLog
from nanogspo.run.process import StopRequest
from nanogspo.sampler import Sampler


@dataclasses.dataclass
class Evaluations:
    data: Data
    sampler: Sampler
    log: RunLog
    folder: pathlib.Path
    stop: StopRequest

    def examine(self, problems: list, step: int) -> tuple[int, dict[str, float]]:
        """How many of these problems are answered right, 0 if the run is asked to stop; and other numbers."""
        with sharding.gathered(self.sampler.model):
            return examine(self.sampler, problems, self.log.sampling(len(problems), self.stop), step)

    def make(self, step: int, phase: str, last: bool = False) -> None:
        """Held-out problems or rows, after update `step`. Stopped in the middle it logs nothing, and the resumed run
        makes it anew. last: of the run, which also answers a few rows."""
        config, data, log, model = self.sampler.config, self.data, self.log, self.sampler.model
        where = {"step": step, "phase": phase}
        if log.has(**where, eval_count=config.eval_size):  # already logged: the run was killed after this row
            return
        if data.held_out:
            with sharding.gathered(model):
                loss, accuracy = held_out_loss(model, data.held_out, config, self.stop)
                on_step = log.sampling(3, self.stop)
                answers = sample_answers(model, data.chat, data.held_out, config, on_step) if last else []
            if not distributed.agree(self.stop):
                self.keep_best(phase, -loss)
                log.answers(step, answers)
                log.held_out(**where, loss=loss, accuracy=accuracy, count=config.eval_size)
        if data.problems:
            right, facts = self.examine(data.problems, step)
            if not distributed.agree(self.stop):
                self.keep_best(phase, facts.get("eval_reward", right / len(data.problems)))
                log.evaluation(**where, successes=right, count=config.eval_size, **facts)

    def keep_best(self, phase: str, result: float) -> None:
        """Keep the weights if this evaluation of the main phase is better than all before it."""
        config, best = self.sampler.config, max(self.log.results(phase), default=-math.inf)
        if config.keep_best and phase == config.algo and result > best:
            policy.save(self.sampler.model, config, self.folder / "best", self.data.chat.tokenizer)

    def no_better(self, phase: str) -> bool:
        """Whether --patience is at its end: metrics.jsonl says so, and says it to a resumed run too."""
        n = self.sampler.config.patience
        results = self.log.results(phase) if n else []  # asked before every update
        return phase == self.sampler.config.algo and 0 < n < len(results) and max(results[-n:]) <= max(results[:-n])
