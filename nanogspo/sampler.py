"""Rollouts: problems -> answers -> rewards -> advantages -> experience; and the same greedily, for an evaluation.

    sampler = Sampler(model, chat, task, config, rewards)
    rollout = sampler.rollout(first_problem=0, step=1, ...)      an Experience, ready to be trained on
    sampler.judge(problems, samples, step)                       what the reward functions say, or the task itself

An answer is a Sample, whether it was one turn or an episode of several (episodes.py).

Reading order: Sampler.rollout, round, judge, Group, rollout_facts.      Tests: tests/test_sampler.py, test_train.py
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from nanogspo import distributed
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.episodes import Episode, episode_facts, sample_episodes
from nanogspo.experience import Experience, experience, sampler_gap
from nanogspo.model import Transformer
from nanogspo.objectives import mixed_advantages, total_rewards
from nanogspo.packing import Example
from nanogspo.rollout import Answer, generate
from nanogspo.tasks import rewards as judges
from nanogspo.tasks.base import Problem, Task
from nanogspo.tasks.mix import is_right, own_metrics
from nanogspo.tasks.rewards import Mean, Scores

OnStep = Callable[[int, int], bool]


@dataclasses.dataclass
class Sample:
    """One answer, and what became of it."""

    example: Example  # all its tokens; loss on those that were sampled
    logp: list[float]  # of the sampled tokens
    text: str  # of an episode the last turn
    truncated: bool
    notes: dict = dataclasses.field(default_factory=dict)  # what samples.jsonl says besides
    own: float = math.nan  # the reward that an environment gave
    experts: Tensor | None = dataclasses.field(default=None, compare=False)  # (sampled tokens, L, k): rollout.Answer

    @property
    def ids(self) -> list[int]:
        return [t for t, scored in zip(self.example.tokens, self.example.loss_mask, strict=True) if scored]


@dataclasses.dataclass
class Group:
    """A problem and the G answers to it."""

    problem: Problem
    samples: list[Sample]
    rewards: list[float]  # nan where nobody gave one
    right: list[bool]
    advantages: Tensor  # (G,), nan where there is no reward

    @property
    def teaches(self) -> bool:
        """False: the group's advantages are all 0."""
        return bool((self.advantages.abs() > 0).any())


