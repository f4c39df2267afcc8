"""Experts in files: the three layouts in and out, adapters, packed weights, the sizes of real models.

Run: python -m pytest tests/test_moe_storage.py
"""

import json
import re
import shutil

import peft
import pytest
import references
import torch
from safetensors.torch import load_file, save_file
from test_moe import E, folder, ours, reference

from nanogspo import checkpoint
from nanogspo.families import export_config, model_config
from nanogspo.fast.fused_linear import FusedLinears
from nanogspo.layers.moe import ROUTER, ExpertLinear
from nanogspo.lora import LoRAExperts, add_lora, lora_layers, merge_lora, unmerge_lora
from nanogspo.model import Transformer
from nanogspo.quant import PackedExperts, PackedLinear, linear_layers, packed_layers, quantize_model, weight_count
from nanogspo.run.planner import outline

TOKENS = references.tokens(1, 17)
EXPERTS = ("gate_proj", "up_proj", "down_proj")


def hidden(model):
    with torch.no_grad():
        return model(TOKENS)


def stacked(tensors: dict, turned: bool) -> dict:
    """Tensors with a matrix per expert -> the stacks of qwen3_5_moe, or, turned, of qwen3_vl_moe; by hand."""
    out = {name: t for name, t in tensors.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{e}.{part}.weight"] for e in range(E)]) for part in EXPERTS
        )
        for name, t in (("gate_up", torch.cat([gate, up], 1)), ("down", down)):
            out[f"{layer}.experts.{name}_proj"] = t.mT.contiguous() if turned else t
    return out


@pytest.mark.parametrize("layout", ["each", "fused", "turned"])
def test_layouts_are_read_alike_and_written_as_they_were_read(layout, tmp_path):
    """transformers wrote `each` of qwen2_moe; every layout holds the same numbers, with a head of its own."""
    tensors = load_file(folder("qwen2_moe") / "model.safetensors")
    if layout != "each":
        tensors = stacked(tensors, layout == "turned")
    source = tmp_path / "source"
    shutil.copytree(folder("qwen2_moe"), source)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = checkpoint.load(source, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours("qwen2_moe").parameters(), strict=True))
    checkpoint.save(model, tmp_path / "copy")
    again = load_file(tmp_path / "copy" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "qwen3_vl_moe"])
def test_transformers_opens_what_is_saved(name, tmp_path):
    """Of qwen3_vl_moe the whole folder, tower and turned stacks; of the others config.json as well is written anew."""
    model = checkpoint.load(folder(name), dtype=torch.float32)
    checkpoint.save(model, tmp_path)
    theirs = references.open_reference(tmp_path, name)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=TOKENS).logits, reference(name)(input_ids=TOKENS).logits)
    assert re.search(
        "experts.0.gate" if name != "qwen3_vl_moe" else "gate_up", " ".join(load_file(tmp_path / "model.safetensors"))
    )


def test_the_text_part_of_a_wrapper_is_exported_as_qwen3_moe():
    for kind in ("qwen3_vl_moe_text", "qwen3_omni_moe_text"):
        raw = {"model_type": kind, "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
               "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}  # fmt: skip
        config = model_config(raw)
        again = model_config(json.loads(json.dumps(export_config(config, dtype="float32"))))
        assert again.norm_topk and again.family == "qwen3_moe"
        assert (again.num_experts, again.experts_per_token, again.expert_size, again.rope, again.head_dim) == (
            config.num_experts, config.experts_per_token, config.expert_size, config.rope, config.head_dim
        )  # fmt: skip
    whole = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": raw},
    }
    assert model_config(whole).module_prefix == "thinker.model." and model_config(whole).num_experts == 128


def test_every_missing_extra_and_misshapen_expert_is_named(tmp_path):
    tensors = load_file(folder("qwen3_moe") / "model.safetensors")
    source = tmp_path / "source"
    shutil.copytree(folder("qwen3_moe"), source)
    first = "model.layers.0.mlp.experts"
    bad = dict(tensors) | {
        f"{first}.{E}.up_proj.weight": torch.zeros(24, 64),
        f"{first}.2.up_proj.weight": torch.zeros(2, 2),
    }
    del bad[f"{first}.3.gate_proj.weight"]

    def refusal(tensors) -> str:
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError) as e:
            checkpoint.load(source, dtype=torch.float32)
        return str(e.value)

    line = refusal(bad)
    assert "missing layers.0.mlp.experts.3.gate_proj.weight" in line
    assert f"unexpected {first}.{E}.up_proj.weight" in line and "experts.2.up_proj.weight has shape [2, 2]" in line
    fused = stacked(tensors, False)
    fused[f"{first}.gate_up_proj"] = fused[f"{first}.gate_up_proj"][:, :-2].contiguous()
    assert "experts.0.gate_proj.weight has shape [23, 64], config.json wants [24, 64]" in refusal(fused)
    fused = stacked(tensors, False)
    fused[f"{first}.down_proj"] = fused[f"{first}.down_proj"][1:].contiguous()
    assert f"missing layers.0.mlp.experts.{E - 1}.down_proj.weight" in refusal(fused)
    packed = tensors | {f"{first}.0.up_proj.weight.absmax": torch.zeros(3)}
    assert "got packed experts" in refusal(packed) and "--quant nf4" in refusal(packed)


