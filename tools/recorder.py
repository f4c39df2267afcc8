"""A CUDA graph without a GPU: records what a function does to tensors, and does it again.

    a CUDA graph                                    here
    launches are recorded, with the addresses       every torch operation and every launch of a Triton kernel (in the
    and numbers that they have at that moment       interpreter) is kept, with its very tensors and numbers
    nothing runs while recording                    it runs, because shapes are needed; then memory gets back what it
                                                    held before, and what was made on the way becomes junk
    a replay is the same launches on that memory    the same calls on the same tensors
    Python may not read results or send numbers     operations that would are refused: RuntimeError

So a step that leans on a Python number that changes, on a tensor that has moved, or on anything computed while it was
recorded gives other results when replayed, and one that waits for the GPU is refused: the four ways to get it wrong.
What this cannot show: streams, the allocator's pools, what cuBLAS and the driver make of it, speed, and a copy from one
device to another (x.to("cpu"), or the other way), because all tensors here are on one.

    replay = record(step)           as nanogspo/fast/cuda_graph.py::capture

Used by tests/test_cuda_graph.py, lessons/05_a_decode_step.md and its exercise.
"""

import contextlib
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for a GPU to tell Python something (the size of a result too), and what copies from Python's memory
READS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"}
READS |= {"_unique2", "unique_dim", "unique_consecutive"}
SENDS = {"lift_fresh"}  # torch.tensor(numbers)
METHODS = ("tolist", "numpy", "cpu")  # on a CPU these are no operations


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.launches = 0
        self.before: dict[int, tuple] = {}  # storage -> (storage, a copy of what it held)
        self.made: dict[int, torch.UntypedStorage] = {}
        self.inside_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside_kernel:  # the interpreter's own copies are no launches
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in SENDS:
            raise RuntimeError(f"got {name} while recording, want nothing that sends numbers to a GPU; do it before")
        if name in READS or mask or str(func) == "aten.repeat_interleave.Tensor":
            refuse(name)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [
            x for x, a in zip(args, func._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write
        ]
        for x in written:
            self.save(x)
        out = func(*args, **kwargs)
        known = {_key(x) for x in inputs}
        fresh = {}  # place among the results -> a tensor with memory of its own
        for i, x in enumerate(tree_leaves(out)):
            if isinstance(x, Tensor) and _key(x) not in known:
                fresh[i] = x
                self.made[_key(x)] = x.untyped_storage()

        def again():
            results = tree_leaves(func(*args, **kwargs))
            for i, x in fresh.items():
                x.copy_(results[i])

        self.calls.append(again)
        self.launches += bool((fresh or written) and not name.startswith(("empty", "new_empty")))  # views are none
        return out

    def refusing(self, name: str) -> Callable:
        method = getattr(Tensor, name)
        return lambda x, *args: method(x, *args) if self.inside_kernel else refuse(name)

    def save(self, x: Tensor) -> None:
        if _key(x) not in self.made and _key(x) not in self.before:
            storage = x.untyped_storage()
            self.before[_key(x)] = (storage, storage.clone())

    def launch(self, executor, run, args, kwargs) -> None:
        """A Triton kernel: which of its pointers it writes to is its own business."""
        self.inside_kernel = True
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.save(x)
        run(executor, *args, **kwargs)
        self.inside_kernel = False
        self.launches += 1
        self.calls.append(lambda: run(executor, *args, **kwargs))

    def rewind(self) -> None:
        for storage, held in self.before.values():
            storage.copy_(held)
        for storage in self.made.values():
            storage.fill_(255)  # nan, and -1


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What `step` does, recorded; it has not happened when this returns. Raises RuntimeError for what a graph refuses.

    replay.launches  how many kernels a GPU would be sent, more or less
    """
    recording = _Recording()
    with contextlib.ExitStack() as stack:
        stack.callback(recording.rewind)
        with contextlib.suppress(ImportError):
            from triton.runtime.interpreter import GridExecutor

            run = GridExecutor.__call__
            through = lambda executor, *args, **kwargs: recording.launch(executor, run, args, kwargs)  # noqa: E731
            stack.enter_context(patch.object(GridExecutor, "__call__", through))
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, recording.refusing(name)))
        stack.enter_context(recording)
        step()

    @torch.no_grad()
    def replay() -> None:
        for call in recording.calls:
            call()

    replay.launches = recording.launches
    return replay


def refuse(name: str) -> NoReturn:
    raise RuntimeError(f"got {name} while recording, want nothing that waits for a GPU; do it before, or after")


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
