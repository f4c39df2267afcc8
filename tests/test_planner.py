"""nanogspo/run/planner.py: the bytes it announces against the bytes that are really there.

Run: python -m pytest tests/test_planner.py
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import weakref
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.attention
import kernels.delta_rule
import kernels.glu
import kernels.rms_norm
import kernels.rope
from kernels import prepacked
from kernels.attention import Segments
from kernels.backend import INTERPRETED
from kernels.nf4 import quantize_nf4
from kernels.prepacked import can_prepack, can_prepack_head
from nanogspo import checkpoint
from nanogspo.cache import KVCache
from nanogspo.config import TrainConfig
from nanogspo.experience import split_minibatches
from nanogspo.families import model_config
from nanogspo.fast.fused_linear import FusedLinears
from nanogspo.lora import add_lora
from nanogspo.model import Transformer
from nanogspo.optimizer import Optimizer
from nanogspo.packing import SHARE_PROMPT_FROM, Example, pack, score
from nanogspo.quant import NF4Linear, put, quantize_model, weight_count
from nanogspo.rollout import sample
from nanogspo.run import planner
from nanogspo.run.planner import (
    ACTIVATIONS,
    CACHE,
    ESTIMATES,
    FILL,
    GRADIENTS,
    SCORES,
    UPDATE,
    batch_tokens,
    decide_checkpointing,
    decide_prepacking,
    human,
    layer_bytes,
    memory_parts,
    memory_report,
    most,
    outline,
    too_large,
)
from nanogspo.run.process import available_memory
from tests.test_train import script, write_checkpoint

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 4096,
}
LINEAR = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 24}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3_text"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def tiny(family="qwen3", dtype=torch.float32, lora_r=0, dropout=0.0):
    model = Transformer(model_config({**SHAPE, "model_type": family})).init_weights(0).to(dtype)
    if lora_r:
        add_lora(model, r=lora_r, alpha=32, dropout=dropout)
    return model.train()


def bytes_of(tensors):
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@DTYPES
@pytest.mark.parametrize("lora_r", [0, 4])
def test_what_is_counted_exactly(dtype, lora_r):
    model = tiny(dtype=dtype, lora_r=lora_r)
    config = TrainConfig(lora_r=lora_r, prompts_per_rollout=3, group_size=4, max_new_tokens=5)
    parts = memory_parts(config, model, longest_prompt=7)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert parts["weights"] == bytes_of(frozen if lora_r else trained)
    assert parts.get("adapter", 0) == (bytes_of(trained) if lora_r else 0)
    optimizer = Optimizer(model)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.accumulate()
    assert parts["gradients"] == bytes_of([master.grad for master in optimizer.masters])
    masters = [m for m, p in zip(optimizer.masters, trained, strict=True) if m is not p]
    assert parts.get("fp32 masters", 0) == bytes_of(masters)
    optimizer.step(1e-3, 1.0)
    state = optimizer.state()
    assert parts["optimiser (two moments)"] == bytes_of([t for n, t in state.items() if "exp_avg" in n])
    cache = KVCache(model.config, Segments.build([7, 7, 7]), 4, 4, dtype=dtype)  # the last token is not fed
    assert parts["KV cache of a rollout"] == bytes_of(
        [x for kept in cache.layers for x in (kept.prefix_k, kept.prefix_v, kept.k, kept.v)]
    )


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("lora_r", [0, 4])
def test_prepacked_weights_are_counted(dtype, lora_r):
    """Of every matrix that FusedLinears lays out, as it is handed over."""
    model, handed = tiny(dtype=dtype, lora_r=lora_r), []
    with patch.object(prepacked, "_prepack", lambda weight: handed.append(weight)):
        FusedLinears(model)
    parts = memory_parts(TrainConfig(lora_r=lora_r), model, longest_prompt=7)
    layers = 3 * 4 * (2 if lora_r else 1)  # q k v, out, gate up, down; of an adapter A and B beside W
    weight = model.head_weight  # the head of 16 bits is laid out as fp32, also where bf16 layers gain nothing
    assert len(handed) == layers * can_prepack(weight) + can_prepack_head(weight)
    assert parts.get("prepacked weights", 0) == sum(weight.nbytes for weight in handed)


def kept(model, batch):
    """Bytes that are saved for the backward pass of a micro-batch: every tensor, found as autograd packs it."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        score(model, batch)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    return bytes_of([t for t in saved if t.untyped_storage()._cdata not in parameters])


