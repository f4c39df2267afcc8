"""--tracker: the numbers of metrics.jsonl, sent to Weights & Biases, trackio or TensorBoard as well.

    track = open_tracker("wandb", "my project", folder, settings, held)
    track({"step": 1, "reward": 0.31, ...})

The run folder's files stay the truth. What is no number (a histogram, a sentence of the doctor) is in them alone.

Tests: tests/test_trackers.py
"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from nanogspo.inputs import explained, optional


def open_tracker(
    tracker: str, project: str, folder: Path, settings: dict, held: contextlib.ExitStack
) -> Callable[[dict], None] | None:
    """What sends a row of metrics.jsonl; None for "none". `held` closes the tracker. ValueError without its package.

    A resumed run goes on in the tracker's own run, which is found by the folder's path.
    """
    if tracker == "none":
        return None
    package = optional(tracker, f"--tracker {tracker}")
    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        held.callback(writer.close)
        return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in numbers(row).items()]
    name, key = folder.resolve().name, hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    more = {"id": key, "dir": str(folder)} if tracker == "wandb" else {}
    name = name if tracker == "wandb" else f"{name}-{key[:6]}"  # trackio finds a run by its name
    try:
        package.init(project=project, name=name, config=settings, resume="allow", **more)
    except Exception as error:  # each package has its own: no login, no network
        got = f"--tracker {tracker}: {explained(error, '')}"
        raise ValueError(f"{got}; want that mended (a login?), or --tracker none") from error
    held.callback(package.finish)
    return lambda row: package.log(numbers(row), step=row["step"])


def numbers(row: dict) -> dict[str, float]:
    """The numbers of a row, under its phase's name: an SFT's loss and RL's are not one curve."""
    phase = f"{row['phase']}/" if "phase" in row else ""
    found = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {f"{phase}{k}": v for k, v in found.items()}
