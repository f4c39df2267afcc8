"""nanogspo/layouts.py: dense attention against float64, and what each layout asks of its arguments.

That packed rows and caches see what dense rows see: tests/test_model.py.

Run: python -m pytest tests/test_layouts.py
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import Segments
from nanogspo import layouts
from nanogspo.cache import KVCache
from nanogspo.families import model_config
from nanogspo.layouts import attend, choose
from tests.strategies import SEEDS

EPS = torch.finfo(torch.float32).eps
CONFIG = model_config({
    "model_type": "qwen3", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
})  # fmt: skip
SETTINGS = {"scale": 0.3, "softcap": None}


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


@pytest.mark.parametrize("window", [0, 1, 3, 5, 6, 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dense_rows_see_what_a_packed_row_sees(window, softcap):
    """Windows below, at and above the 6 tokens of the row, plain and written out; the two are different code."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, heads, 8, generator=g) for heads in (4, 2, 2))
    settings = {"scale": 0.3, "softcap": softcap, "window": window}
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    dense, packed = choose(tokens, None, None), choose(tokens, Segments.build([6]), None)
    assert torch.equal(dense.positions, packed.positions)
    want = packed.attend(0, q, k, v, **settings)
    # sums of 8 products and of at most 6 weights, in another order
    assert (dense.attend(0, q, k, v, **settings) - want).abs().max() <= 64 * EPS * v.abs().max()


def test_positions_are_those_of_the_layout():
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    segments = Segments.build([2, 2, 1], [-1, 0, -1])  # an answer goes on where its prompt ends
    assert choose(tokens.expand(3, 5), None, None).positions.tolist() == [[0, 1, 2, 3, 4]]
    assert choose(tokens, segments, None).positions.tolist() == [[0, 1, 2, 3, 0]]
    with torch.no_grad():
        cache = KVCache(CONFIG, Segments.build([2, 3]), 2, 2, dtype=torch.float32)
        assert choose(tokens, Segments.build([2, 3]), cache).positions.tolist() == [[0, 1, 0, 1, 2]]
        assert cache.extent == 0  # a prefill takes none of the rows' slots
        assert choose(tokens[:, :4], None, cache).positions.tolist() == [[2, 2, 3, 3]]


def test_a_packed_row_hands_its_gradient_back_without_a_copy():
    """x[0] has a backward that writes zeros and copies: 11 GB for 16k tokens of Qwen3-0.6B."""
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = choose(torch.zeros(1, 4), Segments.build([4]), None).attend(0, q, k, v, **SETTINGS, window=0)
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.add(type(node).__name__)
        nodes += [after for after, _ in node.next_functions if after is not None]
    assert "SelectBackward0" not in seen and "SqueezeBackward1" in seen


def test_one_row_where_rows_are_packed_and_no_gradients_where_keys_are_kept():
    tokens, segments = torch.zeros(2, 3, dtype=torch.int64), Segments.build([3])
    cache = KVCache(CONFIG, segments, 1, 2, dtype=torch.float32)
    for given_segments, given_cache in ((segments, None), (None, cache), (segments, cache)):
        with torch.no_grad(), pytest.raises(ValueError, match="got 2 rows with segments or a cache, want one packed"):
            choose(tokens, given_segments, given_cache)
    with pytest.raises(ValueError, match="got a cache and gradients, want one of them"):
        choose(tokens[:1], segments, cache)
    with torch.no_grad():
        kinds = [
            choose(tokens[:1], a, b) for a, b in ((None, None), (segments, None), (segments, cache), (None, cache))
        ]
    assert [type(kind) for kind in kinds] == [layouts.Dense, layouts.Packed, layouts.Prefill, layouts.Decode]
