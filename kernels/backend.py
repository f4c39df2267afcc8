"""Which body of a kernel runs: plain torch, or Triton. And a stand-in that lets kernel files load without Triton.

    backend=None        Triton where the tensors live on a GPU and Triton is installed, torch elsewhere
    backend="torch"     the reference of the file, on any device
    backend="triton"    the Triton kernels; on a CPU only under Triton's interpreter

Kernel files write `from kernels.backend import choose, tl, triton`, and decorate with @triton.jit as everybody does.
Triton has no builds for macOS and Windows: there the decorator gives back the function, which nothing then calls.

Tests: tests/test_backend.py
"""

import contextlib
import math
import os
from collections.abc import Iterator

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    from types import SimpleNamespace

    triton = SimpleNamespace(
        jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel), cdiv=lambda a, b: -(-a // b)
    )
    tl = SimpleNamespace(constexpr=None)  # annotations are evaluated when a kernel is defined

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels take; nf4.cu counts them in this order
INTS = (torch.int32, torch.int64)  # lengths, targets
HAVE_TRITON = hasattr(triton, "__version__")
# Triton itself reads this when a kernel is defined, so a later change has no effect there either.
INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def choose(backend: str | None, x: torch.Tensor) -> str:
    """ "torch" or "triton" for tensors that live where x lives.

    Raises ValueError for another word, and for Triton where it cannot run.
    """
    if backend is None:
        return "triton" if x.is_cuda and HAVE_TRITON and not INTERPRETED else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"got backend {backend!r}, want 'torch', 'triton' or None, which chooses; leave it out")
    if backend == "triton" and not HAVE_TRITON:
        raise ValueError("got backend 'triton' without Triton, want it installed (pip install triton); or use 'torch'")
    if backend == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(
            "got backend 'triton' and tensors on the CPU, want a GPU, or TRITON_INTERPRET=1 set before Python starts"
        )
    return backend


def or_torch(chosen: str, backend: str | None, unfit: str) -> str:
    """chosen, or "torch" for what Triton kernels cannot take: unfit says what that is and what is wanted, "" nothing.

    Raises ValueError when Triton was asked for.
    """
    if chosen == "triton" and unfit:
        if backend is not None:
            raise ValueError(f"got {unfit}; use backend='torch'")
        return "torch"
    return chosen


HOPPER = False  # tools/compile_kernels.py: the answer below for its CPU tensors


def is_hopper(x: torch.Tensor) -> bool:
    """Whether x lives on an H100 or H200 (sm_90), whose matrix units have tiles and register limits of their own."""
    if not x.is_cuda:
        return HOPPER
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) == (9, 0)


def same_device(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError when tensors, given by name, live on several devices: a kernel would read foreign memory."""
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        places = {name: str(x.device) for name, x in tensors.items() if x is not None}
        listed = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(f"got {listed}, want one device; move them with .to()")


def check_positive(name: str, number: float | None, hint: str) -> None:
    """Raises ValueError unless a number is finite and above 0; None stands for none."""
    if number is not None and not (number > 0 and math.isfinite(number)):
        raise ValueError(f"got {name} {number}, want a number above 0{hint}")


def inner(x: torch.Tensor) -> torch.Tensor:
    """(..., W), numbers of the last dimension side by side: a slice is a view, a transpose is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """(..., W) -> (N, W), the same: half a fused projection is a view."""
    return inner(x.reshape(-1, x.shape[-1]))


@contextlib.contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """Within it a CPU may multiply fp32 matrices as bf16 ones, with fp32 sums and results, where it has such units.

    For operands that *are* bf16 numbers, widened: the products are exact either way, and the sums differ by their order
    alone. On an EPYC with AVX512-BF16 it saves a quarter to a half of the time. torch.mm has no bf16 operands with an
    fp32 result on a CPU, so this setting is the way to ask for it. Elsewhere it changes nothing.
    """
    before = torch.backends.mkldnn.matmul.fp32_precision
    if wanted:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
