"""nanogspo/lora.py: equation, what is trained, what merging costs, and peft on the same matrices.

Run: python -m pytest tests/test_lora.py
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nanogspo.families import export_config, model_config
from nanogspo.lora import ALL_LINEAR, LoRALinear, add_lora, describe, lora_layers, merge_lora, unmerge_lora
from nanogspo.model import Transformer
from nanogspo.quant import dense_weight, quantize_linear
from tests.strategies import SEEDS

# 4 query heads on 2 key/value heads and an MLP wider than the model: no matrix is square, none has another's shape
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])  # (B, T)
TARGETS = st.lists(st.sampled_from(ALL_LINEAR), min_size=1, max_size=7, unique=True)
MANY_UNITS = {"rtol": 0, "atol": 1e-5}  # fp32 logits of size 1 after 2 layers of sums over 44 terms: 100 roundings


def tiny(seed=0, dtype=torch.float32, **changes):
    """A random model with biases and norms off their starting values."""
    model = Transformer(model_config({**QWEN3, **changes})).init_weights(seed, std=0.2)
    g = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    return model.to(dtype)


def trained_adapter(model, seed=0):
    """Give every B a value: a fresh adapter is 0 and would hide all mistakes."""
    g = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=g)
    return model


def logits(model, tokens=TOKENS):
    return model.logits(model(tokens)).detach()  # (B, T, V)


# ----------------------------------------------------------------------------
# the equation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=SEEDS, targets=TARGETS, r=st.sampled_from([1, 3, 16, 50]))
def test_starts_exactly_equal_to_its_base(dtype, seed, targets, r):
    model = tiny(seed % 1000, dtype)
    before = logits(model)
    add_lora(model, r=r, alpha=2 * r, targets=targets, seed=seed)
    assert torch.equal(logits(model), before)


@given(
    seed=SEEDS,
    r=st.sampled_from([1, 2, 7]),
    alpha=st.sampled_from([0.5, 16.0]),
    sizes=st.sampled_from([(1, 1), (5, 3), (8, 33)]),
    bias=st.booleans(),
)
def test_is_the_equation(seed, r, alpha, sizes, bias):
    """y = W x + b + alpha / r * B A x, multiplied out in float64."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(*sizes, bias=bias)
    layer = LoRALinear(base, r, alpha / r)
    for p in layer.parameters():
        p.data.normal_(generator=g)
    x = torch.randn(2, 3, sizes[0], generator=g)  # (B, T, in)
    W, A, B = (p.detach().double() for p in (base.weight, layer.lora_A.weight, layer.lora_B.weight))
    want = x.double() @ W.T + alpha / r * (x.double() @ (B @ A).T)  # (B, T, out)
    want += base.bias.detach().double() if bias else 0
    # fp32 sums of at most 8 + 7 products, each of size 10 at most and multiplied by 16: 2000 * 6e-8
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-5, atol=2e-4)


