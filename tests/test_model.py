"""nanogspo/model.py and cache.py against transformers, and against laws of the arithmetic itself.

Run: python -m pytest tests/test_model.py       HYPOTHESIS_PROFILE=deep for more cases
"""

import dataclasses
import functools
import math
from unittest.mock import patch

import pytest
import references
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernels.attention import Segments
from kernels.backend import bf16_products
from kernels.blocked import Blocked, can_block
from kernels.rope import rotate
from nanogspo import checkpoint, tiny
from nanogspo import model as model_file
from nanogspo.cache import KVCache
from nanogspo.families import GELU_TANH, ModelConfig, model_config
from nanogspo.lora import ALL_LINEAR, Adapters, add_lora, lora_layers
from nanogspo.model import Projections, RMSNorm, Transformer, attend, inverse_frequencies
from nanogspo.quant import pack as pack_weight
from nanogspo.storage.names import SKIP

EPS = torch.finfo(torch.float32).eps
NAMES = references.NAMES


@functools.cache
def ours(name: str) -> Transformer:
    """Our model on the reference's weights, fp32."""
    return checkpoint.load(references.folder(name), dtype=torch.float32)


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


@pytest.mark.isa
@pytest.mark.skipif(not can_block(torch.ones(1, 1, dtype=torch.bfloat16)), reason="no bf16 in oneDNN here")
@pytest.mark.parametrize("name", ["gemma2", "llama", "qwen3", "qwen2"])
def test_weights_in_blocks_give_the_same_model(name):
    """bf16 layers, an fp32 head: sums of 64 products in another order, rounded by 2^-9 now and then to the other side.
    The copies are made once, read by all products without gradients,
    and gone afterwards, even after an exception: kept, they would be stale after the next update."""
    model = checkpoint.load(references.folder(name), dtype=torch.bfloat16)
    tokens = references.tokens(1, 12)  # (1, T)
    blocked, linear = [], Blocked.linear
    with torch.no_grad(), patch.object(Blocked, "linear", lambda b, x: blocked.append(b) or linear(b, x)):
        want = model.logits(model(tokens))  # (1, T, V)
        assert not blocked
        with model.sampling():
            got = model.logits(model(tokens))  # (1, T, V)
            assert len({*map(id, blocked)}) == len(blocked) == 4 * model.config.num_layers + 1
            with torch.enable_grad():
                assert model.logits(model(tokens)).requires_grad and len(blocked) == 4 * model.config.num_layers + 1
        assert got.dtype == torch.float32 and (got - want).abs().max() <= 0.05 * want.abs().max()
        with pytest.raises(RuntimeError, match="inside"), model.sampling():
            raise RuntimeError("inside")
        blocked.clear()
        assert torch.equal(model.logits(model(tokens)), want) and not blocked
    assert not any("block" in key for key in model.state_dict())


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj", "up_proj", "down_proj")])
def test_adapters_are_sampled_with(targets, blocks, monkeypatch):
    """In blocks as beside them: on all layers of one x or on some, one of them merged, one over packed weights. The
    adapters move the hidden states thirty times as far as bf16 rounds them."""
    if not blocks:
        monkeypatch.setattr("nanogspo.model.can_block", lambda weight: False)
    elif not can_block(torch.ones(1, 1, dtype=torch.bfloat16)):
        pytest.skip("no bf16 in oneDNN here")
    model = checkpoint.load(references.folder("qwen3"), dtype=torch.bfloat16)
    tokens = references.tokens(1, 12)  # (1, T)
    with torch.no_grad():
        mlp = model.layers[1].mlp
        mlp.up_proj = pack_weight(mlp.up_proj.weight.data, None, "int8")  # beside a plain gate_proj
        base = model(tokens).float()  # (1, T, C)
        add_lora(model, r=4, alpha=8.0, targets=targets)
        g = torch.Generator().manual_seed(0)
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(generator=g).mul_(0.3)
        merged = model.layers[0].self_attn.v_proj
        merged.base.weight.data, merged.merged = merged.merged_weight(), True
        want = model(tokens).float()
        with model.sampling():
            groups = [group for m in model.modules() if isinstance(m, Projections) for group in m._together.values()]
            got = model(tokens).float()
    L, kinds = model.config.num_layers, [type(group) for group in groups]
    if blocks:
        assert kinds.count(Blocked) == 4 * L - 1 and kinds.count(Adapters) == 1  # gate and up of layer 1
    else:
        assert kinds == [Adapters] * (4 * L if targets == ALL_LINEAR else 3 * L)  # o_proj has none
    assert not any(m._together for m in model.modules() if isinstance(m, Projections))
    moved = (want - base).norm() / want.norm()
    assert (got - want).norm() / want.norm() < min(0.03, moved / 10), (moved, (got - want).norm() / want.norm())


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
    "attn_softcap": 0.5,
    "final_softcap": 1.0,
}
SHAPES = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
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
    assert fields == FLIPS.keys() | SHAPES | NOT_ARITHMETIC | IN_OTHER_TESTS


@pytest.mark.parametrize("flag", FLIPS)
def test_every_flag_moves_the_logits(flag):
    tokens = references.tokens(1, 12) % 11
    off, on = perturbed(small()), perturbed(small(**{flag: FLIPS[flag]}))
    assert (logits(off, tokens) - logits(on, tokens)).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# parts


