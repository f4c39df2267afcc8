"""A rollout that is ready to be trained on: examples, advantages, micro-batches, old log-probs.

    sample_rollout     prompts -> answers -> rewards -> advantages -> experience
    experience         examples and advantages -> micro-batches and their old log-probs

Micro-batches are a pure function of examples and advantages, so a saved experience is these and its old log-probs; a
resumed run cuts them the same way and goes on in the middle of the rollout.

Two forward passes are skipped because they cannot change the update. An answer with advantage 0 (all of a group whose
rewards are equal) has zero gradient: it is left out of the micro-batches, and still counts in the averages. And the
first update's own forward pass yields the old log-probs of its answers, because no weight has moved yet.

Tests: tests/test_experience.py, tests/test_train.py, tests/test_state.py
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.seq_logprob import sequence_sums
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.episodes import Episode, episode_facts, sample_episodes
from nanogspo.model import Transformer
from nanogspo.objectives import group_advantages
from nanogspo.packing import Example, MicroBatch, pack, score
from nanogspo.rollout import generate
from nanogspo.tasks.base import Problem, Task


@dataclasses.dataclass
class Experience:
    """P x G sampled answers in prompt-major order; N = P * G."""

    examples: list[Example]  # prompt + answer, loss on the answer
    advantages: Tensor  # (N,)
    minibatches: list[list[MicroBatch]]  # one entry per update
    old_logp: list[
        list[Tensor | None]
    ]  # like minibatches: (M,) log-probs before any update, on any device; None: not scored apart
    facts: dict = dataclasses.field(default_factory=dict)  # what metrics.jsonl says about it
    samples: list[dict] = dataclasses.field(default_factory=list)  # rows of samples.jsonl

    def state(self) -> dict:
        """What storage/state.py saves."""
        later = [logp for batches in self.old_logp[1:] for logp in batches]  # the first update has been made
        old_logp = torch.cat([torch.zeros(0), *(logp.cpu() for logp in later)])  # (scored tokens of these,)
        tensors = {"advantages": self.advantages, "old_logp": old_logp}
        return {"examples": self.examples, "facts": self.facts, "tensors": tensors}


def sample_rollout(
    model: Transformer,
    chat: Chat,
    task: Task,
    config: TrainConfig,
    *,
    first_problem: int,
    step: int,
    score_first: bool,
    on_step: Callable[[int, int], bool],
    environments: Callable[[list[dict]], list[dict]] | None = None,
) -> Experience | None:
    """Prompts -> answers -> rewards -> advantages -> micro-batches -> old log-probs. None if on_step ended it early.

    first_problem  number of the first of the task's training problems, which also seeds the sampling
    step           the update that is the first to use the rollout: a row of samples.jsonl says so
    score_first    see `experience`
    environments   of several turns, run/environments.py; each answer is then an episode, rewarded by its environment
    """
    problems = [task.train_problem(first_problem + i, config.seed) for i in range(config.prompts_per_rollout)]
    if environments:
        how = {"first_prompt": first_problem, "on_step": on_step}
        episodes = sample_episodes(model, chat, environments, [*map(environment_row, problems)], config, **how)
        return episodes and episode_rollout(model, chat, episodes, config, step, score_first)
    prompts = [chat.prompt(p) for p in problems]
    answers = generate(
        model,
        prompts,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_ids=chat.tokenizer.eos_ids,
        seed=config.seed,
        first_prompt=first_problem,
        max_rows=config.rollout_rows,
        on_step=on_step,
    )
    if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):
        return None
    asked = [problems[a.prompt_index] for a in answers]
    texts = [chat.text(a.tokens) for a in answers]
    rewards = [task.reward(p, text) for p, text in zip(asked, texts, strict=True)]
    table = torch.tensor(rewards).view(-1, config.group_size)  # (P, G)
    advantages = group_advantages(table, divide_by_std=config.divide_by_std).flatten()  # (N,)
    examples = [Example.answered(prompts[a.prompt_index], a.tokens) for a in answers]
    rollout = experience(
        model,
        examples,
        advantages,
        updates=config.updates_per_rollout,
        max_tokens=config.micro_batch_tokens,
        temperature=config.temperature,
        device=config.device,
        score_first=score_first,
    )
    N = len(answers)
    rollout.facts = {
        "reward": table.mean().item(),
        "reward_std": table.std(dim=1).mean().item(),
        "exact": sum(task.exact(p, text) for p, text in zip(asked, texts, strict=True)) / N,
        "zero_spread_frac": (table.amax(1) == table.amin(1)).float().mean().item(),
        "truncated_frac": sum(not a.finished for a in answers) / N,
        "answer_len": sum(len(a.tokens) for a in answers) / N,
        "sampler_gap_max": sampler_gap(rollout, [a.logp for a in answers]),
    }
    read = [chat.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    for a, text, reward, A in zip(answers, texts, rewards, advantages.tolist(), strict=True):
        row = {"step": step, "prompt": read[a.prompt_index], "answer": text, "reward": reward}
        rollout.samples.append(row | {"advantage": A, "truncated": not a.finished, "length": len(a.tokens)})
    return rollout


def environment_row(problem: Problem) -> dict:
    return problem.row or {"prompt": problem.messages, "answer": problem.answer}


def episode_rollout(
    model: Transformer, chat: Chat, episodes: list[Episode], config: TrainConfig, step: int, score_first: bool
) -> Experience:
    """Episodes -> advantages -> micro-batches -> old log-probs."""
    rewards = torch.tensor([e.reward for e in episodes]).view(-1, config.group_size)  # (P, G)
    table = rewards.where(~rewards.isnan(), rewards.nanmean(1, keepdim=True)).nan_to_num()  # (P, G)
    advantages = group_advantages(table, divide_by_std=config.divide_by_std)  # (P, G)
    advantages = advantages.where(~rewards.isnan(), 0.0).flatten()  # (N,)
    rollout = experience(
        model,
        [Example(e.tokens, e.loss_mask) for e in episodes],
        advantages,
        updates=config.updates_per_rollout,
        max_tokens=config.micro_batch_tokens,
        device=config.device,
        temperature=config.temperature,
        score_first=score_first,
    )
    rollout.facts = {
        "reward": table.mean().item(),
        "reward_std": table.std(dim=1).mean().item(),
        "exact": (table == 1).float().mean().item(),
        "zero_spread_frac": (table.amax(1) == table.amin(1)).float().mean().item(),
        "truncated_frac": sum(e.truncated for e in episodes) / len(episodes),
        "answer_len": sum(sum(e.loss_mask) for e in episodes) / len(episodes),
        "sampler_gap_max": sampler_gap(rollout, [e.logp for e in episodes]),
        **episode_facts(episodes),
    }
    for e, A in zip(episodes, advantages.tolist(), strict=True):
        read = chat.tokenizer.decode(e.tokens[: e.loss_mask.index(True)], skip_special_tokens=False)
        row = {
            "step": step,
            "prompt": read,
            "answer": e.text,
            "reward": None if e.failed or not e.rewards else e.reward,
        }
        row |= {"advantage": A, "truncated": e.truncated, "length": sum(e.loss_mask), "messages": e.messages}
        rollout.samples.append(row | ({"failed": e.failed} if e.failed else {}))
    return rollout


def experience(
    model: Transformer,
    examples: list[Example],
    advantages: Tensor,
    *,
    updates: int,
    max_tokens: int,
    temperature: float,
    device: str,
    score_first: bool = True,
) -> Experience:
    """Cut the rollout into micro-batches and score them before any update.

    With the kernels, shapes and dtypes of the updates to come, so that the first update's ratios are exactly 1.
    score_first=False trusts in that and skips the first update's micro-batches.
    """
    minibatches = split_minibatches(examples, advantages, updates, max_tokens)
    with torch.no_grad():
        old_logp = [
            [score(model, batch.to(device), temperature=temperature)[0] for batch in batches]
            if update or score_first
            else [None] * len(batches)
            for update, batches in enumerate(minibatches)
        ]
    return Experience(examples, advantages, minibatches, old_logp)


def from_state(saved: dict, *, updates: int, max_tokens: int) -> Experience:
    """The inverse of Experience.state(), but for the first update's old log-probs. ValueError if it does not fit."""
    examples, tensors = saved["examples"], saved["tensors"]
    first, *later = minibatches = split_minibatches(examples, tensors["advantages"], updates, max_tokens)
    sizes = [len(b.targets) for batches in later for b in batches]
    if sum(sizes) != len(tensors["old_logp"]):
        raise ValueError(
            f"got a saved rollout with {len(tensors['old_logp'])} old log-probs, want {sum(sizes)}: another version of "
            "this program saved it; finish the run with that one"
        )
    pieces = iter(tensors["old_logp"].split(sizes))
    old_logp = [[None] * len(first), *([next(pieces) for _ in batches] for batches in later)]
    return Experience(examples, tensors["advantages"], minibatches, old_logp, saved["facts"])


