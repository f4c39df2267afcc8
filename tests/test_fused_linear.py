"""nanogspo/fast/fused_linear.py: fused layers against the layers one by one.

Run: python -m pytest tests/test_fused_linear.py
"""

import dataclasses

import pytest
import references
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import prepacked
from kernels.prepacked import PrepackedLinear, can_prepack
from nanogspo import checkpoint
from nanogspo.fast import fused_linear
from nanogspo.fast.fused_linear import ConcatenatedLinear, FusedAdapters, FusedLinears, fuse, groups
from nanogspo.lora import ALL_LINEAR, LoRALinear, add_lora, lora_layers
from nanogspo.quant import quantize_linear
from nanogspo.rollout import generate
from tests.strategies import SEEDS
from tests.test_lora import drawn_layer
from tests.test_rollout import PROMPTS, tiny

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
MODES = pytest.mark.parametrize("mode", ["prepacked", "concatenated", "adapters"])


def only(monkeypatch, mode):
    """Let one kind of fused layer be chosen for weights in plain form, whatever machine and size."""
    if mode == "prepacked" and not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN on this machine")
    units = prepacked._has_layout(torch.ones(1)) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    fits = lambda w: mode == "prepacked" and (w.dtype == torch.float32 or units)  # noqa: E731
    monkeypatch.setattr(fused_linear, "can_prepack", fits)
    monkeypatch.setattr(fused_linear, "can_concatenate", lambda weight: mode == "concatenated")
    monkeypatch.setattr(prepacked, "FP32_FROM", 1)
    return {"prepacked": PrepackedLinear, "concatenated": ConcatenatedLinear, "adapters": FusedAdapters}[mode]


