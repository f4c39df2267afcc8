"""nanogspo/rollout.py and cache.py: cached decoding against full forwards, and the distribution that is drawn from.

The oracle is the model without its cache, run on the whole row again for every token, one row at a time.

Run: python -m pytest tests/test_rollout.py
"""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels.sample
from nanogspo import rollout
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.rollout import draw_uniforms, generate, sample
from tests.strategies import SEEDS

V = 23
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# every mechanism that attention over a cache can get wrong: grouped heads, qk-norm, windows narrower than the prompts,
# windows on some layers with their own RoPE base, both soft-caps
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 3, "rope_theta": 1e6},
}
PROMPTS = [[5], [7, 7, 2, 19, 4, 11, 3], [1, 2, 3], [22, 0, 22, 0, 22]]  # widths 1, above every window, and between
# fp32 log-probs of a 3-layer model, sums in another order in the cache: 100 roundings of numbers up to 10
CACHE_NOISE = 100 * 10 * 2**-24


def tiny(family="qwen3", seed=0, **changes):
    model = Transformer(model_config({**SHAPE, **FAMILIES[family], **changes})).init_weights(seed, std=0.3)
    g = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.2 * torch.randn(p.shape, generator=g)
    model.norm.weight.data -= 0.7  # tied heads would else repeat the last token for ever
    return model.eval()


@torch.no_grad()
def next_logits(model, row):
    return model.logits(model(torch.tensor([row])))[0, -1]  # (V,)


@torch.no_grad()
def recomputed(model, prompt, answer, temperature=1.0):
    """Log-prob of every token of an answer: one full forward of the row, no cache, no padding, no neighbours."""
    z = model.logits(model(torch.tensor([prompt + answer])))[0].double() / temperature  # (T, V)
    return [z[len(prompt) - 1 + i].log_softmax(-1)[token].item() for i, token in enumerate(answer)]