def split_minibatches(
    examples: list[Example], advantages: Tensor, updates: int, max_tokens: int
) -> list[list[MicroBatch]]:
    """The examples in `updates` equal minibatches, in order (so whole groups stay together where they can), each cut
    into micro-batches of those with an advantage. `index` counts over the whole rollout.

    Where none has one, the shortest is kept: an update is made (AdamW's momentum moves on), and has ratios to report.
    """
    size, minibatches = len(examples) // updates, []
    for first in range(0, len(examples), size):
        rows = range(first, first + size)
        kept = [i for i in rows if advantages[i] != 0] or [min(rows, key=lambda i: len(examples[i].tokens))]
        batches = pack([examples[i] for i in kept], max_tokens=max_tokens)
        minibatches.append([dataclasses.replace(b, index=torch.tensor(kept)[b.index]) for b in batches])
    return minibatches


def sampler_gap(experience: Experience, sampled: list[list[float]]) -> float:
    """Largest difference between the mean log-prob an answer was drawn with and the one it was scored with: the unit of
    log(ratio). About 1e-7 in fp32; in bf16 1e-3 over long answers and up to 0.08 over a few tokens, which is why the
    first never stands in for the second. Over all updates but the first, which are scored in any case."""
    gap = 0.0
    for batches, old in zip(experience.minibatches[1:], experience.old_logp[1:], strict=True):
        for batch, logp in zip(batches, old, strict=True):
            means = sequence_sums(logp.cpu(), batch.cu_scored) / batch.lengths  # (N,)
            drawn = torch.tensor([sum(sampled[i]) / len(sampled[i]) for i in batch.index.tolist()])  # (N,)
            gap = max(gap, (means - drawn).abs().max().item())
    return gap
