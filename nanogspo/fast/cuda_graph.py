"""A decode step as one CUDA graph: hundreds of launches replayed by a single call.

For Qwen3-0.6B in bf16 a step is some 430 launches, 650 with adapters: 2.1 and 3.3 ms of Python at 5 us each, where a
GPU reads the weights in 0.4 ms. The step must read and write tensors that stay where they are and take no number from
Python (rollout.DecodeBatch, cache.KVCache).

All graphs of a process allocate from one memory pool. With a pool each, a dead graph's memory is free only for
allocations outside of a capture, and a run of some twenty rollouts ends out of memory (24 GB, 256 rows).

Lesson: lessons/05_a_decode_step.md       Tests: tests/test_cuda_graph.py, with tools/recorder.py in place of a GPU
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import torch

from kernels.decode_attention import choose_backend
from nanogspo.cache import KeysValues, KVCache

CAPTURE_FROM = 8  # steps left. Capturing is a step's worth of Python and the driver's work on it: a guess, not measured


class CapturedStep:
    """step(), captured the second time it is called and replayed from then on. The first call compiles kernels.

    cache    the KVCache that the step advances
    enabled  False: every call runs eagerly, as it does after a capture has failed twice
    """

    def __init__(self, step: Callable[[], None], cache: KVCache, enabled: bool):
        self._step, self._cache, self.enabled = step, cache, enabled
        self._warm, self._replay = False, None

    def __call__(self, left: int) -> None:
        """left: steps that may follow, this one included."""
        if self._replay is None and self.enabled and self._warm and left >= CAPTURE_FROM:
            self._replay = self._captured()
        if self._replay is None:
            self._step()
            self._warm = True
        else:
            self._cache.advance_host()
            self._replay()

    def forget(self) -> None:
        """Tensors are about to move: the next call runs eagerly, the one after it is captured."""
        self._warm, self._replay = False, None  # a graph holds memory

    def _captured(self) -> Callable[[], None] | None:
        extent = self._cache.extent
        for last in (False, True):
            try:
                return capture(self._step)
            except RuntimeError as error:  # driver, library, out of memory
                if last:
                    while error.__context__ is not None:  # the first error; later ones say that the capture is broken
                        error = error.__context__
                    print(
                        f"decoding without a CUDA graph, which could not be captured: {error!r:.300}", file=sys.stderr
                    )
                    self.enabled = False  # for this rollout: the next one may find more memory
                    with contextlib.suppress(RuntimeError):  # one that ends well, or generators stay in capture mode
                        capture(torch.zeros(1, device=self._cache.slot.device).zero_)
                else:
                    torch.cuda.empty_cache()  # a capture may not release cached memory itself
            finally:
                self._cache.extent = extent  # capturing ran nothing but Python
        return None


def can_capture(cache: KVCache) -> bool:
    """Whether a step is launches and nothing else: on a GPU, with the Triton kernel (the other one reads lengths)."""
    keys = [layer.k for layer in cache.layers if isinstance(layer, KeysValues)]
    return cache.slot.is_cuda and all(choose_backend(k, k) == "triton" for k in keys)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """What `step` launches, as one launch. It is captured and does not run; what it allocates stays allocated.

    torch.cuda.graph would do, but it first gives all cached memory back to the driver, and when a capture fails it
    leaves the process on its own stream.
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), _capture_stream(), _memory_pool()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the default stream cannot be captured
        graph.capture_begin(pool=pool.id)
        try:
            step()
        finally:
            try:
                graph.capture_end()
            except RuntimeError as error:
                # the driver has ended the capture, the allocator has not: it would never release cached memory again
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool.id)
                if isinstance(error.__context__, KeyboardInterrupt):  # no failure: the reader of Ctrl-C wants it
                    raise error.__context__ from None
                raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: cuBLAS keeps memory for every stream it has seen


@functools.cache
def _memory_pool() -> torch.cuda.MemPool:
    return torch.cuda.MemPool()
