"""Compiles every Triton kernel for three GPUs, on a machine that has none. Refuses spills and too much shared memory.

There is no list of signatures to keep. The cases below call the public entries, as the model does; each launch an entry
makes is caught, specialised as on a GPU (which pointers and integers are multiples of 16, which integers are 1),
and compiled with its own num_warps and num_stages:

    entry(CPU tensors, backend="triton") -> JITFunction.run, replaced here -> triton.compile, for each target

The interpreter (TRITON_INTERPRET=1, all tests) checks values and forgives types; this checks types, layouts and
resources and sees no value. What fails:

    an error of the compiler, or an exception in the entry before it launches anything
    spilled registers: a loop that is meant to run in registers then runs in memory, silently and many times slower
    (except at widths that 16 does not divide: no model has them, there a kernel only has to run)
    more shared memory than one block may have
    a kernel of kernels/ or lessons/kernels/ that no case launches (functions that kernels call are found and left out)

Two processes, no GPU, no cache left behind. CUDA C++ files are compiled with nvcc where there is one.

A ledger remembers what each launch compiled to: tests/compiled/, one file for each module, one launch for one target a
line. Its key is the hash of the kernel (its source without comments, the @triton.jit functions and the constants it
mentions, however deep), the launch, the target and Triton's version. All cases still run and all limits are still
checked; what is known is not compiled again, but for 5 % drawn by the commit's hash. Read it to see what a kernel
takes; commit it with a change of one. A run of a part shows all rows of that part and writes nothing.

Run: python tools/compile_kernels.py [--case SUBSTRING] [--only SUBSTRING] [--targets sm_90,gfx942]
     python tools/compile_kernels.py --deep       compiles all, and must find what the ledger says; about 4 minutes
Tests: tests/test_compile_kernels.py
"""

import os
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: it decides at every @triton.jit
SCRATCH = tempfile.TemporaryDirectory()
os.environ["TRITON_CACHE_DIR"] = SCRATCH.name  # never an old result

import argparse  # noqa: E402
import ast  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import io  # noqa: E402
import itertools  # noqa: E402
import multiprocessing  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import textwrap  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Iterator  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import ledger  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from code_lines import code_lines  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from kernels import backend as choice  # noqa: E402

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # kernels say it where bits matter

LEDGER = ROOT / "tests" / "compiled"

# name -> what Triton calls it, and the shared memory one block may have. CUDA C++ programming guide, table of compute
# capabilities: 163 KB of 164 (A100) and 227 KB of 228 (H100); 64 KB of LDS on MI300.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# (kernel, target) -> the fault it may have there ("spills" or "shared memory") and why. Printed with every run; an
# entry that is not needed is an error, and none excuses another fault.
FOR_32_LANES = "spills", "tiles are chosen for NVIDIA's warps of 32; on an MI300 it only has to run"
EXCUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("kernels.attention._forward_kernel", "gfx942"): FOR_32_LANES,
    ("kernels.attention._dq_kernel", "gfx942"): FOR_32_LANES,
    ("kernels.attention._dkdv_kernel", "gfx942"): FOR_32_LANES,
}

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# ----------------------------------------------------------------------------
# the cases: every dtype and every variant that an entry claims. Rows are few, widths are real: widths decide tiles.


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


@contextlib.contextmanager
def odd_widths() -> Iterator[None]:
    """Inside, launches may spill."""
    global MAY_SPILL
    MAY_SPILL = True
    try:
        yield
    finally:
        MAY_SPILL = False


MAY_SPILL = False


def token_logp() -> None:
    """Lesson 06. A width that 16 does not divide is another kernel: without wide loads."""
    for version, width in (("v1", 16384), ("v2", 151936), ("v3", 151936)):
        entry = importlib.import_module(f"lessons.kernels.token_logp_{version}").token_logp
        for dtype in FLOATS:
            backward(entry(randn(2, width, dtype=dtype, grad=True), torch.tensor([0, 1]), backend="triton"))
        with odd_widths():
            backward(entry(randn(2, width - 1, grad=True), torch.tensor([0, 1]), backend="triton"))


