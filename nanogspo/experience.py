"""A rollout that is ready to be trained on: examples, advantages, the plan of its micro-batches, old log-probs.

The plan is a pure function of the examples, so a saved experience is its examples and two tensors; a resumed run cuts
them the same way and goes on in the middle of the rollout.

Tests: tests/test_train.py, tests/test_runstate.py
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
    old_logp: list[list[Tensor]]  # like minibatches: (S,) log-probs before any of the updates
    facts: dict = dataclasses.field(default_factory=dict)  # what metrics.jsonl says about it
    samples: list[dict] = dataclasses.field(default_factory=list)  # rows of samples.jsonl

    def state(self) -> dict:
        """What runstate.save_state stores."""
        old_logp = torch.cat([logp for batches in self.old_logp for logp in batches])  # (all scored tokens,)
        tensors = {"advantages": self.advantages, "old_logp": old_logp}
        return {"examples": self.examples, "facts": self.facts, "tensors": tensors}


def experience(model, examples: list[Example], advantages: Tensor, **how) -> Experience:
    """Plan the micro-batches and score them once: with the kernels, shapes and dtypes of the updates to come, so that
    the first update's ratios are exactly 1. how: updates, max_tokens, temperature, device."""
    minibatches = plan(examples, how["updates"], how["max_tokens"])
    with torch.no_grad():
        old_logp = [
            [score(model, batch.to(how["device"]), temperature=how["temperature"])[0].cpu() for batch in batches]
            for batches in minibatches
        ]
    return Experience(examples, advantages, minibatches, old_logp)


def from_state(saved: dict, *, updates: int, max_tokens: int) -> Experience:
    """The inverse of Experience.state()."""
    minibatches = plan(saved["examples"], updates, max_tokens)
    pieces = iter(saved["tensors"]["old_logp"].split([len(b.targets) for batches in minibatches for b in batches]))
    old_logp = [[next(pieces) for _ in batches] for batches in minibatches]
    return Experience(saved["examples"], saved["tensors"]["advantages"], minibatches, old_logp, saved["facts"])


def plan(examples: list[Example], updates: int, max_tokens: int) -> list[list[MicroBatch]]:
    """The examples in `updates` equal minibatches, in order (so whole groups stay together where they can), each cut
    into micro-batches. `index` counts over the whole rollout."""
    size, minibatches = len(examples) // updates, []
    for first in range(0, len(examples), size):
        batches = pack(examples[first : first + size], max_tokens=max_tokens)
        minibatches.append([dataclasses.replace(b, index=b.index + first) for b in batches])
    return minibatches


def sampler_gap(experience: Experience, sampled: list[list[float]]) -> float:
    """Largest difference between the mean log-prob an answer was drawn with and the one it was scored with: the unit of
    log(ratio). About 1e-7 in fp32; in bf16 1e-3 over long answers and up to 0.08 over a few tokens, which is why the
    first never stands in for the second."""
    gap = 0.0
    for batches, old in zip(experience.minibatches, experience.old_logp, strict=True):
        for batch, logp in zip(batches, old, strict=True):
            means = sequence_sums(logp, batch.cu_seqlens) / batch.lengths  # (N,)
            drawn = torch.tensor([sum(sampled[i]) / len(sampled[i]) for i in batch.index.tolist()])  # (N,)
            gap = max(gap, (means - drawn).abs().max().item())
    return gap
