"""What is measured on problems and rows that are never trained on: right answers, and the loss on given ones.

    examine          a task's problems, answered greedily
    hold_out         which rows of a file are never trained on
    held_out_loss    these, as SFT scores them: loss and token accuracy
    sample_answers   a few of these rows answered, for people to read beside what was asked for

Tests: tests/test_evaluation.py, tests/test_tasks.py (hold_out), tests/test_train.py
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from nanogspo import distributed
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.model import Transformer
from nanogspo.packing import pack, score
from nanogspo.rollout import generate
from nanogspo.run import planner
from nanogspo.run.log import wilson_interval
from nanogspo.sampler import Sampler, per_task
from nanogspo.tasks.base import Problem, smallest_hashes
from nanogspo.tasks.jsonl import Example

# The number of the first held-out problem: beyond every training problem. It decides random numbers, and what an
# environment asks that draws its questions by the seed
EXAM_STREAM = 2**40


def examine(
    sampler: Sampler, problems: list[Problem], on_step: Callable[[int, int], bool], step: int = 0
) -> tuple[int, dict[str, float]]:
    """(how many problems are answered right, greedily; with reward functions or an environment the mean reward and its
    standard error, with --eval-samples pass@1 and pass@K, for several tasks each one's fraction). Nothing is right if
    on_step ended it early."""
    config, tokens = sampler.config, [len(sampler.chat.prompt(problem)) for problem in problems]
    # no more memory than a rollout: there a group shares its prompt, here every row has its own
    slots = config.max_episode_tokens if config.environment else max(tokens) + config.max_new_tokens - 1
    rows = max(1, planner.cache_slots(config, max(tokens), distributed.world()) // slots)
    samples, facts = sampler.answers(problems, 1, 0.0, EXAM_STREAM, on_step, most=rows)
    if samples is None:
        return 0, {}
    if K := config.eval_samples:
        tries, _ = sampler.answers(problems, K, config.temperature, EXAM_STREAM, on_step, most=rows)
        if tries is None:
            return 0, {}
        _, _, hits = sampler.judge(problems, tries, step)
        solved = sum(any(hits[first : first + K]) for first in range(0, len(hits), K))
        low, high = wilson_interval(solved, len(problems))
        facts |= {"pass_at_1": sum(hits) / len(hits), f"pass_at_{K}": solved / len(problems)}
        facts |= {f"pass_at_{K}_low": low, f"pass_at_{K}_high": high}
    scores, totals, right = sampler.judge(problems, samples, step)
    if sampler.rewards or sampler.environments:
        some = torch.tensor([total for total in totals if total == total], dtype=torch.float64)
        spread = some.std().item() if len(some) > 1 else math.nan
        facts |= {"reward": some.mean().item(), "reward_se": spread / max(1, len(some)) ** 0.5}
    facts |= per_task("exact", problems, list(map(float, right)))
    return sum(right), {f"eval_{name}": value for name, value in (scores.facts | facts).items()}


def hold_out(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples): `count` different rows are held out, those with the smallest hashes.

    What repeats a held-out row, in whatever form it is written or under another system prompt, is on neither side: its
    answer would be known by heart.
    """
    rows = {}  # hash -> line
    for example in examples:
        rows.setdefault(example.row, example.line)
    chosen = set(smallest_hashes(rows, count))
    held_out = [e for e in examples if e.row in chosen and e.line == rows[e.row]]
    known = {tuple(e.tokens) for e in held_out}
    train = [e for e in examples if e.row not in chosen and tuple(e.tokens) not in known]
    if not train:
        raise ValueError(f"got --eval-size {len(chosen)} with rows that all give the same tokens as these; want fewer")
    return train, held_out


def split(config: TrainConfig, examples: list[Example]) -> tuple[TrainConfig, list[Example], list[Example]]:
    """hold_out, and the configuration with what only the file decides: eval_size, and steps where there are epochs."""
    train, held_out = hold_out(examples, config.eval_size)
    count = len({example.line for example in held_out})
    if count:
        repeats = len(examples) - len(train) - len(held_out)
        note = f" and {repeats} examples left out that repeat them" if repeats else ""
        print(f"{count} rows held out{note}: {len(train)} examples to train on")
    config = dataclasses.replace(config, eval_size=count)
    if config.epochs:
        steps = max(1, math.ceil(round(config.epochs * len(train) / config.batch_size, 6)))
        print(f"{config.epochs:g} epochs of {len(train)} examples, {config.batch_size} an update: {steps} updates")
        config = dataclasses.replace(config, steps=steps, epochs=0.0)
    return config, train, held_out


@torch.no_grad()
def held_out_loss(
    model: Transformer, examples: list[Example], config: TrainConfig, stop: object = False
) -> tuple[float, float]:
    """(mean negative log-prob, fraction of first choices) over all scored tokens, without LoRA dropout; nan, nan if it
    ended early because stop became true."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # tokens, log-probs, right ones
    own = [examples[n] for n in distributed.mine(len(examples))]
    for batch in pack(own, max_tokens=config.micro_batch_tokens):
        if stop:
            sums.fill_(math.nan)
            break
        logp, _, right = score(model, batch.to(config.device))  # (M,), (M,)
        sums += torch.tensor([len(logp), logp.double().sum().item(), right.sum().item()], dtype=torch.float64)
    model.train(was_training)
    tokens, logp, right = distributed.total(sums).tolist()
    return -logp / tokens, right / tokens


def sample_answers(
    model: Transformer, chat: Chat, examples: list[Example], config: TrainConfig, on_step=None, count: int = 3
) -> list[dict]:
    """Greedy answers to the first prompts that leave room for one: rows of samples.jsonl, with the row's own answer as
    "reference" and no reward. Of a conversation the first scored turn is asked for."""
    room = model.config.max_positions - config.max_new_tokens
    asked = [(e, start) for e in examples if (start := e.loss_mask.index(True, 1)) <= room][:count]
    prompts, text = [e.tokens[:start] for e, start in asked], chat.tokenizer.decode
    if not prompts:
        return []
    how = {"max_new_tokens": config.max_new_tokens, "temperature": 0.0, "eos_ids": chat.tokenizer.eos_ids}
    answers = generate(model, prompts, **how, on_step=on_step)
    rows = []
    for (e, start), prompt, answer in zip(asked, prompts, answers, strict=True):
        end = next((t for t in range(start, len(e.tokens)) if not e.loss_mask[t]), len(e.tokens))
        row = {"prompt": text(prompt, skip_special_tokens=False), "answer": chat.text(answer.tokens), "reward": None}
        row |= {"reference": text(e.tokens[start:end]), "truncated": not answer.finished, "length": len(answer.tokens)}
        rows.append(row)
    return rows
