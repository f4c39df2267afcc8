"""nanogspo/packing.py: nothing is lost, nothing is scored twice, and neither neighbours nor a shared prompt change it.

Run: python -m pytest tests/test_packing.py
"""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.seq_logprob import token_logprob
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.packing import SHARE_PROMPT_FROM, Example, pack, score
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
    # windows, and both soft-caps: some answers see all of their prompt, some its end, some nothing of it
    "gemma2": {"model_type": "gemma2", "sliding_window": 3, "query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0},
}
NEVER = 10**9


def tiny(family="qwen3", dtype=torch.float32):
    return Transformer(model_config({**SHAPE, **FAMILIES[family]})).init_weights(3, std=0.3).to(dtype)


@st.composite
def examples(draw, max_size=9):
    """Ragged, from one scored token to all but the first, with holes in the masks, as conversations of several turns
    have. In runs that begin alike, of one to four, with one of three beginnings: equal ones may also stand apart. The
    last token of a beginning is each example's own: what is shared ends before it."""
    ids = st.integers(0, V - 1)
    beginnings = [draw(st.lists(ids, max_size=8).filter(lambda x: len(x) in (0, 1, 3, 4, 8))) for _ in range(3)]
    out = []
    while len(out) < max_size and (not out or draw(st.booleans())):
        prompt = draw(st.sampled_from(beginnings))
        for _ in range(min(draw(st.integers(1, 4)), max_size - len(out))):
            rest = draw(st.lists(st.tuples(ids, st.booleans()), max_size=draw(st.sampled_from([0, 1, 4, 9]))))
            tokens = [*prompt, draw(ids), draw(ids), *(token for token, _ in rest)]
            mask = [draw(st.booleans()), *[False] * len(prompt), True, *(hit for _, hit in rest)]
            out.append(Example(tokens, mask))  # mask[0] never counts
    return out


BUDGETS = st.sampled_from([1, 7, 12, 16, 26, 40, 10**6])  # below, at and above the longest example
SHARED_FROM = st.sampled_from([1, 3, 4, 5, NEVER])  # beginnings have 0, 1, 3, 4 and 8 tokens


def packed(rows, budget, share_from):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogspo.packing.SHARE_PROMPT_FROM", share_from)
        return pack(rows, max_tokens=budget)


def scored(example):
    """(column, token) of what is scored, the slow way: the token at t is predicted by the hidden state at t - 1."""
    return [(t - 1, example.tokens[t]) for t in range(1, len(example.tokens)) if example.loss_mask[t]]


def beginning(example):
    """All before the token that predicts the first scored one."""
    return example.tokens[: scored(example)[0][0]]


def runs(rows, share_from):
    """Indices of neighbours with one beginning that is long enough, and everybody else alone."""
    out = []
    for i, e in enumerate(rows):
        if i and len(beginning(e)) >= share_from and beginning(e) == beginning(rows[i - 1]):
            out[-1].append(i)
        else:
            out.append([i])
    return out


def pieces(batch):
    """Example's index, hidden states that score it and its targets."""
    for n, i in enumerate(batch.index.tolist()):
        piece = slice(*batch.cu_scored[n : n + 2].tolist())
        yield i, batch.scored[piece].tolist(), batch.targets[piece].tolist()


# ----------------------------------------------------------------------------
# the plan


class Moves(TorchDispatchMode):
    """Copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.seen.append((len(out), kwargs["non_blocking"]))
        return out


def test_a_micro_batch_moves_in_one_copy_that_nobody_waits_for():
    """To the meta device, which has no numbers to wait for either; shapes and dtypes are those of the CPU's."""
    [batch] = packed([Example.answered([1, 2, 3, 4], [5] * n) for n in (1, 2, 3)], NEVER, 1)
    with Moves() as moves:
        moved = batch.to("meta")
    names = ["tokens", "scored", "targets", "cu_scored"]
    pairs = [(getattr(batch, name), getattr(moved, name)) for name in names]
    names = ["cu_seqlens", "prefix", "positions"]
    pairs += [(getattr(batch.segments, name), getattr(moved.segments, name)) for name in names]
    assert moves.seen == [(sum(len(here) for here, _ in pairs), True)]
    assert all(there.is_meta and (here.shape, here.dtype) == (there.shape, there.dtype) for here, there in pairs)
    assert (moved.segments.lengths, moved.segments.parents) == (batch.segments.lengths, batch.segments.parents)
    assert moved.index is batch.index and batch.to("cpu") is batch
    with patch.object(
        torch.Tensor, "to", lambda t, *device, **how: t.clone()
    ):  # as if there: every number in its place
        again = batch.to("meta")
    assert all(
        torch.equal(getattr(again, name), here)
        for name, (here, _) in zip(["tokens", "scored", "targets", "cu_scored"], pairs[:4], strict=True)
    )
    assert all(
        torch.equal(getattr(again.segments, name), here) for name, (here, _) in zip(names, pairs[4:], strict=True)
    )


