"""nanogspo/model.py and cache.py against transformers, and against laws of the arithmetic itself.

Run: python -m pytest tests/test_model.py       HYPOTHESIS_PROFILE=deep for more cases
"""

import dataclasses
import math

import pytest
import references
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor, nn

from kernels.attention import Segments
from kernels.backend import bf16_products
from kernels.rope import rotate
from nanogspo import checkpoint, tiny
from nanogspo import model as model_file
from nanogspo.cache import KVCache
from nanogspo.families import GELU_TANH, ModelConfig, model_config
from nanogspo.layers.rope import inverse_frequencies
from nanogspo.model import RMSNorm, Transformer
from nanogspo.storage.names import SKIP

EPS = torch.finfo(torch.float32).eps
NAMES, ours = references.NAMES, references.ours


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))  # (B, T, V)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    """70 positions: past the window of 8 and past the 64 that RoPE variants are stretched from.

    The same operations in the same order on the same kernels, so the same bits. If a new torch picks another kernel for
    one side, 1e-5 is the bar: 4 eps of logits around 5, times a handful of layers.
    """
    tokens = references.tokens(3, 70)  # (B, T)
    with torch.no_grad():
        want = references.reference(name)(input_ids=tokens).logits  # (B, T, V)
    got = logits(ours(name), tokens)
    assert (got - want).abs().max() <= 1e-5
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen2_sliding"])
def test_a_window_bites_from_the_first_row_that_is_longer(name):
    """Rows of 7 to 10 tokens under a window of 8: up to 8 no mask is made."""
    for T in (7, 8, 9, 10):
        tokens = references.tokens(2, T)  # (B, T)
        with torch.no_grad():
            want = references.reference(name)(input_ids=tokens).logits  # (B, T, V)
        assert (logits(ours(name), tokens) - want).abs().max() <= 1e-5


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name):
    tokens = references.tokens(2, 20)
    direction = torch.randn(2, 20, references.VOCABULARY, generator=torch.Generator().manual_seed(1))  # (B, T, V)
    model, reference = ours(name), references.reference(name)
    named = [(n, p) for n, p in reference.named_parameters() if not SKIP.search(n)]
    want = torch.autograd.grad((reference(input_ids=tokens).logits * direction).sum(), [p for _, p in named])
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad((model.logits(model(tokens)) * direction).sum(), list(parameters.values()))
    got = dict(zip(parameters, got, strict=True))
    assert {checkpoint.our_name(n) for n, _ in named} == set(got)
    for (n, _), theirs in zip(named, want, strict=True):
        assert theirs.abs().max() > 0, f"{n}: the reference cannot see this parameter"
        # sums over 40 positions in another order: a few eps of the largest entry
        assert (got[checkpoint.our_name(n)] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), n


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_bf16_hidden_states_are_those_of_transformers(name):
    """bf16 is where the rounding order shows: of the norms, the embedding scale, cos and sin, the softmax.

    transformers rounds its logits to bf16 (and Gemma 2's soft-cap after each of its three steps); ours stay fp32.
    Rounded as theirs are, they are equal but for ties of the last bit: mean <= 1e-3, where a bf16 ulp at 4 is 0.03.
    """
    tokens = references.tokens(2, 40)
    model = checkpoint.load(references.folder(name), dtype=torch.bfloat16)
    reference = references.open_reference(references.folder(name), name, torch.bfloat16)
    with torch.no_grad():
        want = reference(input_ids=tokens, output_hidden_states=True)
        hidden = model(tokens)  # (B, T, C)
        got = model.logits(hidden)  # (B, T, V)
    assert got.dtype == torch.float32 and want.logits.dtype == hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, want.hidden_states[-1])
    rounded = got.bfloat16()  # (B, T, V)
    if cap := model.config.final_softcap:
        # every rounding of theirs is needed here; that our one is right is test_logits_are_fp32_sums_whatever_the_slice
        rounded = torch.tanh(F.linear(hidden, model.head_weight) / cap) * cap
    assert (rounded - want.logits).abs().float().mean() <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_is_the_full_forward(name):
    """Prompts of 40, 23 and 1 tokens prefilled as one packed row, then two rows for each, 30 single steps.

    Other kernels (pieces instead of is_causal, one query row instead of many), so not the same bits: 1e-5 is again
    4 eps of logits around 5 over a few layers.
    """
    model, steps, lengths = ours(name), 30, [40, 23, 1]
    tokens = references.tokens(6, 70)  # (N, T) rows of one prompt begin alike
    for first, n in zip((0, 2, 4), lengths, strict=True):
        tokens[first + 1, :n] = tokens[first, :n]
    prompts = Segments.build(lengths)
    packed = torch.cat([tokens[2 * p, :n] for p, n in enumerate(lengths)])[None]  # (1, S)
    starts = torch.tensor(lengths).repeat_interleave(2)  # (N,)
    with torch.no_grad():
        cache = KVCache(model.config, prompts, 2, steps, dtype=torch.float32)
        first = model.logits(model(packed, segments=prompts, cache=cache))[0].split(lengths)  # (n, V) each
        hidden = []
        for step in range(steps):
            column = tokens.gather(1, (starts + step)[:, None])  # (N, 1)
            hidden.append(model(column.T, cache=cache)[0])  # (N, C)
        decoded = model.logits(torch.stack(hidden, 1))  # (N, steps, V)
        full = model.logits(model(tokens))  # (N, T, V)
    assert cache.lengths.tolist() == [steps] * 6 and cache.extent == steps
    for row, n in enumerate(starts.tolist()):
        assert (first[row // 2] - full[row, :n]).abs().max() <= 1e-5
        assert (decoded[row] - full[row, n : n + steps]).abs().max() <= 1e-5


@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_row_is_its_sequences_one_by_one(name):
    """Two answers to a prompt of 30 tokens, a prompt of 3 with one answer, and a sequence alone. With a window of 8 the
    answers of 12 and 17 leave the long prompt behind, the answer of 4 never leaves the short one.

    Other kernels, and attention in pieces: 1e-5 is again 4 eps of logits around 5 over a few layers.
    """
    model, tokens = ours(name), references.tokens(1, 91)[0]  # (T,)
    prompt, a, b, short, c, alone = tokens.split([30, 12, 17, 3, 4, 25])
    segments = Segments.build([30, 12, 17, 3, 4, 25], [-1, 0, 0, -1, 3, -1])
    with torch.no_grad():
        packed = model(tokens[None], segments=segments)  # (1, T, C)
        got = model.logits(packed)[0].split(segments.lengths)  # (tokens of a segment, V) each
        for before, own, where in ((prompt, a, 1), (prompt, b, 2), (short, c, 4), (alone[:0], alone, 5)):
            want = logits(model, torch.cat((before, own))[None])[0]  # (tokens of both, V)
            assert (got[where] - want[len(before) :]).abs().max() <= 1e-5
            if len(before):
                assert (got[where - 1 if where != 2 else 0] - want[: len(before)]).abs().max() <= 1e-5


def test_a_cache_keeps_no_graph():
    model, segments = ours("llama"), Segments.build([4])
    cache = KVCache(model.config, segments, 1, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="got a cache and gradients, want one of them"):
        model(references.tokens(1, 4), segments=segments, cache=cache)


def test_packed_tokens_are_one_row():
    model, tokens, segments = ours("llama"), references.tokens(2, 6), Segments.build([4, 2])
    cache = KVCache(model.config, segments, 1, 8, dtype=torch.float32)
    for arguments in ({"segments": segments}, {"cache": cache}, {"segments": segments, "cache": cache}):
        with pytest.raises(ValueError, match="got 2 rows with segments or a cache, want one packed row"):
            model(tokens, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# laws of the whole model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@given(length=st.sampled_from([1, 2, 8, 9, 19]), junk=SEEDS)
def test_what_stands_behind_a_row_cannot_reach_it(name, length, junk):
    """Right padding needs no mask: the same shape with other ids after `length` gives the same bits before it."""
    tokens = references.tokens(2, 20)
    other = tokens.clone()
    other[:, length:] = references.tokens(2, 20 - length, junk)
    assert torch.equal(logits(ours(name), tokens)[:, :length], logits(ours(name), other)[:, :length])


@given(W=st.integers(1, 6), at=st.integers(0, 11), layers=st.integers(1, 2))
def test_a_sliding_layer_reaches_window_minus_one_back(W, at, layers):
    """The window counts the query itself: a token moves positions from its own to layers * (W - 1) later, no other."""
    config = small(layer_types=("sliding",) * layers, num_layers=layers, sliding_window=W)
    model, tokens = perturbed(config), references.tokens(1, 12) % 11
    other = tokens.clone()
    other[0, at] = (other[0, at] + 1) % 11
    with torch.no_grad():
        moved = (model(tokens) - model(other)).abs().amax(-1)[0] > 0  # (T,)
    assert moved.nonzero().squeeze(1).tolist() == list(range(at, min(12, at + layers * (W - 1) + 1)))


def test_positions_may_start_anywhere():
    """RoPE is relative: shifting every position of a row moves nothing but the last bits."""
    model, tokens = ours("qwen3"), references.tokens(2, 20)
    with torch.no_grad():
        shifted = model(tokens, positions=torch.arange(20).expand(2, 20) + 100)
        # angles around 100 rad carry 1e-5 of rounding; through three layers
        assert (shifted - model(tokens)).abs().max() <= 1e-3
        stretched = model(tokens, positions=2 * torch.arange(20).expand(2, 20))
        assert (stretched - model(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama_biases", "qwen3", "gemma2", "gemma3"])
def test_gradient_checkpointing_gives_the_same_bits(name):
    model, tokens = checkpoint.load(references.folder(name), dtype=torch.float32), references.tokens(2, 20)
    runs = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        loss = model.logits(model(tokens)).square().mean()
        loss.backward()
        runs.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, gradients), (loss_again, again) = runs
    assert torch.equal(loss, loss_again) and all(map(torch.equal, gradients, again))


def test_gradient_checkpointing_recomputes_the_blocks():
    """Otherwise the test above would pass on a flag that does nothing."""
    model, tokens, calls = ours("qwen3"), references.tokens(1, 5), []
    hook = model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        model.gradient_checkpointing = True
        model(tokens).sum().backward()
    finally:
        model.gradient_checkpointing = False
        model.zero_grad(set_to_none=True)
        hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "llama", "qwen3"])
def test_logits_are_fp32_sums_whatever_the_slice(name, dtype, monkeypatch):
    """Against float64; in slices of 7 rows of the head (97 is no multiple) and position by position."""
    model = checkpoint.load(references.folder(name), dtype=dtype)
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)  # (B, T, C)
    weight = model.head_weight
    with torch.no_grad():
        whole = model.logits(hidden)  # (B, T, V)
        z = hidden.double() @ weight.double().T  # (B, T, V)
        cap = model.config.final_softcap
        want = cap * torch.tanh(z / cap) if cap else z
        # C products are summed in fp32: at most C eps of sum |h w|; tanh and its scaling add a few eps of the cap
        bound = EPS * (64 * (hidden.double().abs() @ weight.double().abs().T) + 4 * cap)
        assert whole.dtype == torch.float32 and ((whole - want).abs() <= bound).all()
        monkeypatch.setattr(model_file, "HEAD_ROWS", 7)
        assert ((model.logits(hidden) - want).abs() <= bound).all()
        assert ((model.logits(hidden[1, 3]) - want[1, 3]).abs() <= bound[1, 3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_bf16_operands_are_multiplied_as_bf16(dtype, monkeypatch):
    """fp16 numbers have three bits more than bf16 has, fp32 ones sixteen: such products would be off by 4e-3."""
    model = checkpoint.load(references.folder("llama"), dtype=dtype)
    setting, seen, linear = torch.backends.mkldnn.matmul, [], F.linear
    spy = lambda x, w: seen.append(setting.fp32_precision) or linear(x, w)  # noqa: E731
    monkeypatch.setattr(model_file.F, "linear", spy)
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)).to(dtype)  # (n, C)
    with torch.no_grad(), bf16_products(False):
        setting.fp32_precision = "ieee"  # until the end of the block
        model.logits(hidden)
        model.logits(hidden.float())  # a bf16 head under fp32 hidden states: not bf16 operands
    assert seen == ["bf16" if dtype == torch.bfloat16 else "ieee", "ieee"]


# ---------------------------------------------------------------------------------------------------------------------
# no dead flags


def small(**changes) -> ModelConfig:
    """Every switch off. sliding_window 3 of 12 positions acts as soon as a layer is "sliding"."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    config = ModelConfig(
        family="llama", vocab_size=11, hidden_size=12, intermediate_size=20, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, layer_types=("full", "full"), rope={"full": rope, "sliding": rope}, rotary_dim=8,
        attn_scale=8**-0.5, sliding_window=3, norm_eps=1e-6,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def perturbed(config: ModelConfig) -> Transformer:
    """Random weights that depend on a parameter's name alone, so that two configs differ in one flag only."""
    model = Transformer(config)
    for name, p in model.named_parameters():
        g = torch.Generator().manual_seed(sum(name.encode()) * 31 + len(name))
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.4 + (p.ndim == 1))
    return model


LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
FLIPS = {
    "layer_types": ("full", "sliding"),
    "rope": {"full": LINEAR},
    "rotary_dim": 4,
    "attn_scale": 0.1,
    "norm_eps": 0.1,
    "activation": GELU_TANH,
    "tied": True,
    "norm_plus_one": True,
    "post_norms": True,
    "qk_norm": True,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "scale_embedding": True,
    "gated_attention": True,
    "attn_softcap": 0.5,
    "final_softcap": 1.0,
}
EXPERTS = {"moe_layers": (True, True), "num_experts": 5, "experts_per_token": 2, "expert_size": 6}
DELTA_NET = {
    "conv_width": 3,
    "linear_key_heads": 2,
    "linear_value_heads": 4,
    "linear_key_dim": 4,
    "linear_value_dim": 6,
}
FLIPS_OF = {  # flags of models that have these settings besides
    "moe_layers": (EXPERTS, (True, False)),
    "experts_per_token": (EXPERTS, 3),
    "shared_expert_size": (EXPERTS, 6),
    "norm_topk": (EXPERTS, True),
    "layer_types": (DELTA_NET, ("full", "linear")),
}
SHAPES = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
SHAPES |= {"num_experts", "expert_size", *DELTA_NET}
NOT_ARITHMETIC = {
    "family",
    "max_positions",
    "eos_ids",
    "module_prefix",
    "unread",
    "source",
}  # names, limits and what to stop at
IN_OTHER_TESTS = {"sliding_window"}  # test_a_sliding_layer_reaches_window_minus_one_back