@FAMILIES
@DTYPES
@pytest.mark.parametrize("lora_r, dropout", [(0, 0.0), (4, 0.0), (4, 0.1)])
def test_activations_are_what_autograd_keeps_within_a_tenth(family, dtype, lora_r, dropout):
    """Of 4 examples that share nothing, 64 tokens each and the last one. An adapter's dropout costs a copy of its
    input; without it an adapter keeps nothing of its own."""
    model = tiny(family, dtype, lora_r, dropout)
    [batch] = pack([Example([n] * 65, [False] * 64 + [True]) for n in range(4)], max_tokens=4 * 64)
    config = TrainConfig(algo="sft", batch_size=4, max_new_tokens=1, lora_r=lora_r, lora_dropout=dropout)
    assert 0.9 < memory_parts(config, model, 64)["activations (estimate)"] / kept(model, batch) < 1.1


@pytest.mark.skipif(not INTERPRETED, reason="wants Triton's interpreter, which plays the GPU here")
@pytest.mark.parametrize("family, lora_r", [("qwen3", 0), ("qwen3", 4), ("gemma3_text", 4), ("qwen3_5_text", 0)])
def test_activations_of_a_gpu_are_what_its_kernels_keep(family, lora_r):
    """The Triton kernels save their inputs, in the dtype they have, where torch's operations save fp32 copies."""
    [batch] = pack([Example([n] * 17, [False] * 16 + [True]) for n in range(2)], max_tokens=2 * 16)
    config, sizes = TrainConfig(lora_r=lora_r, device="cuda"), []
    for layers in (1, 3):
        linear = {**LINEAR, "layer_types": ["linear_attention"] * layers} if family == "qwen3_5_text" else {}
        shape = model_config({**SHAPE, **linear, "model_type": family, "num_hidden_layers": layers})
        model = Transformer(shape).init_weights(0).bfloat16()
        if lora_r:
            add_lora(model, r=lora_r, alpha=32)
        with contextlib.ExitStack() as stack:
            for module in (kernels.attention, kernels.delta_rule, kernels.glu, kernels.rms_norm, kernels.rope):
                stack.enter_context(patch.object(module, "choose", lambda backend, x: backend or "triton"))
            sizes.append(kept(model.train(), batch))
    a_layer = (sizes[1] - sizes[0]) / 2 / len(batch.tokens)
    layer, T = layer_bytes(config, shape, 2, shape.layer_types[0]), batch_tokens(config, 17)
    assert layer == pytest.approx(a_layer, rel=0.02)
    working = kernels.delta_rule.backward_bytes(T, 2, 16, 24) if family == "qwen3_5_text" else 0
    assert memory_parts(config, model, 17)["activations (estimate)"] == 3 * T * layer + working


def test_a_layer_of_qwen3_0_6b_on_a_gpu():
    """Without checkpointing 45 kB a token; and what sampling and libraries hold there is counted."""
    raw = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    raw |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
    raw |= {"tie_word_embeddings": True}
    config = TrainConfig(lora_r=16, device="cuda", prompts_per_rollout=8, group_size=16)
    assert 44_000 < layer_bytes(config, model_config(raw), 2) < 46_000
    parts = memory_parts(config, outline(raw, torch.bfloat16, None), 512)
    step = 8 * 16 * 151_936 * 4  # one copy of the scores
    assert parts[SCORES] + parts["CUDA graph of a decode step (estimate)"] == 4 * step
    assert parts["library workspaces"] == 64 * 2**20
    graph = parts["CUDA graph of a decode step (estimate)"]  # its pool stays when the rollout has ended
    parts |= dict.fromkeys(UPDATE, 2 * sum(parts.values()))  # where an update is the fullest moment
    assert most(parts) == most(parts, ("CUDA graph of a decode step (estimate)",)) + graph
    on_cpu = memory_parts(dataclasses.replace(config, device="cpu"), outline(raw, torch.bfloat16, None), 512)
    assert on_cpu[SCORES] == 2 * step and not {"CUDA graph of a decode step (estimate)", "library workspaces"} & {
        *on_cpu
    }


@FAMILIES
def test_a_shared_prompt_is_kept_once(family):
    """4 groups of 4 answers in 2 updates: 2 prompts of 60 tokens and 8 answers of 10, not 8 of both."""
    model = tiny(family, lora_r=4)
    groups = [Example.answered([n] * 60, [a] * 10) for n in range(2) for a in range(4)]
    [batch] = pack(groups, max_tokens=10**6)
    rl = {"prompts_per_rollout": 4, "group_size": 4, "updates_per_rollout": 2, "max_new_tokens": 10, "lora_r": 4}
    parts = memory_parts(TrainConfig(**rl, micro_batch_tokens=10**6), model, 60)
    assert len(batch.tokens) == 2 * 59 + 8 * 10
    assert 0.9 < parts["activations (estimate)"] / kept(model, batch) < 1.1


def test_gradient_checkpointing_keeps_one_layer_and_every_input():
    model = tiny()
    config = TrainConfig(algo="sft", batch_size=4, micro_batch_tokens=256, max_new_tokens=1, lora_r=0)
    whole = memory_parts(config, model, 64)["activations (estimate)"]
    less = memory_parts(dataclasses.replace(config, gradient_checkpointing="on"), model, 64)["activations (estimate)"]
    assert less == whole / 3 + 3 * 256 * 64 * 4  # layers; tokens, width, fp32


