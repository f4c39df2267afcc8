"""One run by many processes: each samples and trains on its own prompts, and the gradients of an update are added up.
torchrun starts the processes; no flag changes its meaning. Each holds the whole model, unless it is sharded
(sharding.py).

    torchrun --standalone --nproc-per-node 2 train.py

    prompts     process r of W has prompts r, r + W, r + 2 W, ... of a rollout, in whole groups
    update      loss / (answers of all processes), backward, one flat fp32 all_reduce of the trained gradients, AdamW
    decisions   stop, the clock, the best evaluation: from numbers that all processes share, so all decide alike
    files       process 0 writes and prints; the others only end, and say why

Nothing is sent within a forward pass, a backward pass or a decode step, so processes may have different numbers of
micro-batches and of decode steps. Every process has to make the same calls of this file, in the same order: one that
leaves one out lets the others wait.

In one process every function gives back what it was given, and torch.distributed is not even started.

Left out: sending weights, a wrapper like DDP, which would sum at every micro-batch.

Source: data parallelism by a sum of gradients, Goyal et al., arXiv:1706.02677.      Tests: tests/test_distributed.py
"""

import contextlib
import datetime
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogspo.inputs import launched

WAIT = datetime.timedelta(hours=2)  # for the slowest rollout; a process that dies is noticed by torchrun, not by this


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Together with the other processes, if torchrun has started several. All but process 0 then print nothing.

    A process that has ended is no bug of the others, in whatever collective they wait for it: a gather, or one of FSDP2
    within a pass. ConnectionError, an OSError, ends them in one line."""
    if launched("WORLD_SIZE", 1) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(launched("LOCAL_RANK", 0))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        got = f"got no meeting of the processes at {where} ({str(error).splitlines()[0]})"
        raise ValueError(f"{got}, want torchrun to start them, a free MASTER_PORT, or no WORLD_SIZE") from error
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")) if rank() else contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):  # gloo names a file of its source
            raise
        why = f"another process of this run has ended, or has kept this one waiting for {WAIT}"
        raise ConnectionError(f"{why}; it, or torchrun, says why") from error
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def tell(line: str) -> None:
    """Print what only this process knows. The stdout of all but process 0 is closed: theirs goes to stderr."""
    print(f"process {rank()}: " * (rank() > 0) + line, file=sys.stderr if rank() else None, flush=True)


def seed(run: int, step: int) -> None:
    """Seed torch's own generator for an update: every process and every update draws other numbers, resumed or not."""
    torch.manual_seed(((run * 1_000_003 + step) * world() + rank()) % 2**63)


def local_world() -> int:
    """Processes on this host."""
    return launched("LOCAL_WORLD_SIZE", 1) if dist.is_initialized() else 1


def launcher() -> str:
    """What starts a run like this one."""
    hosts = f"--nnodes {world() // local_world()} " * (world() > local_world())
    return f"torchrun {hosts}--nproc-per-node {local_world()}" if world() > 1 else "python"


def mine(count: int) -> range:
    """Of `count` things, the numbers of this process's."""
    return range(rank(), count, world())


def gather(value: Any) -> list:
    """Every process's value, in their order. Tensors arrive on the CPU."""
    if world() == 1:
        return [value]
    packed, parts = io.BytesIO(), [None] * world()
    _Pickler(packed).dump(value)
    dist.all_gather_object(parts, packed.getvalue())
    return [pickle.loads(part) for part in parts]  # of our own processes


def joined(*lists: list) -> list[list]:
    """Each of these lists, those of all processes one behind the other."""
    return [[x for part in parts for x in part] for parts in zip(*gather(lists), strict=True)]


def in_order(parts: Sequence[list]) -> list:
    """The inverse of `mine`: what the processes have made of their things, in the order of all."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def total(value: int | Tensor) -> Any:
    """The sum of every process's integer or tensor, in the tensor's own dtype; it arrives on the CPU."""
    if world() == 1:
        return value
    added = torch.as_tensor(value).to("cpu", copy=True)
    dist.all_reduce(added)
    return added if isinstance(value, Tensor) else added.item()


def agree(asked: object) -> bool:
    """True in all processes if it is in one."""
    return total(int(bool(asked))) > 0


def first(make: Callable[[], Any]) -> Any:
    """What `make` gives in process 0, where alone it is called."""
    if world() == 1:
        return make()
    values = [None if rank() else make()]
    dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up every parameter's gradient over the processes, as one message; a missing one is 0. Those of a sharded
    weight have been added up in the backward pass."""
    parameters = [p for p in parameters if not hasattr(p, "full_tensor")]
    if world() == 1 or not parameters:
        return
    flat = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters])  # (all,)
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def check_same(named: Iterable[tuple[str, Tensor]], files: dict[str, str] | None = None) -> None:
    """Raises ValueError unless all processes hold the same bits: another file, or another version of a library, on one
    host would otherwise show as a policy that slowly falls apart. files: hashes of what was read, since processes hold
    different rows of a sharded weight."""
    if world() == 1:
        return
    digest = hashlib.sha256(repr(files).encode())
    for name, tensor in ((name, tensor) for name, tensor in named if not hasattr(tensor, "full_tensor")):
        digest.update(name.encode() + _bytes(tensor))
    found = gather(digest.hexdigest())
    if len(set(found)) > 1:
        odd = [r for r, other in enumerate(found) if other != found[0]]
        want = "want the same files on every host"
        raise ValueError(f"got other weights or files in processes {odd} than in process 0, {want}")


class _Pickler(pickle.Pickler):
    """A tensor as its bytes, from the CPU. (As torch pickles one it is a zip archive: 0.2 ms each, and an update's
    metrics are a hundred.)"""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        return _tensor, (_bytes(value), value.dtype, tuple(value.shape))


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
