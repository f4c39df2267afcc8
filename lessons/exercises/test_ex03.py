import pytest
import torch

from lessons.exercises import load
from nanogspo import checkpoint, lora, tiny

ex03 = load("ex03")


@pytest.fixture
def model():
    return tiny.build("01+=", seed=0)[1]


def test_a_copy_has_not_changed(model, tmp_path):
    for folder in ("a", "b"):
        checkpoint.save(model, tmp_path / folder)
    assert ex03.changed(tmp_path / "a", tmp_path / "b") == {}


@pytest.mark.parametrize("shard_bytes", [10**9, 400_000])
def test_names_what_changed_and_by_how_much(model, tmp_path, monkeypatch, shard_bytes):
    checkpoint.save(model, tmp_path / "a")
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight[3, 5] -= 0.25
        model.norm.weight[0] = 3.0  # it was 1
        model.norm.weight[1] = 1.5
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)  # the second folder may be cut into other shards
    checkpoint.save(model, tmp_path / "b")
    got = ex03.changed(tmp_path / "a", tmp_path / "b")
    assert got == {
        "model.layers.1.self_attn.q_proj.weight": pytest.approx(0.25, abs=1e-7),  # weights are below 1: half an ulp
        "model.norm.weight": 2.0,
    }


def test_a_merged_adapter_touches_its_targets_only(model, tmp_path):
    checkpoint.save(model, tmp_path / "base")
    lora.add_lora(model, r=2, alpha=2, targets=["k_proj"])
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_B.weight.fill_(0.1)  # B starts at 0, and A B would change nothing
    checkpoint.save(model, tmp_path / "merged")
    got = ex03.changed(tmp_path / "base", tmp_path / "merged")
    assert set(got) == {f"model.layers.{i}.self_attn.k_proj.weight" for i in range(model.config.num_layers)}


def test_rounding_to_bf16_is_a_change(model, tmp_path):
    checkpoint.save(model, tmp_path / "a")
    checkpoint.save(model.to(torch.bfloat16), tmp_path / "b")
    got = ex03.changed(tmp_path / "a", tmp_path / "b")
    assert "model.embed_tokens.weight" in got and "model.norm.weight" not in got  # 1.0 is a number of bf16
    assert max(got.values()) < 2**-9  # half an ulp of bf16 for weights below 1


def test_says_what_is_missing(model, tmp_path):
    checkpoint.save(model, tmp_path / "a")
    del model.norm
    tensors = {f"model.{n}": p for n, p in model.named_parameters()}
    checkpoint.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    with pytest.raises(ValueError, match="model.norm.weight"):
        ex03.changed(tmp_path / "a", tmp_path)