@pytest.mark.isa
@MODES
@DTYPES
@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj", "up_proj", "down_proj"), None])
def test_the_model_with_fused_layers_is_the_model(mode, dtype, targets, monkeypatch):
    """Adapters on all layers of one x, on some, or on none; one of them merged, one layer packed in 8 bits. The
    adapters move the hidden states thirty times as far as bf16 rounds them."""
    kind = only(monkeypatch, mode)
    model = checkpoint.load(references.folder("qwen3"), dtype=dtype)
    tokens = references.tokens(1, 12)  # (1, T)
    with torch.no_grad():
        mlp = model.layers[1].mlp
        mlp.up_proj = quantize_linear(mlp.up_proj.weight.data, None, "int8")  # beside a plain gate_proj
        base = model(tokens).float()  # (1, T, C)
        if targets:
            add_lora(model, r=4, alpha=8.0, targets=targets)
            g = torch.Generator().manual_seed(0)
            for layer in lora_layers(model).values():
                layer.lora_B.weight.normal_(generator=g).mul_(0.3)
            merged = model.layers[0].self_attn.v_proj
            merged.base.weight.data, merged.merged = merged.merged_weight(), True
        want = model(tokens).float()
        fused = FusedLinears(model)
        got = model(tokens, linear=fused).float()
        assert torch.equal(model(tokens).float(), want)  # which itself has not changed
    kinds, L = [type(f) for f in fused._fused.values() if f is not None], model.config.num_layers
    if mode == "adapters":
        assert kinds == [FusedAdapters] * {None: 0, ALL_LINEAR: 4 * L}.get(targets, 3 * L)  # o_proj has none
    elif dtype == torch.float32 or mode == "concatenated" or can_prepack(torch.ones(1, 1, dtype=dtype)):
        assert kinds.count(kind) == 4 * L - 1  # all but gate and up of layer 1
        assert kinds.count(FusedAdapters) == (targets is not None)
    error, moved = (got - want).norm() / want.norm(), (want - base).norm() / want.norm()
    # fp32: sums of 64 and 128 products in another order, through the layers
    assert error < (1e-5 if dtype == torch.float32 else min(0.03, moved / 10 if targets else 1.0)), (error, moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_head_gives_the_models_logits(dtype, monkeypatch):
    """With Gemma 2's soft-cap, so small that it bites: without it scores reach 5."""
    monkeypatch.setattr(prepacked, "FP32_FROM", 1)
    model = tiny("gemma2").to(dtype)
    model.config = dataclasses.replace(model.config, final_softcap=0.5)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 4
    with torch.no_grad():
        fused, want = FusedLinears(model), model.logits(hidden)  # (2, 3, V)
        got = fused.logits(hidden)
    assert (fused._head is not None) == torch.backends.mkldnn.is_available()
    assert got.dtype == torch.float32 and 0.3 < want.abs().max() <= 0.5
    # sums of 32 products in another order; a bf16 head is multiplied in fp32 by both, or by units that add in fp32
    assert (got - want).abs().max() < 1e-5


@MODES
def test_a_new_one_sees_updated_weights(mode, monkeypatch):
    """And a rollout makes a new one, once for all its slices."""
    only(monkeypatch, mode)
    model, made = tiny("qwen3"), []
    add_lora(model, r=2, alpha=4.0)

    def counted(model):
        made.append(FusedLinears(model))
        return made[-1]

    monkeypatch.setattr("nanogspo.rollout.FusedLinears", counted)
    settings = {"max_new_tokens": 4, "seed": 1, "max_rows": 1}
    before = generate(model, PROMPTS, **settings)
    assert len(made) == 1 and len(PROMPTS) > 1
    for p in model.parameters():
        p.data.mul_(-1.3)
    after = generate(model, PROMPTS, **settings)
    monkeypatch.setattr("nanogspo.rollout.FusedLinears", FusedLinears)
    assert generate(model, PROMPTS, **settings) == after != before


def test_no_copies_where_they_do_not_fit(monkeypatch):
    """The planner says so; adapters are fused all the same."""
    only(monkeypatch, "prepacked")
    model = tiny("qwen3")
    add_lora(model, r=2, alpha=4.0)
    model.prepack = False
    fused = FusedLinears(model)
    assert fused._head is None and {type(f) for f in fused._fused.values()} == {FusedAdapters}


def test_every_linear_layer_is_in_one_group():
    model = tiny("qwen3")
    found = [f"{type(module).__name__}.{name}" for module, names in groups(model) for name in names]
    assert len(found) == 7 * model.config.num_layers and len(set(found)) == 7


@pytest.mark.isa
@MODES
@DTYPES
@given(
    seed=SEEDS,
    ranks=st.lists(st.sampled_from([0, 0, 1, 4]), min_size=1, max_size=3),  # 0: a layer without an adapter
    kinds=st.lists(st.sampled_from([None, None, "nf4", "int8"]), min_size=3, max_size=3),
    merged=st.sampled_from([None, 0, 1, 2]),
    rows=st.sampled_from([(1,), (1, 5), (2, 3)]),
    bias=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_fused_layers_are_what_each_is(mode, dtype, seed, ranks, kinds, merged, rows, bias):
    """Layers of one x, some with an adapter, one perhaps merged, against their sum in float64."""
    layers = []
    for i, (r, kind) in enumerate(zip(ranks, kinds, strict=False)):
        layer, _ = drawn_layer(seed + i, dtype, kind, max(r, 1), (16, (5, 8, 33)[i]), bias[i])
        layers.append(layer if r else layer.base)
        if r and i == merged and kind is None:
            layer.base.weight.data, layer.merged = layer.merged_weight(), True
    x = torch.randn(*rows, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        kind = only(patched, mode)
        left = [isinstance(layer, LoRALinear) and not layer.merged for layer in layers]
        separate, fused = [layer(x) for layer in layers], fuse(layers, dtype)
        plain = not any(kinds[: len(ranks)]) and (mode == "concatenated" or can_prepack(torch.ones(1, 1, dtype=dtype)))
        assert type(fused) is (kind if plain and mode != "adapters" else FusedAdapters if any(left) else type(None))
        outs = fused.linear(x) if fused else []
        for layer, adapted, y, got in zip(layers, left, separate, outs, strict=bool(fused)):
            base = layer.base if isinstance(layer, LoRALinear) else layer
            want, size = base(x).double(), base(x).double().abs()
            if kind is not FusedAdapters and plain:
                b = 0 if base.bias is None else base.bias.double()
                want = x.double() @ base.weight.double().T + b
                size = x.double().abs() @ base.weight.double().abs().T + abs(b)
            if adapted:
                A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double() * layer.scale
                want, size = want + x.double() @ A.T @ B.T, size + x.double().abs() @ A.abs().T @ B.abs().T
            eps = torch.finfo(dtype).eps
            # bf16: y, u, A and s B are rounded by half an eps each, y twice; fp32: the order of 16 + 4 sums besides
            assert got.dtype == dtype and got.shape == y.shape and not got.requires_grad
            assert ((got.double() - want).abs() <= (20 if eps < 1e-6 else 2.6) * eps * size).all()


@DTYPES
def test_concatenated_weights_are_stored_once(dtype):
    """They become views of one tensor, with the bits they had; a second time nothing moves, and an update of a layer is
    an update of the whole."""
    g = torch.Generator().manual_seed(0)
    layers = [torch.nn.Linear(6, out, bias=out == 3).to(dtype) for out in (4, 3, 5)]
    before = [layer.weight.detach().clone() for layer in layers]
    x = torch.randn(2, 6, generator=g).to(dtype)
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(fused_linear, "can_prepack", lambda weight: False)
        patched.setattr(fused_linear, "can_concatenate", lambda weight: True)
        first = fuse(layers, dtype)
        assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True))
        places = [layer.weight.data_ptr() for layer in layers]
        assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
        second = fuse(layers, dtype)
        assert places == [layer.weight.data_ptr() for layer in layers]
        assert second._weight.data_ptr() == first._weight.data_ptr() == places[0]
        layers[1].weight.mul_(2)
        want = [torch.nn.functional.linear(x, layer.weight, layer.bias) for layer in layers]
        for got, y in zip(first.linear(x), want, strict=True):
            torch.testing.assert_close(got, y, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        swapped = fuse(layers[::-1], dtype)  # adjacent, but not in this order
        for got, y in zip(swapped.linear(x), want[::-1], strict=True):
            torch.testing.assert_close(got, y, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