def rms_norm() -> None:
    """Widths: heads of 128, Qwen3-0.6B, Gemma-2's 2304 (no power of two), and the widest there is."""
    from kernels.rms_norm import MAX_WIDTH, add_rms_norm, rms_norm

    def both(W: int, dtype: torch.dtype, plus_one: bool, frozen: bool) -> None:
        x, delta = randn(600, W, dtype=dtype, grad=True), randn(600, W, dtype=dtype, grad=True)
        weight = randn(W, dtype=dtype, grad=not frozen)
        keywords = {"eps": 1e-6, "plus_one": plus_one, "backend": "triton"}
        backward(rms_norm(x, weight, **keywords))
        backward(*add_rms_norm(x, delta, weight, **keywords))  # with the gradient that arrives through the sum
        backward(add_rms_norm(x, delta, weight, **keywords)[0])

    for W, frozen in itertools.product((128, 1024, 2304, 4096, MAX_WIDTH), (False, True)):
        both(W, torch.bfloat16, False, frozen)
    for dtype in FLOATS:
        both(1024, dtype, True, False)
    for dtype in (torch.float16, torch.float32):
        both(MAX_WIDTH, dtype, False, False)
    with odd_widths():
        both(1023, torch.bfloat16, False, False)


def rope() -> None:
    """Heads of Qwen 2.5 (64, no norm), Qwen 3 (128), Gemma (256), and a quarter of a head turned (Qwen3-Next)."""
    from kernels.rope import rope

    def both(dtype: torch.dtype, H: int, K: int, D: int, R: int, norm: bool, plus_one: bool, frozen: bool) -> None:
        q, k = randn(2, 40, H, D, dtype=dtype, grad=True), randn(2, 40, K, D, dtype=dtype, grad=True)
        cos, sin = randn(1 + plus_one, 40, 1, R, dtype=dtype), randn(1 + plus_one, 40, 1, R, dtype=dtype)
        weights = [randn(D, dtype=dtype, grad=not frozen) for _ in "qk"] if norm else [None, None]
        keywords = {"q_weight": weights[0], "k_weight": weights[1], "plus_one": plus_one}
        backward(*rope(q, k, cos, sin, backend="triton", **keywords))

    qwen2, qwen3, gemma, part = (14, 2, 64, 64), (16, 8, 128, 128), (8, 4, 256, 256), (16, 2, 256, 64)
    for dtype, plus_one in itertools.product(FLOATS, (False, True)):
        both(dtype, *qwen3, True, plus_one, False)
    for shape, norm, plus_one in ((qwen2, False, False), (qwen3, True, False), (gemma, True, True), (part, True, True)):
        both(torch.bfloat16, *shape, norm, plus_one, True)
    both(torch.bfloat16, *gemma, True, True, False)


def delta_rule() -> None:
    """Qwen3-Next's heads, and narrow ones; a prompt with an answer, and a decode step."""
    from kernels.attention import Segments
    from kernels.delta_rule import delta_rule, delta_rule_step

    for dk, dv, H, V in ((128, 128, 2, 4), (32, 32, 2, 4), (20, 24, 1, 1)):
        inputs = [
            randn(32, heads, width, dtype=torch.float32, grad=True) for heads, width in ((H, dk), (H, dk), (V, dv))
        ]
        inputs += [torch.zeros(32, V), torch.zeros(32, V)]
        with odd_widths() if dk % 16 else contextlib.nullcontext():
            backward(*delta_rule(*inputs, Segments.build([16, 16], [-1, 0]), backend="triton"))
            delta_rule_step(*inputs, torch.zeros(32, V, dk, dv), backend="triton")


def glu() -> None:
    from kernels.glu import glu

    for dtype, activation in itertools.product(FLOATS, ("silu", "gelu_tanh")):
        fused = randn(4, 2 * 3072, dtype=dtype, grad=True)  # two halves of one projection
        backward(glu(fused[:, :3072], fused[:, 3072:], activation=activation, backend="triton"))
    with odd_widths():
        backward(glu(randn(4, 3071, grad=True), randn(4, 3071, grad=True), activation="silu", backend="triton"))


def moe() -> None:
    """Experts of Qwen3-30B-A3B's widths, with few rows each and with many; those of their adapters; an odd width."""
    from kernels.moe import grouped_linear, sort_by_expert

    def both(dtype: torch.dtype, T: int, C: int, F: int) -> None:
        groups = sort_by_expert(torch.arange(2 * T).view(T, 2) % 8, 8)
        gate, up, down = (randn(8, *shape, dtype=dtype, grad=True) for shape in ((F, C), (F, C), (C, F)))
        rows, inside = randn(2 * T, C, dtype=dtype, grad=True), randn(2 * T, F, dtype=dtype, grad=True)
        backward(*grouped_linear(rows, [gate, up], groups, backend="triton"))
        backward(*grouped_linear(inside, [down], groups, backend="triton"))

    for dtype, T in itertools.product(FLOATS, (16, 200)):
        both(dtype, T, 2048, 768)
    both(torch.float32, 200, 2048, 16)
    with odd_widths():
        both(torch.bfloat16, 200, 63, 33)


