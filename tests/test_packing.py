"""nanogspo/packing.py: nothing is lost, nothing is scored twice, and neither padding nor neighbours change a score.

Run: python -m pytest tests/test_packing.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.seq_logprob import token_logprob
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.packing import Example, pack, score
from tests.strategies import SEEDS

V = 19
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "qwen3": {"model_type": "qwen3"},
    # windows, and both soft-caps; padding must not come in through either
    "gemma2": {"model_type": "gemma2", "sliding_window": 3, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0},
}


def tiny(family="qwen3", dtype=torch.float32):
    return Transformer(model_config({**SHAPE, **FAMILIES[family]})).init_weights(3, std=0.3).to(dtype)


@st.composite
def examples(draw, max_size=9):
    """Ragged, from one scored token to all but the first; masks with holes, as conversations of several turns have."""
    out = []
    for _ in range(draw(st.integers(1, max_size))):
        length = draw(st.sampled_from([2, 3, 5, 8, 8, 13]))
        tokens = draw(st.lists(st.integers(0, V - 1), min_size=length, max_size=length))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        mask[draw(st.integers(1, length - 1))] = True
        out.append(Example(tokens, mask))
    return out


BUDGETS = st.sampled_from([1, 7, 13, 16, 26, 40, 10**6])  # below, at and above the longest row


def scored(example):
    """(column, token) of what is scored, the slow way: the token at t is predicted by the hidden state at t - 1."""
    return [(t - 1, example.tokens[t]) for t in range(1, len(example.tokens)) if example.loss_mask[t]]


@given(rows=examples(), budget=BUDGETS, pad_id=st.integers(0, V - 1))
def test_every_scored_token_is_there_exactly_once(rows, budget, pad_id):
    batches = pack(rows, max_tokens=budget, pad_id=pad_id)
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(len(rows)))
    for batch in batches:
        N, T = batch.tokens.shape
        cuts = batch.cu_seqlens.tolist()
        assert len(cuts) == N + 1 and cuts[0] == 0 and cuts[-1] == len(batch.targets)
        for n, i in enumerate(batch.index.tolist()):
            length = len(rows[i].tokens)
            assert batch.tokens[n].tolist() == rows[i].tokens + [pad_id] * (T - length)
            piece = slice(cuts[n], cuts[n + 1])
            assert list(zip(batch.columns[piece].tolist(), batch.targets[piece].tolist(), strict=True)) == scored(
                rows[i]
            )
            assert batch.rows[piece].tolist() == [n] * len(scored(rows[i]))
            assert batch.lengths[n] == len(scored(rows[i]))
        assert batch.real_tokens == sum(len(rows[i].tokens) for i in batch.index)
        assert T == max(len(rows[i].tokens) for i in batch.index)  # never wider than its longest row


@given(rows=examples(max_size=20), budget=BUDGETS)
def test_the_budget_holds_padding_included_except_for_one_long_row(rows, budget):
    batches = pack(rows, max_tokens=budget)
    for batch in batches:
        assert batch.tokens.numel() <= budget or len(batch.tokens) == 1
    # and it is used: the first row of the next micro-batch would not have fitted into this one
    for batch, following in zip(batches, batches[1:], strict=False):
        longer = len(rows[following.index[0]].tokens)
        assert (len(batch.tokens) + 1) * longer > budget
    # sorted by length, rows of one length in the order given: the plan is a function of the lengths alone
    order = [i for batch in batches for i in batch.index.tolist()]
    assert order == sorted(order, key=lambda i: (len(rows[i].tokens), i))


@pytest.mark.parametrize("family", FAMILIES)
@given(rows=examples(), budget=BUDGETS, temperature=st.sampled_from([1.0, 0.7]))
def test_scores_are_those_of_each_row_alone(family, rows, budget, temperature):
    """The oracle runs a row without padding or neighbours and picks from the whole matrix of logits."""
    model = tiny(family)
    for batch in pack(rows, max_tokens=budget):
        logp, entropy, first = (x.detach() for x in score(model, batch, temperature=temperature))  # (S,) each
        assert logp.dtype == entropy.dtype == torch.float32 and first.dtype == torch.bool
        want = []
        for i in batch.index.tolist():
            with torch.no_grad():
                z = model.logits(model(torch.tensor([rows[i].tokens])))[0].double() / temperature  # (T, V)
            want += [(z[column].log_softmax(-1), token) for column, token in scored(rows[i])]
        for n, (log_p, token) in enumerate(want):
            # fp32 logits up to 10 (soft-capped at 4), after 2 layers of sums in another order: 100 roundings
            assert logp[n].item() == pytest.approx(log_p[token].item(), abs=6e-5)
            assert entropy[n].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=6e-5)
            if abs(log_p[token] - log_p.max()) > 1e-4 or log_p.topk(2).values.diff().abs() > 1e-4:
                assert first[n] == (token == log_p.argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=examples(), budget=BUDGETS, pad_id=st.integers(1, V - 1))
def test_the_padding_id_does_not_matter(family, dtype, rows, budget, pad_id):
    """Not one bit: padding stands behind every query that counts, so it is masked and never enters a sum."""
    model = tiny(family, dtype)
    for one, other in zip(
        pack(rows, max_tokens=budget, pad_id=0), pack(rows, max_tokens=budget, pad_id=pad_id), strict=True
    ):
        for x, y in zip(score(model, one), score(model, other), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=examples(), budget=BUDGETS)
def test_scoring_twice_gives_equal_bits_with_and_without_gradients(dtype, rows, budget):
    """What makes the first ratio after a rollout exactly 1: old log-probs come from a pass without gradients."""
    model = tiny(dtype=dtype)
    for batch in pack(rows, max_tokens=budget):
        with torch.no_grad():
            old = score(model, batch)
        new = score(model, batch)
        model.gradient_checkpointing = True
        checkpointed = score(model, batch)
        model.gradient_checkpointing = False
        for x, y, z in zip(old, new, checkpointed, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)


@given(rows=examples(), seed=SEEDS)
def test_gradients_do_not_depend_on_the_budget(rows, seed):
    """Micro-batches weighted as train.py weights them: by scored tokens of all scored tokens."""
    model, gradients = tiny(), []
    for budget in (1, 26, 10**6):
        model.zero_grad()
        batches = pack(rows, max_tokens=budget)
        total = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            (-score(model, batch)[0].sum() / total).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    largest = max(g.abs().max() for g in gradients[0])
    for other in gradients[1:]:
        for x, y in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(largest))  # sums in another order: 100 roundings


def test_only_scored_positions_reach_the_vocabulary(monkeypatch):
    """Prompt and padding cost no logits: token_logprob is given S rows, none of them to be ignored."""
    seen = []

    def spy(hidden, weight, targets, **settings):
        seen.append((hidden.shape[0], targets.tolist()))
        return token_logprob(hidden, weight, targets, **settings)

    monkeypatch.setattr("nanogspo.packing.token_logprob", spy)
    rows = [Example([1, 2, 3, 4], [False, False, True, True]), Example([5, 6], [True, True])]
    [batch] = pack(rows, max_tokens=100)
    score(tiny(), batch)
    assert seen == [(3, [6, 3, 4])]  # the shorter row first; its first token is predicted by nothing


@pytest.mark.parametrize(
    "example",
    [
        Example([1, 2, 3], [False, False, False]),
        Example([1, 2, 3], [True, False, False]),  # the first token has no hidden state before it
        Example([1], [True]),
        Example([], []),
        Example([1, 2, 3], [False, True]),
    ],
)
def test_an_example_with_nothing_to_score_is_named(example):
    with pytest.raises(ValueError, match="example 1: got .* want at least one scored") as error:
        pack([Example([1, 2], [False, True]), example], max_tokens=10)
    assert "\n" not in str(error.value)


def test_no_examples_are_no_batches():
    assert pack([], max_tokens=10) == []


def test_moving_keeps_everything():
    [batch] = pack([Example([1, 2, 3], [False, True, True])], max_tokens=10)
    moved = batch.to("meta")
    devices = {
        name: getattr(moved, name).device.type for name in ("tokens", "rows", "columns", "targets", "cu_seqlens")
    }
    assert set(devices.values()) == {"meta"}
    assert moved.index.device.type == "cpu" and moved.real_tokens == 3
    assert batch.tokens.device.type == "cpu"


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    answer=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_an_answer_is_scored_to_its_last_token(prompt, answer):
    """The stop token too: a model that is never scored on it never learns to stop."""
    example = Example.answered(prompt, answer)
    assert example.tokens == prompt + answer
    assert example.loss_mask == [False] * len(prompt) + [True] * len(answer)