def drawn_layer(seed, dtype, kind, r, sizes, bias):
    """An adapter with values in A and B over a base that is plain, or packed in four or eight bits."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(*sizes, bias=bias)
    for p in base.parameters():
        p.data.normal_(generator=g)
    base = base.to(dtype).requires_grad_(False)
    layer = LoRALinear(quantize_linear(base.weight, base.bias, kind) if kind else base, r, scale=1.5)
    for p in (layer.lora_A.weight, layer.lora_B.weight):
        p.data.normal_(generator=g)
    return layer, g


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    seed=SEEDS, r=st.sampled_from([1, 3, 16]), sizes=st.sampled_from([(1, 1), (64, 5), (40, 96)]),
    shape=st.sampled_from([(3,), (2, 5), (1, 1), (17, 1)]), bias=st.booleans(), frozen=st.booleans(),
)  # fmt: skip
def test_gradients_are_those_of_the_plain_formula(dtype, kind, seed, r, sizes, shape, bias, frozen):
    """By autograd in float64, on the very numbers the layer has. A bf16 layer's dA and dB are fp32 sums of bf16 x and
    dy: they must be as good as fp32's. frozen: the first layer's input wants no gradient."""
    layer, g = drawn_layer(seed, dtype, kind, r, sizes, bias)
    x = torch.randn(*shape, sizes[0], generator=g).to(dtype).requires_grad_(not frozen)  # (..., in)
    dy = torch.randn(*shape, sizes[1], generator=g).to(dtype)  # (..., out)
    A, B = layer.lora_A.weight, layer.lora_B.weight
    y = layer(x)
    assert y.dtype == dtype and y.shape == dy.shape
    y.backward(dy)

    W, b = dense_weight(layer.base, dtype).double(), layer.base.bias.double() if bias else 0.0
    x_, A_, B_ = (p.detach().double().requires_grad_() for p in (x, A, B))
    (x_ @ W.T + b + layer.scale * (x_ @ A_.T) @ B_.T).backward(dy.double())

    # every gradient is a sum of products of sums: at most n + 16 (or out + 16) roundings of fp32 of the whole's size
    n, sums = dy[..., 0].numel(), torch.finfo(torch.float32).eps * (max(dy.shape[-1], x.shape[-1]) + 16)
    rows, dys, absolute = x_.detach().abs().reshape(n, -1), dy.double().abs().reshape(n, -1), layer.scale
    dh = dys @ B_.detach().abs() * absolute  # (n, r)
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert ((A.grad - A_.grad).abs() <= (sums + n * 1.2e-7) * (dh.T @ rows)).all()
    assert ((B.grad - B_.grad).abs() <= (sums + n * 1.2e-7) * (dys.T @ (rows @ A_.detach().abs().T)) * absolute).all()
    if frozen:
        assert x.grad is None
        return
    whole = (dys @ W.abs() + dh @ A_.detach().abs()).view(x.shape)
    # dy W is rounded to the layer's dtype and so is the sum: each by half a unit of its last place
    assert x.grad.dtype == dtype
    assert ((x.grad - x_.grad).abs() <= (sums + torch.finfo(dtype).eps * 1.01) * whole).all()


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_keeps_its_input_as_it_is_and_nothing_else(dtype, kind):
    """x itself, which the layers beside it keep too, and A and B: no copy in fp32, no unpacked W, no h."""
    layer, g = drawn_layer(0, dtype, kind, 3, (64, 40), bias=True)
    x, saved = torch.randn(2, 5, 64, generator=g).to(dtype).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, layer.lora_A.weight, layer.lora_B.weight)}
    y.sum().backward()  # a gradient that is one number expanded
    assert x.grad.isfinite().all() and layer.lora_A.weight.grad.abs().max() > 0


def test_default_scale_is_alpha_over_r_and_can_be_overruled():
    one, other = tiny(), tiny()
    add_lora(one, r=4, alpha=8)
    add_lora(other, r=4, alpha=8, scale=4.0)  # what rslora saves: alpha / sqrt(r)
    assert {layer.scale for layer in lora_layers(one).values()} == {2.0}
    assert {layer.scale for layer in lora_layers(other).values()} == {4.0}


def test_a_is_drawn_as_in_peft_and_from_the_seed():
    """Uniform, bound 1/sqrt(in): kaiming_uniform(a=sqrt(5)) of PEFT's reset_lora_parameters."""
    models = [tiny() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        add_lora(model, r=64, alpha=64, seed=seed)
    same, again, other = ([x.lora_A.weight for x in lora_layers(m).values()] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(same, other, strict=True))
    assert not torch.equal(same[0], same[1])  # q and k have one input width, but not one A
    for a in same:
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound
        # n >= 64 * 24 = 1536 uniform draws: none above 0.99 of the bound has probability 0.99^1536 = 2e-7;
        # their variance is bound^2 / 3, known to sqrt(4 / 5 / n) = 2.3 % (one standard deviation)
        assert a.abs().max() > 0.99 * bound
        assert a.var().item() == pytest.approx(bound**2 / 3, rel=0.15)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gemma2", "gemma3_text"])
def test_peft_with_the_same_matrices_gives_the_same_logits(family):
    """The model itself is the same code as in test_model.py; here only what the adapter adds may differ."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = tiny(model_type=family, query_pre_attn_scalar=8, sliding_window=4, pad_token_id=0)
    config = export_config(ours.config, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="sdpa" if "gemma2" not in family else "eager"
    ).eval()
    theirs.load_state_dict({f"model.{name}": p for name, p in ours.state_dict().items()}, strict=False)
    base_gap = (theirs(TOKENS).logits - logits(ours)).abs().max()
    add_lora(ours, r=3, alpha=12)
    trained_adapter(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=12, target_modules=list(ALL_LINEAR))).eval()
    for name, layer in lora_layers(ours).items():
        twin = theirs.get_submodule(f"base_model.model.model.{name}")
        twin.lora_A["default"].weight.data.copy_(layer.lora_A.weight)
        twin.lora_B["default"].weight.data.copy_(layer.lora_B.weight)
    with torch.no_grad():
        gap = (theirs(TOKENS).logits - logits(ours)).abs().max()
    assert base_gap <= 1e-5
    assert gap <= base_gap + 1e-6 * logits(ours).abs().max().clamp(min=1)  # 8 units in the last place of the logits


# ----------------------------------------------------------------------------
# what is trained


@given(targets=TARGETS, r=st.sampled_from([1, 4]))
def test_only_a_and_b_get_gradients(targets, r):
    model = tiny()
    touched = add_lora(model, r=r, alpha=8, targets=targets)
    trained_adapter(model)  # with B = 0 the gradient of A is 0
    model.logits(model(TOKENS)).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{name}.{part}.weight" for name in touched for part in ("lora_A", "lora_B")}
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in with_gradient)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == with_gradient


def test_touches_leaves_in_model_order_and_full_names_one_by_one():
    model = tiny()
    assert add_lora(model, r=2, alpha=2, targets=["up_proj", "q_proj"]) == [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ]
    model = tiny()
    assert add_lora(model, r=2, alpha=2, targets=["layers.1.mlp.up_proj"]) == ["layers.1.mlp.up_proj"]
    assert list(lora_layers(model)) == ["layers.1.mlp.up_proj"]
    model = tiny(num_hidden_layers=12)  # layers.1 is no prefix of layers.11
    assert add_lora(model, r=2, alpha=2, targets=["layers.1.mlp.up_proj"]) == ["layers.1.mlp.up_proj"]
    model = tiny()
    assert len(add_lora(model, r=2, alpha=2)) == 2 * 7


def test_a_target_that_matches_nothing_is_an_error_that_names_the_layers_there_are():
    model = tiny()
    for targets, unmatched in (
        (["q_proj", "query", "proj"], "'query', 'proj'"),
        ([], "none"),
        (["lm_head"], "lm_head"),
    ):
        with pytest.raises(ValueError, match="down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj") as error:
            add_lora(model, r=2, alpha=2, targets=targets)
        assert unmatched in str(error.value) and "\n" not in str(error.value)
    assert "'q_proj'" not in str(error.value)
    with pytest.raises(ValueError, match="rank 0.*--lora-r 0"):
        add_lora(model, r=0, alpha=2)
    # a refusal leaves the model as it was
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    add_lora(model, r=2, alpha=2)
    with pytest.raises(ValueError, match="already has a LoRA adapter"):
        add_lora(model, r=2, alpha=2)


def test_bf16_base_keeps_fp32_adapters():
    """GSPO moves A and B by 1e-6 to 1e-4 of themselves an update; bf16 would round that away."""
    model = tiny(dtype=torch.bfloat16)
    add_lora(model, r=4, alpha=8)
    trained_adapter(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = lora_layers(model)["layers.0.mlp.up_proj"]
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).bfloat16()  # (B, in)
    assert layer(x).dtype == torch.bfloat16
    # the update itself is multiplied in fp32 and rounded once, together with W x
    update = x.float() @ layer.lora_A.weight.T @ layer.lora_B.weight.T * layer.scale  # (B, out)
    assert torch.equal(layer(x), (layer.base(x).float() + update).bfloat16())


def test_dropout_only_while_training():
    model = tiny()
    add_lora(model, r=4, alpha=8, dropout=0.2)
    trained_adapter(model)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    plain = copy.deepcopy(model)
    for layer in lora_layers(plain).values():
        layer.dropout = 0.0
    assert torch.equal(logits(plain), logits(model))
    plain.train()
    assert torch.equal(logits(plain), logits(plain))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    # it is the adapter's input that is dropped, and nothing else
    layer, x = lora_layers(model)["layers.0.mlp.up_proj"], torch.ones(2, 24)  # (B, in)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    want = layer.base(x) + layer.lora_B(layer.lora_A(F.dropout(x, 0.2))) * layer.scale
    assert torch.equal(got, want)


# ----------------------------------------------------------------------------
# merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=SEEDS, targets=TARGETS)
def test_unmerge_puts_the_very_bits_back(dtype, seed, targets):
    model = tiny(seed % 1000, dtype)
    touched = add_lora(model, r=3, alpha=6, targets=targets)
    trained_adapter(model, seed)
    bits, unmerged = copy.deepcopy(model.state_dict()), logits(model)
    assert merge_lora(model) == touched
    once = copy.deepcopy(model.state_dict())
    merge_lora(model)  # twice is once
    assert all(torch.equal(once[name], p) for name, p in model.state_dict().items())
    assert {n for n in bits if not torch.equal(bits[n], once[n])} == {f"{name}.base.weight" for name in touched}
    merged = logits(model)
    assert unmerge_lora(model) == touched
    unmerge_lora(model)
    assert all(torch.equal(bits[name], p) for name, p in model.state_dict().items())
    assert torch.equal(logits(model), unmerged)
    if dtype == torch.float32:
        torch.testing.assert_close(merged, unmerged, **MANY_UNITS, msg="merged and unmerged logits differ")


def test_merged_weight_is_rounded_once():
    model = tiny(dtype=torch.bfloat16)
    add_lora(model, r=3, alpha=6)
    trained_adapter(model)
    for layer in lora_layers(model).values():
        exact = layer.base.weight.double() + 2.0 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        merged = layer.merged_weight()
        assert merged.dtype == torch.bfloat16
        # half a unit of an 8-bit mantissa, and the few fp32 roundings in front of it
        assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
        merge_lora(model)
        assert torch.equal(layer.merged_weight(), merged)  # asked again, it is not added again
        unmerge_lora(model)


# ----------------------------------------------------------------------------
# the table


def test_qwen3_06b_trains_ten_million_of_606():
    """The published shape of Qwen3-0.6B, on the meta device: no bytes are allocated."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    with torch.device("meta"):
        model = Transformer(model_config(config))
        base = sum(p.numel() for p in model.parameters())
        touched = add_lora(model, r=16, alpha=32)
    # by hand: r (in + out) for q 1024 -> 2048, k and v -> 1024, o 2048 -> 1024, gate and up 1024 -> 3072, down back
    by_hand = 28 * 16 * (1024 + 2048 + 2 * (1024 + 1024) + 2048 + 1024 + 2 * (1024 + 3072) + 3072 + 1024)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(touched) == 28 * 7
    assert (base, trained) == (596_049_920, by_hand) and by_hand == 10_092_544
    table = describe(model)
    assert table.splitlines()[-1] == "  trained 10,092,544 of 606,142,464 parameters (1.67 %)"


def test_the_table_counts_every_layer_once():
    model = tiny()
    add_lora(model, r=4, alpha=8, targets=["v_proj", "layers.1.mlp.down_proj"])
    *rows, last = describe(model).splitlines()
    v, down = (row.split() for row in rows)
    assert v[:7] == ["v_proj", "x", "2", "24", "->", "16", "r"]
    assert down[:7] == ["down_proj", "x", "1", "44", "->", "24", "r"]
    counts = [int(row.split()[-2].replace(",", "")) for row in rows]
    assert counts == [2 * 4 * (24 + 16), 4 * (44 + 24)]
    total = sum(p.numel() for p in model.parameters())
    assert last == f"  trained {sum(counts)} of {total:,} parameters ({100 * sum(counts) / total:.2f} %)"