# ----------------------------------------------------------------------------
# the cache


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_a_full_forward_at_every_step(family):
    model = tiny(family)
    answers = generate(model, PROMPTS, max_new_tokens=9, temperature=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        row = list(prompt)
        for token, logp in zip(answer.tokens, answer.logp, strict=True):
            log_p = next_logits(model, row).log_softmax(-1)  # (V,)
            # a tie within rounding may go either way
            assert log_p[token] >= log_p.max() - CACHE_NOISE
            assert logp == pytest.approx(log_p[token].item(), abs=CACHE_NOISE)
            row.append(token)
        assert len(answer.tokens) == 9 and not answer.finished


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kept_logp_is_the_log_softmax_of_a_full_forward(family, temperature):
    model = tiny(family)
    answers = generate(
        model, PROMPTS, group_size=3, max_new_tokens=8, temperature=temperature, eos_ids=range(9), seed=1
    )
    lengths = {len(a.tokens) for a in answers}
    assert len(lengths) > 1  # rows did end at different steps
    for answer in answers:
        want = recomputed(model, PROMPTS[answer.prompt_index], answer.tokens, temperature)
        assert answer.logp == pytest.approx(want, abs=CACHE_NOISE / temperature)


# ----------------------------------------------------------------------------
# groups


def test_answers_come_prompt_by_prompt_and_prompts_are_prefilled_once():
    model = tiny()
    calls = []
    forward = Transformer.forward

    def spy(self, tokens, **kwargs):
        calls.append(tuple(tokens.shape))
        return forward(self, tokens, **kwargs)

    with patch.object(Transformer, "forward", spy):
        answers = generate(model, PROMPTS, group_size=5, max_new_tokens=4, seed=3)
    assert [a.prompt_index for a in answers] == [p for p in range(4) for _ in range(5)]
    # one packed prefill of each prompt once; then a step a token for the rows still alive, and none after the last
    assert calls == [(1, 16), (1, 20), (1, 20), (1, 20)]
    groups = [{tuple(a.tokens) for a in answers[i : i + 5]} for i in range(0, 20, 5)]
    assert all(len(group) > 1 for group in groups)  # answers of a group are drawn apart


@pytest.mark.isa
@given(seed=SEEDS, keep=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_row_does_not_depend_on_which_rows_have_finished(seed, keep):
    """Dropping finished rows early, late or never: the same tokens. In fp32 log-probs move by rounding only."""
    model = tiny(seed=seed % 7)
    arguments = dict(group_size=4, max_new_tokens=10, eos_ids=[1, 4, 9], seed=seed)
    with patch.object(rollout, "COMPACT_BELOW", keep):
        one = generate(model, PROMPTS, **arguments)
    with patch.object(rollout, "COMPACT_BELOW", -1.0):  # never
        other = generate(model, PROMPTS, **arguments)
    for a, b in zip(one, other, strict=True):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
        assert a.logp == pytest.approx(b.logp, abs=CACHE_NOISE)


def test_finished_rows_leave_the_batch():
    """Short answers stop costing: the batch only ever shrinks, and holds at most 1 / COMPACT_BELOW rows a row alive."""
    model, widths = tiny(), []
    forward = Transformer.forward

    def spy(self, tokens, **kwargs):
        if "segments" not in kwargs:  # a step, not the prefill
            widths.append(tokens.shape[1])
        return forward(self, tokens, **kwargs)

    with patch.object(Transformer, "forward", spy):
        answers = generate(model, PROMPTS, group_size=8, max_new_tokens=20, eos_ids=[1, 4, 9, 10, 11], seed=4)
    for step, width in enumerate(widths, start=1):
        alive = sum(len(a.tokens) > step for a in answers)
        assert alive <= width < alive / rollout.COMPACT_BELOW + 1
    assert widths[-1] < 12 < widths[0] < 32


def test_max_rows_slices_whole_groups():
    model, widths = tiny(), []
    forward = Transformer.forward

    def spy(self, tokens, **kwargs):
        if "segments" not in kwargs:  # a step, not the prefill
            widths.append(tokens.shape[1])
        return forward(self, tokens, **kwargs)

    with patch.object(Transformer, "forward", spy):
        answers = generate(model, [[5, 6]] * 5, group_size=3, max_new_tokens=4, seed=0, max_rows=7)
    assert max(widths) == 6  # 7 rows have room for two groups of 3
    assert [a.prompt_index for a in answers] == [p for p in range(5) for _ in range(3)]
    for answer in answers:
        assert answer.logp == pytest.approx(recomputed(model, [5, 6], answer.tokens), abs=CACHE_NOISE)
    # equal prompts in different slices are not drawn with the same numbers
    assert len({tuple(a.tokens) for a in answers}) > 10
    with patch.object(Transformer, "forward", spy):
        widths.clear()
        generate(model, PROMPTS, group_size=3, max_new_tokens=2, max_rows=1)
    assert max(widths) == 3  # a group is never cut
    greedy = dict(max_new_tokens=4, temperature=0)
    sliced = generate(model, PROMPTS, **greedy, max_rows=2)
    assert [a.tokens for a in sliced] == [a.tokens for a in generate(model, PROMPTS, **greedy)]


@pytest.mark.isa
def test_an_answer_depends_on_the_seed_and_its_prompts_number_alone():
    """Not on which prompts are beside it, nor on how many rows are decoded at a time."""
    model, settings = tiny(), {"group_size": 3, "max_new_tokens": 6, "seed": 5}
    together = generate(model, PROMPTS, first_prompt=40, **settings)
    for max_rows in (1, 6):
        sliced = generate(model, PROMPTS, first_prompt=40, max_rows=max_rows, **settings)
        assert [a.tokens for a in sliced] == [a.tokens for a in together]
    for p, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], first_prompt=40 + p, **settings)
        assert [a.tokens for a in alone] == [a.tokens for a in together[3 * p : 3 * p + 3]]
    other = generate(model, PROMPTS, first_prompt=41, **settings)
    assert [a.tokens for a in other] != [a.tokens for a in together]


@given(
    seed=st.integers(-(2**63), 2**63 - 2), number=st.integers(0, 2**40), steps=st.integers(1, 5), G=st.integers(1, 4)
)
def test_uniforms_of_a_prompt(seed, number, steps, G):
    """In [0, 1), another stream for every pair of seed and number, the same beginning whatever the limit."""
    u = draw_uniforms(seed, number, steps, G)
    assert u.shape == (steps, G) and u.dtype == torch.float64 and ((u >= 0) & (u < 1)).all()
    assert torch.equal(draw_uniforms(seed, number, steps + 2, G)[:steps], u)
    for other in ((seed, number + 1), (seed + 1, number), (number, seed), (seed + 1, number - 1)):
        assert other == (seed, number) or not torch.equal(draw_uniforms(*other, steps, G), u)