def test_every_field_is_a_shape_a_flag_or_no_arithmetic():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == FLIPS.keys() | FLIPS_OF.keys() | SHAPES | NOT_ARITHMETIC | IN_OTHER_TESTS


@pytest.mark.parametrize("flag", FLIPS)
def test_every_flag_moves_the_logits(flag):
    tokens = references.tokens(1, 12) % 11
    off, on = perturbed(small()), perturbed(small(**{flag: FLIPS[flag]}))
    assert (logits(off, tokens) - logits(on, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("flag", FLIPS_OF)
def test_every_flag_of_experts_and_delta_net_moves_the_logits(flag):
    tokens, (besides, value) = references.tokens(1, 12) % 11, FLIPS_OF[flag]
    off, on = perturbed(small(**besides)), perturbed(small(**besides | {flag: value}))
    assert (logits(off, tokens) - logits(on, tokens)).abs().max() > 1e-3


def angles(positions: Tensor, D: int) -> tuple[Tensor, Tensor]:
    f, _ = inverse_frequencies({"rope_type": "default", "rope_theta": 100.0}, D)
    angle = (positions.double()[:, None] * f.double()).repeat(1, 2)[None, :, None]  # (1, T, 1, D)
    return angle.cos(), angle.sin()


@given(D=st.sampled_from([2, 4, 6, 32]), extra=st.sampled_from([0, 2, 5]), shift=st.integers(0, 1000), seed=SEEDS)
def test_rotation_keeps_norms_and_sees_only_distances(D, extra, shift, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 5, 3, D + extra, generator=g, dtype=torch.float64) for _ in range(2))  # (1, T, heads, D)
    cos, sin = angles(torch.arange(5), D)
    turned = rotate(q, cos, sin)
    # float64 everywhere: 1e-12 is 4,500 eps, far above rounding and far below any real rotation
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(turned[..., D:], q[..., D:])  # channels past rotary_dim pass through
    assert torch.equal(turned[:, 0], q[:, 0])  # position 0 is not turned
    far_cos, far_sin = angles(torch.arange(5) + shift, D)
    near = torch.einsum("bthd,bshd->bhts", rotate(q, cos, sin), rotate(k, cos, sin))
    far = torch.einsum("bthd,bshd->bhts", rotate(q, far_cos, far_sin), rotate(k, far_cos, far_sin))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-9)  # angles of 1000 rad keep 1e-13 of themselves