def test_weights_are_prepacked_where_the_copies_fit(monkeypatch, capsys):
    """For SFT too, whose evaluations sample; never on a GPU, and where somebody says so it is not asked."""
    monkeypatch.setattr("kernels.prepacked.FP32_FROM", 1)
    if not can_prepack(torch.ones(1, 1)):
        pytest.skip("no oneDNN on this machine")
    for algo in ("gspo", "sft"):
        model, config = tiny(), TrainConfig(algo=algo, lora_r=0, gradient_checkpointing="on")
        parts = memory_parts(config, model, 7)
        assert parts["prepacked weights"] > 0
        enough = most(parts) / FILL
        assert decide_prepacking(config, model, 7, enough + 1).prepack == "on" and not capsys.readouterr().out
        decided = decide_prepacking(config, model, 7, enough - 1)
        assert decided.prepack == "off" and "prepacked weights" not in memory_parts(decided, model, 7)
        assert capsys.readouterr().out.startswith("weights are not prepacked for sampling: ")
        for word in ("on", "off"):
            asked = dataclasses.replace(config, prepack=word)
            assert decide_prepacking(asked, model, 7, 1) == decide_prepacking(asked, model, 7, 10**15) == asked
        gpu = dataclasses.replace(config, device="cuda")
        assert (
            "prepacked weights" not in memory_parts(gpu, model, 7)
            and decide_prepacking(gpu, model, 7, 1).prepack == "on"
        )


def test_checkpointing_is_chosen_where_training_needs_it(capsys):
    """What a rollout holds is gone by then, so that it does not count."""
    model, config = tiny(), TrainConfig(lora_r=0, group_size=2, prompts_per_rollout=64)
    parts = memory_parts(config, model, 20)
    training = sum(parts.values()) - parts[CACHE] - parts[SCORES]
    enough, short = training / FILL + 1, training / FILL - 1
    assert short < sum(parts.values())
    assert decide_checkpointing(config, model, 20, enough).gradient_checkpointing == "off"
    assert not capsys.readouterr().out
    assert decide_checkpointing(config, model, 20, short).gradient_checkpointing == "on"
    said = capsys.readouterr().out
    assert f"would take {human(training)} without it, {human(short)} are free" in said and said.count("\n") == 1
    for word in ("on", "off"):  # who says so is not asked
        asked = dataclasses.replace(config, gradient_checkpointing=word)
        assert decide_checkpointing(asked, model, 20, 1) == decide_checkpointing(asked, model, 20, 10**15) == asked


def test_available_memory_is_between_what_is_held_and_what_there_is():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 100e6 < available_memory("cpu") <= total


def test_available_memory_by_hand(tmp_path):
    """30 of 50 resident pages are this process's own; a container may allow less than the machine has."""
    page, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_memory("cpu", str(tmp_path)) == total  # no /proc: not Linux
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "sys" / "fs" / "cgroup" / "memory").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  9000000 kB\nMemAvailable:   2000 kB\nHugePages_Free: 0\n")
    (tmp_path / "proc" / "self" / "statm").write_text("900 50 20 3 0 7 0")
    assert available_memory("cpu", str(tmp_path)) == 2000 * 1024 + 30 * page
    for name, words, want in [
        ("memory.max", "max\n", 2000 * 1024 + 30 * page),
        ("memory.max", "1000000\n", 1_000_000),
        ("memory/memory.limit_in_bytes", "900000\n", 900_000),
    ]:
        (tmp_path / "sys" / "fs" / "cgroup" / name).write_text(words)
        assert available_memory("cpu", str(tmp_path)) == want


