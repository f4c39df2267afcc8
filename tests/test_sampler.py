"""nanogspo/sampler.py: answers find their problems, rewards their answers, and groups without a spread are replaced.

Run: python -m pytest tests/test_sampler.py
"""

import math

import pytest
import torch

from nanogspo import tiny
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.objectives import total_rewards
from nanogspo.rollout import generate
from nanogspo.sampler import Sampler
from nanogspo.tasks import get_task
from nanogspo.tasks.rewards import Scores
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
    assert sampler.rollout(first_problem=3, on_step=lambda done, length: True, **how) is None


def test_right_is_what_every_reward_gives_a_1_but_for_rounding():
    scores = Scores([], [1.5, 1.5, 0.8], {}, [])
    total = total_rewards(torch.tensor([[math.nan, math.nan, 1.0]], dtype=torch.float64), scores.weights).item()
    assert total / 3.8 < 1 and scores.fraction(total) == 1
    assert scores.fraction(0.999 * 3.8) < 1