def seq_logprob() -> None:
    """Both GPU paths; with and without soft-cap; head frozen, trained, and with a gradient through the entropy."""
    import kernels.seq_logprob as file

    def all_ways(C: int, V: int, dtype: torch.dtype, **keywords) -> None:
        hidden, weight, targets = randn(48, C, dtype=dtype, grad=True), randn(V, C, dtype=dtype), torch.arange(48)
        keywords |= {"temperature": 0.7, "backend": "triton"}
        with torch.no_grad():
            file.token_logprob(hidden, weight, targets, **keywords)
        backward(file.token_logprob(hidden, weight, targets, **keywords)[0])
        backward(*file.token_logprob(hidden, weight.requires_grad_(), targets, **keywords))
        backward(file.token_logprob(hidden, weight, targets, **keywords)[0])

    middle = file.EPILOGUE_BELOW
    for file.EPILOGUE_BELOW, softcap in itertools.product((0, 10**9), (None, 30.0)):  # 0: "rows", 10**9: "epilogue"
        for dtype in FLOATS:
            all_ways(64, 512, dtype, softcap=softcap)
        with odd_widths():
            all_ways(33, 515, torch.bfloat16, softcap=softcap)
    file.EPILOGUE_BELOW = middle


def nf4() -> None:
    """Layers of real widths (16 divides K) in every dtype; another block size in one; odd sizes."""
    from kernels.nf4 import dequantize_nf4, nf4_matmul, quantize_nf4

    for double_quant, dtype in itertools.product((True, False), FLOATS):
        q = quantize_nf4(randn(128, 1024), double_quant=double_quant)
        dequantize_nf4(q, dtype, backend="triton")
        for M in (1, 16, 32, 64) if dtype == torch.bfloat16 else (16, 64):
            nf4_matmul(randn(M, 1024, dtype=dtype), q, backend="triton")
    q = quantize_nf4(randn(128, 1024), block_size=128)
    dequantize_nf4(q, backend="triton")
    nf4_matmul(randn(16, 1024), q, backend="triton")
    with odd_widths():
        dequantize_nf4(quantize_nf4(randn(37, 27)), backend="triton")
        nf4_matmul(randn(3, 96)[:, ::2], quantize_nf4(randn(33, 48)), backend="triton")


def int8() -> None:
    from kernels.int8 import dequantize_int8, int8_matmul, quantize_int8

    for dtype in FLOATS:
        q = quantize_int8(randn(128, 1024))
        dequantize_int8(q, dtype, backend="triton")
        for M in (1, 16, 32, 64) if dtype == torch.bfloat16 else (16, 64):
            int8_matmul(randn(M, 1024, dtype=dtype), q, backend="triton")
    with odd_widths():
        q = quantize_int8(randn(33, 1021))
        dequantize_int8(q, backend="triton")
        int8_matmul(randn(3, 1021), q, backend="triton")


def lora() -> None:
    """Thin and thick ranks; y += h B^T, and dx += dh A, whose A is read along its rows."""
    from kernels.lora import frozen_linear

    def both(C: int, F: int, R: int) -> None:
        A, B = randn(R, C, dtype=torch.float32, grad=True), randn(F, R, dtype=torch.float32, grad=True)
        backward(frozen_linear(randn(100, C, grad=True), randn(F, C), None, A, B, scale=2.0, backend="triton"))

    for R in (1, 8, 16, 64, 128):
        both(1024, 3072, R)
    with odd_widths():
        both(1023, 515, 3)


def attention() -> None:
    """Heads of 64, 128 (Qwen 3; Gemma 2 27B, with its soft-cap and window) and 256 (Gemma)."""
    from kernels.attention import Segments, attention

    segments = Segments.build([40, 30, 30], [-1, 0, 0])  # a prompt and two answers

    def both(dtype: torch.dtype, D: int, softcap: float | None, window: int) -> None:
        q, k, v = (randn(100, n, D, dtype=dtype, grad=True) for n in (4, 2, 2))
        backward(attention(q, k, v, segments, scale=D**-0.5, softcap=softcap, window=window, backend="triton"))

    for D, softcap, window in ((128, None, 0), (128, 50.0, 16), (64, None, 0), (256, 50.0, 16)):
        both(torch.bfloat16, D, softcap, window)
    both(torch.float16, 128, None, 0)
    with odd_widths():  # fp32 without tensor cores is for tests
        both(torch.float32, 128, None, 0)