@st.composite
def attention_inputs(draw):
    """Sizes include 1, a prime, and groups of one query head and of all of them."""
    B, T = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 7, 13]))
    K, groups, D = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([2, 4, 6]))
    causal = draw(st.booleans())
    S = T if causal else draw(st.sampled_from([1, 5, 13]))
    g = torch.Generator().manual_seed(draw(SEEDS))
    q = torch.randn(B, T, K * groups, D, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 4.0]))
    k, v = (torch.randn(B, S, K, D, generator=g, dtype=torch.float64) for _ in range(2))
    mask = None if causal else torch.rand(B, 1, T, S, generator=g) < 0.6  # (B, 1, T, S)
    if mask is not None:
        mask[..., 0] = True  # every query may look somewhere
    return q, k, v, mask, draw(st.sampled_from([0.0, 0.5, 5.0, 50.0]))


def attend_oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """One row, one query, one head at a time, float64."""
    B, T, H, _ = q.shape
    out = torch.zeros(B, T, H, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv = h // (H // k.shape[2])
                seen = torch.arange(k.shape[1]) <= t if mask is None else mask[b, 0, t]  # (S,)
                scores = (k[b, seen, kv] @ q[b, t, h]) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores - scores.max())
                out[b, t, h] = (weights[:, None] * v[b, seen, kv]).sum(0) / weights.sum()
    return out


@given(attention_inputs())
def test_attend_matches_float64(case):
    q, k, v, mask, softcap = case
    scale = 0.3
    got = attend(q.float(), k.float(), v.float(), mask, scale, softcap).double()  # (B, T, H, D)
    # a score is D products, off by D eps of its largest possible value; softmax multiplies weights by exp of that, and
    # the sum over S keys adds S eps; the inputs' own rounding counts twice
    largest = q.abs().amax() * k.abs().amax() * scale * q.shape[-1]
    bound = EPS * (4 * q.shape[-1] * largest + 2 * k.shape[1] + 16) * v.abs().amax()
    assert (got - attend_oracle(q, k, v, mask, scale, softcap)).abs().max() <= bound


@given(attention_inputs())
def test_attend_gradients_match_float64(case):
    q, k, v, mask, softcap = case
    direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # (B, T, H, D)
    wide = [x.clone().requires_grad_() for x in (q, k, v)]
    narrow = [x.float().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad((attend_oracle_autograd(*wide, mask, 0.3, softcap) * direction).sum(), wide)
    got = torch.autograd.grad((attend(*narrow, mask, 0.3, softcap) * direction.float()).sum(), narrow)
    for ours_, truth in zip(got, want, strict=True):
        # the largest entry of any of the three sets the scale: dq is small where dv is not, and shares its rounding
        scale = max(1.0, *(g.abs().max().item() for g in want)) * max(1.0, q.abs().max().item() * k.abs().max().item())
        assert (ours_.double() - truth).abs().max() <= 200 * EPS * scale


def attend_oracle_autograd(q, k, v, mask, scale, softcap):
    """The oracle above as one expression, so that autograd can follow it."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x[:, :, torch.arange(q.shape[2]) // groups] for x in (k, v))  # (B, S, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale  # (B, H, T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.arange(k.shape[1]) <= torch.arange(q.shape[1])[:, None]  # (T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)  # (B, H, T, S)
    return torch.einsum("bhts,bshd->bthd", weights, v)


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


class RopeConfig:
    """What transformers' RoPE functions read of a config."""

    def __init__(self, rope: dict, D: int):
        self.rope_parameters, self.head_dim, self.max_position_embeddings = rope, D, 4096
        self.hidden_size, self.num_attention_heads = D, 1

    def standardize_rope_params(self):
        pass


@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    D=st.sampled_from([4, 6, 64, 128]),
    theta=st.sampled_from([1e3, 1e4, 5e5, 1e6]),
    factor=st.sampled_from([1.0, 2.0, 4.0, 32.0]),
    old=st.sampled_from([64, 2048, 32768]),
    extra=st.sampled_from(
        [{}, {"attention_factor": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"beta_fast": 16.0, "truncate": False}]
    ),
)
def test_stretched_frequencies_are_those_of_transformers(kind, D, theta, factor, old, extra):
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": old,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, **(extra if kind == "yarn" else {})}  # fmt: skip
    want, want_magnitude = ROPE_INIT_FUNCTIONS[kind](RopeConfig(rope, D), "cpu")
    got, magnitude = inverse_frequencies(rope, D)
    # a quotient, a ramp and a blend: a few roundings each, in another order
    torch.testing.assert_close(got, want, rtol=16 * EPS, atol=0)
    assert got.dtype == torch.float32 and magnitude == pytest.approx(want_magnitude, rel=1e-12)


@given(D=st.sampled_from([2, 6, 128]), theta=st.sampled_from([1e2, 1e4, 1e6]))
def test_plain_frequencies(D, theta):
    f, magnitude = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, D)
    want = torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    # the exponent is rounded to fp32, and theta ** x turns eps into ln(theta) eps
    torch.testing.assert_close(f.double(), want, rtol=(2 + math.log(theta)) * EPS, atol=0)
    assert f[0] == 1.0 and magnitude == 1.0


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
