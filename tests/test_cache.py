"""nanogspo/cache.py: what is stored where, and for whom. What attention makes of it: tests/test_model.py.

Run: python -m pytest tests/test_cache.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import Segments
from nanogspo.cache import KVCache
from nanogspo.families import model_config
from tests.strategies import SEEDS

CONFIG = model_config({
    "model_type": "qwen3", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
})  # fmt: skip
WHOLE = {"scale": 8**-0.5, "softcap": None, "window": 0}


def filled(lengths, group_size, capacity, steps, seed, dtype=torch.float32):
    """A cache after its prefill and some steps; the k and v it was given, and the last q: (layer) -> tensors."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    cache = KVCache(CONFIG, Segments.build(lengths), group_size, capacity, dtype=dtype)
    prompts = [(draw(sum(lengths), 2, 8), draw(sum(lengths), 2, 8)) for _ in range(2)]
    for layer, (k, v) in enumerate(prompts):
        cache.prefill(layer, k, v)
    N, rows, out = len(lengths) * group_size, [([], []), ([], [])], None
    for _ in range(steps):
        cache.advance()
        for layer in range(2):
            q, k, v = draw(N, 4, 8), draw(N, 2, 8), draw(N, 2, 8)
            rows[layer][0].append(k)
            rows[layer][1].append(v)
            out = cache.attend(layer, q, k, v, **WHOLE)
    return cache, prompts, rows, (q, out) if steps else None


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    group_size=st.integers(1, 3),
    steps=st.integers(1, 4),
    seed=SEEDS,
)
def test_a_row_attends_to_its_prompt_and_then_to_itself(lengths, group_size, steps, seed):
    """Softmax in float64 over keys and values gathered by hand, at the last step of the last layer."""
    _, prompts, rows, (q, out) = filled(lengths, group_size, 4, steps, seed)
    (prompt_k, prompt_v), (own_k, own_v) = prompts[1], rows[1]
    for n in range(len(q)):
        p = n // group_size
        keys, values = (
            torch.cat((x.split(lengths)[p], torch.stack(own)[:, n])).double().repeat_interleave(2, dim=1)  # (S, H, D)
            for x, own in ((prompt_k, own_k), (prompt_v, own_v))
        )
        p = torch.einsum("hd,shd->hs", q[n].double(), keys).mul(8**-0.5).softmax(-1)  # (H, S)
        assert (out[n] - torch.einsum("hs,shd->hd", p, values)).abs().max() < 1e-5


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kept=st.sets(st.integers(0, 8), min_size=1),
    seed=SEEDS,
)
def test_rows_that_stay_find_what_they_found(lengths, kept, seed):
    """Whoever else leaves: the same keys and values, hence the same result but for the order of sums."""
    kept = torch.tensor(sorted({n % (3 * len(lengths)) for n in kept}))
    results = []
    for drop in (False, True):
        cache, *_ = filled(lengths, 3, 6, 3, seed)
        if drop:
            cache.compact(kept)
            assert cache.prompt.tolist() == (kept // 3).tolist() and cache.lengths.tolist() == [3] * len(kept)
            assert cache.layers[0].k.shape == (2, len(kept), 6, 8)
        g = torch.Generator().manual_seed(seed + 1)
        q, k, v = (torch.randn(3 * len(lengths), heads, 8, generator=g) for heads in (4, 2, 2))
        rows = kept if drop else torch.arange(3 * len(lengths))
        positions = cache.advance()
        results.append((positions, cache.attend(0, q[rows], k[rows], v[rows], **WHOLE)))
    (all_positions, want), (positions, got) = results
    assert torch.equal(positions, all_positions[kept])
    assert (got - want[kept]).abs().max() < 1e-6


def test_positions_go_on_from_the_prompt():
    cache = KVCache(CONFIG, Segments.build([5, 2]), 2, 3, dtype=torch.float32)
    assert cache.advance().tolist() == [5, 5, 2, 2]
    assert cache.advance().tolist() == [6, 6, 3, 3]
    cache.compact(torch.tensor([1, 2]))
    assert cache.advance().tolist() == [7, 4]


def test_a_full_cache_says_so():
    cache = KVCache(CONFIG, Segments.build([5]), 2, 2, dtype=torch.float32)
    cache.advance()
    cache.advance()  # exactly full is fine
    with pytest.raises(ValueError, match="got token 3 for a cache of 2 a row, want more capacity"):
        cache.advance()
    assert cache.extent == 2 and cache.lengths.tolist() == [2, 2]  # the refusal took nothing


def test_16_bits_are_kept_as_they_are_but_wider():
    cache, prompts, rows, (_, out) = filled([3, 1], 2, 2, 2, seed=0, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and {x.dtype for kept in cache.layers for x in (kept.k, kept.prefix_v)} == {
        torch.float32
    }
    assert torch.equal(cache.layers[1].prefix_k[:, 0, :3], prompts[1][0][:3].transpose(0, 1).float())  # (K, n, D)
    assert torch.equal(cache.layers[0].prefix_v[:, 1, :1], prompts[0][1][3:].transpose(0, 1).float())
    assert torch.equal(cache.layers[1].v[:, :, 1], rows[1][1][1].transpose(0, 1).float())  # (K, N, D)


def test_prompts_have_no_prefix_themselves():
    with pytest.raises(ValueError, match="want prompts, which have none"):
        KVCache(CONFIG, Segments.build([3, 2], [-1, 0]), 1, 2, dtype=torch.float32)
