"""nanogspo/experience.py: answers find their problems, minibatches their answers, and a saved rollout is cut as before.

Run: python -m pytest tests/test_experience.py
"""

import pytest
import torch

from nanogspo import tiny
from nanogspo.experience import experience, from_state, sampler_gap, split_minibatches
from nanogspo.packing import Example, score


def drawn_examples():
    _, model = tiny.build("0123456789+=", seed=0)
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randint(2, 14, (n,), generator=g).tolist() for n in (3, 1, 4, 2, 2, 5, 1, 3)]
    return model, drawn, [Example.answered([5, 6, 7][: 1 + i % 3], answer) for i, answer in enumerate(drawn)]


@pytest.mark.parametrize("score_first", [True, False])
def test_a_saved_rollout_is_cut_and_scored_as_before(score_first):
    """Every answer in one minibatch, in order; index counts over the rollout, which is how advantages are found. The
    first update may take its own forward for the old one, and is over when a rollout is saved."""
    model, drawn, examples = drawn_examples()
    how = {"updates": 4, "max_tokens": 8}
    more = {"temperature": 1.0, "device": "cpu", "score_first": score_first}
    one = experience(model, examples, torch.arange(1.0, 9.0), **how, **more)
    for update, batches in enumerate(one.minibatches):
        assert sorted(i for b in batches for i in b.index.tolist()) == [2 * update, 2 * update + 1]
        for batch, old_logp in zip(batches, one.old_logp[update], strict=True):
            assert batch.targets.tolist() == [t for i in batch.index.tolist() for t in drawn[i]]
            if update or score_first:
                assert torch.equal(old_logp, score(model, batch)[0].detach())
            else:
                assert old_logp is None
    again = from_state(one.state(), **how)
    assert again.examples == one.examples and torch.equal(again.advantages, one.advantages)
    assert again.old_logp[0] == [None] * len(one.minibatches[0])
    for a, b in zip(one.old_logp[1:], again.old_logp[1:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_gap_to_the_sampler_is_measured_token_by_token_and_answer_by_answer():
    """Each token is moved by a number of its own; the first update's answers (0 to 3) are not looked at."""
    model, drawn, examples = drawn_examples()
    one = experience(model, examples, torch.arange(1.0, 9.0), updates=2, max_tokens=8, temperature=1.0, device="cpu")
    scored = {}
    for batches, old in zip(one.minibatches, one.old_logp, strict=True):
        for b, logp in zip(batches, old, strict=True):
            scored |= dict(zip(b.index.tolist(), logp.split(b.lengths.tolist()), strict=True))
    moves = {i: [(-1) ** t * (i + 1) / 100 for t in range(len(drawn[i]))] for i in range(8)}
    moves[0][0] = 9.0
    facts = sampler_gap(one, [(scored[i] - torch.tensor(moves[i])).tolist() for i in range(8)])
    tokens = [abs(m) for i in range(4, 8) for m in moves[i]]
    assert facts["sampler_gap_mean"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-4)
    assert facts["sampler_gap_token_max"] == pytest.approx(max(tokens), rel=1e-4)
    assert facts["sampler_gap_max"] == pytest.approx(
        max(abs(sum(moves[i])) / len(moves[i]) for i in range(4, 8)), rel=1e-4
    )


def test_answers_without_an_advantage_are_not_trained_on():
    """Left out one by one, whole micro-batches if need be; of a minibatch of them the shortest stays."""
    _, drawn, examples = drawn_examples()
    A = torch.tensor([0.0, 0.5, 1.0, -1.0, 0.0, 0.0, -0.1, 0.0])
    batches = split_minibatches(examples, A, 2, 10**6)
    assert [sorted(i for b in part for i in b.index.tolist()) for part in batches] == [[1, 2, 3], [6]]
    for part in batches:
        for batch in part:
            assert batch.targets.tolist() == [t for i in batch.index.tolist() for t in drawn[i]]
    nothing = split_minibatches(examples, torch.zeros(8), 4, 10**6)
    assert [[b.index.tolist() for b in part] for part in nothing] == [[[1]], [[3]], [[4]], [[6]]]


def test_another_versions_rollout_is_refused():
    model, _, examples = drawn_examples()
    how = {"updates": 4, "max_tokens": 8}
    state = experience(model, examples, torch.arange(1.0, 9.0), **how, temperature=1.0, device="cpu").state()
    state["tensors"]["old_logp"] = torch.zeros(99)
    with pytest.raises(
        ValueError, match="got a saved rollout with 99 rows of old_logp, want .*; finish the run with that"
    ):
        from_state(state, **how)
