"""train.py with a mixture of experts: ratios of exactly 1, resuming to the last byte, metrics, the load-balancing loss.

Run: python -m pytest tests/test_moe_train.py
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_train import ROLLOUT_TIMES, TIMES, interrupted_at, quick, resume, script, train  # noqa: F401

from nanogspo import tiny
from nanogspo.config import ROOT, TrainConfig, load_yaml
from nanogspo.families import model_config
from nanogspo.layers.moe import MoE, Routers
from nanogspo.lora import LoRAExperts, add_lora, lora_layers
from nanogspo.model import separate
from nanogspo.packing import Example, pack, score
from nanogspo.run.log import read_rows
from nanogspo.run.planner import layer_bytes

FLAGS = "--architecture qwen3_moe --threads 1 --task addition --task-size 2 --max-new-tokens 4 --no-control".split()
FLAGS += "--warm-steps 2 --warm-until 2 --eval-size 0 --prompts-per-rollout 4 --group-size 4 --steps 4".split()
FLAGS += "--updates-per-rollout 2 --batch-size 4 --save-every 1000 --micro-batch-tokens 60 --lr 1e-3".split()
KEYS = {"experts_unused", "experts_max_load", "router_entropy"}


def rows(folder) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k not in TIMES | ROLLOUT_TIMES} for row in read_rows(folder / "metrics.jsonl")
    ]


def test_a_run_is_watched_and_resumed_to_the_last_byte_and_its_first_ratios_are_one(tmp_path):
    """Updates 3 and 5 are the first of a rollout, 4 and 6 the second: there the ratio moves. Counts are sums over
    several micro-batches of 60 tokens."""
    train(tmp_path / "whole", *FLAGS)
    with interrupted_at(4):
        train(tmp_path / "run", *FLAGS)
    resume(tmp_path / "run")
    a, b = ((tmp_path / name / "state" / "state.safetensors").read_bytes() for name in ("whole", "run"))
    assert a == b and rows(tmp_path / "run") == rows(tmp_path / "whole")
    updates = [row for row in rows(tmp_path / "whole") if "algo" in row]
    assert [row["algo"] for row in updates] == ["sft"] * 2 + ["gspo"] * 4
    for row in updates:
        assert row.keys() >= KEYS and 0 <= row["experts_unused"] < 1
        assert 1 <= row["experts_max_load"] <= 4 and 1.5 < row["router_entropy"] <= 2.0795  # 8 / 2; ln 8 = 2.0794
    ratios = [(row["ratio_min"], row["ratio_max"]) for row in updates[2:]]
    assert ratios[0] == ratios[2] == (1, 1) and ratios[1][0] < 1 < ratios[1][1]


def test_the_balance_loss_evens_experts_out_and_is_off_by_default(tmp_path):
    flags = "--algo sft --warm-steps 0 --steps 12 --batch-size 16 --lr 3e-3".split()
    for name, weight in (("off", []), ("on", ["--router-aux-loss", 1])):
        train(tmp_path / name, *FLAGS, *flags, *weight)
    off, on = ([row for row in rows(tmp_path / name) if "algo" in row] for name in ("off", "on"))
    assert off[0]["loss"] == on[0]["loss"]  # the logged loss is without it
    assert off[0]["grad_norm"] != on[0]["grad_norm"]
    assert on[-1]["experts_max_load"] < off[-1]["experts_max_load"]


def test_a_dense_model_has_no_such_metrics(tmp_path):
    train(tmp_path / "run", *FLAGS, "--architecture", "qwen3", "--steps", 2)
    assert all(not KEYS & row.keys() for row in rows(tmp_path / "run"))


@pytest.mark.parametrize("adapter", [False, True])
def test_scoring_and_training_have_equal_bits(adapter):
    """With and without gradients, watched or not: of a row in which prompts are shared. And gradients reach what is
    trained, of every expert that a token met."""
    _, model = tiny.build("0123456789+=", seed=0, architecture="qwen3_moe")
    if adapter:
        add_lora(model, r=2, alpha=4.0)
        for layer in lora_layers(model).values():
            layer.lora_B.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    prompt = list(range(1, 11)) * 2
    [batch] = pack([Example.answered(prompt, [3, 4 + i, 0]) for i in range(5)], max_tokens=999)
    with torch.no_grad():
        old, _, _ = score(model, batch, temperature=0.8)
    routers = Routers(model.config)
    new, _, _ = score(model, batch, temperature=0.8, linear=routers.watch(separate))
    routers.balance(0.0)
    assert torch.equal(old, new)
    loads = routers.sums[:, : -Routers.COLUMNS]  # (L, E)
    new.sum().backward()
    assert (loads == 0).any() or adapter  # a few tokens do not meet all of 8
    for block, load in zip(model.layers, loads, strict=True):
        layer = block.mlp.experts.down_proj
        grad = layer.lora_B.weight.grad if isinstance(layer, LoRAExperts) else layer.weight.grad
        trained, met = grad.flatten(1).abs().amax(1) > 0, load > 0  # (E,) both
        if block is model.layers[-1]:  # nothing reads what it makes of tokens that are not scored
            assert trained.any() and not (trained & ~met).any()
        else:
            assert torch.equal(trained, met)
        assert adapter or block.mlp.gate.weight.grad.abs().max() > 0
        assert isinstance(block.mlp, MoE)


def test_the_config_is_that_of_the_default_run_with_experts():
    dense, moe = (load_yaml(ROOT / "configs" / f"{name}.yaml", TrainConfig, "") for name in ("tiny", "tiny_moe"))
    assert moe.pop("architecture") == "qwen3_moe" and moe == dense
    sizes = []
    for architecture in ("qwen3", "qwen3_moe"):
        _, model = tiny.build("ab>", seed=0, architecture=architecture)
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert dataclasses.replace(model.config, source={}).num_experts == (8 if "moe" in architecture else 0)
    assert sizes[1] > 2 * sizes[0]
    done = script("train.py", "--model", "some/checkpoint", "--architecture", "qwen3_moe")
    assert done.code == 2 and "--architecture qwen3_moe with --model some/checkpoint, which states its own" in done.err


def test_the_plan_counts_what_rows_of_experts_keep():
    """Two experts of width 128 instead of an MLP of 256: besides gate, act, up and product a token has two rows of x
    and two results, 2 * 2 * 128 numbers of fp32."""
    config, sizes = TrainConfig(device="cpu", dtype="fp32", lora_r=0), []
    for architecture in ("qwen3", "qwen3_moe"):
        _, raw = tiny.describe("ab>", architecture)
        sizes.append(layer_bytes(config, model_config(raw), 4))
    assert sizes[1] - sizes[0] == 2 * 2 * 128 * 4
    _, raw = tiny.describe("ab>", "qwen3_moe")  # a dense layer among them is wider
    assert layer_bytes(config, model_config(raw | {"mlp_only_layers": [0], "intermediate_size": 999}), 4) > sizes[1]


def test_what_a_run_saves_is_a_checkpoint(tmp_path):
    train(tmp_path / "run", *FLAGS, "--steps", 2)
    names = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert "model.layers.2.mlp.experts.7.up_proj.weight" in names