def test_uniforms_are_uniform_and_what_philox_gives():
    """Moments of 2^16 draws: mean 1/2 and variance 1/12, each within five of its own standard deviations."""
    u, n = draw_uniforms(0, 1, 2**14, 4).flatten(), 2**16
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / n) ** 0.5 and abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert torch.equal(u[:8], torch.from_numpy(np.random.Generator(np.random.Philox(key=[0, 1])).random(8)))


def test_eos_is_kept_and_scored_and_unfinished_answers_say_so():
    model = tiny()
    answers = generate(model, PROMPTS, group_size=6, max_new_tokens=6, eos_ids=(4, 9), seed=2)
    assert {a.finished for a in answers} == {True, False}
    for answer in answers:
        assert len(answer.logp) == len(answer.tokens) <= 6
        assert answer.finished == (answer.tokens[-1] in (4, 9))
        assert not {4, 9} & {*answer.tokens[:-1]}
        assert answer.finished or len(answer.tokens) == 6


@pytest.mark.parametrize("max_rows", [0, 6])  # all at once, and a prompt after the other
def test_sampling_is_watched_and_ended_after_any_step(max_rows):
    """It counts the answers that are complete and the tokens of the others. Ended, what there is is a beginning of the
    whole, the model is as it was, and not one step more is made."""
    model = tiny().train()
    settings = dict(group_size=6, max_new_tokens=6, eos_ids=(4, 9), seed=2, max_rows=max_rows)
    seen = []
    whole = generate(model, PROMPTS, **settings, on_step=lambda *counts: seen.append(counts))
    ended = [sum(a.finished and len(a.tokens) <= n for a in whole) for n in range(1, 6)]  # by the n-th token
    assert seen[-1][0] == 24 and {tokens for _, tokens in seen} == set(range(1, 7))
    if not max_rows:
        assert seen == [*zip(ended, range(1, 6), strict=True), (24, 6)]
    assert [complete for complete, _ in seen] == sorted(complete for complete, _ in seen)
    for last in range(len(seen)):
        counts = []
        answers = generate(model, PROMPTS, **settings, on_step=lambda *c, n=last, k=counts: k.append(c) or len(k) > n)
        assert counts == seen[: last + 1] and model.training and torch.is_grad_enabled()
        assert sum(a.finished or len(a.tokens) == 6 for a in answers) == counts[-1][0]
        for a, b in zip(answers, whole, strict=True):
            assert a.tokens == b.tokens[: len(a.tokens)] and (a.finished <= b.finished)
            assert max_rows or a.tokens == b.tokens[: last + 1]


def test_equal_seeds_give_equal_answers():
    model = tiny()
    draws = [generate(model, PROMPTS, group_size=2, max_new_tokens=6, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert generate(model, PROMPTS, group_size=2, max_new_tokens=6, seed=0) == draws[0]
    assert torch.equal(torch.get_rng_state(), before)  # torch's own stream is neither read nor moved


def test_leaves_the_model_as_it_was():
    model = tiny()
    for training in (True, False):
        model.train(training)
        [answer] = generate(model, [[5]], max_new_tokens=2)
        assert model.training == training and torch.is_grad_enabled()
    steps = rollout.decode(
        model.train(), [[5]], group_size=1, max_new_tokens=3, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(), seed=0
    )
    next(steps)
    steps.close()  # a chat that is interrupted
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, r"2 prompts, of which \[1\] are empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0, want at least 1"),
        ([[1]], {"group_size": 0}, "group_size 0, want at least 1"),
        ([[1]], {"temperature": -0.1}, "temperature -0.1"),
        ([[1]], {"temperature": math.nan}, "temperature nan"),
        ([[1]], {"top_k": -1}, "top_k -1"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p 1.1"),
        ([[1]], {"top_p": math.nan}, "top_p nan"),
        ([[1], [1] * 60], {"max_new_tokens": 5}, "prompt of 60 tokens . 5 new ones, want at most 64"),
        ([[1], [V]], {}, f"token id {V}, want ids in .0, {V}"),
        ([[1], [-2]], {}, "token id -2, want ids"),
    ],
)
def test_refuses_in_one_line(prompts, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(tiny(), prompts, **{"max_new_tokens": 1, **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_not_finite_end_the_rollout(broken, temperature):
    model = tiny()
    model.norm.weight.data[0] = broken
    with pytest.raises(FloatingPointError, match="scores are not finite numbers any more"):
        generate(model, [[1, 2]], group_size=3, max_new_tokens=2, temperature=temperature)


def test_a_row_may_fill_the_context_to_the_last_position():
    [answer] = generate(tiny(), [[1] * 59], max_new_tokens=5)
    assert len(answer.tokens) == 5


# ----------------------------------------------------------------------------
# sample


# What a sampler meets: peaked, flat and tied rows, tokens that are ruled out, tokens too rare for fp32
LOGITS = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, 0.0, -math.inf, -math.inf, -200.0, 80.0])),
    min_size=1,
    max_size=12,
).filter(lambda row: max(row) > -math.inf)
LAST_UNIFORM = 1 - 2**-53  # the largest float64 below 1, and the largest that torch.rand gives
UNIFORMS = st.one_of(st.sampled_from([0.0, 5e-324, 0.5, LAST_UNIFORM]), st.floats(0, 1, exclude_max=True))
BLOCKS = st.sampled_from([1, 2, 3, 256])  # tokens of a block: rows of one block, of several, of several and a rest
TRUNCATION = st.sampled_from([(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.5), (0, 1e-6), (0, 0.999), (2, 0.7), (99, 1.0)])