def decode_attention() -> None:
    """The same heads; one row of one prompt, and many rows of two."""
    from kernels.decode_attention import decode_attention

    def step(dtype: torch.dtype, D: int, softcap: float | None, window: int, rows: int, prompts: int) -> None:
        cache = [
            randn(2, n, slots, D, dtype=dtype) for n, slots in ((prompts, 64), (prompts, 64), (rows, 32), (rows, 32))
        ]
        lengths, prompt = torch.full((rows,), 9), torch.arange(rows) * prompts // rows
        decode_attention(
            randn(rows, 4, D, dtype=dtype), *cache[:2], torch.full((prompts,), 20), *cache[2:], lengths, prompt,
            scale=D**-0.5, softcap=softcap, window=window, backend="triton",
        )  # fmt: skip

    for rows, prompts in ((6, 2), (1, 1)):
        for D, softcap, window in ((128, None, 0), (64, None, 0), (256, 50.0, 16)):
            step(torch.bfloat16, D, softcap, window, rows, prompts)
        step(torch.float16, 128, None, 0, rows, prompts)
        with odd_widths():  # fp32 without tensor cores is for tests
            step(torch.float32, 128, None, 0, rows, prompts)


def sample() -> None:
    """Vocabularies of Qwen 3 and Llama 3; one that 16 does not divide; one row."""
    from kernels.sample import sample

    for N, V in ((6, 151936), (6, 128256), (1, 151936)):
        sample(randn(N, V, dtype=torch.float32), torch.zeros(N).double(), 0.7, backend="triton")
    with odd_widths():
        sample(randn(6, 32001, dtype=torch.float32), torch.zeros(6).double(), backend="triton")


def lessons() -> None:
    """The slow versions of lessons 08, 10 and 07, in bf16: what their lessons speak of."""
    from kernels.nf4 import quantize_nf4
    from lessons.kernels import nf4_v2, nf4_v3, rms_norm_v1, rms_norm_v2, rms_norm_v3, seq_logprob_v3

    q = quantize_nf4(randn(128, 1024))
    for version in (nf4_v2, nf4_v3):
        version.dequantize(q)
    for version in (rms_norm_v1, rms_norm_v2, rms_norm_v3):
        version.rms_norm(randn(4, 4096), randn(4096), eps=1e-6)
    seq_logprob_v3.token_logprob(randn(48, 64), randn(512, 64), torch.arange(48))


def decode() -> None:
    """One row, token, key head: a 1 is a constant to Triton, so these are other kernels, and rollouts launch them."""
    from kernels.glu import glu
    from kernels.int8 import int8_matmul, quantize_int8
    from kernels.nf4 import nf4_matmul, quantize_nf4
    from kernels.rms_norm import add_rms_norm, rms_norm
    from kernels.rope import rope
    from kernels.seq_logprob import token_logprob

    x, weight = randn(1, 1, 1024), randn(1024)
    rms_norm(x, weight, eps=1e-6, backend="triton")
    add_rms_norm(x, x, weight, eps=1e-6, backend="triton")
    for B, K in ((1, 8), (1, 1), (3, 1)):
        cos, w = randn(B, 1, 1, 128), randn(128)
        rope(randn(B, 1, 16, 128), randn(B, 1, K, 128), cos, cos, q_weight=w, k_weight=w, backend="triton")
    glu(randn(1, 1, 3072), randn(1, 1, 3072), activation="silu", backend="triton")
    nf4_matmul(randn(1, 1024), quantize_nf4(randn(1, 1024)), backend="triton")
    int8_matmul(randn(1, 1024), quantize_int8(randn(1, 1024)), backend="triton")
    token_logprob(randn(1, 64), randn(512, 64), torch.zeros(1, dtype=torch.int64), backend="triton")


CASES: dict[str, Callable[[], None]] = {
    "kernels/attention.py": attention,
    "kernels/decode_attention.py": decode_attention,
    "kernels/seq_logprob.py": seq_logprob,
    "kernels/nf4.py": nf4,
    "kernels/int8.py": int8,
    "kernels/lora.py": lora,
    "kernels/rms_norm.py": rms_norm,
    "kernels/rope.py": rope,
    "kernels/delta_rule.py": delta_rule,
    "kernels/glu.py": glu,
    "kernels/moe.py": moe,
    "kernels/sample.py": sample,
    "decode": decode,
    "lessons/kernels/token_logp": token_logp,
    "lessons/kernels": lessons,
}

