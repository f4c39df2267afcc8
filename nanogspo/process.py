"""The process around a run: its folder, its memory, and how it is asked to stop.

Tests: tests/test_train.py
"""

import itertools
import os
import pathlib
import signal
import sys

from nanogspo.config import TrainConfig
from nanogspo.runlog import read_rows


def run_folder(config: TrainConfig) -> pathlib.Path:
    """Where this run writes. A folder that holds a run is never written over: it is resumed, or another is taken."""
    if config.resume or config.out:
        folder = pathlib.Path(config.resume or config.out)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"got --out {folder}, which is a file; want a folder")
        if not config.resume and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} holds another run or other files; want an empty --out, or --resume {folder} to go on with it"
            )
    else:
        name = "tiny" if config.model == "tiny" else pathlib.Path(config.model).name
        name += "" if name == "tiny" and config.algo == "gspo" else f"-{config.algo}"
        tries = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        folder = next(f for f in (pathlib.Path("runs", t) for t in tries) if not f.exists() or not any(f.iterdir()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}); want another --out") from error
    return folder


def peak_memory(device: str) -> int:
    """Bytes: the most the GPU held, or the most this process ever had resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(device: str, root: str = "/") -> int:
    """Bytes that this process can hold, those included that it holds already: of the GPU; as Linux estimates them, and
    no more than a container is allowed; elsewhere all that the machine has."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    page, top = os.sysconf("SC_PAGE_SIZE"), pathlib.Path(root)
    try:
        facts = dict(line.split(":") for line in (top / "proc/meminfo").read_text().splitlines())
        resident, shared = (int(n) for n in (top / "proc/self/statm").read_text().split()[1:3])
        # pages shared with files are available: they can be read again
        available = int(facts["MemAvailable"].split()[0]) * 1024 + (resident - shared) * page
    except (OSError, KeyError):
        available = os.sysconf("SC_PHYS_PAGES") * page
    for limit in (top / "sys/fs/cgroup/memory.max", top / "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if limit.is_file() and (words := limit.read_text().strip()).isdigit():  # "max": none
            available = min(available, int(words))
    return available


class StopRequest:
    """True after Ctrl-C or SIGTERM: the update at hand is finished and saved. A second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this update (once more to stop at once)", file=sys.stderr)

    def __bool__(self) -> bool:
        return self.asked


def summary(config: TrainConfig, folder: pathlib.Path, picture, example: str | None, seconds: float) -> str:
    """What a run prints last: held-out exact match before and after each phase, and where things are."""
    names = {"start": "before", "sft": "after SFT", "gspo": "after GSPO", "grpo": "after GRPO", "control": "control"}
    lines = []
    last = {row["phase"]: row for row in read_rows(folder / "metrics.jsonl") if "eval_exact" in row}
    for phase, row in last.items():
        note = "  (SFT continued instead of RL, for the same time)" if phase == "control" else ""
        interval = f"95 % interval {row['eval_low']:.1%} to {row['eval_high']:.1%}"
        lines.append(f"  {names[phase]:<10} {row['eval_exact']:6.1%}   {interval}{note}")
    if lines:
        lines.insert(0, f"held-out exact match, {config.eval_size} problems never trained on:")
    weights = folder / ("adapter" if config.lora_r else "model")
    lines.append(f"{seconds:.0f} s; curves {picture}, samples {folder / 'samples.jsonl'}, weights {weights}")
    if example:
        tail = f"--model {config.model} --adapter {weights}" if config.lora_r else f"--model {weights}"
        tail += "" if config.quant == "none" else f" --quant {config.quant}"  # what the adapter was trained over
        tail += "" if config.model == "tiny" else f" --thinking {config.thinking}"
        lines.append(f'try it: python sample.py {tail} --temperature 0 "{example}"')
    return "\n".join(lines)
