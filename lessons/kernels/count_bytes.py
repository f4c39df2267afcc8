"""Counts the bytes that a computation moves, instead of guessing them: as torch operations, and as Triton kernels.

    torch     every operation that makes a tensor reads its inputs from memory and writes its outputs there. Views are
              free. What the GPU's caches save is not seen; at a few thousand tokens there is nothing left in them.
    Triton    every load and store of a kernel, masked lanes not counted. Only in the interpreter.

Both count what leaves for memory, so they are what a bandwidth is divided into. Not the launches: a kernel costs a GPU
some 3 us even where it moves nothing.

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_lesson_kernels_rms_norm.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Traffic:
    """What was moved so far, in bytes; steps are torch operations, or programs' loads and stores."""

    read: int = 0
    written: int = 0
    steps: int = 0

    @property
    def total(self) -> int:
        return self.read + self.written


class TorchBytes(TorchDispatchMode):
    """`with TorchBytes() as mode: ...` counts in mode.traffic, gradients included."""

    def __init__(self):
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        places = {t.untyped_storage().data_ptr() for t in inputs}
        if outputs and not all(t.untyped_storage().data_ptr() in places for t in outputs):  # not a view
            self.traffic.read += sum(_size(t) for t in inputs)
            self.traffic.written += sum(_size(t) for t in outputs)
            self.traffic.steps += 1
        return out


def _size(t: Tensor) -> int:
    """Bytes of t in memory: an expanded tensor is as large as what it was expanded from."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


@contextmanager
def triton_bytes() -> Iterator[Traffic]:
    """`with triton_bytes() as traffic: ...` counts the loads and stores of every kernel that runs inside."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic, load, store = Traffic(), Builder.create_masked_load, Builder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        traffic.read += int(mask.data.sum()) * (ptrs.get_element_ty().primitive_bitwidth // 8)
        traffic.steps += 1
        return load(self, ptrs, mask, *rest)

    def counted_store(self, ptrs, value, mask, *rest):
        traffic.written += int(mask.data.sum()) * (ptrs.get_element_ty().primitive_bitwidth // 8)
        traffic.steps += 1
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
