"""Everything that only a GPU can show, in one command: the most telling first, saved as it comes. Needs a GPU.

     1 card            bandwidth, product rates, time of the smallest kernel and of a replayed graph of 1,000
     2 checks          what the interpreter cannot see: fp32 products, a model that scores itself, a decode graph, ...
     3 decode_profile  one replayed decode step by kernel, its floor, the gap between steps
     4 decode          ms a step by slots, rows, adapter; eager against replayed; ms a capture
     5 micro_batch     one of 16k tokens by kernel, tokens a second and peak memory, checkpointing off and on
     6 rollouts        memory after rollouts whose rows leave; a capture made to fail
     7 kernels         benchmarks/kernels.py's cases, ours alone, against their floors
     8 waits           how often the host waits, kernels compiled and their seconds
     9 cycle           rollout, score, train; first ratios; sampling against what it must read
    10 peers, tests, nvcc   the other libraries; the kernels' own tests on silicon; kernels/nf4.cu, which is built first

Each part is a process of its own under a time limit: one that hangs, crashes, runs out of memory or leaves the GPU
unusable (an illegal access does) costs its own results and no others. Each result is a line of output, and the file in
--out is rewritten after every one. Models have Qwen3-0.6B's shape and random weights. torch.compile, which takes most
of the time and may hang, is timed by benchmarks/kernels.py alone.

Run: python benchmarks/gpu_suite.py [--parts card,checks,...] [--seconds 1200] [--out benchmarks/results]
Exit code 0: every part passed. 1: some part failed. 2: no GPU. Tests: tests/test_benchmarks.py
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

# name -> the most seconds it may take, in the order they run. The first nine are under ten minutes together.
LIMITS = {
    "card": 30, "checks": 110, "decode_profile": 50, "decode": 90, "micro_batch": 60, "rollouts": 50, "kernels": 70,
    "waits": 40, "cycle": 80, "peers": 200, "tests": 300, "nvcc": 90,
}  # fmt: skip
STEP = {"prompts": 8, "group": 16, "prompt_tokens": 512, "tokens": 1024, "updates": 4, "max_tokens": 16384}
WARM_TOKENS, PEER_TOKENS = 32, 256  # of the first cycle, which compiles; of the answers that transformers writes too
QWEN3_0_6B = {
    "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip


# ----------------------------------------------------------------------------
# checks: each takes the device and whether it is a real one, and raises what is wrong. On a CPU the kernels run in
# Triton's interpreter and the sizes are small: that is how tests/test_benchmarks.py tries this file.


def check_same_bits_twice(device: torch.device, big: bool) -> str:
    """Both paths of the log-prob, forward and backward: no atomics, no race."""
    for path in paths():
        runs = [logprob(device, big, path) for _ in range(3)]
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                assert torch.equal(a, b), f"{path}: {(a != b).sum().item()} of {a.numel()} numbers differ between runs"
    return "logp, entropy and gradient, three runs, both paths"


def check_ratio_is_one(device: torch.device, big: bool) -> str:
    """A scoring pass without gradients and the training forward: GSPO's first ratio is exp(0)."""
    for path in paths():
        scored, trained = logprob(device, big, path, train=False), logprob(device, big, path)
        for a, b in zip(scored[:2], trained[:2], strict=True):
            assert torch.equal(a, b), f"{path}: {(a != b).sum().item()} of {a.numel()} differ without gradients"
    return "logp and entropy with and without gradients, both paths"


def check_rows_alone(device: torch.device, big: bool) -> str:
    """A row's bits do not depend on the rows beside it."""
    for path in paths():
        whole = logprob(device, big, path)
        for rows in (slice(0, 1), slice(3, 20), slice(1, None, 2)):
            part = logprob(device, big, path, rows=rows)
            for a, b in zip(whole, part, strict=True):
                assert torch.equal(a[rows], b), f"{path}: rows {rows} alone have other bits"
    return "one row, 17 rows, every second row, both paths"


def check_log_prob_against_float64(device: torch.device, big: bool) -> str:
    """bf16 in: logp to 1e-4, gradient to 4e-3 a row, also where the target is nearly certain."""
    worst = []
    for path in paths():
        hidden, weight, targets = inputs(device, big)
        got = logprob(device, big, path)
        z = hidden.double() @ weight.double().T  # (N, V)
        p = z.softmax(1)
        want = z.log_softmax(1).gather(1, targets[:, None]).squeeze(1)  # (N,)
        p.scatter_(1, targets[:, None], 0.0)
        # p - 1 of the target from the others' p: where p is 1 - 6e-14, subtracting 1 would leave three digits
        p.scatter_(1, targets[:, None], -p.sum(1, keepdim=True))
        gradient = -(p @ weight.double())  # (N, C)
        sure = int((want > -1e-3).sum())
        assert sure >= 3, f"only {sure} rows with p > 0.999: the case shows nothing"
        off = (got[0] - want).abs().max().item()
        rows = (got[2].double() - gradient).norm(dim=1) / gradient.norm(dim=1)  # (N,)
        assert off <= 1e-4, f"{path}: logp is off by {off:.1e}, want 1e-4"
        assert rows.max() <= 4e-3, f"{path}: a row's gradient is off by {rows.max():.1e}, want 4e-3"
        worst.append(f"{path}: logp {off:.0e}, gradient {rows.max():.0e}")
    return "; ".join(worst)