@given(rows=examples(), budget=BUDGETS, share_from=SHARED_FROM)
def test_every_scored_token_is_there_exactly_once(rows, budget, share_from):
    """And what the hidden state that predicts it has seen is what stands before it in the example, nothing else."""
    batches = packed(rows, budget, share_from)
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(len(rows)))
    for batch in batches:
        segments, tokens = batch.segments, batch.tokens.tolist()
        starts = segments.cu_seqlens.tolist()
        own = [tokens[a:b] for a, b in zip(starts, starts[1:], strict=False)]  # of each segment
        before = [own[p] if p >= 0 else [] for p in segments.prefix.tolist()]
        seen = [[*b, *o[: t + 1]] for b, o in zip(before, own, strict=True) for t in range(len(o))]  # by each token
        assert len(seen) == len(tokens) == sum(segments.lengths)
        assert segments.positions.tolist() == [len(context) - 1 for context in seen]
        assert len(batch.scored) == len(batch.targets) == batch.cu_scored[-1]
        assert len(batch.cu_scored) == len(batch.index) + 1 and batch.cu_scored[0] == 0
        for (i, at, targets), length in zip(pieces(batch), batch.lengths.tolist(), strict=True):
            assert length == len(targets) == len(scored(rows[i]))
            assert [(len(seen[s]) - 1, token) for s, token in zip(at, targets, strict=True)] == scored(rows[i])
            assert all(seen[s] == rows[i].tokens[: len(seen[s])] for s in at)
        assert len(set(batch.scored.tolist())) == len(batch.scored)
        for x in (batch.tokens, batch.scored, batch.targets, batch.cu_scored, batch.index):
            assert x.dtype == torch.int64


@given(rows=examples(max_size=20), budget=BUDGETS, share_from=SHARED_FROM)
def test_the_budget_holds_except_for_one_long_example_and_is_used(rows, budget, share_from):
    batches = packed(rows, budget, share_from)
    for batch in batches:
        assert len(batch.tokens) <= budget or len(batch.index) == 1
    # the first example of the next micro-batch would not have fitted into this one, sharing its prompt where it could
    family = {i: run for run in runs(rows, share_from) for i in run}
    for batch, following in zip(batches, batches[1:], strict=False):
        first = following.index[0].item()
        shares = set(family[first]) & set(batch.index.tolist())
        more = len(rows[first].tokens) - 1 - (len(beginning(rows[first])) if shares else 0)
        assert len(batch.tokens) + more > budget


@given(rows=examples(max_size=20), budget=BUDGETS, share_from=SHARED_FROM)
def test_neighbours_that_begin_alike_share_it_and_nobody_else_does(rows, budget, share_from):
    """Counted: an example is all its tokens but the last, and a prompt stands once for those of its run that are in the
    micro-batch. A run that the budget splits repeats it."""
    families = runs(rows, share_from)
    batches = packed(rows, budget, share_from)
    for batch in batches:
        here = set(batch.index.tolist())
        saved = sum(max(0, len(here & set(run)) - 1) * len(beginning(rows[run[0]])) for run in families)
        assert len(batch.tokens) == sum(len(rows[i].tokens) - 1 for i in here) - saved
        parts = [len(here & set(run)) for run in families]
        assert len(batch.segments.lengths) == sum(n + (n > 1) for n in parts)  # one member shares with nobody
    # first those that share, in order; then the others; each by length, so that equal ones are neighbours
    length = lambda i: (len(rows[i].tokens), i)  # noqa: E731
    order = [i for run in families if len(run) > 1 for i in sorted(run, key=length)]
    order += sorted((run[0] for run in families if len(run) == 1), key=length)
    assert [i for batch in batches for i in batch.index.tolist()] == order


