"""Every kernel against its floor, against plain torch, and against the libraries that do the same. Needs a GPU.

    floor = max(bytes that must be moved / bandwidth, operations that must be done / rate)

Bandwidth and rate are measured first, on the machine at hand: a large copy (reads and writes counted), a large bf16
matrix product of random numbers. No version can be much faster than its floor; the table says how far each is from it.

A time is the median of single calls between two CUDA events, after a warm-up. Before each call 256 MB are overwritten,
so that nothing is read from the cache, and the GPU is kept busy for half a millisecond, so that it never waits for
Python. What a library cannot do here (not installed, out of memory, another Triton) is a line of the table with the
reason. Peers get the very same tensors, and how far their result is from ours is a column: another function would show.

On a CPU it prints the floors of an H100 (3.0 TB/s, 790 TFLOP/s, assumed), and no time. What a CPU can measure is
memory: --memory scores 8192 tokens at V = 151,936 in a process of its own and reads its peak (some minutes).

Run: python benchmarks/kernels.py [--only SUBSTRING] [--seconds 600] [--no-compile] [--out FOLDER] [--memory]
Writes kernels_DATE_GPU.json into --out and prints a Markdown table. Tests: tests/test_benchmarks.py
Letters as in kernels/.
"""

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels.seq_logprob as seq_logprob  # noqa: E402
from kernels.attention import Segments, attention  # noqa: E402
from kernels.decode_attention import decode_attention  # noqa: E402
from kernels.glu import glu  # noqa: E402
from kernels.int8 import dequantize_int8, int8_matmul, quantize_int8  # noqa: E402
from kernels.nf4 import dequantize_nf4, nf4_matmul, quantize_nf4  # noqa: E402
from kernels.rms_norm import add_rms_norm, rms_norm  # noqa: E402
from kernels.rope import rope  # noqa: E402

Run = Callable[[], object]  # one call; what it returns is compared
BF16 = torch.bfloat16
ASSUMED = {"name": "H100 (assumed)", "bandwidth": 3.0e12, "rate": 790e12}
# the bars that a GPU run is held to
LOGPROB_BAR, BANDWIDTH_BAR, BNB_BAR, SMALL_BATCH, MEMORY_BAR = {1024: 1.45, 4096: 1.3}, 0.8, 1.2, 16, 350e6


@dataclass(frozen=True)
class Case:
    """What is computed, what it must cost, and who can do it.

    make  device -> {variant: build}; inputs are drawn there, once. build() prepares a variant and gives back what is
          timed. Both may raise: that is a line of the table.
    """

    name: str
    shape: str
    bytes: float
    operations: float
    make: Callable[[torch.device], dict[str, Callable[[], Run]]]

    def floor(self, machine: dict) -> float:
        return max(self.bytes / machine["bandwidth"], self.operations / machine["rate"])


# ----------------------------------------------------------------------------
# the machine


class CudaTimer:
    """Median seconds of one call."""

    def __init__(self):
        self.dirt = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # 4 to 5 times the L2 of an H100 or H200

    def __call__(self, run: Run, budget: float = 0.4) -> float:
        for _ in range(2):
            run()
        repeats, started = 1, self._once(run)
        repeats = max(5, min(50, int(budget / max(started, 1e-6))))
        return statistics.median(self._once(run) for _ in range(repeats))

    def _once(self, run: Run) -> float:
        self.dirt.zero_()
        torch.cuda._sleep(1_000_000)  # clock cycles, about 0.5 ms: time for Python to queue all of run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def measure_machine(timer: Callable[[Run], float], device: torch.device, size: int = 2**30, width: int = 8192) -> dict:
    """Bytes a second of a copy of 1 GiB (each is read and written), operations a second of a bf16 product."""
    source, target = torch.randint(0, 255, (2, size), dtype=torch.uint8, device=device)
    bandwidth = 2 * size / timer(lambda: target.copy_(source))
    a, b = torch.randn(2, width, width, device=device).to(BF16)
    rate = 2 * width**3 / timer(lambda: a @ b)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"name": name, "bandwidth": bandwidth, "rate": rate}