def check_offsets_beyond_31_bits(device: torch.device, big: bool) -> str:
    """Tensors of more than 2^31 numbers: the last rows equal the same rows alone."""
    from kernels.glu import glu
    from kernels.rms_norm import rms_norm
    from lessons.kernels.token_logp_v3 import token_logp

    rows = {name: 2**31 // width + 70 if big else 12 for name, width in WIDTHS.items()}
    gate = randn(rows["glu"], WIDTHS["glu"] if big else 64, device=device)
    whole = glu(gate, gate, activation="silu", backend="triton")
    assert torch.equal(whole[-9:], glu(gate[-9:], gate[-9:], activation="silu", backend="triton")), "glu"
    del whole, gate
    x = randn(rows["norm"], WIDTHS["norm"] if big else 64, device=device)
    weight = randn(x.shape[1], device=device, seed=1)
    whole = rms_norm(x, weight, eps=1e-6, backend="triton")
    assert torch.equal(whole[-9:], rms_norm(x[-9:], weight, eps=1e-6, backend="triton")), "rms_norm"
    del whole, x
    logits = randn(rows["logits"], WIDTHS["logits"] if big else 64, device=device)
    targets = torch.randint(0, logits.shape[1], (len(logits),), device=device)
    whole = token_logp(logits, targets, backend="triton")
    assert torch.equal(whole[-9:], token_logp(logits[-9:], targets[-9:], backend="triton")), "token_logp"
    return ", ".join(f"{name} {n} x {WIDTHS[name]}" for name, n in rows.items())


WIDTHS = {"glu": 12288, "norm": 1024, "logits": 151_936}


def check_nf4_same_bits(device: torch.device, big: bool) -> str:
    """Triton and torch decode to the same bits, in every dtype; offsets beyond 2^31 too."""
    return same_nf4_bits(device, big, "triton")


def check_nf4_cuda_same_bits(device: torch.device, big: bool) -> str:
    """CUDA C++ and torch decode to the same bits. Needs nvcc and ninja, and says so without them."""
    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

    if CUDA_HOME is None or not is_ninja_available():
        return "not run: no nvcc or no ninja on this machine"
    return same_nf4_bits(device, big, "cuda")


def same_nf4_bits(device: torch.device, big: bool, backend: str) -> str:
    from kernels.nf4 import dequantize_nf4, quantize_nf4

    q = quantize_nf4(randn(1024 if big else 16, 1000, device=device))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        want = dequantize_nf4(q, dtype, backend="torch")
        got = dequantize_nf4(q, dtype, backend=backend)
        assert torch.equal(got, want), f"{backend}, {dtype}: {(got != want).sum().item()} weights differ"
    times = 2200 if big else 2
    small = quantize_nf4(randn(1024 if big else 16, 1024, device=device), double_quant=False)
    large = dataclasses.replace(
        small,
        codes=small.codes.repeat(times, *[1] * (small.codes.ndim - 1)),
        absmax=small.absmax.repeat(times),
        shape=(small.shape[0] * times, 1024),
    )
    want = dequantize_nf4(small, backend="torch")
    got = dequantize_nf4(large, backend=backend)
    assert torch.equal(got[-len(want) :], want), f"{backend}: weights beyond 2^31 differ"
    return f"{backend} and torch; {large.shape[0] * 1024:.1e} weights"


def check_small_products(device: torch.device, big: bool) -> str:
    """NF4 and int8 products against their own dequantised weights in float64; a row's bits do not depend on M."""
    from kernels.int8 import dequantize_int8, int8_matmul, quantize_int8
    from kernels.nf4 import dequantize_nf4, nf4_matmul, quantize_nf4

    N, K = (3072, 1024) if big else (32, 64)
    for quantize, dequantize, multiply in (
        (quantize_nf4, dequantize_nf4, nf4_matmul),
        (quantize_int8, dequantize_int8, int8_matmul),
    ):
        q, x = quantize(randn(N, K, device=device)), randn(16, K, device=device, seed=1)
        want = x.double() @ dequantize(q, backend="torch").double().T  # (16, N)
        got = multiply(x, q, backend="triton")
        off = ((got.double() - want).norm() / want.norm()).item()
        assert off < 4e-3, f"{multiply.__name__} is off by {off:.1e}: bf16 rounding is 2e-3"
        for M in (1, 5, 16):
            again = multiply(x[:M], q, backend="triton")
            assert torch.equal(again, got[:M]), f"{multiply.__name__}: {M} rows alone have other bits"
    return f"NF4 and int8, {N} x {K}, M 1, 5, 16"


def check_decode_attention(device: torch.device, big: bool) -> str:
    """A step of a rollout in bf16 against float64; on a GPU with storage whose offsets pass 2^31."""
    from kernels.decode_attention import decode_attention

    K, D, P, group, Sp, Ss = (8, 128, 8, 16, 700, 20000) if big else (2, 16, 2, 3, 20, 9)
    N = P * group
    q = randn(N, 2 * K, D, device=device)
    prefix_k, prefix_v = (randn(K, P, Sp, D, device=device, seed=i) for i in (1, 2))
    k, v = (q.new_full((K, N, Ss, D), torch.nan) for _ in "kv")
    prompt = torch.arange(P, device=device).repeat_interleave(group)  # (N,)
    prefixes, lengths = torch.arange(Sp - P, Sp, device=device), torch.arange(1, N + 1, device=device)
    for i, storage in ((3, k), (4, v)):
        storage[:, :, :N] = randn(K, N, N, D, device=device, seed=i)
    numbers = {"prefix_lengths": prefixes, "lengths": lengths, "prompt": prompt, "scale": D**-0.5}
    got = decode_attention(q, prefix_k, prefix_v, k=k, v=v, backend="triton", **numbers)  # (N, H, D)
    off = 0.0
    for n in (0, group, N - 1):
        p, own = n // group, int(lengths[n])
        keys, values = (
            torch.cat((a[:, p, : int(prefixes[p])], b[:, n, :own]), dim=1).double().repeat_interleave(2, 0)  # (H, S, D)
            for a, b in ((prefix_k, k), (prefix_v, v))
        )
        weights = torch.einsum("hd,hsd->hs", q[n].double(), keys).mul(D**-0.5).softmax(-1)  # (H, S)
        off = max(off, (got[n].double() - torch.einsum("hs,hsd->hd", weights, values)).abs().max().item())
    assert off < 3e-2, f"off by {off:.1e}; bf16 values of up to 4 are rounded by 1.6e-2"
    return f"{N} rows of {P} prompts, {k.numel():.1e} numbers of keys"


def check_decode_graph(device: torch.device, big: bool) -> str:
    """Answers sampled by a replayed CUDA graph, and step by step: the same tokens, and how much faster."""
    from nanogspo import rollout
    from nanogspo.fast import cuda_graph
    from nanogspo.rollout import generate

    model, _ = small_model(device)
    prompts, seconds, answers = [[1, 2, 3], list(range(40))], {}, {}
    settings = {"group_size": 32 if big else 2, "max_new_tokens": 200 if big else 4, "eos_ids": range(20)}
    captures, capture, can_capture = [], cuda_graph.capture, rollout.can_capture
    for name, can in (("step by step", lambda cache: False), ("replayed", can_capture)):
        counted = lambda step: captures.append(1) or capture(step)  # noqa: E731
        # batches of equal sizes: cuBLAS may choose another kernel for another size
        below = {"COMPACT_BELOW": rollout.COMPACT_CAPTURED_BELOW, "can_capture": can}
        with patch.multiple(rollout, **below), patch.object(cuda_graph, "capture", counted):
            for _ in range(2):  # the first compiles
                started = time.perf_counter()
                answers[name] = generate(model, prompts, seed=1, **settings)
                seconds[name] = time.perf_counter() - started
    if device.type == "cuda":
        assert len(captures) >= 4, f"{len(captures)} captures in two rollouts whose rows leave at all times"
    for a, b in zip(*answers.values(), strict=True):
        assert a.tokens == b.tokens, f"tokens differ: {a.tokens[:9]} and {b.tokens[:9]}"
        off = max(abs(x - y) for x, y in zip(a.logp, b.logp, strict=True))
        assert off < 1e-5, f"log-probs differ by {off:.1e}"
    ratio = seconds["step by step"] / seconds["replayed"]
    return f"{len(answers['replayed'])} answers, {len(captures)} captures in 2 rollouts, {ratio:.1f} x as fast"


def check_products_come_out_as_fp32(device: torch.device, big: bool) -> str:
    """torch.mm and torch.addmm with out_dtype: what every exact logit here leans on."""
    a, b = randn(64, 256, device=device), randn(256, 32, device=device, seed=1)
    want = a.double() @ b.double()
    got = torch.empty(64, 32, device=device)
    torch.mm(a, b, out=got, out_dtype=torch.float32)
    assert (got - want).abs().max() < 1e-3, "torch.mm(..., out=, out_dtype=torch.float32)"
    torch.addmm(got, a, b, out=got, out_dtype=torch.float32)
    assert (got - 2 * want).abs().max() < 1e-3, "torch.addmm(..., out=, out_dtype=torch.float32)"
    return "bf16 x bf16 -> fp32"


def check_model_scores_itself(device: torch.device, big: bool) -> str:
    """A small Qwen 3 in bf16: log-probs of a scoring pass and of the training forward, bit for bit, with and without
    gradient checkpointing."""
    from nanogspo.packing import score

    model, batch = small_model(device)
    with torch.no_grad():
        scored = score(model, batch)[0]
    for model.gradient_checkpointing in (False, True):
        trained = score(model, batch)[0]
        assert torch.equal(scored, trained), f"{(scored != trained).sum().item()} of {scored.numel()} log-probs differ"
        trained.sum().backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert norms and all(0 < n < float("inf") for n in norms), "a LoRA gradient is 0, inf or nan"
    return f"{scored.numel()} tokens"


def check_model_against_cpu(device: torch.device, big: bool) -> str:
    """The same small model in fp32, with the fused kernels here and plain torch there."""
    from nanogspo.packing import score

    model, batch = small_model(device)
    model = model.float()
    here = score(model, batch)[0].detach().cpu()
    there = score(model.cpu(), batch.to("cpu"))[0].detach()
    off = (here - there).abs().max().item()
    assert off < 5e-3, f"log-probs are {off:.1e} apart; tf32 would explain 1e-3"
    return f"log-probs at most {off:.0e} apart"


FIRST = ["products_come_out_as_fp32", "model_scores_itself", "model_against_cpu", "decode_graph"]
CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
CHECKS = {name: CHECKS[name] for name in [*FIRST, *CHECKS]}
NEEDS_CUDA = {"products_come_out_as_fp32", "nf4_cuda_same_bits"}


def randn(*shape: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """bf16, drawn from a seed; in slices, because 2^31 numbers in fp32 would be 9 GB on the way."""
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for part in out.view(shape[0], -1).split(max(1, 2**26 // max(1, out[0].numel()))):
        part.copy_(torch.randn(part.shape, device=device, generator=generator))
    return out


def paths() -> list[str]:
    return ["rows", "epilogue"]


def inputs(device: torch.device, big: bool) -> tuple[torch.Tensor, ...]:
    """Hidden, head, targets. Every fifth row points at its own token: p > 0.999, as for most sampled tokens."""
    N, C, V = (300, 1024, 151_936) if big else (11, 32, 40)
    weight = randn(V, C, device=device, seed=1)  # (V, C)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2)).to(device)  # (N,)
    hidden = randn(N, C, device=device) * 2 / C**0.5  # (N, C) logits with a deviation of 2
    hidden[::5] += weight[targets[::5]] * (24 / C if big else 1.0)
    return hidden, weight, targets


def logprob(device, big: bool, path: str, rows: slice = slice(None), train: bool = True) -> list[torch.Tensor]:
    """logp, entropy and, with train, the gradient of their rows' hidden states."""
    import kernels.seq_logprob as file

    hidden, weight, targets = inputs(device, big)
    hidden = hidden[rows].clone().requires_grad_(train)
    before = file.EPILOGUE_BELOW
    file.EPILOGUE_BELOW = 0 if path == "rows" else 10**9
    try:
        with contextlib.nullcontext() if train else torch.no_grad():
            logp, entropy = file.token_logprob(hidden, weight, targets[rows], backend="triton")
        if train:
            logp.sum().backward()
    finally:
        file.EPILOGUE_BELOW = before
    return [logp.detach(), entropy.detach(), *([hidden.grad] if train else [])]


def small_model(device: torch.device):
    """Two layers of Qwen 3 with LoRA, and a micro-batch of three answers."""
    from nanogspo.families import model_config
    from nanogspo.lora import add_lora
    from nanogspo.model import Transformer
    from nanogspo.packing import Example, pack

    sizes = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = Transformer(model_config({**QWEN3_0_6B, **sizes})).init_weights(0, std=0.1).to(device, torch.bfloat16)
    add_lora(model, r=4, alpha=8.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)  # at 0, A would have no gradient
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 2048, (n,), generator=generator).tolist() for n in (40, 61, 64)]
    [batch] = pack([Example.answered(text[:8], text[8:]) for text in texts], max_tokens=1024)
    return model, batch.to(device)


def run_checks(device: torch.device, big: bool, names: list[str] | None = None) -> list[dict]:
    """A result each, printed as it comes: RESULT lines are what the parent reads."""
    out = []
    for name in names or [name for name in CHECKS if name != "nf4_cuda_same_bits"]:
        started, row = time.perf_counter(), {"check": name, "passed": True}
        try:
            row["said"] = CHECKS[name](device, big)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            row |= {
                "passed": False,
                "said": f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})",
            }
        row["seconds"] = round(time.perf_counter() - started, 2)
        out.append(row)
        result(row)
        if device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return out


