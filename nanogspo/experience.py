"""A rollout that is ready to be trained on: examples, advantages, the plan of its micro-batches, old log-probs.

The plan is a pure function of examples and advantages, so a saved experience is these and its old log-probs; a resumed
run cuts them the same way and goes on in the middle of the rollout.

Two forward passes are skipped because they cannot change the update. An answer with advantage 0 (all of a group whose
rewards are equal) has zero gradient: it is left out of the micro-batches, and still counts in the averages. And the
first update's own forward pass yields the old log-probs of its answers, because no weight has moved yet.

Tests: tests/test_train.py, tests/test_state.py
"""

import dataclasses

import torch
from torch import Tensor

from kernels.seq_logprob import sequence_sums
from nanogspo.packing import Example, MicroBatch, pack, score


@dataclasses.dataclass
class Experience:
    """P x G sampled answers in prompt-major order; N = P * G."""

    examples: list[Example]  # prompt + answer, loss on the answer
    advantages: Tensor  # (N,)
    minibatches: list[list[MicroBatch]]  # one entry per update
    old_logp: list[list[Tensor | None]]  # like minibatches: (S,) log-probs before any update; None: not scored apart
    facts: dict = dataclasses.field(default_factory=dict)  # what metrics.jsonl says about it
    samples: list[dict] = dataclasses.field(default_factory=list)  # rows of samples.jsonl

    def state(self) -> dict:
        """What storage/state.py saves."""
        later = [logp for batches in self.old_logp[1:] for logp in batches]  # the first update has been made
        old_logp = torch.cat([torch.zeros(0), *later])  # (scored tokens of these,)
        tensors = {"advantages": self.advantages, "old_logp": old_logp}
        return {"examples": self.examples, "facts": self.facts, "tensors": tensors}


def experience(
    model,
    examples: list[Example],
    advantages: Tensor,
    *,
    updates: int,
    max_tokens: int,
    temperature: float,
    device: str,
    score_first: bool = True,
) -> Experience:
    """Plan the micro-batches and score them before any update: with the kernels, shapes and dtypes of the updates to
    come, so that the first update's ratios are exactly 1. score_first=False trusts in that and leaves the first out."""
    minibatches = plan(examples, advantages, updates, max_tokens)
    with torch.no_grad():
        old_logp = [
            [score(model, batch.to(device), temperature=temperature)[0].cpu() for batch in batches]
            if update or score_first
            else [None] * len(batches)
            for update, batches in enumerate(minibatches)
        ]
    return Experience(examples, advantages, minibatches, old_logp)


def from_state(saved: dict, *, updates: int, max_tokens: int) -> Experience:
    """The inverse of Experience.state(), but for the first update's old log-probs. ValueError if it does not fit."""
    examples, tensors = saved["examples"], saved["tensors"]
    first, *later = minibatches = plan(examples, tensors["advantages"], updates, max_tokens)
    sizes = [len(b.targets) for batches in later for b in batches]
    if sum(sizes) != len(tensors["old_logp"]):
        raise ValueError(
            f"got a saved rollout with {len(tensors['old_logp'])} old log-probs, want {sum(sizes)}: another version of "
            "this program saved it; finish the run with that one"
        )
    pieces = iter(tensors["old_logp"].split(sizes))
    old_logp = [[None] * len(first), *([next(pieces) for _ in batches] for batches in later)]
    return Experience(examples, tensors["advantages"], minibatches, old_logp, saved["facts"])


def plan(examples: list[Example], advantages: Tensor, updates: int, max_tokens: int) -> list[list[MicroBatch]]:
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
            means = sequence_sums(logp, batch.cu_seqlens) / batch.lengths  # (N,)
            drawn = torch.tensor([sum(sampled[i]) / len(sampled[i]) for i in batch.index.tolist()])  # (N,)
            gap = max(gap, (means - drawn).abs().max().item())
    return gap