# ----------------------------------------------------------------------------
# from a call to launches, from a launch to a specialisation


@dataclasses.dataclass(frozen=True)
class Pointer:
    """What a specialisation reads of a tensor, without its memory: hundreds of launches are kept."""

    dtype: torch.dtype
    address: int
    bytes: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:  # AMD: below 2 GB offsets fit in 32 bits
        return self.bytes


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as the entry wrote it, with pointers for tensors."""

    kernel: JITFunction
    arguments: tuple
    keywords: dict
    case: str
    may_spill: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """One specialisation of one kernel for one target: what Triton would compile at that launch."""

    kernel: JITFunction
    target: str
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    case: str
    may_spill: bool

    @property
    def name(self) -> str:
        return full_name(self.kernel)

    @property
    def key(self) -> str:
        return str((self.name, self.target, self.signature, self.constants, self.attributes, self.options))

    @property
    def digest(self) -> str:
        """The key of the ledger: all that decides what Triton makes of it."""
        parts = [triton.__version__, self.key, *closure(self.kernel)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """What tells two rows of a kernel apart: types of pointers, constants, how many arguments divide by 16."""
        arguments = [t for t in self.signature.values() if t != "constexpr"]
        pointers = dict.fromkeys(t for t in arguments if str(t).startswith("*"))
        constants = [f"{self.kernel.arg_names[path[0]]}={value}" for path, value in self.constants.items()]
        options = [
            f"{name}={self.options[name]}" for name in ("num_warps", "num_stages", "maxnreg") if name in self.options
        ]
        divisible = sum(map(bool, self.attributes.values()))
        odd = " (may spill)" * self.may_spill
        return f"{' '.join([*pointers, *constants, *options])} /16: {divisible} of {len(arguments)}{odd}"


def full_name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"


def record(cases: dict[str, Callable[[], None]], hopper: bool = False) -> tuple[list[Launch], list[str]]:
    """Run the cases with launches caught instead of made. What an entry computes in torch it computes; what a kernel
    would have written is nan. hopper: as on an H100, for which entries choose other tiles."""
    launches, errors, current = [], [], ""

    def caught(self, *arguments, grid, warmup, **keywords):
        if callable(grid):
            constants = {name: value for name, value in keywords.items() if name in self.arg_names}
            grid = grid(dict(inspect.signature(self.fn).bind(*arguments, **constants).arguments))
        if not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(f"{full_name(self)}: got the grid {grid}, want positive ints")
        arguments, keywords = [light(x) for x in arguments], {name: light(x) for name, x in keywords.items()}
        launches.append(Launch(self, tuple(arguments), keywords, current, MAY_SPILL))

    run, interpreted = JITFunction.run, choice.INTERPRETED
    # choose() lets CPU tensors through where kernels are interpreted; nan, so that nothing depends on stale memory
    JITFunction.run, choice.INTERPRETED, choice.HOPPER = caught, True, hopper
    torch.use_deterministic_algorithms(True)
    try:
        for current, case in cases.items():
            try:
                case()
            except Exception as error:  # an entry that fails before its last launch has kernels nobody checks
                errors.append(f"{current}: {type(error).__name__}: {error}")
    finally:
        JITFunction.run, choice.INTERPRETED, choice.HOPPER = run, interpreted, False
        torch.use_deterministic_algorithms(False)
    return launches, errors


def light(x: object) -> object:
    return Pointer(x.dtype, x.data_ptr(), x.untyped_storage().nbytes()) if isinstance(x, torch.Tensor) else x


def specialise(launch: Launch, target: str) -> Job:
    """What JITFunction.run does before it compiles, for a target that is not there."""
    backend = make_backend(TARGETS[target][0])
    kernel, keywords = launch.kernel, dict(launch.keywords)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = binder(*launch.arguments, **keywords)
    _, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, options)
    options = {k: v for k, v in keywords.items() if k not in kernel.arg_names}
    return Job(kernel, target, signature, constants, attributes, options, launch.case, launch.may_spill)


# ----------------------------------------------------------------------------
# compile, and read what it takes


@dataclasses.dataclass(frozen=True)
class Result:
    registers: int = 0  # a thread
    shared: int = 0  # bytes a block
    spills: int = 0  # bytes a thread
    error: str = ""
    seconds: float = 0.0


def compile_job(job: Job) -> Result:
    started, noise = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(noise):  # on an error Triton prints the whole PTX
            source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
            compiled = triton.compile(source, target=TARGETS[job.target][0], options=job.options)
        registers, spills = resources(compiled.asm)
    except Exception as error:
        text = " ".join(str(error).split())
        return Result(error=f"{type(error).__name__}: {text[:400]}", seconds=time.perf_counter() - started)
    return Result(registers, compiled.metadata.shared, spills, "", time.perf_counter() - started)


def resources(asm: dict) -> tuple[int, int]:
    """Registers a thread, and what did not fit into them."""
    if "amdgcn" in asm:
        # the private segment is memory; a vgpr may also spill to an agpr, and an sgpr to a lane, which are registers
        found = (re.search(rf"\.{k}:\s+(\d+)", asm["amdgcn"]) for k in ("vgpr_count", "private_segment_fixed_size"))
        return tuple(int(match[1]) for match in found)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    # "Function name: REG:40 STACK:0 SHARED:64 LOCAL:0 ...": Triton's kernels have no arrays, so a stack is a spill
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    return int(usage["REG"]), max(int(usage["STACK"]), int(usage["LOCAL"]))


def faults(job: Job, result: Result) -> list[str]:
    limit = TARGETS[job.target][1]
    if result.error:
        return [result.error]
    found = [f"spills: {result.spills} bytes a thread"] * (result.spills > 0 and not job.may_spill)
    if result.shared > limit:
        found.append(f"takes {result.shared} bytes of shared memory, {job.target} has {limit}")
    return found


# ----------------------------------------------------------------------------
# no kernel escapes


def kernels_of(module: types.ModuleType) -> dict[str, JITFunction]:
    """The @triton.jit functions that a module defines (not those it imports)."""
    found = vars(module).values()
    return {full_name(f): f for f in found if isinstance(f, JITFunction) and f.fn.__module__ == module.__name__}


def mentioned(kernel: JITFunction) -> dict[str, object]:
    """Global names in its body -> what they are: @triton.jit functions, constants, modules."""
    scope = kernel.fn.__globals__
    names = {node.id for node in ast.walk(kernel.parse()) if isinstance(node, ast.Name)}
    return {name: scope[name] for name in sorted(names) if name in scope}


def called_by(kernel: JITFunction) -> set[str]:
    """Names of the @triton.jit functions that its body mentions."""
    return {full_name(f) for f in mentioned(kernel).values() if isinstance(f, JITFunction)}


@functools.cache
def closure(kernel: JITFunction) -> tuple[str, ...]:
    """Code of a kernel and of the functions that it calls, and the constants they read."""
    parts, seen, waiting = [], {kernel}, [kernel]
    while waiting:
        function = waiting.pop()
        parts += code_lines(textwrap.dedent(inspect.getsource(function.fn)))
        for name, value in mentioned(function).items():
            if not isinstance(value, JITFunction):
                value = getattr(value, "value", value)  # of a tl.constexpr
                parts += [] if callable(value) or isinstance(value, types.ModuleType) else [f"{name} = {value!r}"]
            elif value not in seen:
                seen.add(value)
                waiting.append(value)
    return tuple(parts)


def escaped(kernels: dict[str, JITFunction], launched: Iterable[str]) -> list[str]:
    """Kernels that are neither launched nor called by one that is, however deep."""
    reached, new = set(), set(launched)
    while new:
        reached |= new
        new = {callee for name in new if name in kernels for callee in called_by(kernels[name])} - reached
    return sorted(set(kernels) - reached)


def modules() -> list[types.ModuleType]:
    files = sorted([*(ROOT / "kernels").glob("*.py"), *(ROOT / "lessons" / "kernels").glob("*.py")])
    dotted = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if f.stem != "__init__"]
    return [importlib.import_module(name) for name in dotted]


# ----------------------------------------------------------------------------
# CUDA C++


def compile_cuda(target: str) -> list[tuple[str, Result]]:
    """kernels/*.cu through nvcc; (file: kernel, result) each. Only what stands outside of the binding to torch is
    compiled, which needs neither torch's headers nor a minute."""
    out = []
    for file in sorted((ROOT / "kernels").glob("*.cu")):
        started = time.perf_counter()
        command = ["nvcc", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", f"-arch={target}", "-o", os.devnull, file]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            out.append((file.name, Result(error=" ".join(run.stderr.split())[:400])))
            continue
        found = re.findall(r"Compiling entry function '(\w+)'(.*?Used [^\n]*)", run.stderr, re.DOTALL)
        if not found:  # another wording, or no kernel any more: no limit would be looked at
            out.append((file.name, Result(error="nvcc names no kernel and its registers")))
        for name, facts in found:
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", facts)))
            registers = int(re.search(r"Used (\d+) registers", facts)[1])
            shared = int((re.search(r"(\d+) bytes smem", facts) or [0, 0])[1])
            out.append((f"{file.name}: {name}", Result(registers, shared, spills, "", time.perf_counter() - started)))
    return out


# ----------------------------------------------------------------------------
# the ledger


class Ledger:
    """What launches compiled to before, in one file of a folder for each module.

    deep: as if it were empty, and what is found must be what it says.
    """

    def __init__(self, folder: Path, deep: bool):
        self.folder, self.deep = folder, deep
        self.entries = {e["key"]: e for path in sorted(folder.glob("*.jsonl")) for e in ledger.read(path)}

    def known(self, jobs: list[Job]) -> dict[str, Result]:
        """Digest -> result, of those that are not compiled again."""
        keys = [] if self.deep else [job.digest for job in jobs if job.digest in self.entries]
        again = ledger.drawn_again(ROOT, keys)
        return {key: result_of(self.entries[key]) for key in keys if key not in again}

    def contradicts(self, job: Job, result: Result) -> str:
        held = self.entries.get(job.digest)
        if not held or result.error or (was := result_of(held)) == dataclasses.replace(result, seconds=0.0):
            return ""
        found = f"{result.registers} registers, {result.shared} B shared, {result.spills} B spilled"
        return f"tests/compiled says {was.registers}, {was.shared}, {was.spills}; compiled again it takes {found}"

    def write(self, jobs: list[Job], results: list[Result]) -> None:
        """These are all jobs there are: others leave the ledger."""
        found = {}
        for job, result in zip(jobs, results, strict=True):
            if not result.error:
                numbers = {"registers": result.registers, "shared": result.shared, "spills": result.spills}
                found[job.digest] = {"kernel": job.name, "launch": job.label, "target": job.target}
                found[job.digest] |= numbers | {"key": job.digest}
        by_module: dict[str, list[dict]] = {path.stem: [] for path in self.folder.glob("*.jsonl")}
        for entry in sorted(found.values(), key=lambda e: [e[k] for k in ("kernel", "launch", "key")]):
            by_module.setdefault(entry["kernel"].rpartition(".")[0], []).append(entry)
        for module, entries in by_module.items():
            if entries != ledger.read(self.folder / f"{module}.jsonl"):
                ledger.write(self.folder / f"{module}.jsonl", entries)


def result_of(entry: dict) -> Result:
    return Result(entry["registers"], entry["shared"], entry["spills"])


# ----------------------------------------------------------------------------


def gate(
    cases: dict[str, Callable[[], None]],
    sources: list[types.ModuleType],
    targets: list[str],
    only: str = "",
    all_cases: bool = True,
    memory: Ledger | None = None,
) -> list[str]:
    """Record, compile, print a row each; returns what is wrong, one line each. all_cases: none was left out, so that a
    kernel without a launch has no case, and an excuse that nothing needed is none. memory: what need not be compiled,
    nor shown unless something is wrong; written when nothing was left out."""
    launches, failures = {}, []
    for hopper in dict.fromkeys(target == "sm_90" for target in targets):
        launches[hopper], errors = record(cases, hopper)
        launches[hopper] = [launch for launch in launches[hopper] if only in full_name(launch.kernel)]
        failures += [error for error in errors if error not in failures]
    kernels = {name: f for module in sources for name, f in kernels_of(module).items() if only in name}
    if all_cases:
        launched = {full_name(x.kernel) for some in launches.values() for x in some}
        failures += [f"{name}: no case launches it" for name in escaped(kernels, launched)]
    unique = {}
    for target in targets:
        for launch in launches[target == "sm_90"]:
            try:
                job = specialise(launch, target)
            except Exception as error:
                failures.append(f"{full_name(launch.kernel)} for {target}: {type(error).__name__}: {error}")
            else:
                if job.key not in unique or unique[job.key].may_spill:
                    unique[job.key] = job
    global JOBS
    JOBS = sorted(unique.values(), key=lambda job: (job.name, job.label, job.target))
    global KNOWN
    KNOWN = memory.known(JOBS) if memory else {}
    print(
        f"{sum(map(len, launches.values()))} launches, {len(JOBS)} kernels to compile, triton {triton.__version__}",
        flush=True,
    )
    if memory:
        print(f"{len(KNOWN)} of them known from tests/compiled", flush=True)
    complete = all_cases and not only and targets == list(TARGETS)
    context, excused, rows = multiprocessing.get_context("fork"), set(), {}  # fork: a JITFunction cannot be pickled
    results = []
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        for job, result in zip(JOBS, pool.map(_compile, range(len(JOBS))), strict=True):
            results.append(result)
            if rows and (job.name,) != next(iter(rows))[:1]:  # the kernel before is complete
                show(list(rows.values()), targets)
                rows.clear()
            row = rows.setdefault((job.name, job.label, str(job.signature)), {"job": job, "notes": [], "excuses": []})
            row[job.target] = result
            row["shown"] = row.get("shown") or not complete or job.digest not in KNOWN
            contradiction = memory.contradicts(job, result) if memory else ""
            wrong = faults(job, result) + [contradiction] * bool(contradiction)
            fault, reason = EXCUSED.get((job.name, job.target), ("", ""))
            kept = [w for w in wrong if not fault or fault not in w]
            if len(kept) < len(wrong):
                excused.add((job.name, job.target))
                row["excuses"].append(f"{job.target} excused: {reason}")
            if wrong := kept:
                failures += [f"{job.name} for {job.target} [{job.label}, from {job.case}]: {w}" for w in wrong]
                row["notes"] += [f"{job.target} {w[:100]}" for w in wrong]
    show(list(rows.values()), targets)
    if memory and complete:
        memory.write(JOBS, results)
    unused = (pair for pair in EXCUSED if pair[0] in kernels and pair[1] in targets and pair not in excused)
    needless = list(unused) if all_cases else []
    return failures + [f"{name} for {target}: is excused and compiles; delete the excuse" for name, target in needless]


def show(rows: list[dict], targets: list[str]) -> None:
    """The table of one kernel, a row for each specialisation: registers a thread, shared bytes a block, spills."""
    for i, row in enumerate(row for row in rows if row["shown"] or row["notes"]):
        job, notes, cells = row["job"], row["excuses"] + row["notes"], ""
        if i == 0:
            print(f"\n{job.name}\n  " + "".join(f"{t + ' regs shared spill':>26}" for t in targets))
        for result in (row.get(t) for t in targets):
            cell = (
                "-" if result is None or result.error else f"{result.registers} {result.shared:>6} {result.spills:>5}"
            )
            cells += f"{cell:>26}"
        print(f"  {cells}  {job.label}" + "".join(f"\n{'':6}{note}" for note in notes), flush=True)


JOBS: list[Job] = []  # read by the forked workers
KNOWN: dict[str, Result] = {}


def _compile(index: int) -> Result:
    return KNOWN.get(JOBS[index].digest) or compile_job(JOBS[index])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="run only the cases whose name holds this")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="kernels whose full name holds this")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="LIST", help=f"some of {','.join(TARGETS)}")
    parser.add_argument("--deep", action="store_true", help="compile what tests/compiled knows, too, and compare")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := [t for t in targets if t not in TARGETS]:
        parser.error(f"got the target {unknown[0]!r}, want some of {', '.join(TARGETS)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    started = time.perf_counter()
    cases = {name: case for name, case in CASES.items() if options.case in name}
    memory = Ledger(LEDGER, options.deep)
    failures = gate(cases, modules(), targets, options.only, all_cases=not options.case, memory=memory)
    for target in [t for t in targets if t.startswith("sm_")] * bool(list((ROOT / "kernels").glob("*.cu"))):
        if not shutil.which("nvcc"):
            print(f"\nCUDA C++ for {target}: not compiled, there is no nvcc on this machine")
            continue
        for name, result in compile_cuda(target) if not options.only or "cu" in options.only else []:
            print(f"\n{name}\n  {target:<8}{result.registers:>9} {result.shared:>8} {result.spills:>7}")
            wrong = [result.error] * bool(result.error) + [f"spills: {result.spills} bytes"] * (result.spills > 0)
            failures += [f"{name} for {target}: {w}" for w in wrong]
    print(f"\n{time.perf_counter() - started:.0f} s; " + ("all good" if not failures else f"{len(failures)} failures"))
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
