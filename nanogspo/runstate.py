"""What --resume reads: one safetensors file with weights, optimiser, random state, cursor and the rollout in progress.

One file, written atomically, because half a state is worse than none: a kill at any moment leaves the last whole one.
Tensors go in as tensors, everything else as JSON in the file's metadata; nothing is pickled.

Tests: tests/test_runstate.py
"""

import json
import pathlib

import torch
from torch import Tensor, nn

from nanogspo.checkpoint import DTYPES, read_header, read_tensor, write_safetensors
from nanogspo.optimizer import Optimizer
from nanogspo.packing import Example

MODEL, OPTIMIZER, ROLLOUT = "model.", "optimizer.", "rollout."


def save_state(
    path: pathlib.Path, model: nn.Module, optimizer: Optimizer, progress: dict, rollout: dict | None
) -> None:
    """progress: JSON-able counters. rollout: None, or {"examples": [...], "tensors": {...}, "facts": {...}}."""
    tensors = {MODEL + name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {OPTIMIZER + name: t for name, t in optimizer.state().items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    facts = {"progress": progress}
    if rollout:
        tensors |= {ROLLOUT + name: t for name, t in rollout["tensors"].items()}
        facts["rollout"] = rollout["facts"]
        facts["examples"] = [
            [e.tokens, e.loss_mask.index(True)] for e in rollout["examples"]
        ]  # prompt length says the mask
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {name: (t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    write_safetensors(path, entries, {"state": json.dumps(facts)})


def load_state(path: pathlib.Path, model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict | None]:
    """Put weights, optimiser and random state back in place; return (progress, rollout).

    Raises ValueError when the file is missing or damaged, or holds other parameters than the model trains.
    """
    if not path.exists():
        raise ValueError(f"{path}: no state to resume from; want the folder of a run that has saved at least once")
    header, metadata = read_header(path)
    if "state" not in metadata or "rng.cpu" not in header:
        raise ValueError(f"{path}: got a safetensors file that no run saved as its state; want one of this program")
    wanted = {MODEL + name: p for name, p in model.named_parameters() if p.requires_grad}
    differ = sorted({n for n in header if n.startswith(MODEL)} ^ set(wanted))
    for name in sorted(wanted.keys() & header.keys()):
        kind = DTYPES[header[name]["dtype"]], header[name]["shape"]
        differ += [name] if kind != (wanted[name].dtype, tuple(wanted[name].shape)) else []
    if differ:
        raise ValueError(
            f"{path}: the saved run trained other parameters ({', '.join(differ[:4])}"
            f"{', ...' if len(differ) > 4 else ''}); resume with its own flags"
        )
    with open(path, "rb", buffering=0) as f:
        tensors = {name: read_tensor(f, entry) for name, entry in header.items()}
    for name, p in wanted.items():
        p.data.copy_(tensors[name])
    optimizer.load_state(_under(tensors, OPTIMIZER))
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    facts = json.loads(metadata["state"])
    rollout = None
    if "rollout" in facts:
        examples = [Example(tokens, [i >= start for i in range(len(tokens))]) for tokens, start in facts["examples"]]
        rollout = {"examples": examples, "tensors": _under(tensors, ROLLOUT), "facts": facts["rollout"]}
    return facts["progress"], rollout


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