# (hidden, layers, heads, kv heads, experts, expert width) of config.json on the hub -> parameters: 30.5 B and 235 B
REAL = {
    "30B-A3B": ((2048, 48, 32, 4, 128, 768), 30_532_122_624),
    "235B-A22B": ((4096, 94, 64, 4, 128, 1536), 235_093_634_560),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_have_the_published_parameters(name):
    (C, L, H, kv, experts, width), total = REAL[name]
    raw = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": C, "num_hidden_layers": L, "head_dim": 128,
           "num_attention_heads": H, "num_key_value_heads": kv, "num_experts": experts, "num_experts_per_tok": 8,
           "moe_intermediate_size": width, "intermediate_size": 3 * C, "norm_topk_prob": True,
           "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
    model = outline(raw, torch.bfloat16, None)
    assert weight_count(model) == total


# ---------------------------------------------------------------------------------------------------------------------
# adapters


def adapted(name: str = "qwen2_moe", quant: str | None = None, **options):
    model = checkpoint.load(folder(name), dtype=torch.float32, quant=quant)
    add_lora(model, r=3, alpha=6.0, **options)
    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=generator)
    return model


def test_an_adapter_is_a_pair_of_thin_matrices_for_every_expert():
    """Against the dense sum: hidden states, and gradients by the chain rule: dA = s B^T dW, dB = s dW A^T.
    fp32, sums of 24 to 64 terms in another order: 1e-5 of the largest."""
    model, dense = adapted(), checkpoint.load(folder("qwen2_moe"), dtype=torch.float32)
    layers = lora_layers(model)
    experts = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAExperts)}
    assert len(experts) == 6 and not any(name.endswith(ROUTER) for name in layers)
    weights = dict(dense.named_parameters())
    for name, layer in layers.items():
        weights[f"{name}.weight"].data = layer.merged_weight()
    direction = torch.randn(TOKENS.numel(), 64, generator=torch.Generator().manual_seed(2))
    (model(TOKENS)[0] * direction).sum().backward()
    (dense(TOKENS)[0] * direction).sum().backward()
    assert (hidden(model) - hidden(dense)).abs().max() <= 1e-5
    for name, layer in experts.items():
        dW = weights[f"{name}.weight"].grad
        A, B = layer.lora_A.weight, layer.lora_B.weight
        for got, want in ((A.grad, 2.0 * B.mT @ dW), (B.grad, 2.0 * dW @ A.mT)):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name
        assert layer.base.weight.grad is None
    want, before = hidden(model), layers["layers.1.mlp.experts.up_proj"].base.weight.data.clone()
    merge_lora(model)
    assert (hidden(model) - want).abs().max() <= 1e-5
    unmerge_lora(model)
    assert torch.equal(layers["layers.1.mlp.experts.up_proj"].base.weight, before)
    fused = FusedLinears(model)
    with torch.no_grad():
        assert (model(TOKENS, linear=fused) - want).abs().max() <= 1e-5


def test_the_router_gets_an_adapter_when_it_is_asked_for():
    model = adapted(targets=["gate", "q_proj"])
    assert "layers.1.mlp.gate" in lora_layers(model) and "layers.1.mlp.experts.gate_proj" not in lora_layers(model)
    model(TOKENS).square().sum().backward()
    assert lora_layers(model)["layers.1.mlp.gate"].lora_A.weight.grad.abs().max() > 0