def probabilities(row, temperature=1.0):
    """softmax in float64 and plain Python."""
    top = max(row)
    p = [math.exp((z - top) / temperature) for z in row]
    return [x / sum(p) for x in p]


@given(
    row=LOGITS,
    uniform=UNIFORMS,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    truncation=TRUNCATION,
    block=BLOCKS,
)
@example(row=[-math.inf, 0.0, 1.0], uniform=0.0, temperature=1.0, truncation=(0, 1.0), block=256)
@example(row=[-math.inf, 0.0, 1.0], uniform=LAST_UNIFORM, temperature=1.0, truncation=(0, 1.0), block=256)
@example(row=[0.0, 1.0, -math.inf], uniform=LAST_UNIFORM, temperature=1.0, truncation=(0, 1.0), block=2)
def test_never_draws_what_has_no_probability(row, uniform, temperature, truncation, block):
    z = torch.tensor([row, row[::-1]])  # (2, V) ruled-out tokens at either end
    with patch.object(kernels.sample, "BLOCK", block):
        token, logp = sample(z, torch.tensor([uniform, uniform], dtype=torch.float64), temperature, *truncation)
    for n in range(2):
        assert 0 <= token[n] < len(row)
        assert z[n, token[n]] > -math.inf
        assert -math.inf < logp[n] <= 1e-6  # log_softmax of one sure token may round to just above 0


@given(row=LOGITS, uniform=UNIFORMS, temperature=st.sampled_from([0.3, 1.0, 2.0]), block=BLOCKS)
def test_inverts_the_cumulative_distribution(row, uniform, temperature, block):
    """cdf(token - 1) <= uniform < cdf(token), and logp is the token's own."""
    with patch.object(kernels.sample, "BLOCK", block):
        token, logp = sample(torch.tensor([row]), torch.tensor([uniform], dtype=torch.float64), temperature)
    p = probabilities(row, temperature)
    below = math.fsum(p[: token.item()])
    # fp32 log-softmax: each of 12 probabilities is off by (1 + |logp|) units, and rare ones by less than they weigh
    slack = 12 * 32 * 2**-24
    assert below - slack <= uniform <= below + p[token.item()] + slack
    z = (row[token.item()] - max(row)) / temperature
    assert logp.item() == pytest.approx(math.log(p[token.item()]) if p[token.item()] else z, rel=1e-5, abs=1e-5)


@given(seed=SEEDS, N=st.integers(1, 5))
def test_rows_are_drawn_independently(seed, N):
    g = torch.Generator().manual_seed(seed)
    z, uniform = torch.randn(N, 9, generator=g) * 3, torch.rand(N, generator=g, dtype=torch.float64)
    token, logp = sample(z, uniform, 0.8, 5, 0.9)
    for n in range(N):
        alone = sample(z[n : n + 1], uniform[n : n + 1], 0.8, 5, 0.9)
        assert token[n] == alone[0] and logp[n] == pytest.approx(alone[1].item(), abs=1e-6)


def kept(z, top_k=0, top_p=1.0, temperature=1.0):
    """The set of tokens that can be drawn, and the log-prob of each, over a fine grid of uniforms."""
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    token, logp = sample(torch.tensor([z]).expand(len(grid), -1), grid, temperature, top_k, top_p)
    return {t: lp for t, lp in zip(token.tolist(), logp.tolist(), strict=True)}


