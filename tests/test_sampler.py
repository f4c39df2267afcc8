"""nanogspo/sampler.py: answers find their problems, rewards their answers, and groups without a spread are replaced.

Run: python -m pytest tests/test_sampler.py
"""

import math
from types import SimpleNamespace

import pytest
import torch

from nanogspo import tiny
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.objectives import total_rewards
from nanogspo.packing import Example
from nanogspo.rollout import generate
from nanogspo.sampler import Sample, Sampler
from nanogspo.tasks import get_task
from nanogspo.tasks.base import Problem
from nanogspo.tasks.rewards import Scores, load
from tests import oracles


def test_a_rollout_is_what_its_problems_and_its_place_decide():
    """The second rollout of a run: its own problems, its own random numbers, rewards and advantages group by group."""
    task = get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    sizes = {"prompts_per_rollout": 3, "group_size": 4, "updates_per_rollout": 2, "max_new_tokens": 4}
    config = TrainConfig(**sizes, temperature=0.9, seed=7, device="cpu", rollout_rows=8)
    how = {"step": 9, "score_first": True}
    sampler = Sampler(model, Chat(tokenizer, {}), task, config)
    rollout = sampler.rollout(first_problem=3, on_step=lambda done, length: False, **how)
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
    assert 0 < rollout.facts["sampler_gap_mean"] <= rollout.facts["sampler_gap_token_max"] < 1e-4
    assert rollout.facts["effective_groups"] == sum(any(advantages[i : i + 4]) for i in (0, 4, 8)) > 0
    assert set(rollout.times) == {"sampling_tokens_per_s", "scoring_tokens_per_s", "reward_s"}
    assert (
        min(rollout.times["sampling_tokens_per_s"], rollout.times["scoring_tokens_per_s"])
        > 0
        <= rollout.times["reward_s"]
    )
    assert sampler.rollout(first_problem=3, on_step=lambda done, length: True, **how) is None


def test_right_is_what_every_reward_gives_a_1_but_for_rounding():
    scores = Scores([], [1.5, 1.5, 0.8], {}, [])
    total = total_rewards(torch.tensor([[math.nan, math.nan, 1.0]], dtype=torch.float64), scores.weights).item()
    assert total / 3.8 < 1 and scores.fraction(total) == 1
    assert scores.fraction(0.999 * 3.8) < 1


def asked_of(rewards=None, environments=None, own=math.nan):
    """(the groups that reward functions were given, what judge says) of a thought and an answer."""
    text, groups = "<think>a</think><answer>b</answer>", []
    tokenizer, _ = tiny.describe("".join(sorted(set(text))))
    chat, ids = Chat(tokenizer, {}), tokenizer.encode(text)
    sample = Sample(Example.answered([0], ids), [0.0] * len(ids), chat.text(ids), False, own=own)

    def judge(asked, step):
        groups.extend(asked)
        return Scores([[1.0]], [1.0], {}, [{}])

    problem = Problem("?", [{"role": "user", "content": "?"}], "<answer>b</answer>")
    task = SimpleNamespace(reward=lambda p, said: float(said == p.answer), exact=lambda p, said: said == "never")
    sampler = Sampler(None, chat, task, TrainConfig(), judge if rewards else None, environments)
    return groups, sampler.judge([problem], [sample], 1)


def test_reward_functions_read_the_chain_of_thought_and_those_by_name_what_is_behind_it():
    [group], _ = asked_of(rewards=True)
    assert group.answers == ["<think>a</think><answer>b</answer>"]
    assert load("format")(group, {})["values"] == [1] and load("regex:think")(group, {})["values"] == [0]
    assert load("exact")(group, {})["values"] == [1]
    assert asked_of()[1][1] == [1.0]  # a task's own


def test_what_is_right_in_an_environment_is_the_environments_to_say():
    assert asked_of(environments=print, own=1.0)[1][2] == [True]
    assert asked_of(environments=print, own=0.9)[1][2] == [False]
    assert asked_of()[1][2] == [False]  # the task's `exact`