def test_a_group_costs_its_prompt_once():
    """The figures of the file's first lines; and 16 tokens is where sharing starts."""
    prompt = list(range(40))
    group = [Example.answered(prompt, [n] * 64) for n in range(8)]
    [batch] = pack(group, max_tokens=551)
    assert len(batch.tokens) == 39 + 8 * 64 == 551
    assert sum(len(b.tokens) for b in packed(group, 10**6, NEVER)) == 8 * (39 + 64)
    assert [len(b.tokens) for b in pack(group, max_tokens=550)] == [39 + 7 * 64, 39 + 64]
    for n in (SHARE_PROMPT_FROM, SHARE_PROMPT_FROM + 1):  # tokens of the prompt, of which the last is not shared
        [batch] = pack([Example.answered(prompt[:n], [a]) for a in (1, 2, 3)], max_tokens=10**6)
        assert batch.segments.parents == ((-1, 0, 0, 0) if n > SHARE_PROMPT_FROM else (-1, -1, -1))
    late = [Example.answered([*prompt, n, 0], [1]) for n in (5, 6)]  # the same for longer than sharing needs, then not
    assert [b.segments.parents for b in pack(late, max_tokens=10**6)] == [(-1, -1)]


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
    [batch] = packed([Example.answered([1, 2, 3], [4] * n) for n in (1, 2)], 10, 1)
    moved = batch.to("meta")
    for old, new in ((batch, moved), (batch.segments, moved.segments)):
        for field in dataclasses.fields(old):
            before, after = getattr(old, field.name), getattr(new, field.name)
            if field.name == "index":
                assert after is before and after.device.type == "cpu"
            elif isinstance(before, torch.Tensor):
                assert (after.shape, after.dtype, after.device.type) == (before.shape, before.dtype, "meta")
    assert moved.segments.lengths == batch.segments.lengths == (2, 1, 2)
    assert moved.segments.parents == batch.segments.parents == (-1, 0, 0)
    assert batch.tokens.device.type == batch.segments.positions.device.type == "cpu"


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    answer=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_an_answer_is_scored_to_its_last_token(prompt, answer):
    """The stop token too: a model that is never scored on it never learns to stop."""
    example = Example.answered(prompt, answer)
    assert example.tokens == prompt + answer
    assert example.loss_mask == [False] * len(prompt) + [True] * len(answer)
    assert example.prefix == prompt[:-1]  # its last token predicts, and for each answer another token


# ----------------------------------------------------------------------------
# the scores


@pytest.mark.isa
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=examples(), budget=BUDGETS, share_from=SHARED_FROM, temperature=st.sampled_from([1.0, 0.7]))
def test_scores_are_those_of_each_example_alone(family, rows, budget, share_from, temperature):
    """The oracle runs an example without neighbours or segments and picks from the whole matrix of logits."""
    model = tiny(family)
    for batch in packed(rows, budget, share_from):
        logp, entropy, first = (x.detach() for x in score(model, batch, temperature=temperature))  # (S,) each
        assert logp.dtype == entropy.dtype == torch.float32 and first.dtype == torch.bool
        want = []
        for i in batch.index.tolist():
            with torch.no_grad():
                z = model.logits(model(torch.tensor([rows[i].tokens])))[0].double() / temperature  # (T, V)
            want += [(z[column].log_softmax(-1), token) for column, token in scored(rows[i])]
        assert len(want) == len(logp)
        for n, (log_p, token) in enumerate(want):
            # fp32 logits up to 10 (soft-capped at 4), after 2 layers of sums in another order: 100 roundings
            assert logp[n].item() == pytest.approx(log_p[token].item(), abs=6e-5)
            assert entropy[n].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=6e-5)
            if abs(log_p[token] - log_p.max()) > 1e-4 or log_p.topk(2).values.diff().abs() > 1e-4:
                assert first[n] == (token == log_p.argmax())


def weights_of(rows, seed):
    """A random weight for every scored token, 0.5 to 1.5."""
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(len(scored(e)), generator=g) + 0.5 for e in rows]


def scores_and_gradients(model, rows, batches, weights):
    """Log-probs of all examples in order, and the gradient of their weighted sum by each parameter."""
    model.zero_grad()
    logp = {}
    for batch in batches:
        parts = score(model, batch)[0].split(batch.lengths.tolist())
        own = dict(zip(batch.index.tolist(), parts, strict=True))
        sum((weights[i] * part).sum() for i, part in own.items()).backward()
        logp |= {i: part.detach() for i, part in own.items()}
    return torch.cat([logp[i] for i in range(len(rows))]), [p.grad.clone() for p in model.parameters()]