def environment() -> dict:
    """What a number needs to be compared with another one."""

    def said(*command: str) -> str:
        try:
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"

    versions = {}
    for package in ("triton", "liger_kernel", "cut_cross_entropy", "bitsandbytes", "trl"):
        try:
            from importlib.metadata import version

            versions[package] = version(package.replace("_", "-"))
        except ImportError:
            versions[package] = "not installed"
    dirty = said("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": said("git", "rev-parse", "HEAD") + ("" if dirty == "unknown" else " + changes"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **versions,
    }


# ----------------------------------------------------------------------------
# the cases


def randn(*shape: int, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """The same numbers for everybody: bf16, drawn from a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, device=device, generator=generator) * scale).to(BF16)


def logprob(N: int, C: int, V: int, softcap: float | None, *, train: bool) -> Case:
    """Frozen head, as under LoRA. Two products of 2 N V C operations with a gradient, one without."""

    def make(device):
        hidden = randn(N, C, device=device).requires_grad_(train)  # (N, C)
        weight = randn(V, C, device=device, seed=1, scale=3 / C**0.5)  # (V, C) logits with a deviation of 3
        targets = torch.randint(0, V, (N,), device=device, generator=torch.Generator(device).manual_seed(2))  # (N,)
        dlogp = randn(N, device=device, seed=3).float()  # (N,) GSPO: another coefficient for every answer

        def timed(function: Callable[[Tensor], Tensor]) -> Run:
            def run():
                if not train:
                    with torch.no_grad():
                        return function(hidden)
                function(hidden).backward(dlogp)
                grad, hidden.grad = hidden.grad, None
                return grad

            return run

        def ours(below: int | None) -> Callable[[], Run]:
            def function(h):
                before = seq_logprob.EPILOGUE_BELOW
                seq_logprob.EPILOGUE_BELOW = before if below is None else below
                try:
                    return seq_logprob.token_logprob(h, weight, targets, softcap=softcap)[0]
                finally:
                    seq_logprob.EPILOGUE_BELOW = before

            return lambda: timed(function)

        def plain(h):
            z = F.linear(h, weight).float()  # (N, V)
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            return -F.cross_entropy(z, targets, reduction="none")

        def liger():
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=softcap)
            return timed(lambda h: -loss(weight, h, targets))

        def cce():
            from cut_cross_entropy import linear_cross_entropy

            return timed(lambda h: -linear_cross_entropy(h, weight, targets, softcap=softcap, reduction="none"))

        def trl():
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction

            return timed(  # 32768 columns at a time, as its trainer asks for
                lambda h: ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 32768, softcap, 1.0, ())[0]
            )

        return {
            "ours": ours(None),
            "ours, rows": ours(0),
            "ours, epilogue": ours(10**9),
            "torch": lambda: timed(plain),
            "liger_kernel": liger,
            "cut_cross_entropy": cce,
            "trl": trl,
            "torch.compile": lambda: timed(torch.compile(plain)),
        }

    products, kind = (2, "forward + backward") if train else (1, "no gradient")
    shape = f"N {N}, C {C}, V {V}" + (f", soft-cap {softcap:g}" if softcap else "")
    moved = products * 2 * V * C + 2 * N * C * (3 if train else 1)  # weight per product; hidden, G and its gradient
    return Case(f"log-prob, {kind}", shape, moved, products * 2 * N * V * C, make)


def nf4_dequantize(N: int, K: int) -> Case:
    def make(device):
        w = randn(N, K, device=device)  # (N, K)
        q, out = quantize_nf4(w), torch.empty_like(w)

        def bnb():
            from bitsandbytes import functional as bnb

            codes, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            return lambda: bnb.dequantize_4bit(codes, state)

        return {
            "ours": lambda: lambda: dequantize_nf4(q, out=out),
            "ours, CUDA C++": lambda: lambda: dequantize_nf4(q, out=out, backend="cuda"),
            "torch": lambda: lambda: dequantize_nf4(q, out=out, backend="torch"),
            "bitsandbytes": bnb,
        }

    return Case("NF4 dequantise", f"{N} x {K}", nf4_bytes(N, K) + 2 * N * K, N * K, make)


def nf4_bytes(N: int, K: int) -> float:
    """Codes, a byte for 64 weights, a float for 64 * 256."""
    return N * K * (1 / 2 + 1 / 64 + 4 / (64 * 256))


def matmul(kind: str, M: int, N: int, K: int) -> Case:
    """M rows times quantised weights, as in a rollout of M answers."""

    def make(device):
        w, x = randn(N, K, device=device, scale=K**-0.5), randn(M, K, device=device, seed=1)  # (N, K), (M, K)
        scratch = torch.empty_like(w)  # (N, K)
        quantize, multiply, dequantize = {
            "NF4": (quantize_nf4, nf4_matmul, dequantize_nf4),
            "int8": (quantize_int8, int8_matmul, dequantize_int8),
        }[kind]
        q = quantize(w)

        def bnb():
            import bitsandbytes

            codes, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            return lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

        variants = {
            "ours": lambda: lambda: multiply(x, q),
            "dequantise + cuBLAS": lambda: lambda: x @ dequantize(q, out=scratch).T,
            "bf16 cuBLAS": lambda: lambda: x @ w.T,
        }
        return variants | ({"bitsandbytes": bnb} if kind == "NF4" else {})

    weights = nf4_bytes(N, K) if kind == "NF4" else N * K + 4 * N
    return Case(f"{kind} product", f"M {M}, {N} x {K}", weights + 2 * M * (N + K), 2 * M * N * K, make)


def elementwise(
    name: str, shape: str, forward_bytes: float, backward_bytes: float, make: Callable[[torch.device], tuple]
) -> list[Case]:
    """A forward and a backward case. make: device -> inputs that want gradients, {variant: build of the function}."""

    def forward(device):
        inputs, variants = make(device)
        plain = [x.detach() for x in inputs]
        return {name: lambda build=build: _call(build(), plain) for name, build in variants.items()}

    def backward(device):
        inputs, variants = make(device)
        return {name: lambda build=build: _pull(build(), inputs) for name, build in variants.items()}

    return [
        Case(f"{name}, forward", shape, forward_bytes, 0, forward),
        Case(f"{name}, backward", shape, backward_bytes, 0, backward),
    ]


def _call(function: Callable[..., object], inputs: list[Tensor]) -> Run:
    def run():
        with torch.no_grad():
            return function(*inputs)

    return run


def _pull(function: Callable[..., object], inputs: list[Tensor]) -> Run:
    out = function(*inputs)
    out = [out] if isinstance(out, Tensor) else list(out)
    grads = [randn(*x.shape, device=x.device, seed=9 + i) for i, x in enumerate(out)]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As nanogspo/model.py has it."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def norm_cases(N: int, W: int) -> list[Case]:
    def make(device):
        x, weight = randn(N, W, device=device).requires_grad_(), randn(W, device=device, seed=1)

        def liger():
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)

        return [x], {
            "ours": lambda: lambda x: rms_norm(x, weight, eps=1e-6),
            "torch": lambda: lambda x: plain_norm(x, weight),
            "torch, F.rms_norm": lambda: lambda x: F.rms_norm(x, (W,), weight, 1e-6),
            "liger_kernel": liger,
            "torch.compile": lambda: torch.compile(lambda x: plain_norm(x, weight)),
        }

    return elementwise("RMSNorm", f"N {N}, W {W}", N * (4 * W + 4), N * (6 * W + 4), make)


def add_norm_cases(N: int, W: int) -> list[Case]:
    def make(device):
        x, delta = (randn(N, W, device=device, seed=seed).requires_grad_() for seed in (0, 1))
        weight = randn(W, device=device, seed=2)

        def plain(x, delta):
            total = x + delta
            return plain_norm(total, weight), total

        def liger():
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return lambda x, delta: LigerFusedAddRMSNormFunction.apply(x, delta, weight, 1e-6, 0.0, "llama", False)

        return [x, delta], {
            "ours": lambda: lambda x, delta: add_rms_norm(x, delta, weight, eps=1e-6),
            "torch": lambda: plain,
            "liger_kernel": liger,
            "torch.compile": lambda: torch.compile(plain),
        }

    return elementwise("add + RMSNorm", f"N {N}, W {W}", N * (8 * W + 4), N * (8 * W + 4), make)


def rope_cases(N: int, H: int, K: int, D: int) -> list[Case]:
    """With the norm of Qwen 3 in front. One row of N positions."""

    def make(device):
        q = randn(1, N, H, D, device=device).requires_grad_()  # (1, N, H, D)
        k = randn(1, N, K, D, device=device, seed=1).requires_grad_()  # (1, N, K, D)
        angle = torch.arange(N, device=device)[:, None] * 10000.0 ** -(torch.arange(0, D, 2, device=device) / D)
        angle = torch.cat((angle, angle), dim=-1)[None, :, None]  # (1, N, 1, D)
        cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
        wq, wk = randn(D, device=device, seed=3), randn(D, device=device, seed=4)

        def plain(q, k):
            return plain_rotate(plain_norm(q, wq), cos, sin), plain_rotate(plain_norm(k, wk), cos, sin)

        return [q, k], {
            "ours": lambda: lambda q, k: rope(q, k, cos, sin, q_weight=wq, k_weight=wk),
            "torch": lambda: plain,
            "torch.compile": lambda: torch.compile(plain),
        }

    shape, heads = f"N {N}, heads {H} + {K} of {D}", (H + K) * D
    return elementwise("qk-norm + RoPE", shape, N * 4 * (heads + D), N * (6 * heads + 4 * D), make)


def glu_cases(N: int, F_: int) -> list[Case]:
    def make(device):
        gate, up = (randn(N, F_, device=device, seed=seed).requires_grad_() for seed in (0, 1))

        def liger():
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            return LigerSiLUMulFunction.apply

        return [gate, up], {
            "ours": lambda: lambda gate, up: glu(gate, up, activation="silu"),
            "torch": lambda: lambda gate, up: F.silu(gate) * up,
            "liger_kernel": liger,
            "torch.compile": lambda: torch.compile(lambda gate, up: F.silu(gate) * up),
        }

    return elementwise("SwiGLU", f"N {N}, F {F_}", N * 6 * F_, N * 10 * F_, make)


def attention_cases(prompt: int, group: int, answer: int, H: int, K: int, D: int) -> list[Case]:
    """Training: a packed row of one prompt and its answers."""
    lengths, parents = [prompt] + [answer] * group, [-1] + [0] * group
    S = sum(lengths)
    pairs = sum(x * (x + 1) // 2 for x in lengths) + group * answer * prompt  # of a query and a key it sees

    def make(device):
        q, k, v = (randn(S, heads, D, device=device, seed=i).requires_grad_() for i, heads in enumerate((H, K, K)))
        segments = Segments.build(lengths, parents, device)

        def by(backend):
            return lambda: lambda q, k, v: attention(q, k, v, segments, scale=D**-0.5, backend=backend)

        return [q, k, v], {"ours": by(None), "torch, by pieces": by("torch")}

    shape = f"{prompt} + {group} x {answer}, {H} heads on {K}"
    forward, backward = elementwise("attention", shape, 4 * S * D * (H + K), 4 * S * D * (3 * H + 3 * K), make)
    operations = 4 * pairs * H * D
    return [replace(forward, operations=operations), replace(backward, operations=2.5 * operations)]


def decode_case(P: int, group: int, prefix: int, length: int, H: int, K: int, D: int) -> Case:
    """One step of a rollout, one layer."""
    N = P * group

    def make(device):
        q = randn(N, H, D, device=device)
        prefix_k, prefix_v = (randn(K, P, prefix, D, device=device, seed=i) for i in (1, 2))
        k, v = (randn(K, N, length, D, device=device, seed=i) for i in (3, 4))
        prompt = torch.arange(P, device=device).repeat_interleave(group)  # (N,)
        lengths, prefixes = torch.full((N,), length, device=device), torch.full((P,), prefix, device=device)

        def ours():
            numbers = {"prefix_lengths": prefixes, "lengths": lengths, "prompt": prompt, "scale": D**-0.5}
            return lambda: decode_attention(q, prefix_k, prefix_v, k=k, v=v, **numbers)

        def repeated():
            keys, values = (
                torch.cat((shared.index_select(1, prompt), own), dim=2).transpose(0, 1).contiguous()  # (N, K, S, D)
                for shared, own in ((prefix_k, k), (prefix_v, v))
            )
            sdpa = F.scaled_dot_product_attention
            return lambda: sdpa(q[:, :, None], keys, values, scale=D**-0.5, enable_gqa=True)[:, :, 0]

        return {"ours": ours, "sdpa, prompts repeated": repeated}

    shape = f"{P} x {group} rows, {prefix} + {length}, {H} heads on {K}"
    moved = 4 * K * D * (P * prefix + N * length) + 4 * N * H * D
    return Case("decode attention", shape, moved, 4 * N * (prefix + length) * H * D, make)


# Qwen3-0.6B and 8B, Gemma-2-2B; and the same cases small enough for a test on a CPU
REAL = {
    "heads": [(8192, 1024, 151936, None), (8192, 4096, 151936, None), (8192, 2304, 256000, 30.0)],
    "weights": (4096, 12288),
    "layer": (12288, 4096),
    "batches": (1, 2, 4, 8, 16, 32, 64),
    "tokens": 8192,
    "models": [(1024, 3072, 16, 8, 128), (4096, 12288, 32, 8, 128)],
    "packed": (512, 16, 512),
    "decoded": [(8, 16, 512, 512), (1, 1, 512, 512)],
}
TINY = {
    "heads": [(5, 32, 70, None), (3, 16, 33, 3.0)],
    "weights": (8, 128),
    "layer": (16, 128),
    "batches": (1, 16),
    "tokens": 6,
    "models": [(32, 48, 4, 2, 16)],
    "packed": (5, 2, 3),
    "decoded": [(2, 2, 5, 3)],
}


def cases(sizes: dict) -> list[Case]:
    """Most telling first: a run that is cut short has these."""
    heads, models, tokens = sizes["heads"], sizes["models"], sizes["tokens"]
    return [
        *(logprob(*head, train=True) for head in heads),
        *(logprob(*head, train=False) for head in heads),
        *(decode_case(*rows, *models[0][2:]) for rows in sizes["decoded"]),
        *attention_cases(*sizes["packed"], *models[0][2:]),
        nf4_dequantize(*sizes["weights"]),
        *(matmul("NF4", M, *sizes["layer"]) for M in sizes["batches"]),
        *(case for C, *_ in models for case in norm_cases(tokens, C)),
        *(case for C, *_ in models for case in add_norm_cases(tokens, C)),
        *(case for _, _, H, K, D in models for case in rope_cases(tokens, H, K, D)),
        *(case for _, F_, *_ in models for case in glu_cases(tokens, F_)),
        *(matmul("int8", M, *sizes["layer"]) for M in sizes["batches"]),
    ]


# ----------------------------------------------------------------------------
# running them


def measure(
    todo: list[Case],
    machine: dict,
    timer: Callable[[Run], float],
    device: torch.device,
    *,
    deadline: float = math.inf,
    compiled: bool = True,
    show: Callable[[str], None] = print,
    wanted: Callable[[str], bool] | None = None,
) -> list[dict]:
    """A row for each case and variant (wanted: of those whose name it accepts). First everything but torch.compile,
    which takes most of the time; then that."""
    rows = []
    for compiling in (False, True)[: 1 + compiled]:
        for case in todo:
            rows += _measure_case(case, machine, timer, device, deadline, compiling, show, wanted)
            _forget(device)
    order = {(case.name, case.shape): i for i, case in enumerate(todo)}
    return sorted(rows, key=lambda row: order[row["case"], row["shape"]])  # stable: compile comes last of its case


def _measure_case(case, machine, timer, device, deadline, compiling: bool, show, wanted) -> list[dict]:
    floor, rows, ours = case.floor(machine), [], None
    empty = {"case": case.name, "shape": case.shape, "floor_s": floor, "bytes": case.bytes, "flops": case.operations}
    empty |= {"seconds": None, "over_floor": None, "extra_bytes": None, "differs": None, "note": ""}
    if time.monotonic() > deadline:
        return [] if compiling else [empty | {"variant": "ours", "note": "not measured: out of time"}]
    try:
        variants = case.make(device)
    except Exception as error:
        return [] if compiling else [empty | {"variant": "ours", "note": f"not measured: {_reason(error)}"}]
    chosen = {name: build for name, build in variants.items() if (name == "torch.compile") == compiling}
    chosen = {name: build for name, build in chosen.items() if wanted is None or wanted(name)}
    for name, build in chosen.items():
        row = empty | {"variant": name}
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("out of time")
            run = build()
            value = [x.detach().clone() for x in _tensors(run())]
            ours = value if name == "ours" else ours
            row["differs"] = _distance(value, ours)
            row["extra_bytes"] = _extra_memory(run, device)
            row["seconds"] = timer(run)
            row["over_floor"] = row["seconds"] / floor
        except Exception as error:  # a peer that fails must not take the table with it; the reason stays in it
            row["note"] = f"not measured: {_reason(error)}"
        rows.append(row)
        show(f"{case.name} | {case.shape} | {name} | {_cells(row)}")
        run = value = None
        _forget(device)
    return rows


def _tensors(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for t in x if isinstance(t, Tensor)]


def _distance(value: list[Tensor], ours: list[Tensor] | None) -> float | None:
    """|theirs - ours| / |ours|, the largest over what is returned. bf16 makes 3e-3 of it."""
    if ours is None or len(ours) != len(value):
        return None
    pairs = [(a.float().flatten(), b.float().flatten()) for a, b in zip(value, ours, strict=True)]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def _extra_memory(run: Run, device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        with contextlib.suppress(Exception):  # after an illegal access everything fails; the rows so far must not
            torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"\|", "/", f"{type(error).__name__}: {text}"[:160])


# ----------------------------------------------------------------------------
# memory: what a log-prob may hold besides hidden and G

MEMORY = """
import ctypes, sys, torch
from kernels.seq_logprob import token_logprob
N, C, V, train = map(int, sys.argv[1:5])
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def run(hidden, weight, targets):
    logp, _ = token_logprob(hidden.requires_grad_(bool(train)), weight, targets)
    return hidden.numel() * hidden.element_size() * train, logp
run(torch.randn(8, C).bfloat16(), torch.randn(64, C).bfloat16(), torch.arange(8))  # what BLAS keeps for itself
hidden, weight = torch.empty(N, C, dtype=torch.bfloat16).fill_(0.5), torch.empty(V, C, dtype=torch.bfloat16)
for rows in weight.split(4096):
    rows.copy_(torch.randn(rows.shape) / C**0.5)  # no fp32 copy of all of it: it would be the peak
targets = torch.randint(0, V, (N,))
ctypes.CDLL(None).malloc_trim(0)  # what was freed so far goes back, or it would be reused below and not count
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forgets the peak so far: Linux, proc(5)
before = status("VmRSS")
G, _ = run(hidden, weight, targets)
print(status("VmHWM") - before - G)
"""


def cpu_memory(N: int = 8192, C: int = 1024, V: int = 151936) -> dict[str, int]:
    """Bytes over inputs and G at the peak of a scoring pass and of a training forward, each in a fresh process."""
    out = {}
    for train in (0, 1):
        command = [sys.executable, "-c", MEMORY, *map(str, (N, C, V, train))]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the measuring process ended with {run.returncode}: {run.stderr[-500:]}")
        out["with a gradient" if train else "without a gradient"] = int(run.stdout)
    return out


# ----------------------------------------------------------------------------
# bars and tables


def bars(rows: list[dict]) -> list[dict]:
    """What the kernels are held to on a GPU. passed is None where nothing was measured."""
    table = {}
    for row in rows:
        table.setdefault((row["case"], row["shape"]), {})[row["variant"]] = row
    out = []

    def bar(name: str, value: float | None, want: str, passed: Callable[[float], bool]) -> None:
        out.append({"bar": name, "value": value, "want": want, "passed": None if value is None else passed(value)})

    for (case, shape), variants in table.items():
        ours = variants.get("ours", {})
        seconds, over = ours.get("seconds"), ours.get("over_floor")
        rivals = {n: r["seconds"] for n, r in variants.items() if not n.startswith("ours") and r["seconds"] is not None}
        best = min(rivals.values(), default=None)
        ratio = best / seconds if seconds and best else None
        width = re.search(r"C (\d+)", shape)
        if case == "log-prob, forward + backward":
            if limit := LOGPROB_BAR.get(int(width[1])):
                bar(f"{case}, {shape}: time over floor", over, f"<= {limit}", lambda x, limit=limit: x <= limit)
            bar(f"{case}, {shape}: fastest other / ours", ratio, "> 1", lambda x: x > 1)
            held = ours.get("extra_bytes")
            G = 2 * math.prod(int(n) for n in re.findall(r"[NC] (\d+)", shape))  # bf16, as large as hidden
            if "V 151936" in shape and "C 1024" in shape:
                # the gradient of hidden, as large again, is what backward is for
                extra = None if held is None else held - 2 * G
                bar(f"{case}, {shape}: extra bytes", extra, f"<= {MEMORY_BAR:.0f}", lambda x: x <= MEMORY_BAR)
        elif case == "NF4 dequantise":
            share = None if over is None else 1 / over
            bar(f"{case}: share of copy bandwidth", share, f">= {BANDWIDTH_BAR}", lambda x: x >= BANDWIDTH_BAR)
            peer = variants.get("bitsandbytes", {}).get("seconds")
            gain = peer / seconds if peer and seconds else None
            bar(f"{case}: bitsandbytes / ours", gain, f">= {BNB_BAR}", lambda x: x >= BNB_BAR)
        elif case == "NF4 product" and int(re.search(r"M (\d+)", shape)[1]) <= SMALL_BATCH:
            slow = variants.get("dequantise + cuBLAS", {}).get("seconds")
            gain = slow / seconds if slow and seconds else None
            bar(f"{case}, {shape}: dequantise + cuBLAS / ours", gain, "> 1", lambda x: x > 1)
        elif case.startswith(("RMSNorm", "add + RMSNorm", "qk-norm", "SwiGLU")):
            share = None if over is None else 1 / over
            bar(f"{case}, {shape}: share of copy bandwidth", share, f">= {BANDWIDTH_BAR}", lambda x: x >= BANDWIDTH_BAR)
    return out


def _cells(row: dict) -> str:
    if row["seconds"] is None:
        return row["note"] or "not measured"
    rate = row["flops"] / row["seconds"] / 1e12
    speed = f"{rate:.0f} TFLOP/s" if rate > 20 else f"{row['bytes'] / row['seconds'] / 1e12:.2f} TB/s"
    extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f} MB"
    differs = "-" if row["differs"] is None else f"{row['differs']:.0e}"
    return f"{row['seconds'] * 1e3:.3f} ms | {row['over_floor']:.2f} x floor | {speed} | {extra} | {differs}"


def markdown(rows: list[dict], machine: dict, facts: dict, checked: list[dict]) -> str:
    lines = [
        f"{machine['name']}: copy {machine['bandwidth'] / 1e12:.2f} TB/s, bf16 products {machine['rate'] / 1e12:.0f} "
        f"TFLOP/s, torch {facts['torch']}, triton {facts['triton']}, driver {facts['driver']}, {facts['date']}",
        "",
        "| case | shape | floor | variant | time | over floor | speed | extra memory | differs from ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = _cells(row)
        cells = cells if row["seconds"] is not None else f"{cells} | | | |"
        lines.append(f"| {row['case']} | {row['shape']} | {_time(row['floor_s'])} | {row['variant']} | {cells} |")
    lines += ["", "| bar | measured | wanted | |", "|---|---|---|---|"]
    for bar in checked:
        value = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[bar["passed"]]
        lines.append(f"| {bar['bar']} | {value} | {bar['want']} | {verdict} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def save(folder: Path, kind: str, facts: dict, content: dict) -> Path:
    """KIND_DATE_GPU.json. gpu_suite.py stores its own beside it."""
    gpu = re.sub(r"\W+", "-", facts["gpu"]).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}_{facts['date'][:10]}_{gpu}.json"
    file.write_text(json.dumps({"environment": facts, **content}, indent=1))
    return file


def floors(todo: list[Case], machine: dict) -> str:
    """The table of a machine that cannot measure."""
    lines = [
        f"Floors of an {machine['name']}: {machine['bandwidth'] / 1e12:.1f} TB/s of copies, "
        f"{machine['rate'] / 1e12:.0f} TFLOP/s in bf16. No GPU here: no time is measured.",
        "",
        "| case | shape | bytes | operations | floor | time |",
        "|---|---|---|---|---|---|",
    ]
    for case in todo:
        work = f"{case.bytes / 1e6:.1f} MB | {case.operations / 1e9:,.1f} G"
        lines.append(f"| {case.name} | {case.shape} | {work} | {_time(case.floor(machine))} | not measured |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="cases whose name or shape holds this")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after this time")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--memory", action="store_true", help="CPU: peak memory of scoring 8192 tokens, some minutes")
    options = parser.parse_args(arguments)
    todo = [case for case in cases(REAL) if options.only in f"{case.name}, {case.shape}"]
    if not todo:
        parser.error(f"got --only {options.only!r}, which no case holds; want e.g. log-prob, NF4, RoPE or SwiGLU")
    if options.memory:
        for kind, extra in cpu_memory().items():
            verdict = "met" if extra <= MEMORY_BAR else "MISSED"
            wanted = f"wanted <= {MEMORY_BAR / 1e6:.0f} MB: {verdict}"
            print(f"8192 tokens, C 1024, V 151936, bf16, {kind}: {extra / 1e6:.0f} MB besides inputs and G, {wanted}")
    if not torch.cuda.is_available():
        print(floors(todo, ASSUMED))
        return 0
    started, device = time.monotonic(), torch.device("cuda")
    facts, timer = environment(), CudaTimer()
    machine = measure_machine(timer, device)
    print(
        f"{machine['name']}: {machine['bandwidth'] / 1e12:.2f} TB/s, {machine['rate'] / 1e12:.0f} TFLOP/s", flush=True
    )
    torch._dynamo.config.cache_size_limit = 64  # cases share their functions' names, not their shapes
    rows = measure(
        todo,
        machine,
        timer,
        device,
        deadline=started + options.seconds,
        compiled=not options.no_compile,
        show=lambda line: print(line, flush=True),
    )
    checked = bars(rows)
    table = markdown(rows, machine, facts, checked)
    file = save(options.out, "kernels", facts, {"machine": machine, "rows": rows, "bars": checked, "markdown": table})
    print(f"\n{table}\n\nwritten to {os.path.relpath(file)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