@dataclasses.dataclass
class Sampler:
    """Everything that answers come from, and who judges them."""

    model: Transformer
    chat: Chat
    task: Task
    config: TrainConfig
    rewards: Callable[[list[judges.Group], int], Scores] | None = None  # None: the task's own
    environments: Callable[[list[dict]], list[dict]] | None = None  # None: an answer is one turn
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by phase, of the rollout at hand

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def rollout(
        self,
        *,
        first_problem: int,
        step: int,
        score_first: bool,
        on_step: OnStep,
        reference: AbstractContextManager | None = None,
    ) -> Experience | None:
        """Problems -> answers -> rewards -> advantages -> micro-batches -> old log-probs. None if on_step ended it.

        first_problem  number of the first of the task's training problems, which also seeds the sampling
        step           the update that is the first to use the rollout: a row of samples.jsonl says so
        score_first, reference    see `experience`
        """
        config, groups, facts, P = self.config, [], [], self.config.prompts_per_rollout
        self.seconds = {"sampling": 0.0, "rewards": 0.0}
        while len(facts) <= config.dynamic_sampling and sum(group.teaches for group in groups) < P:
            found = self.round(first_problem + len(groups), step, on_step)
            if found is None:
                return None
            groups, facts = groups + found[0], [*facts, found[1]]
        kept = choose(groups, P)
        samples, advantages = [s for g in kept for s in g.samples], torch.cat([g.advantages for g in kept])  # (N,)
        if config.mask_truncated:
            advantages[torch.tensor([s.truncated for s in samples])] = torch.nan
        scoring = time.perf_counter()
        rollout = experience(
            self.model,
            [s.example for s in samples],
            advantages,
            updates=config.updates_per_rollout,
            max_tokens=config.micro_batch_tokens,
            temperature=config.temperature,
            device=config.device,
            score_first=score_first,
            score_old=config.algo != "reinforce",
            reference=reference,
            group_size=config.group_size,
        )
        # a function may log a metric of any name
        rollout.facts = merged(facts) | rollout_facts(groups) | {"sampling_rounds": len(facts)}
        if config.algo != "reinforce":
            gaps = distributed.gather(sampler_gap(rollout, *zip(*((s.logp, s.experts) for s in samples), strict=True)))
            rollout.facts |= {name: max(gap.get(name, 0.0) for gap in gaps) for own in gaps for name in own}
        rollout.times = self.times(groups, rollout, time.perf_counter() - scoring)
        columns = samples, [r for g in kept for r in g.rewards], advantages.tolist()
        for s, reward, A in zip(*columns, strict=True):
            prompt = self.chat.tokenizer.decode(s.example.tokens[: s.example.loss_mask.index(True)], False)
            row = {"step": step, "prompt": prompt, "answer": s.text, "reward": reward, "advantage": A}
            row |= {"truncated": s.truncated, "length": len(s.logp)}
            rollout.samples.append(row | s.notes | row)  # a function may log a column of any name
        return rollout

    def times(self, groups: list[Group], rollout: Experience, scoring: float) -> dict[str, float]:
        """What metrics.jsonl says of the rollout's speed: tokens sampled a second, tokens scored a second (those of a
        reference beside them count as time only), and the seconds of the reward functions."""
        sampled = sum(len(s.logp) for group in groups for s in group.samples)
        pairs = zip(rollout.minibatches, rollout.old_logp, strict=True)
        scored = sum(len(b.tokens) for part, old in pairs for b, lp in zip(part, old, strict=True) if lp is not None)
        times = {"sampling_tokens_per_s": sampled / self.seconds["sampling"], "reward_s": self.seconds["rewards"]}
        return times | ({"scoring_tokens_per_s": scored / scoring} if scored else {})

    def round(self, first_problem: int, step: int, on_step: OnStep) -> tuple[list[Group], dict[str, float]] | None:
        """Problems -> answers -> rewards -> advantages, for prompts_per_rollout problems, and the rewards' facts."""
        config = self.config
        problems = [self.task.train_problem(first_problem + i, config.seed) for i in range(config.prompts_per_rollout)]
        with self.timed("sampling"):
            samples, facts = self.answers(problems, config.group_size, config.temperature, first_problem, on_step)
        if samples is None:
            return None
        with self.timed("rewards"):
            scores, totals, right = self.judge(problems, samples, step)
        advantages = mixed_advantages(
            torch.tensor(scores.values, dtype=torch.float64),
            scores.weights,
            config.group_size,
            normalize_first=config.reward_mix == "normalize_then_sum",
            divide_by_std=config.divide_by_std,
        ).float()  # (N,)
        columns, G = (samples, totals, right, advantages), config.group_size
        parts = [[column[p * G : (p + 1) * G] for column in columns] for p in range(len(problems))]
        return [Group(problems[p], *part) for p, part in enumerate(parts)], scores.facts | facts

    def answers(
        self, problems: list[Problem], group_size: int, temperature: float, first: int, on_step: OnStep, most: int = 0
    ) -> tuple[list[Sample] | None, dict[str, float]]:
        """group_size answers to each problem, at most `most` decoded at a time, and facts about episodes. (None, {}) if
        on_step ended it early. Of several processes each answers its own problems, and all get all answers.

        first   number of the first problem, which decides the random numbers of its answers
        """
        numbers = distributed.mine(len(problems))
        own, how = [problems[i] for i in numbers], (group_size, temperature, [first + i for i in numbers])
        parts = distributed.gather(self.own_answers(own, *how, on_step, most) if own else ([], {}))
        if any(samples is None for samples, _ in parts):
            return None, {}
        samples, facts = zip(*parts, strict=True)
        return whole(samples, group_size), merged(facts)

    def own_answers(
        self,
        problems: list[Problem],
        group_size: int,
        temperature: float,
        numbers: list[int],
        on_step: OnStep,
        most: int,
    ) -> tuple[list[Sample] | None, dict[str, float]]:
        """`answers` of one process. numbers: of each problem."""
        config = self.config
        if self.environments:
            how = {"group_size": group_size, "temperature": temperature, "rollout_rows": most or config.rollout_rows}
            how = dataclasses.replace(config, **how)
            rows = [row_of(problem) for problem in problems]
            where = {"first_prompt": numbers[0], "every": distributed.world()}
            episodes = sample_episodes(self.model, self.chat, self.environments, rows, how, **where, on_step=on_step)
            return (None, {}) if episodes is None else ([of_episode(e) for e in episodes], episode_facts(episodes))
        prompts = [self.chat.prompt(p) for p in problems]
        how = {"group_size": group_size, "temperature": temperature, "max_new_tokens": config.max_new_tokens}
        how |= {"eos_ids": self.chat.tokenizer.eos_ids, "seed": config.seed}
        how["streams"] = [(n, 0, 0) for n in numbers]
        answers = generate(self.model, prompts, **how, max_rows=most or config.rollout_rows, on_step=on_step)
        if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):
            return None, {}
        return [of_answer(self.chat, prompts[a.prompt_index], a) for a in answers], {}

    def judge(
        self, problems: list[Problem], samples: list[Sample], step: int
    ) -> tuple[Scores, list[float], list[bool]]:
        """What the reward functions, the environment, or else the task say of N = P * G answers to P problems: their
        values, the totals, and which answers are right. Notes of the reward functions go into the samples'. Of several
        processes each asks about its own problems, and all get all values."""
        G, own = len(samples) // len(problems), distributed.mine(len(problems))
        given = [s for p in own for s in samples[p * G : (p + 1) * G]]
        parts = distributed.gather(self.own_scores([problems[p] for p in own], given, G, step))
        columns = (whole([getattr(part, name) for part in parts], G) for name in ("values", "notes"))
        (values, notes), weights = columns, max((part.weights for part in parts), key=len)
        scores = Scores(values, weights, merged([part.facts for part in parts]), notes)
        for sample, note in zip(samples, notes, strict=False):  # without reward functions there are none
            sample.notes |= note
        totals = total_rewards(torch.tensor(scores.values, dtype=torch.float64), scores.weights).tolist()
        asked, texts = [p for p in problems for _ in range(G)], [s.text for s in samples]
        scores.facts.update(own_metrics(self.task, asked, texts))
        columns = zip(asked, texts, totals, strict=True)
        task = None if self.environments else self.task  # a conversation may be about something else than its question
        return scores, totals, [is_right(task, p, text, scores.fraction(total)) for p, text, total in columns]

    def own_scores(self, problems: list[Problem], samples: list[Sample], G: int, step: int) -> Scores:
        """What `judge` says, by one process: values and notes."""
        if not problems:
            return Scores([], [], {}, [])
        if self.rewards:
            parts = [(problem, samples[p * G : (p + 1) * G]) for p, problem in enumerate(problems)]
            whole = (lambda s: s.text) if self.environments else (lambda s: self.chat.tokenizer.decode(s.ids))
            groups = [group_of(problem, list(map(whole, own)), [s.ids for s in own]) for problem, own in parts]
            scores = self.rewards(groups, step)
        else:
            scores = Scores([[] for _ in samples], [], {}, [])
        if self.environments:
            scores = scores.beside([s.own for s in samples])
        elif not self.rewards:
            scores = scores.beside([self.task.reward(problems[n // G], s.text) for n, s in enumerate(samples)])
        return scores


def of_answer(chat: Chat, prompt: list[int], answer: Answer) -> Sample:
    facts = answer.logp, chat.text(answer.tokens), not answer.finished
    return Sample(Example.answered(prompt, answer.tokens), *facts, experts=answer.experts)


def of_episode(e: Episode) -> Sample:
    notes = {"messages": e.messages, **({"failed": {"environment": e.failed}} if e.failed else {})}
    experts = torch.cat(e.experts) if e.experts else None  # (sampled tokens, L, k)
    return Sample(Example(e.tokens, e.loss_mask), e.logp, e.text, e.truncated, notes, e.reward, experts)


def row_of(problem: Problem) -> dict:
    """The columns of a problem, for reward functions and environments."""
    return problem.row or {"prompt": problem.messages, "answer": problem.answer}


def group_of(problem: Problem, texts: list[str], ids: list[list[int]]) -> judges.Group:
    """The answers to a problem as reward functions are given them."""
    return judges.Group(row_of(problem)["prompt"], row_of(problem), texts, ids)


def choose(groups: list[Group], count: int) -> list[Group]:
    """The first `count` groups with different rewards, or, where there are fewer, some without; as they were sampled.

    Source: dynamic sampling, DAPO, arXiv:2503.14476, equation 11. Elsewhere: verl filter_groups, which ends the run
    where too few have been found; ms-swift dynamic_sample.
    """
    first = sorted(range(len(groups)), key=lambda i: not groups[i].teaches)[:count]  # sorted() keeps equals in order
    return [groups[i] for i in sorted(first)]


def rollout_facts(groups: list[Group]) -> dict[str, float]:
    """What metrics.jsonl says of a rollout: of all that was sampled, since groups with a spread are no fair sample."""
    table = torch.tensor([group.rewards for group in groups])  # (groups, G)
    there = ~table.isnan()  # (groups, G)
    some = [row[kept] for row, kept in zip(table, there, strict=True)]
    spreads = [row.std() for row in some if len(row) > 1]
    samples, N = [sample for group in groups for sample in group.samples], table.numel()
    problems = [group.problem for group in groups for _ in group.samples]
    right = [float(r) for group in groups for r in group.right]
    facts = {
        "reward": table.nanmean().item(),
        "reward_std": torch.stack(spreads).mean().item() if spreads else 0.0,
        "exact": sum(right) / N,
        "effective_groups": sum(group.teaches for group in groups),
        "zero_spread_frac": sum(len(row) < 2 or bool(row.max() == row.min()) for row in some) / len(groups),
        "truncated_frac": sum(s.truncated for s in samples) / N,
        "answer_len": sum(len(s.logp) for s in samples) / N,
        **per_task("reward", problems, table.flatten().tolist()),
        **per_task("exact", problems, right),
    }
    return facts if there.all() else facts | {"unrewarded_frac": 1 - there.float().mean().item()}


def per_task(name: str, problems: list[Problem], values: list[float]) -> dict[str, float]:
    """The mean of each task's values, under NAME/TASK, where several tasks are mixed; nan is left out."""
    found = {}
    for problem, value in zip(problems, values, strict=True):
        if problem.task and value == value:
            found.setdefault(f"{name}/{problem.task}", []).append(value)
    return {key: sum(numbers) / len(numbers) for key, numbers in found.items()}


def whole(parts: Sequence[list], G: int) -> list:
    """What several processes have of their groups of G, in the order of all groups."""
    groups = distributed.in_order([[part[n : n + G] for n in range(0, len(part), G)] for part in parts])
    return [x for group in groups for x in group]


def merged(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The rewards' facts of several rounds or processes: counts are added, Means are of all their numbers."""
    found = {key: [facts[key] for facts in rounds if key in facts] for facts in rounds for key in facts}
    return {k: sum(v) if isinstance(v[0], int) else Mean.of(v) for k, v in found.items()}
