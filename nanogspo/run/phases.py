"""The phases of a run: an SFT warm-up, the main part, and the control beside it.

Tests: tests/test_train.py
"""

import dataclasses
import sys

from nanogspo.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run with one algorithm: the SFT warm-up, the main part, the control."""

    name: str  # of its rows in metrics.jsonl: sft, gspo, grpo, control
    algo: str
    steps: int
    lr: float
    seconds: float = float("inf")  # the control stops by the clock
    until: float = 1.1  # the warm-up stops at this fraction of right answers; above 1: never


def phases_of(config: TrainConfig) -> list[Phase]:
    """What the run consists of. Warm-up and control belong to RL; a control continues a warm-up, so it needs one."""
    main = Phase(config.algo, config.algo, config.steps, config.lr)
    if config.algo == "sft" or not config.warm_steps:
        return [main]
    warm_up = Phase("sft", "sft", config.warm_steps, config.warm_lr, until=config.warm_until)
    # SFT instead of RL, for as long as RL took, which is known when RL has ended
    control = Phase("control", "sft", sys.maxsize, config.warm_lr)
    return [warm_up, main, control] if config.control else [warm_up, main]