def alone_one_by_one(model, rows, weights):
    """The same from each example by itself: no segments, the whole matrix of logits. And the examples' largest entries,
    summed: where gradients cancel, their roundings do not."""
    logp, gradients, scale = [], [torch.zeros_like(p) for p in model.parameters()], 0.0
    for e, weight in zip(rows, weights, strict=True):
        log_p = model.logits(model(torch.tensor([e.tokens])))[0].log_softmax(-1)  # (T, V)
        columns, targets = (list(x) for x in zip(*scored(e), strict=True))
        logp.append(log_p[columns, targets])
        own = torch.autograd.grad((weight * logp[-1]).sum(), list(model.parameters()))
        scale += max(float(g.abs().max()) for g in own)
        gradients = [a + b for a, b in zip(gradients, own, strict=True)]
    return torch.cat(logp).detach(), gradients, scale


@pytest.mark.isa
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=examples(), budget=BUDGETS, seed=SEEDS)
def test_a_shared_prompt_is_a_repeated_one(family, rows, budget, seed):
    """The same log-probs, and the same gradients of all parameters, as repeated in one row and as each example alone: a
    prompt's keys collect what each answer sends."""
    model, weights = tiny(family), weights_of(rows, seed)
    logp, gradients = scores_and_gradients(model, rows, packed(rows, budget, 1), weights)
    repeated = scores_and_gradients(model, rows, packed(rows, 10**6, NEVER), weights)
    *alone, scale = alone_one_by_one(model, rows, weights)
    # Of 6e-8 of the scale each, shared and repeated prompts differ by a few dozen roundings; alone, logits and softmax
    # are made in another way too
    for (want_logp, want), bar in ((repeated, 2e-6), (alone, 4e-6)):
        torch.testing.assert_close(logp, want_logp, rtol=0, atol=6e-5)  # as above: 100 roundings of logits of 10
        for x, y in zip(gradients, want, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=bar * max(1.0, scale))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@given(rows=examples(), budget=BUDGETS, share_from=SHARED_FROM)
def test_scoring_twice_gives_equal_bits_with_and_without_gradients(family, dtype, rows, budget, share_from):
    """What makes the first ratio after a rollout exactly 1: old log-probs come from a pass without gradients."""
    model = tiny(family, dtype)
    for batch in packed(rows, budget, share_from):
        with torch.no_grad():
            old = score(model, batch)
        new = score(model, batch)
        model.gradient_checkpointing = True
        checkpointed = score(model, batch)
        model.gradient_checkpointing = False
        [again] = [b for b in packed(rows, budget, share_from) if torch.equal(b.index, batch.index)]
        cut_again = score(model, again)
        for x, *others in zip(old, new, checkpointed, cut_again, strict=True):
            assert all(torch.equal(x, y) for y in others)


@given(rows=examples(), share_from=SHARED_FROM, seed=SEEDS)
def test_gradients_do_not_depend_on_the_budget(rows, share_from, seed):
    """Micro-batches weighted as train.py weights them: by scored tokens of all scored tokens."""
    model, gradients = tiny(), []
    for budget in (1, 26, 10**6):
        model.zero_grad()
        batches = packed(rows, budget, share_from)
        total = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            (-score(model, batch)[0].sum() / total).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    largest = max(g.abs().max() for g in gradients[0])
    for other in gradients[1:]:
        for x, y in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(largest))  # sums in another order: 100 roundings


def test_gradient_checkpointing_gives_the_same_gradients():
    """Blocks are run again with the same segments, to the last bit."""
    rows = [Example.answered([1, 2, 3, 4], [a] * n) for a, n in ((5, 3), (6, 3), (7, 1))]
    model, batches = tiny(), packed(rows, 10**6, 1)
    logp, want = scores_and_gradients(model, rows, batches, weights_of(rows, 0))
    model.gradient_checkpointing = True
    again, got = scores_and_gradients(model, rows, batches, weights_of(rows, 0))
    assert torch.equal(logp, again) and all(map(torch.equal, got, want))


def test_only_scored_positions_reach_the_vocabulary(monkeypatch):
    """A prompt costs no logits: token_logprob is given S rows, none of them to be ignored."""
    seen = []

    def spy(hidden, weight, targets, **settings):
        seen.append((hidden.shape[0], targets.tolist()))
        return token_logprob(hidden, weight, targets, **settings)

    monkeypatch.setattr("nanogspo.packing.token_logprob", spy)
    rows = [Example([1, 2, 3, 4], [False, False, True, True]), Example([5, 6], [True, True])]
    [batch] = pack(rows, max_tokens=100)
    score(tiny(), batch)
    assert seen == [(3, [6, 3, 4])]  # the shorter one first; its first token is predicted by nothing