def test_top_k_keeps_exactly_k_also_when_tokens_tie():
    for z in ([1.0, 3.0, 2.0, 0.0], [0.0] * 7, [1.0, 2.0, 2.0, 2.0, 0.0]):
        for k in range(1, len(z) + 2):
            got = kept(z, top_k=k)
            want = sorted(z, reverse=True)[:k]
            assert sorted((z[t] for t in got), reverse=True) == want  # k tokens, and the likeliest
            assert sum(map(math.exp, got.values())) == pytest.approx(1, abs=1e-6)  # renormalised over what is left
    assert set(kept([1.0, 3.0, 2.0, 0.0], top_k=2)) == {1, 2}


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    halves = [math.log(x) for x in (0.125, 0.5, 0.25, 0.0625, 0.0625)]
    for top_p, want in [
        (0.01, {1}),
        (0.49, {1}),
        (0.51, {1, 2}),
        (0.74, {1, 2}),
        (0.76, {0, 1, 2}),
        (0.9, {0, 1, 2, 3}),
    ]:
        got = kept(halves, top_p=top_p)
        assert set(got) == want
        mass = sum(math.exp(halves[t]) for t in want)
        for token, logp in got.items():
            assert logp == pytest.approx(halves[token] - math.log(mass), abs=1e-6)
    assert set(kept(halves, top_p=1.0)) == {0, 1, 2, 3, 4}
    # of 8 equal tokens, half the mass is exactly 4 of them (1/8 and its sums are exact in fp32), the first in order
    assert set(kept([0.7] * 8, top_p=0.5)) == {0, 1, 2, 3}
    assert set(kept([0.7] * 8, top_p=0.51)) == {0, 1, 2, 3, 4}
    # temperature comes first: at 1/2 the probabilities are squared and renormalised, 0.25 / 0.336 = 74 % for the top
    assert set(kept(halves, top_p=0.7, temperature=0.5)) == {1}
    # and top_k before top_p: of the 4 tied at the end, two stay and share the rest
    assert len(kept([3.0, 0.0, 0.0, 0.0, 0.0], top_k=3, top_p=0.999)) == 3


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (4, 1.0, 0.7), (0, 0.8, 1.5)])
def test_frequencies_follow_the_distribution(top_k, top_p, temperature):
    """Pearson's chi-square over the kept tokens of a fixed seed, and the log-probs reported for them."""
    z, n = [0.0, 1.0, 2.0, -1.0, 0.5, -3.0], 20_000
    allowed = kept(z, top_k, top_p, temperature)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logp = sample(torch.tensor([z]).expand(n, -1), uniform, temperature, top_k, top_p)
    counts = torch.bincount(token, minlength=len(z)).tolist()
    weights = [math.exp(x / temperature) if t in allowed else 0.0 for t, x in enumerate(z)]
    expected = [n * w / sum(weights) for w in weights]
    assert all(count == 0 for count, want in zip(counts, expected, strict=True) if want == 0)
    chi2 = sum((count - want) ** 2 / want for count, want in zip(counts, expected, strict=True) if want)
    # a chi-square of k degrees of freedom exceeds k + 2 sqrt(k t) + 2 t with probability e^-t (Laurent and Massart):
    # with t = 7 that is 1 seed in 1000, and this seed is fixed
    k = len(allowed) - 1
    assert chi2 < k + 2 * math.sqrt(7 * k) + 14
    for t, x in zip(token[:50].tolist(), logp[:50].tolist(), strict=True):
        assert x == pytest.approx(math.log(expected[t] / n), abs=1e-6)


def test_rollouts_follow_the_distribution():
    """Through generate: 4000 answers of one token to one prompt against the model's own softmax."""
    model = tiny()
    answers = generate(model, [[5, 6, 7]], group_size=4000, max_new_tokens=1, seed=0)
    p = next_logits(model, [5, 6, 7]).double().softmax(-1).tolist()
    counts = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=V).tolist()
    rare = [t for t in range(V) if 4000 * p[t] < 5]  # chi-square needs some counts: these are taken together
    cells = [([t], p[t]) for t in range(V) if t not in rare] + ([(rare, sum(p[t] for t in rare))] if rare else [])
    chi2 = sum((sum(counts[t] for t in cell) - 4000 * q) ** 2 / (4000 * q) for cell, q in cells)
    k = len(cells) - 1
    assert chi2 < k + 2 * math.sqrt(7 * k) + 14
