"""nanogspo/experience.py: answers find their problems, minibatches their answers, and a saved rollout is cut as before.

Run: python -m pytest tests/test_experience.py
"""

import pytest
import torch

from nanogspo import tiny
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.experience import experience, from_state, sample_rollout, split_minibatches
from nanogspo.packing import Example, score
from nanogspo.rollout import generate
from nanogspo.tasks import get_task
from tests import oracles


def test_a_rollout_is_what_its_problems_and_its_place_decide():
    """The second rollout of a run: its own problems, its own random numbers, rewards and advantages group by group."""
    task = get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    sizes = {"prompts_per_rollout": 3, "group_size": 4, "updates_per_rollout": 2, "max_new_tokens": 4}
    config = TrainConfig(**sizes, temperature=0.9, seed=7, device="cpu", rollout_rows=8)
    how = {"step": 9, "score_first": True}
    rollout = sample_rollout(
        model, Chat(tokenizer, {}), task, config, first_problem=3, on_step=lambda done, length: False, **how
    )
    problems = [task.train_problem(n, 7) for n in (3, 4, 5)]
    answers = generate(
        model,
        [tokenizer.encode(problem.text) for problem in problems],
        group_size=4,
        max_new_tokens=4,
        temperature=0.9,
        eos_ids=tokenizer.eos_ids,
        seed=7,
        first_prompt=3,
    )
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    rewards = [task.reward(problems[i // 4], text) for i, text in enumerate(texts)]
    advantages = sum(oracles.group_advantages([rewards[i : i + 4] for i in range(0, 12, 4)]), [])
    assert [row["step"] for row in rollout.samples] == [9] * 12
    assert [row["prompt"] for row in rollout.samples] == [problems[i // 4].text for i in range(12)]
    assert [row["answer"] for row in rollout.samples] == texts
    assert [row["reward"] for row in rollout.samples] == rewards
    assert [row["truncated"] for row in rollout.samples] == [not answer.finished for answer in answers]
    assert rollout.advantages.tolist() == pytest.approx(advantages, abs=1e-5)
    assert rollout.facts["reward"] == pytest.approx(sum(rewards) / 12)
    assert rollout.facts["answer_len"] == sum(len(answer.tokens) for answer in answers) / 12
    assert rollout.facts["sampler_gap_max"] < 1e-5
    stop = {"first_problem": 3, "on_step": lambda done, length: True}
    assert sample_rollout(model, Chat(tokenizer, {}), task, config, **stop, **how) is None


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
        ValueError, match="got a saved rollout with 99 old log-probs, want .*; finish the run with that"
    ):
        from_state(state, **how)