def test_rotation_pairs_the_halves():
    """Channel i turns with channel i + D/2, counter-clockwise: (1, 0) at a right angle becomes (0, 1)."""
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)
    cos, sin = torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4)
    assert rotate(x, cos, sin).flatten().tolist() == [0, 0, 1, 2]


@given(
    width=st.sampled_from([1, 7, 64]), eps=st.sampled_from([1e-6, 1e-2]), plus_one=st.booleans(), seed=SEEDS,
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_norm_matches_float64_and_ignores_scale(width, eps, plus_one, seed, size):
    g = torch.Generator().manual_seed(seed)
    norm = RMSNorm(width, eps, plus_one)
    assert norm.weight.unique().tolist() == [0.0 if plus_one else 1.0]  # a fresh norm multiplies by one
    norm.weight.data.copy_(torch.randn(width, generator=g))
    x = torch.randn(3, width, generator=g) * size
    wide, weight = x.double(), norm.weight.detach().double() + plus_one
    want = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    # the mean of `width` squares, a root, three products
    torch.testing.assert_close(norm(x).detach().double(), want, rtol=(width + 8) * EPS, atol=1e-12)


def test_norm_rounding_orders_differ_in_bf16():
    """Llama rounds and then multiplies; Gemma multiplies by 1 + w in fp32 and rounds once."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    w = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 0.1
    llama, gemma = RMSNorm(32, 1e-6, False), RMSNorm(32, 1e-6, True)
    llama.weight = nn.Parameter((1 + w).bfloat16())
    gemma.weight = nn.Parameter(w.bfloat16())
    h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(llama(x), h.bfloat16() * llama.weight)
    assert torch.equal(gemma(x), (h * (1 + gemma.weight.float())).bfloat16())
    assert not torch.equal(llama(x), gemma(x))


def test_embedding_scale_is_rounded_first():
    """sqrt(2560) = 50.596; Gemma was trained with the 50.5 that bf16 makes of it."""
    config = small(hidden_size=2560, num_layers=0, layer_types=(), scale_embedding=True)
    model = perturbed(config).bfloat16()
    plain = perturbed(dataclasses.replace(config, scale_embedding=False)).bfloat16()
    model.norm = plain.norm = nn.Identity()
    tokens = torch.arange(11)[None]
    assert torch.equal(model(tokens), plain(tokens) * 50.5)


# ---------------------------------------------------------------------------------------------------------------------
# fresh weights


def test_fresh_weights_depend_on_the_seed_alone():
    config = model_config({**tiny.CONFIG, "vocab_size": 17})
    first, again, other = (Transformer(config).init_weights(seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_fresh_weights_have_the_promised_spread():
    config = dataclasses.replace(model_config({**tiny.CONFIG, "vocab_size": 17}), qkv_bias=True)
    model = Transformer(config).init_weights(0, std=0.1)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            assert p.unique().tolist() == [1.0]
        elif name.endswith(".bias"):
            assert p.abs().max() == 0
        else:
            want = 0.1 / math.sqrt(6) if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.1
            # the standard error of a standard deviation is want / sqrt(2 n); five of them
            assert p.std().item() == pytest.approx(want, rel=5 / math.sqrt(2 * p.numel())), name


def test_a_tied_model_has_one_matrix():
    tied, untied = ours("qwen3"), ours("llama")
    assert tied.head_weight is tied.embed_tokens.weight and not hasattr(tied, "lm_head")
    assert untied.head_weight is untied.lm_head.weight