def test_adapters_go_out_and_in_one_expert_at_a_time(tmp_path):
    """PEFT over transformers 5 reads the same file and computes the same: 0.21, where all layers have experts and all
    three projections an adapter; it has no other way to stack them."""
    moe = "qwen3_moe_sliding"
    model = adapted(moe, targets=["q_proj", "o_proj", *EXPERTS])
    checkpoint.save_adapter(model, tmp_path, base=str(folder(moe)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.experts.{}.down_proj.lora_{}.weight"
    assert tensors[name.format(4, "A")].shape == (3, 24) and tensors[name.format(0, "B")].shape == (64, 3)
    again = checkpoint.load(folder(moe), dtype=torch.float32)
    checkpoint.load_adapter(again, tmp_path)
    assert torch.equal(hidden(again), hidden(model))
    theirs = peft.PeftModel.from_pretrained(references.open_reference(folder(moe), moe), tmp_path)
    with torch.no_grad():
        assert (theirs(input_ids=TOKENS).logits - model.logits(model(TOKENS))).abs().max() <= 2e-5
    del tensors[name.format(1, "A")], tensors[name.format(1, "B")]
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"got no .*experts.1.down_proj.*want all experts"):
        checkpoint.load_adapter(checkpoint.load(folder(moe)), tmp_path)


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_a_merged_folder_is_the_adapted_model(quant, tmp_path):
    model = adapted(quant=quant)
    checkpoint.save(model, tmp_path / "merged")
    checkpoint.save(model, tmp_path / "base", merge_lora=False)
    merged = checkpoint.load(tmp_path / "merged", dtype=torch.float32)
    assert (hidden(merged) - hidden(model)).abs().max() <= 1e-5
    for layer in lora_layers(model).values():
        layer.scale = 0.0
    base = checkpoint.load(tmp_path / "base", dtype=torch.float32)
    assert (hidden(base) - hidden(model)).abs().max() <= 1e-5
    if quant is None:
        merge_lora(model := adapted())
        checkpoint.save(model, tmp_path / "base", merge_lora=False)
        base = checkpoint.load(tmp_path / "base", dtype=torch.float32)
        assert torch.equal(hidden(base), hidden(ours("qwen2_moe")))


# ---------------------------------------------------------------------------------------------------------------------
# packed weights


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_experts_are_packed_one_by_one_and_routers_never(quant, tmp_path):
    model = checkpoint.load(folder("qwen2_moe"), dtype=torch.float32, quant=quant)
    at_once = checkpoint.load(folder("qwen2_moe"), dtype=torch.float32)
    quantize_model(at_once, quant)
    assert torch.equal(hidden(model), hidden(at_once))
    layers, packed = linear_layers(model), packed_layers(model)
    stacks = [name for name, layer in layers.items() if isinstance(layer, PackedExperts)]
    assert len(stacks) == 6 and not any(isinstance(layer, ExpertLinear) for layer in layers.values())
    for name, layer in layers.items():
        assert isinstance(layer, PackedLinear | PackedExperts) != name.endswith(ROUTER), name
    assert sum(".experts." in name for name in packed) == 6 * E and weight_count(model) == weight_count(
        ours("qwen2_moe")
    )
    assert not any(p.requires_grad for p in model.parameters())
    plain = checkpoint.load(folder("qwen2_moe"), dtype=torch.float32)  # multiplied with the very weights of the codes
    for name in stacks:
        plain.get_submodule(name).weight.data = torch.stack([m.unpack(torch.float32) for m in layers[name]])
    for name, layer in packed.items():
        if ".experts." not in name:
            plain.get_submodule(name).weight.data = layer.unpack(torch.float32)
    assert (hidden(model) - hidden(plain)).abs().max() <= 1e-5
    meta = outline(checkpoint.read_config(folder("qwen2_moe")), torch.float32, quant)
    assert {n: m.nbytes for n, m in packed_layers(meta).items()} == {n: m.nbytes for n, m in packed.items()}


def test_an_adapter_over_packed_experts_has_the_gradients_of_one_over_their_weights():
    model = adapted(quant="nf4")
    plain = adapted()
    for name, layer in linear_layers(model).items():
        owner = plain.get_submodule(name) if ".lora_" not in name and not name.endswith(ROUTER) else None
        if isinstance(layer, PackedExperts):
            owner.weight.data = torch.stack([m.unpack(torch.float32) for m in layer])
        elif isinstance(layer, PackedLinear):
            owner.weight.data = layer.unpack(torch.float32)
    for m in (model, plain):
        m(TOKENS).square().sum().backward()
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            got, want = (getattr(x, part).weight.grad for x in (layer, lora_layers(plain)[name]))
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), (name, part)


def test_a_folder_of_nf4_attention_and_plain_experts_is_read_as_it_is(tmp_path):
    """What save writes of an NF4 model: bitsandbytes has no stacked experts, so these are in 16 bits."""
    model = checkpoint.load(folder("qwen3_moe"), dtype=torch.bfloat16, quant="nf4")
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert torch.equal(hidden(again), hidden(model))
    kinds = {name.rsplit(".", 1)[-1]: type(layer) for name, layer in linear_layers(again).items()}
    assert kinds["down_proj"] is ExpertLinear and issubclass(kinds["q_proj"], PackedLinear)
    assert isinstance(Transformer(again.config), Transformer)
