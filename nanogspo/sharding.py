"""A model whose weights, gradients and moments are spread over the processes, for one that fits on no device: FSDP2.

    shard       each process keeps its rows of every weight; a block is gathered before it computes, and dropped again
    gathered    all weights whole for a while: around a rollout, an evaluation and a save
    keep_pace   a pass of one process is a pass of all, because every block is gathered from all

Full fine-tuning: the rows are kept in fp32 and gathered in the model's dtype, so a row is its own AdamW master. The sum
of gradients over the processes (distributed.py) happens in the backward pass, in fp32, a block at a time. With LoRA the
frozen base is sharded; adapters are made afterwards, are whole in every process, and are summed as without sharding.

A step of sampling would gather every block for every token, and processes finish at different steps; so weights are
gathered once, before a rollout, and its scoring needs no collective either. Memory for a whole copy of the weights is
what this costs.

Every function does nothing to a model that is not sharded.

Left out: packed weights (buffers, which FSDP2 does not shard): each process holds all of them. Matmuls that share an
input are not fused on a GPU (fast/fused_linear.py).

Source: ZeRO, arXiv:1910.02054, section 5; PyTorch FSDP, arXiv:2304.11277.      Tests: tests/test_distributed.py
Lesson: lessons/20_many_processes.md
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nanogspo import distributed


def shard(model: nn.Module, dtype: torch.dtype, full: bool, device: str) -> None:
    """Spread a model over the processes. One on the meta device gets rows without numbers, for `fill`.

    dtype  in which it computes
    full   whether its weights are trained: the rows are then fp32
    """
    from torch.distributed.device_mesh import init_device_mesh  # 1.3 s, for runs that are sharded
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.to(dtype).to(torch.float32 if full else dtype)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    how = {"mesh": init_device_mesh(device, (distributed.world(),)), "mp_policy": policy}
    model.shards = [*model.layers, model]
    for part in model.shards:
        # the root stays gathered after its forward pass: the head is read outside (kernels/seq_logprob.py)
        fully_shard(part, **how, reshard_after_forward=part is not model)
        part.set_gradient_divide_factor(1.0)  # a sum, as in distributed.sum_gradients; gloo has no other
        part.set_force_sum_reduction_for_comms(True)
    model.computes_in = dtype
    if model.norm.weight.is_meta:
        model.to_empty(device=device)


def is_sharded(x: nn.Module | Tensor) -> bool:
    return hasattr(x, "shards" if isinstance(x, nn.Module) else "full_tensor")


def reshard(model: nn.Module) -> None:
    """Drop what is gathered. AdamW moves the rows, and a root that stayed gathered would be the old one."""
    for part in getattr(model, "shards", ()):
        part.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every process holds all weights, in the model's dtype, and its forward passes need no other process.

    Not to be nested: the inner one's end would drop the outer one's weights."""
    parts = getattr(model, "shards", ())
    reshard(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def keep_pace(model: nn.Module, passes: int) -> None:
    """Before `passes` forward and backward passes of an update: empty ones, of one token and weight 0, so that this
    process makes as many as the one that has most. (Afterwards would be too late to ask how many that is.)"""
    missing = max(distributed.gather(passes)) - passes if is_sharded(model) else 0
    for _ in range(missing):
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.norm.weight.device)
        scores = model(token) @ model.head_weight.T  # (1, 1, V): the head takes part, or its gradient is summed by some
        (scores.mean() * 0.0).backward()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> what is trained: this process's rows of it, where it is sharded."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dtype(model: nn.Module, p: Tensor) -> torch.dtype:
    """In which the model computes with p. Another than p's own: p is the fp32 master."""
    return model.computes_in if is_sharded(p) else p.dtype


def whole(t: Tensor) -> Tensor:
    """A tensor of all its rows: every process has to ask for it."""
    return t.full_tensor() if is_sharded(t) else t


def rows(t: Tensor) -> slice:
    """The rows of t that this process holds."""
    if not is_sharded(t):
        return slice(0, len(t))
    size = -(-len(t) // distributed.world())
    first = min(distributed.rank() * size, len(t))
    return slice(first, min(first + size, len(t)))


def local(t: Tensor) -> Tensor:
    """The numbers of `rows(t)`, as they are in memory."""
    return t.detach().to_local() if is_sharded(t) else t.detach()


def fill(into: Tensor, read: Callable[[slice | None], Tensor]) -> None:
    """Copy a tensor's numbers into its place. read: what gives some of its rows, or all."""
    own = local(into)
    if own.numel():  # of fewer rows than processes some hold none, which safetensors refuses to read
        own.copy_(read(rows(into) if is_sharded(into) else None))