# ----------------------------------------------------------------------------
# step


def run_step(device: torch.device, file: dict, shape: dict, dtype=torch.bfloat16, cycles: int = 2) -> list[dict]:
    """GSPO as train.py does it, with the reward a function of the tokens. The first cycle is short and warms up."""
    from benchmarks.gspo_step import reward, train_on
    from nanogspo.experience import experience
    from nanogspo.families import model_config
    from nanogspo.lora import add_lora
    from nanogspo.model import Transformer
    from nanogspo.objectives import group_advantages
    from nanogspo.optimizer import Optimizer
    from nanogspo.packing import Example
    from nanogspo.rollout import generate

    config = model_config(file)
    model = Transformer(config).init_weights(0).to(device, dtype)
    add_lora(model, r=16, alpha=32.0)
    optimizer, rows, bandwidth = Optimizer(model), [], copy_speed(device)
    generator = torch.Generator().manual_seed(0)

    for cycle in range(cycles):
        length = shape["tokens"] if cycle else min(WARM_TOKENS, shape["tokens"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, config.vocab_size, (shape["prompts"], shape["prompt_tokens"]), generator=generator)
        prompts = ids.tolist()
        warm(model, prompts, shape["group"], length)
        times = [now(device)]
        answers = generate(model, prompts, group_size=shape["group"], max_new_tokens=length, eos_ids=(), seed=cycle)
        times.append(now(device))
        rewards = torch.tensor([reward(a.tokens) for a in answers]).view(-1, shape["group"])  # (P, G)
        rollout = experience(
            model,
            [Example.answered(prompts[a.prompt_index], a.tokens) for a in answers],
            group_advantages(rewards).flatten(),
            updates=shape["updates"],
            max_tokens=shape["max_tokens"],
            temperature=1.0,
            device=device,
            score_first=cycle == 0,  # as train.py
        )
        times.append(now(device))
        ratios, norms = train_on(rollout, model, optimizer, device)
        times.append(now(device))
        first = ratios[: len(rollout.minibatches[0])]
        tokens = sum(len(a.tokens) for a in answers)
        row = {"cycle": cycle, "rollout_s": times[1] - times[0], "score_s": times[2] - times[1]}
        row |= {"train_s": times[3] - times[2], "cycle_s": times[3] - times[0], "sampled_tokens": tokens}
        row |= {"tokens_per_s": tokens / row["cycle_s"], "first_ratios_are_1": all(r == (1.0, 1.0) for r in first)}
        row |= {"grad_norms": norms, "last_ratios": ratios[-1]}
        row["decode_over_floor"] = row["rollout_s"] / decode_floor(model, shape, length, bandwidth)
        trained = sum(len(batch.tokens) for batches in rollout.minibatches for batch in batches)
        row["trained_tokens_per_s"] = trained / row["train_s"]
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        row["passed"] = row["first_ratios_are_1"] and all(0 < n < float("inf") for n in norms)
        phases = ", ".join(f"{name} {row[f'{name}_s']:.2f} s" for name in ("rollout", "score", "train"))
        peak = f", peak {row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else ""
        row["said"] = f"{phases}, {row['tokens_per_s']:.0f} sampled tokens a second{peak}"
        row["said"] += f"; decoding {row['decode_over_floor']:.1f} x its reading"
        row["said"] += f", {row['trained_tokens_per_s']:.0f} trained tokens a second"
        rows.append(row)
        result(row)
    return rows


def warm(model, prompts: list[list[int]], group: int, tokens: int) -> None:
    """A few steps of a rollout of this size, which compile its kernels."""
    from nanogspo.rollout import decode

    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_ids": (), "seed": 0}
    steps = decode(model, prompts, group_size=group, max_new_tokens=tokens, **settings)
    for _ in zip(range(4), steps, strict=False):
        pass
    steps.close()


def copy_speed(device: torch.device) -> float:
    """Bytes a second of a copy, as benchmarks/kernels.py measures them for its floors; of a small one on a CPU."""
    from benchmarks.kernels import CudaTimer, measure_machine

    if device.type == "cuda":
        return measure_machine(CudaTimer(), device)["bandwidth"]

    def once(run) -> float:
        started = now(device)
        run()
        return now(device) - started

    return measure_machine(once, device, size=2**24, width=64)["bandwidth"]


def decode_floor(model, shape: dict, tokens: int, bandwidth: float) -> float:
    """Seconds that reading takes: weights once a step, prompts once a step, and what each answer has added."""
    c, element = model.config, model.norm.weight.element_size()
    weights = sum(p.nbytes for p in model.parameters())
    slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * element
    rows, steps = shape["prompts"] * shape["group"], tokens - 1
    slots = steps * shape["prompts"] * shape["prompt_tokens"] + rows * steps * tokens / 2
    return (steps * weights + slots * slot) / bandwidth


def against_transformers(model, device: torch.device, file: dict, shape: dict, dtype: torch.dtype) -> dict:
    """Sampled tokens a second, ours over theirs: random weights of one shape, one batch, the whole vocabulary. Ours has
    an adapter on every layer, theirs none."""
    import transformers

    from benchmarks.generate import take_turns

    transformers.utils.logging.set_verbosity_error()
    settings = {name: value for name, value in file.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(file["model_type"], **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    prompts = torch.randint(0, file["vocab_size"], (shape["prompts"], shape["prompt_tokens"])).tolist()
    tokens, rows = min(PEER_TOKENS, shape["tokens"]), shape["prompts"] * shape["group"]
    turns = take_turns(model, theirs, prompts, shape["group"], tokens, rounds=1)
    seconds = {side: times[-1] for side, times in turns.items()}
    ratio = seconds["transformers"] / seconds["ours"]
    said = f"{rows} x {tokens}: ours {seconds['ours']:.2f} s, theirs {seconds['transformers']:.2f} s, {ratio:.1f} x"
    facts = {"rows": rows, "tokens": tokens, "seconds": seconds, "ratio": ratio, "passed": True, "said": said}
    return {"peer": "transformers.generate"} | facts


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ----------------------------------------------------------------------------
# measured parts: generators of results. On a CPU with a small shape they run as well, as tests/test_benchmarks.py does.


def policy(device: torch.device, file: dict, adapter: bool = True):
    from nanogspo.families import model_config
    from nanogspo.lora import add_lora
    from nanogspo.model import Transformer

    model = Transformer(model_config(file)).init_weights(0).to(device, torch.bfloat16)
    if adapter:
        add_lora(model, r=16, alpha=32.0)
    return model


def steps_of(model, shape: dict, tokens: int, rows: int | None = None) -> Iterator:
    """Decode steps of `rows` rows: of all prompts, or as many as fit."""
    from nanogspo.rollout import decode

    rows = rows or shape["prompts"] * shape["group"]
    group = min(shape["group"], rows)
    prompts = torch.randint(0, model.config.vocab_size, (rows // group, shape["prompt_tokens"])).tolist()
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_ids": (), "seed": 0}
    return decode(model, prompts, group_size=group, max_new_tokens=tokens, **settings)


def step_ms(steps: Iterator, slots: tuple[int, ...], device: torch.device, around: int = 5) -> dict[int, float]:
    """Slots of a row so far -> the median ms of the `around` steps that follow."""
    out, seen = {}, 0
    for slot in slots:
        for _ in range(slot - seen):
            next(steps)
        times = [now(device)]
        for _ in range(around):
            next(steps)
            times.append(now(device))
        seen = slot + around
        out[slot] = statistics.median(b - a for a, b in itertools.pairwise(times)) * 1e3
    steps.close()
    return out


def profiled(run: Callable[[], object], times: int, device: torch.device) -> tuple[list[dict], float]:
    """Kernels by time: us and launches of one run each; and the wall time of one run without the profiler, us."""
    from torch.profiler import ProfilerActivity, profile

    started = now(device)
    for _ in range(times):
        run()
    wall = (now(device) - started) / times * 1e6
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        for _ in range(times):
            run()
        now(device)
    spent = lambda event: event.self_device_time_total if gpu else event.self_cpu_time_total  # noqa: E731
    events = sorted((e for e in trace.key_averages() if spent(e) > 0), key=spent, reverse=True)
    return [{"kernel": e.key[:90], "us": spent(e) / times, "count": e.count / times} for e in events], wall


def kernel_rows(kernels: list[dict], top: int = 25) -> Iterator[dict]:
    for row in kernels[:top]:
        yield row | {"name": row["kernel"], "said": f"{row['us']:.1f} us in {row['count']:g} launches"}


def part_card(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    from benchmarks.kernels import CudaTimer, measure_machine

    timer = CudaTimer()
    machine = measure_machine(timer, device)
    yield machine | {"said": f"copy {machine['bandwidth'] / 1e12:.2f} TB/s, bf16 {machine['rate'] / 1e12:.0f} TFLOP/s"}
    a, b = torch.randn(2, 4096, 4096, device=device)
    rate = 2 * 4096**3 / timer(lambda: a @ b)
    yield {"name": "fp32 products", "rate": rate, "said": f"{rate / 1e12:.0f} TFLOP/s"}
    x, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    single = timer(lambda: x.add_(1))
    with torch.cuda.graph(graph):
        for _ in range(1000):
            x.add_(1)
    replay = timer(graph.replay)
    said = f"{single * 1e6:.1f} us; a replayed graph of 1,000: {replay * 1e3:.2f} ms"
    yield {"name": "smallest kernel", "seconds_of_one": single, "seconds_of_1000": replay, "said": said}


def part_decode_profile(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    model, middle = policy(device, file), shape["tokens"] // 2
    steps = steps_of(model, shape, shape["tokens"])
    for _ in range(max(4, middle)):
        next(steps)
    times = max(1, min(16, (shape["tokens"] - middle - 4) // 2))
    kernels, wall = profiled(lambda: next(steps), times, device)
    steps.close()
    total, bandwidth = sum(row["us"] for row in kernels), copy_speed(device)
    once = {**shape, "prompt_tokens": shape["prompt_tokens"] + shape["group"] * middle}  # all slots as if of prompts
    floor = decode_floor(model, {**once, "group": 0}, 2, bandwidth) * 1e6
    said = f"wall {wall:.0f} us, kernels {total:.0f}, gap {wall - total:.0f}, floor {floor:.0f} us"
    yield {"name": "a decode step", "wall_us": wall, "kernels_us": total, "floor_us": floor, "said": said}
    yield from kernel_rows(kernels)


def part_decode(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    from nanogspo import rollout
    from nanogspo.fast import cuda_graph

    last = shape["tokens"] - 1
    slots = tuple(sorted({min(slot, last - 9) for slot in (32, 256, 512, 1000)}))
    all_rows = shape["prompts"] * shape["group"]
    capture, seconds = cuda_graph.capture, []

    def timed(step):
        started = now(device)
        replay = capture(step)
        seconds.append(now(device) - started)
        return replay

    for adapter, rows in ((True, all_rows), (False, all_rows), (True, all_rows // 4), (True, all_rows // 16)):
        model, rows = policy(device, file, adapter), max(1, rows)
        with patch.object(cuda_graph, "capture", timed):
            found = step_ms(steps_of(model, shape, shape["tokens"], rows), slots, device)
        said = ", ".join(f"{ms:.2f} ms at {slot}" for slot, ms in found.items())
        name = f"{rows} rows, {'adapters' if adapter else 'no adapters'}"
        yield {"name": name, "ms": found, "capture_ms": [1e3 * x for x in seconds], "said": said}
    with patch.object(rollout, "can_capture", lambda cache: False):
        [(slot, ms)] = step_ms(steps_of(model, shape, slots[0] + 9, all_rows), slots[:1], device).items()
    yield {"name": "eager", "ms": ms, "said": f"{all_rows} rows with adapters: {ms:.2f} ms at {slot}"}
    worst = max(seconds, default=0.0) * 1e3
    yield {"name": "capture", "ms": worst, "said": f"{len(seconds)} captures, the longest {worst:.1f} ms"}


def micro_batch(file: dict, shape: dict, device: torch.device):
    """A prompt and as many answers as max_tokens holds."""
    from nanogspo.packing import Example, pack

    count = (shape["max_tokens"] - shape["prompt_tokens"]) // shape["tokens"]
    ids = torch.randint(0, file["vocab_size"], (shape["prompt_tokens"] + count * shape["tokens"],)).tolist()
    prompt, rest = ids[: shape["prompt_tokens"]], ids[shape["prompt_tokens"] :]
    answers = [rest[i * shape["tokens"] : (i + 1) * shape["tokens"]] for i in range(count)]
    [batch] = pack([Example.answered(prompt, answer) for answer in answers], max_tokens=shape["max_tokens"])
    return batch.to(device)


def part_micro_batch(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    from nanogspo.packing import score

    model, batch = policy(device, file), micro_batch(file, shape, device)
    for model.gradient_checkpointing in (False, True):
        score(model, batch)[0].sum().backward()  # compiles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = now(device)
        logp = score(model, batch)[0]
        middle = now(device)
        logp.sum().backward()
        forward, backward = middle - started, now(device) - middle
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        rate = len(batch.tokens) / (forward + backward)
        said = f"forward {1e3 * forward:.0f} ms, backward {1e3 * backward:.0f} ms, {rate:.0f} tokens a second"
        row = {"name": f"checkpointing {'on' if model.gradient_checkpointing else 'off'}", "peak_bytes": peak}
        row |= {"forward_s": forward, "backward_s": backward, "tokens_per_s": rate}
        yield row | {"said": f"{len(batch.tokens)} tokens: {said}, peak {peak / 1e9:.2f} GB"}
    model.gradient_checkpointing = False
    kernels, wall = profiled(lambda: score(model, batch)[0].sum().backward(), 1, device)
    total = sum(row["us"] for row in kernels)
    yield {"name": "both", "wall_us": wall, "kernels_us": total, "said": f"wall {wall:.0f} us, kernels {total:.0f} us"}
    yield from kernel_rows(kernels, 40)


def part_rollouts(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    """Rows leave at all times: one token of 200 ends an answer."""
    from nanogspo import rollout
    from nanogspo.fast import cuda_graph

    model, capture, count = policy(device, file), cuda_graph.capture, []
    counted = lambda step: count.append(1) or capture(step)  # noqa: E731
    for number in range(3):
        prompts = torch.randint(0, file["vocab_size"], (shape["prompts"], shape["prompt_tokens"])).tolist()
        with patch.object(cuda_graph, "capture", counted):
            rollout.generate(
                model, prompts, group_size=shape["group"], max_new_tokens=shape["tokens"] // 4 + 1,
                eos_ids=range(file["vocab_size"] // 200), seed=number,
            )  # fmt: skip
        stats = torch.cuda.memory_stats() if device.type == "cuda" else {}
        reserved, retries = (stats.get(f"{x}", 0) for x in ("reserved_bytes.all.current", "num_alloc_retries"))
        said = f"{reserved / 1e9:.2f} GB reserved, {len(count)} captures so far, {retries} allocation retries"
        yield {"name": f"rollout {number}", "reserved": reserved, "captures": len(count), "said": said}
    if device.type == "cuda":
        said, passed = "a capture that waits for the GPU raised nothing", False
        try:
            capture(lambda: (torch.empty(2**20, device=device), torch.cuda.synchronize()))
        except RuntimeError as error:
            said, passed = f"raised {type(error).__name__}; empty_cache() and a product work after it", True
        torch.cuda.empty_cache()
        torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).sum().item()
        yield {"name": "a capture that fails", "passed": passed, "said": said}


def part_waits(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    from nanogspo.packing import score

    compiled, model = [], policy(device, file)
    with contextlib.suppress(Exception):  # the hook is newer than the oldest Triton
        import triton

        triton.knobs.compilation.listener = lambda **facts: compiled.append(facts["times"].total / 1e6)
    batch = micro_batch(file, shape, torch.device("cpu"))
    steps = steps_of(model, shape, 24)
    runs = {"a decode step": lambda: next(steps), "a micro-batch": lambda: score(model, batch.to(device))[0].sum()}
    for name, run in runs.items():
        for _ in range(8 if name == "a decode step" else 1):
            run()
        with warnings.catch_warnings(record=True) as waits, synchronising(device):
            warnings.simplefilter("always")
            value = run()
            if name == "a micro-batch":
                value.backward()
        places = collections.Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
        said = f"{len(waits)} waits: {', '.join(f'{n} x {place}' for place, n in places.most_common(12))}"
        yield {"name": name, "waits": len(waits), "places": dict(places), "said": said}
    steps.close()
    said = f"{len(compiled)} in {sum(compiled):.1f} s"
    yield {"name": "kernels compiled", "count": len(compiled), "seconds": sum(compiled), "said": said}


@contextlib.contextmanager
def synchronising(device: torch.device) -> Iterator[None]:
    """Within it torch warns of each operation that makes the host wait."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def part_kernels(device: torch.device, file: dict, shape: dict, wanted=None, only: str = "") -> Iterator[dict]:
    from benchmarks.kernels import REAL, TINY, CudaTimer, bars, cases, measure, measure_machine

    timer = CudaTimer() if device.type == "cuda" else lambda run: run() is None or 0.5
    machine = measure_machine(timer, device, *([] if device.type == "cuda" else [2**20, 64]))
    rows = []
    for case in [case for case in cases(REAL if device.type == "cuda" else TINY) if only in case.name]:
        found = measure(
            [case], machine, timer, device, compiled=False, show=lambda line: None,
            wanted=wanted or ours,
        )  # fmt: skip
        rows += found
        for row in found:
            time_said = "not measured" if row["seconds"] is None else f"{row['seconds'] * 1e6:.1f} us"
            over = "" if row["over_floor"] is None else f", {row['over_floor']:.2f} x floor"
            name = f"{row['case']}, {row['shape']}, {row['variant']}"
            yield row | {"name": name, "said": f"{time_said}{over} {row['note']}".strip()}
    for bar in bars(rows):
        if bar["passed"] is not None:
            said = f"{bar['value']:.3g}, wanted {bar['want']}: {'met' if bar['passed'] else 'MISSED'}"
            yield {"name": bar["bar"], "met": bar["passed"], "said": said}


def ours(name: str) -> bool:
    return name.startswith("ours") and "CUDA" not in name  # CUDA C++ has to be built first


def part_peers(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    if importable("transformers"):
        yield against_transformers(policy(device, file), device, file, shape, torch.bfloat16)
    yield from part_kernels(device, file, shape, lambda name: not name.startswith("ours,"))


def part_checks(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    run_checks(device, True)
    yield from ()


def part_nvcc(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    run_checks(device, True, ["nf4_cuda_same_bits"])
    yield from part_kernels(device, file, shape, lambda name: name == "ours, CUDA C++", "NF4 dequantise")


def part_cycle(device: torch.device, file: dict, shape: dict) -> Iterator[dict]:
    run_step(device, file, shape)
    yield from ()


INSIDE = {name.removeprefix("part_"): f for name, f in list(globals().items()) if name.startswith("part_")}


def run_inside(part: str, device: torch.device, file: dict, shape: dict) -> None:
    """A result each, printed as it comes. An exception is the last result, and a failed one."""
    try:
        for row in INSIDE[part](device, file, shape):
            result(row)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        said = f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
        result({"name": part, "passed": False, "said": said})


# ----------------------------------------------------------------------------
# parts, each in a process of its own


def result(row: dict) -> None:
    print("RESULT " + json.dumps(row), flush=True)


def command_of(part: str) -> list[str]:
    python = [sys.executable, "-u"]
    if part == "tests":
        spread = ["-n", "8"] if importable("xdist") else []
        stems = sorted(f.stem for f in (ROOT / "kernels").glob("*.py") if f.stem not in ("__init__", "backend"))
        files = [f for stem in stems for f in sorted((ROOT / "tests").glob(f"test_{stem}*.py"))]
        files += sorted((ROOT / "tests").glob("test_lesson_kernels_*.py"))
        files += sorted((ROOT / "tests").glob("test_kernel_*.py"))
        return [*python, "-m", "pytest", "-v", "--tb=line", *spread, *(str(f.relative_to(ROOT)) for f in files)]
    return [*python, "benchmarks/gpu_suite.py", "--inside", part]


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def run_part(
    command: list[str], limit: float, show: Callable[[str], None], keep: Callable[[list[dict]], None] = len
) -> dict:
    """Runs it, shows its lines as they come, ends it and what it started after `limit` seconds. keep: called with all
    results so far after each. Never raises."""
    started, lines, results = time.perf_counter(), [], []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {"passed": False, "said": f"could not start: {error}", "seconds": 0.0, "results": [], "tail": []}

    def read() -> None:
        for line in child.stdout:
            lines.append(line.rstrip("\n"))
            if not line.startswith("RESULT "):
                show(lines[-1])
                continue
            with contextlib.suppress(ValueError):  # half a line, when it was ended while writing
                results.append(json.loads(line.removeprefix("RESULT ")))
                show(said_of(results[-1]))
                keep(results)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = child.wait(timeout=limit)
        said = f"exit code {code}"
    except subprocess.TimeoutExpired:
        code, said = None, f"ended after {limit:.0f} s, its limit"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # also what a finished part left behind
    child.wait()
    reader.join(timeout=5)
    passed = code == 0 and all(row.get("passed", True) for row in results)
    seconds = round(time.perf_counter() - started, 1)
    return {"passed": passed, "said": said, "seconds": seconds, "results": results, "tail": lines[-80:]}


def markdown(parts: dict[str, dict], facts: dict) -> str:
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, {facts['date']}, {facts['commit']}",
        "",
    ]
    lines += ["| part | | seconds | |", "|---|---|---|---|"]
    for name, part in parts.items():
        lines.append(f"| {name} | {'passed' if part['passed'] else 'FAILED'} | {part['seconds']} | {part['said']} |")
    for name, part in parts.items():
        lines += [f"| {name}: {said_of(row)} |" for row in part["results"]]
    return "\n".join(lines)


def said_of(row: dict) -> str:
    """One line of a result: its name, whether it passed, what it found."""
    name = row.get("check") or row.get("peer") or row.get("name") or f"cycle {row.get('cycle')}"
    return f"{name} | {'passed' if row.get('passed', True) else 'FAILED'} | {row.get('said', '')}"


def run_suite(parts: list[str], seconds: float, out: Path, facts: dict, command=command_of, limits=LIMITS) -> dict:
    """The parts in order, each under its limit and all under `seconds`; the file is rewritten after each result."""
    from benchmarks.kernels import save

    deadline, found = time.monotonic() + seconds, {}
    store = lambda: save(out, "suite", facts, {"parts": found, "markdown": markdown(found, facts)})  # noqa: E731
    for part in parts:
        left = min(limits[part], deadline - time.monotonic())
        print(f"\n===== {part}, at most {max(0, left):.0f} s", flush=True)
        found[part] = {"passed": False, "said": "not run: out of time", "seconds": 0, "results": [], "tail": []}
        if left >= 5:
            found[part]["said"] = "still running, or ended with the suite"
            keep = lambda results, part=part: (found[part].update(results=results), store())  # noqa: E731
            found[part] = run_part(command(part), left, lambda line: print(line, flush=True), keep)
        store()
    print("\n" + markdown(found, facts), flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(LIMITS), help="some of them, in the order they should run")
    parser.add_argument("--seconds", type=float, default=1200, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    parser.add_argument("--inside", choices=list(INSIDE), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [p for p in options.parts.split(",") if p not in LIMITS]:
        parser.error(f"got the part {unknown[0]!r}, want some of {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        print("gpu_suite.py: got no GPU, want one; run benchmarks/kernels.py for the floors without", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if options.inside:
        run_inside(options.inside, device, QWEN3_0_6B, STEP)
        return 0
    from benchmarks.kernels import environment

    found = run_suite(options.parts.split(","), options.seconds, options.out.resolve(), environment())
    return 0 if all(part["passed"] for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