@pytest.mark.parametrize(
    "line, folder, name",
    [
        ("0::/slurm/job/step", "", "memory.max"),
        ("7:cpu,memory:/slurm/job/step", "memory", "memory.limit_in_bytes"),
        ("7:cpu:/slurm/job/step", "memory", None),  # another controller's group
    ],
)
def test_a_group_of_processes_may_be_allowed_less(tmp_path, line, folder, name):
    """Its own limit or that of a group around it: SLURM, systemd, a container inside another."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:pids:/x\n{line}\n")
    free = available_memory("cpu", str(tmp_path))
    job = tmp_path / "sys" / "fs" / "cgroup" / folder / "slurm" / "job"
    (job / "step").mkdir(parents=True)
    (job / (name or "memory.limit_in_bytes")).write_text("5000")
    assert available_memory("cpu", str(tmp_path)) == (5000 if name else free)
    if name:
        (job / "step" / name).write_text("4000")
        assert available_memory("cpu", str(tmp_path)) == 4000


def test_a_micro_batch_is_as_large_as_its_budget_its_minibatch_or_its_longest_example():
    def tokens(prompt, **changes):
        return batch_tokens(dataclasses.replace(TrainConfig(max_new_tokens=10), **changes), prompt)

    assert tokens(10, micro_batch_tokens=1) == 19  # an example of 10 + 10, but for its last token
    assert tokens(10, micro_batch_tokens=100) == 100
    large = {"micro_batch_tokens": 10**6}
    assert tokens(10, **large) == 16 * 19  # 8 x 8 answers in 4 updates
    assert tokens(10, **large, algo="sft", batch_size=3) == 3 * 19
    assert tokens(10, **large, algo="sft", batch_size=3, data="rows.jsonl") == 3 * 9
    assert tokens(40, **large, algo="sft", batch_size=3) == 3 * 49  # nobody says that SFT's examples begin alike


@given(
    P=st.integers(1, 6),
    G=st.integers(2, 5),
    updates=st.integers(1, 5),
    prompt=st.sampled_from([1, 5, SHARE_PROMPT_FROM, SHARE_PROMPT_FROM + 1, 40]),
    answer=st.sampled_from([1, 9]),
    budget=st.sampled_from([1, 50, 130, 10**6]),
)
@example(P=3, G=4, updates=4, prompt=40, answer=9, budget=10**6)  # updates of 3: the second has parts of two groups
def test_a_micro_batch_has_the_tokens_that_are_announced(P, G, updates, prompt, answer, budget):
    """Laid out by the planner and by pack(), when all prompts and all answers are as long as they may be: equal where
    the budget does not cut, and never more."""
    updates = next(n for n in range(updates, 0, -1) if P * G % n == 0)
    examples = [Example.answered([p] * prompt, [a] * answer) for p in range(P) for a in range(G)]
    batches = [
        batch for batches in split_minibatches(examples, torch.ones(P * G), updates, budget) for batch in batches
    ]
    sizes = {"prompts_per_rollout": P, "group_size": G, "updates_per_rollout": updates, "max_new_tokens": answer}
    announced = batch_tokens(TrainConfig(**sizes, micro_batch_tokens=budget), prompt)
    largest = max(len(batch.tokens) for batch in batches)
    assert largest <= announced and (largest == announced or len(batches) > updates)


def test_rollout_rows_bound_the_cache_by_whole_groups():
    def cache(rows):
        config = TrainConfig(prompts_per_rollout=6, group_size=4, rollout_rows=rows, lora_r=0)
        return memory_parts(config, tiny(), 10)["KV cache of a rollout"]

    group = cache(0) // 6  # a prompt and its four answers
    assert [cache(n) // group for n in (1, 4, 7, 8, 24, 100)] == [1, 1, 1, 2, 6, 6]
    assert "KV cache of a rollout" not in memory_parts(TrainConfig(algo="sft", lora_r=0), tiny(), 10)


def test_the_plan_says_what_is_trained_and_adds_up():
    config = TrainConfig(lora_r=4, lr=1e-5, clip_low=3e-4, clip_high=4e-4, dtype="fp32", device="cpu", seed=7)
    model = tiny(lora_r=4)
    text = memory_report(config, model, 10)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for words in (
        "qwen3, 3 layers, width 64",
        "4 heads on 2",
        "vocabulary 50",
        "fp32 on cpu",
        "seed 7",
        f"{trained:,}",
    ):
        assert words in text
    assert "clip -3e-04 / +4e-04, lr 1.0e-05" in text
    parts = memory_parts(config, model, 10)
    assert all(f"{name} {human(size)}" in text for name, size in parts.items())
    assert text.endswith(f"together {human(sum(parts.values()))}, at one time {human(most(parts))}")
    full = memory_report(dataclasses.replace(config, algo="sft", lora_r=0), tiny(), 10)
    assert f"all {sum(p.numel() for p in tiny().parameters()):,} parameters are trained" in full
    assert "200 updates of 16 examples" in full


# ----------------------------------------------------------------------------
# before anything is allocated


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])  # tied embeddings, and norms that add one
@pytest.mark.parametrize("quant", [None, "nf4", "int8", "nf4 without double quantisation", "some layers in nf4"])
@DTYPES
def test_an_outline_has_the_bytes_of_the_model_that_is_loaded(tmp_path, family, quant, dtype):
    """By config.json alone, which is all that is left of the folder when the outline is made."""
    model, asked = tiny(family, dtype), quant
    if quant and " " in quant:  # a folder that is packed already
        for name, linear in dict(model.layers.named_modules(prefix="layers")).items():
            if isinstance(linear, nn.Linear) and not (quant.startswith("some") and name.startswith("layers.1.mlp")):
                q = quantize_nf4(linear.weight.detach(), double_quant=quant.startswith("some"))
                put(model, name, NF4Linear(q))
        asked = None
    checkpoint.save(model, tmp_path / "model")
    add_lora(model := checkpoint.load(tmp_path / "model", dtype=dtype, quant=asked), r=4, alpha=8)
    checkpoint.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "model" / "model.safetensors").unlink()
    shape = outline(checkpoint.read_config(tmp_path / "model"), dtype, asked)
    assert weight_count(shape) + sum(p.numel() for p in model.parameters() if p.requires_grad) == weight_count(model)
    checkpoint.load_adapter(shape, tmp_path / "adapter")
    assert {t.device.type for t in [*shape.parameters(), *shape.buffers()]} == {"meta"}
    config = TrainConfig(lora_r=4, device="cpu")
    parts = memory_parts(config, shape, 7)
    assert parts == memory_parts(config, model, 7)
    assert ("nf4 weights" in parts) == ("nf4" in str(quant)) and ("int8 weights" in parts) == (quant == "int8")
    assert memory_report(config, shape, 7) == memory_report(config, model, 7)
    raw = {**checkpoint.read_config(tmp_path / "model"), "quantization_config": {"load_in_4bit": False}}
    assert ("nf4 weights" in memory_parts(config, outline(raw, dtype, asked), 7)) == (asked == "nf4")
    gpu = memory_parts(dataclasses.replace(config, device="cuda"), shape, 7)
    assert gpu[CACHE] * 4 == parts[CACHE] * dtype.itemsize and "prepacked weights" not in gpu


class Live(TorchDispatchMode):
    """The most bytes that tensors of at least `floor` numbers held together."""

    def __init__(self, floor):
        super().__init__()
        self.floor, self.now, self.most, self.seen = floor, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.numel() >= self.floor:
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.most = max(self.most, self.now)
        return out

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_scores_of_a_decode_step_are_counted(temperature):
    """What is as large as (rows, vocabulary) while tokens are drawn; the scores themselves were there before."""
    config = TrainConfig(prompts_per_rollout=5, group_size=4, rollout_rows=11, temperature=temperature, lora_r=0)
    rows, V = 2 * 4, 10_000  # two whole groups of the five
    model = outline({**SHAPE, "model_type": "qwen3", "vocab_size": V}, torch.float32, None)
    with Live(rows * V) as live:
        sample(torch.zeros(rows, V), torch.rand(rows, dtype=torch.float64), temperature)
    assert memory_parts(config, model, 7)[SCORES] == live.most


def test_a_rollout_and_an_update_are_not_there_together():
    parts = {"weights": 100, GRADIENTS: 30, ACTIVATIONS: 50, CACHE: 60, SCORES: 5}
    assert most(parts) == 180 and most({**parts, CACHE: 90}) == 195
    assert most(parts, ESTIMATES) == 160 and most({**parts, CACHE: 20}, ESTIMATES) == 130


def test_what_surely_cannot_fit_is_said_with_what_to_lower():
    parts = {"weights": 1000, GRADIENTS: 300, ACTIVATIONS: 500_000, CACHE: 20_000}
    assert too_large(parts, 21_000, ESTIMATES) == "" != too_large(parts, 20_999, ESTIMATES)
    assert too_large(parts, 20_999, ESTIMATES) == (
        "got a run of at least 21 kB (KV cache of a rollout: 20 kB) where 21 kB are free; "
        "want a lower --rollout-rows, --group-size or --max-new-tokens"
    )
    assert "about 501 kB" in (text := too_large(parts, 501_299)) and "lower --micro-batch-tokens" in text
    assert too_large(parts, 501_300) == ""
    assert "want an adapter" in too_large({"weights": 4, "optimiser (two moments)": 32}, 35, ESTIMATES)
    assert "want --quant nf4, --dtype bf16" in too_large({"weights": 4}, 3, ESTIMATES)
    assert too_large({"nf4 weights": 4}, 3).endswith("want a smaller --model")
    assert too_large({"int8 weights": 4}, 3).endswith("want --quant nf4 or a smaller --model")


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("plan") / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.isa
def test_plan_only_reads_no_weights_and_makes_no_folder(without_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--model",
        without_weights,
        *"--task addition --max-new-tokens 6 --lora-r 4 --threads 1 --dtype fp32".split(),
    ]
    done = script("train.py", *flags, "--plan-only", "--quant", "nf4", "--device", "cpu")
    assert (done.code, done.err) == (0, "") and "  memory: weights " in done.out and "nf4 weights" in done.out
    assert "got a run" not in done.out
    with patch("nanogspo.run.process.available_memory", lambda device: 1000):
        done = script("train.py", *flags, "--plan-only")  # nobody is refused who only asks
        assert done.code == 0 and "got a run of at least" in done.out
        done = script("train.py", *flags)
        assert done.code == 2 and done.err.count("\n") == 1 and "missing weight" not in done.err
        assert "1 kB are free; want" in done.err and done.err.endswith("; or --ignore-memory-plan\n")
        assert not any(tmp_path.iterdir())
        done = script("train.py", *flags, "--ignore-memory-plan")
        assert done.code == 2 and "missing weight files model.safetensors" in done.err  # it went on to load them
        flags = ["--model", write_checkpoint(tmp_path / "model"), *"--dtype fp32 --max-new-tokens 2 hello".split()]
        done = script("sample.py", *flags)
        assert done.code == 2 and "1 kB are free; want" in done.err
        assert script("sample.py", *flags, "--ignore-memory-plan").code == 0


def test_a_config_json_alone_is_enough_for_a_plan(without_weights, tmp_path):
    """The tokens of a prompt are then its bytes in UTF-8, between the marks of ChatML."""
    (tmp_path / "alone").mkdir()
    shutil.copy(without_weights / "config.json", tmp_path / "alone")
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "né 你?"}], "answer": "4"}\n')
    flags = [*"--reward exact --max-new-tokens 6 --lora-r 4 --dtype fp32 --eval-size 0 --prompts-per-rollout 1".split()]
    flags += ["--data", tmp_path / "rows.jsonl", "--plan-only", "--device", "cpu"]
    done = script("train.py", "--model", tmp_path / "alone", *flags)
    assert (done.code, done.err) == (0, "") and "has no tokenizer.json: the plan counts bytes of" in done.out
    turn = "user\nné 你?\nassistant\n"  # and three marks
    c = model_config(json.loads((without_weights / "config.json").read_text()))
    slots = len(turn.encode()) + 3 + 8 * 5
    assert f"{CACHE} {human(slots * 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4)}" in done.out
    as_file = script("train.py", "--model", tmp_path / "alone" / "config.json", *flags)
    assert as_file.out.replace(os.path.join("alone", "config.json"), "alone") == done.out
    for name, want in (("alone", "want a tokenizer.json in it"), ("alone/config.json", "want a checkpoint folder")):
        done = script("train.py", "--model", tmp_path / name, *"--task addition --dtype fp32".split())
        assert done.code == 2 and done.err.count("\n") == 1 and want in done.err  # to train it takes all files


@pytest.mark.isa
def test_the_plan_of_a_hubs_model_fetches_no_weights(without_weights, monkeypatch):
    asked = []

    def snapshot_download(repo, *, allow_patterns, **_):
        asked.extend(allow_patterns)
        return str(without_weights)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    flags = "--model owner/name --task addition --max-new-tokens 6 --plan-only --dtype fp32".split()
    done = script("train.py", *flags)
    assert (done.code, done.err) == (0, "") and "with owner/name: qwen3" in done.out
    assert "config.json" in asked and not any(name.endswith(".safetensors") for name in asked)


def test_a_rollout_beyond_all_memory_is_refused_at_once(tmp_path):
    """What used to be started, and killed by the system minutes later."""
    done = script("train.py", "--out", tmp_path / "run", "--group-size", 10**6, "--eval-size", 0)
    assert done.code == 2 and "KV cache of a rollout: 590 GB" in done.err and not (tmp_path / "run").exists()
    assert "got a run" not in script("train.py", "--plan-only").out


def test_a_shard_is_planned_by_hand():
    """fp32 rows are their own masters; a rollout has all weights in bf16 beside them."""
    model, config = tiny(dtype=torch.bfloat16), TrainConfig(lora_r=0, device="cuda", dtype="bf16")
    n = sum(p.numel() for p in model.parameters())
    replica, sharded = (memory_parts(dataclasses.replace(config, shard=shard), model, 10, 4) for shard in ("off", "on"))
    names = ("weights", "gradients", "optimiser (two moments)", "fp32 masters", "whole weights of a rollout")
    assert [replica.get(name, 0) for name in names] == [2 * n, 4 * n, 8 * n, 4 * n, 0]
    assert [sharded.get(name, 0) for name in names] == [n, n, 2 * n, 0, 2 * n]
    block, root = (sum(p.numel() for p in part) for part in (model.layers[0].parameters(), [model.norm.weight]))
    root += model.embed_tokens.weight.numel() + (0 if model.config.tied else model.lm_head.weight.numel())
    assert sharded["gathered layers (estimate)"] == 2 * (root + 2 * block) + 6 * max(root, block)
    frozen = tiny(dtype=torch.bfloat16, lora_r=4)
    lora = memory_parts(dataclasses.replace(config, lora_r=4, shard="on"), frozen, 10, 4)
    assert [lora[name] for name in ("weights", "whole weights of a rollout")] == [n // 2, 2 * n]
    assert lora["gradients"] == lora["adapter"] == memory_parts(config, frozen, 10)["adapter"]


@pytest.mark.parametrize(
    ("P", "ranks", "rows", "tokens"),
    # 4 updates of 2 groups; a group is never cut
    [(8, 1, 32, 8 * 19), (8, 2, 16, 4 * 19), (8, 8, 4, 4 * 19), (6, 4, 8, 4 * 19), (2, 2, 4, 2 * 19)],
)
def test_a_process_has_its_own_groups(P, ranks, rows, tokens):
    config = TrainConfig(prompts_per_rollout=P, group_size=4, max_new_tokens=10, micro_batch_tokens=10**6)
    assert planner.rollout_rows(config, ranks) == rows
    assert batch_tokens(config, 10, ranks) == tokens
    assert batch_tokens(dataclasses.replace(config, algo="sft", batch_size=7), 10, ranks) == -(-7 // ranks) * 19


def test_sharding_is_chosen_where_a_replica_does_not_fit_and_a_shard_is_less():
    def chosen(available, ranks=4, shard="auto", quant=None, **changes):
        config = TrainConfig(**{"lora_r": 0, "device": "cuda", "shard": shard, "max_new_tokens": 2, **changes})
        model = tiny(dtype=torch.bfloat16, lora_r=0 if quant else config.lora_r)
        if quant:
            quantize_model(model, quant)
            add_lora(model, r=4, alpha=8)
        return planner.decide_sharding(config, model, 4, available, ranks).shard

    config = TrainConfig(lora_r=0, device="cuda", max_new_tokens=2, gradient_checkpointing="on")
    needed = most(memory_parts(config, tiny(dtype=torch.bfloat16), 4, 4)) / planner.FILL
    assert [chosen(needed * (1 + e)) for e in (-1e-6, 1e-6)] == ["on", "off"]
    assert [chosen(1.0, ranks=1), chosen(1.0, shard="off"), chosen(1e12, shard="on")] == ["auto", "off", "on"]
    assert [chosen(1.0, lora_r=4, max_new_tokens=2000), chosen(1.0, quant="nf4", lora_r=4)] == ["off", "off"]
    with pytest.raises(ValueError, match="packed weights every process holds whole; want --shard auto"):
        chosen(1.0, shard="on", quant="nf4", lora_r=4)
    with pytest.raises(ValueError, match="got --beta 0.1 with sharded full fine-tuning"):
        chosen(1.0, beta=0.1)
    assert chosen(1.0, beta=0.1, shard="off") == "off"


def test_the_least_time_by_hand():
    """A card of 1 byte and 1 operation a second."""
    base = {"device": "cuda", "dtype": "bf16", "prompts_per_rollout": 4, "group_size": 2, "max_new_tokens": 10}

    def floor(model, ranks=2, **changes):
        config = TrainConfig(**base | {"gradient_checkpointing": "off"} | changes)
        return list(planner.time_floor(config, model, 5, ranks, 1.0, 1.0).values())

    model = tiny(dtype=torch.bfloat16)
    n, head = sum(p.numel() for p in model.parameters()), model.embed_tokens.weight.numel() * (not model.config.tied)
    tokens, slot = 2 * (5 + 2 * 10), 2 * 3 * 2 * 32 * 2  # of a process: two groups
    step = 2 * n + (2 * 5 + 4 * 9) * slot / 2
    # three of four updates' answers are scored before; with a reference all of them once more
    assert floor(model, lora_r=0) == [10 * step, 1.5 * (n - head) * tokens, 12 * (n - head) * tokens]
    # an update has one group, so one of two processes waits
    assert floor(model, lora_r=0, updates_per_rollout=2)[2] == floor(model, lora_r=0, updates_per_rollout=1)[2]
    assert floor(model, lora_r=0, updates_per_rollout=2)[2] == 6 * (n - head) * tokens
    assert floor(model, lora_r=0, beta=0.1)[1] == 3.5 * (n - head) * tokens
    assert floor(model, lora_r=0, updates_per_rollout=1)[1] == floor(model, lora_r=0, algo="reinforce")[1] == 0
    assert floor(model, lora_r=0, gradient_checkpointing="on")[2] == 16 * (n - head) * tokens
    assert floor(model, lora_r=0, algo="sft", batch_size=3, data="x") == [6 * (n - head) * 2 * 5]
    assert floor(model, lora_r=0, algo="sft", batch_size=3) == [6 * (n - head) * 2 * (5 + 10)]
    rows = {"prompts_per_rollout": 64}
    nf4 = tiny(dtype=torch.bfloat16)
    quantize_model(nf4, "nf4")
    add_lora(nf4, r=4, alpha=8)
    few, many = (floor(nf4, 1, **rows | {"rollout_rows": n})[0] for n in (64, 128))
    inside = sum(m.in_features * m.out_features for m in planner.packed_layers(nf4).values())
    bytes_read = planner.weight_parts(nf4)["weights"] + planner.weight_parts(nf4)["nf4 weights"]
    assert few == 2 * 10 * (bytes_read + (32 * 5 + 64 * 9) * slot / 2)
    assert many == 10 * (bytes_read + 4 * inside + (64 * 5 + 128 * 9) * slot / 2)
    assert floor(nf4, 1)[2] == 4 * (planner.weight_count(nf4) - head) * 2 * tokens


def test_a_token_goes_through_some_of_the_experts():
    raw = {**SHAPE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model, config = outline(raw, torch.bfloat16, None), TrainConfig(lora_r=0, device="cuda", dtype="bf16")
    n = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel() * (not model.config.tied)
    idle = 3 * 6 * 3 * 64 * 16  # 3 layers, 6 of 8 experts, 3 matrices
    assert planner.time_floor(config, model, 5, 8, 1.0, 1.0)["scoring"] == 1.5 * (n - idle) * (5 + 8 * 64)


def test_a_plan_for_another_machine(without_weights):
    flags = ["--model", without_weights, *"--task addition --max-new-tokens 6 --lora-r 0".split()]
    done = script("train.py", *flags, "--plan-for", "2x80")
    assert (done.code, done.err) == (0, "") and "; bf16 on cuda, seed 0" in done.out
    assert "  memory of each of 2 processes (a replica): weights " in done.out
    assert re.search(r"\n  at least \(H100 SXM\): sampling \S+ s, scoring \S+ s, 4 updates \S+ s\n", done.out)
    done = script("train.py", *flags, "--plan-for", "2x80", "--shard", "on")
    assert "(its rows of every weight)" in done.out and "whole weights of a rollout" in done.out
    done = script("train.py", *flags, "--plan-for", "2x7")
    assert done.code == 0 and "at least" not in done.out  # of no card that is known
    done = script("train.py", *flags, "--plan-for", "two")
    assert done.code == 2 and done.err == "train.py: got --plan-for two, want PROCESSESxGB of a GPU, such as 2x80\n"


def test_advice():
    config = TrainConfig(lora_r=0, device="cuda", dtype="bf16", gradient_checkpointing="on", max_new_tokens=2)
    model = tiny(dtype=torch.bfloat16)
    on = dataclasses.replace(config, shard="on")
    for ranks in (2, 8):
        enough = most(memory_parts(on, model, 4, ranks)) / planner.FILL
        line = f"it fits {ranks} such processes: torchrun --nproc-per-node {ranks} train.py --shard on ..."
        assert planner.advice(config, model, 4, enough + 1, 1) == line
        replica = dataclasses.replace(config, shard="off")  # as asked, or as decided for one process
        assert planner.advice(replica, model, 4, enough + 1, ranks) == line
        assert planner.advice(on, model, 4, enough + 1, 1) == line.replace("--shard on ", "")
        assert planner.advice(dataclasses.replace(config, beta=0.1), model, 4, enough + 1, 1) == ""  # none can shard it
    assert planner.advice(config, model, 4, 1e12, 1) == planner.advice(config, model, 4, 1.0, 1) == ""
    adapted, long = tiny(dtype=torch.bfloat16, lora_r=4), dataclasses.replace(config, lora_r=4, max_new_tokens=2000)
    enough = most(memory_parts(long, adapted, 4, 2)) / planner.FILL  # of replicas: shards would take more
    assert "it fits 2 such processes" in planner.advice(long, adapted, 4, enough + 1, 1)
    said = "4 updates share 8 groups, so in each some of 8 processes wait: --prompts-per-rollout 32"
    assert planner.advice(config, model, 4, 1e12, 8) == f"{said} gives every one a group"
    assert planner.advice(dataclasses.replace(config, algo="sft"), model, 4, 1e12, 8) == ""
    one = dataclasses.replace(config, prompts_per_rollout=1, group_size=64)
    assert planner.advice(one, model, 4, 1e12, 1) == ""  # nobody waits
    quantize_model(model, "nf4")
    rows = dataclasses.replace(config, prompts_per_rollout=32)
    assert "--rollout-rows 64 may sample faster: 256 rows" in planner.advice(rows, model, 4, 1e12, 1)
    assert planner.advice(rows, model, 4, 1e12, 4) == ""


@given(st.integers(0, 10**13))
def test_sizes_are_read_back_within_their_rounding(size):
    number, unit = human(size).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
    # whole bytes, kB and hundreds; one decimal of 1.0 to 99.9 MB and GB
    assert abs(float(number) * scale - size) <= (0.05001 if "." in number else 0.5) * scale
    assert float(number) <= 1000 or unit == "GB"


def test_sizes_read_well():
    assert [human(n) for n in (0, 999, 1000, 1_800_000, 99_900_000, 428e6, 1.2e9, 65e12)] == [
        "0 B", "999 B", "1 kB", "1.8 MB", "99.9 MB", "428 MB", "1.2 GB", "65000 GB",
    ]  # fmt: skip
