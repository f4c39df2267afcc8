"""A rollout that is ready to be trained on: examples, advantages, micro-batches, old log-probs.

    sampler.py         prompts -> answers -> rewards -> advantages -> experience
    experience         examples and advantages -> micro-batches, their old and their reference's log-probs

Micro-batches are a pure function of examples and advantages, so a saved experience is these and its log-probs; a
resumed run cuts them the same way and goes on in the middle of the rollout.

Two forward passes are skipped because they cannot change the update. An answer with advantage 0 (all of a group whose
rewards are equal) has zero gradient: it is left out of the micro-batches, and still counts in the averages (but not
with --beta: the pull towards the reference does not ask for a reward). And the first update's own forward pass yields
the old log-probs of its answers, because no weight has moved yet.

Tests: tests/test_experience.py, tests/test_train.py, tests/test_state.py
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.seq_logprob import sequence_sums
from nanogspo import distributed
from nanogspo.layers.moe import Routing, flips
from nanogspo.model import Transformer, separate
from nanogspo.objectives import answer_weights
from nanogspo.packing import Example, MicroBatch, pack, score


@dataclasses.dataclass
class Experience:
    """P x G sampled answers in prompt-major order; N = P * G."""

    examples: list[Example]  # prompt + answer, loss on the answer
    advantages: Tensor  # (N,), nan for an answer that is not trained on and counts in no average
    minibatches: list[list[MicroBatch]]  # one entry per update
    # like minibatches: (M,) log-probs before any update, on any device; None: not scored apart
    old_logp: list[list[Tensor | None]]
    facts: dict = dataclasses.field(default_factory=dict)  # what metrics.jsonl says about it
    times: dict = dataclasses.field(default_factory=dict)  # likewise, in the row of its first update; not saved
    samples: list[dict] = dataclasses.field(default_factory=list)  # rows of samples.jsonl
    ref_logp: list[list[Tensor | None]] = dataclasses.field(default_factory=list)  # likewise; None: no reference
    # likewise; (S, L, k) int16 that the old weights sent a packed row's S tokens to; None: no experts, or not scored
    experts: list[list[Tensor | None]] = dataclasses.field(default_factory=list)
    group_size: int = 1

    def weights(self, update: int, average: str, max_new_tokens: int) -> tuple[Tensor, int, float]:
        """(answer_weights (N,) of all answers, 0 outside the update's; how many of its answers are trained on, by all
        processes together; these as a fraction of its answers in the average)."""
        size, weights = len(self.examples) // len(self.minibatches), torch.zeros(len(self.examples))  # (N,)
        rows = slice(update * size, (update + 1) * size)
        lengths = torch.tensor([sum(example.loss_mask) for example in self.examples[rows]])  # (size,)
        counts = ~self.advantages[rows].isnan()  # (size,)
        weights[rows] = answer_weights(lengths, counts, average, max_new_tokens)
        trained = distributed.total(sum(len(batch.index) for batch in self.minibatches[update]))
        return weights, trained, trained / max(int(counts.sum()), 1)

    def state(self) -> dict:
        """What storage/state.py saves."""
        tensors = {"advantages": self.advantages}
        for name in ("old_logp", "ref_logp", "experts"):
            parts = [part for batches in getattr(self, name)[1:] for part in batches if part is not None]
            [later] = distributed.joined([part.cpu() for part in parts])  # without the first update, which is made
            tensors |= {name: torch.cat(later)} if later else {}  # (scored tokens of these,), or (all tokens, L, k)
        shape = {"group_size": self.group_size, "processes": distributed.world()}
        return {"examples": self.examples, "facts": self.facts | shape, "tensors": tensors}


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
    score_old: bool = True,
    reference: AbstractContextManager | None = None,
    group_size: int = 1,
) -> Experience:
    """Cut the rollout into micro-batches and score them before any update.

    With the kernels, shapes and dtypes of the updates to come, so that the first update's ratios are exactly 1.
    score_first=False trusts in that and skips the first update's micro-batches.
    score_old=False scores none: there are no ratios.
    reference  within it, `model` is another policy, by which all micro-batches are scored, too
    group_size  of several processes each cuts and scores its own groups; examples and advantages are those of all
    """
    own = {"group_size": group_size, "rank": distributed.rank()}
    minibatches = split_minibatches(examples, advantages, updates, max_tokens, reference is not None, **own)

    @torch.no_grad()
    def scored(batches: list[MicroBatch], wanted: bool) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Log-probs and experts of each."""
        logp, experts = [None] * len(batches), [None] * len(batches)
        for i, batch in enumerate(batches if wanted else ()):
            routing = Routing(separate)
            logp[i], _, _ = score(model, batch.to(device), temperature=temperature, linear=routing)
            experts[i] = routing.experts
        return logp, experts

    old = [scored(batches, score_old and (update or score_first)) for update, batches in enumerate(minibatches)]
    with reference or nullcontext():
        ref_logp = [scored(batches, reference is not None)[0] for batches in minibatches]
    old_logp, experts = map(list, zip(*old, strict=True))
    how = {"ref_logp": ref_logp, "experts": experts, "group_size": group_size}
    return Experience(examples, advantages, minibatches, old_logp, **how)


def from_state(saved: dict, *, updates: int, max_tokens: int) -> Experience:
    """The inverse of Experience.state(), but for the first update's log-probs. ValueError if it does not fit."""
    examples, tensors, facts = saved["examples"], saved["tensors"], dict(saved["facts"])
    G, world = facts.pop("group_size", 1), facts.pop("processes", 1)
    if world != distributed.world():
        got = f"{distributed.world()} processes with --resume in the middle of a rollout of {world}"
        raise ValueError(f"got {got}, want {world}; between rollouts any number will do")
    how = examples, tensors["advantages"], updates, max_tokens, "ref_logp" in tensors
    by_rank = [split_minibatches(*how, group_size=G, rank=rank) for rank in range(world)]
    minibatches = by_rank[distributed.rank()]

    def cut(name: str, of: str = "targets") -> list[list[Tensor | None]]:
        if name not in tensors:
            return [[None] * len(batches) for batches in minibatches]
        sizes = [[len(getattr(b, of)) for batches in part[1:] for b in batches] for part in by_rank]
        if sum(map(sum, sizes)) != len(tensors[name]):
            got = f"got a saved rollout with {len(tensors[name])} rows of {name}, want {sum(map(sum, sizes))}"
            raise ValueError(f"{got}: another version of this program saved it; finish the run with that one")
        own = tensors[name].split([sum(part) for part in sizes])[distributed.rank()]
        pieces = iter(own.split(sizes[distributed.rank()]))
        return [[None] * len(minibatches[0]), *([next(pieces) for _ in batches] for batches in minibatches[1:])]

    how = {"ref_logp": cut("ref_logp"), "experts": cut("experts", "tokens"), "group_size": G}
    return Experience(examples, tensors["advantages"], minibatches, cut("old_logp"), facts, **how)


def split_minibatches(
    examples: list[Example],
    advantages: Tensor,
    updates: int,
    max_tokens: int,
    with_zeros: bool = False,
    *,
    group_size: int = 1,
    rank: int = 0,
) -> list[list[MicroBatch]]:
    """The examples in `updates` equal minibatches, in order (so whole groups stay together where they can), each cut
    into micro-batches of those with an advantage. `index` counts over the whole rollout.

    with_zeros  also those with an advantage of 0, but not of nan
    group_size  of several processes the one of this rank gets every world-th group: the minibatches of all together
    rank        hold the same answers as those of one process would
    Where none is left, the shortest is kept: an update is made (AdamW's momentum moves on), and has ratios to report.
    """
    size, minibatches, A = len(examples) // updates, [], advantages.tolist()
    for first in range(0, len(examples), size):
        rows = range(first, first + size)
        kept = [i for i in rows if abs(A[i]) > 0 or (with_zeros and A[i] == 0)]  # nan is neither
        kept = kept or [min(rows, key=lambda i: len(examples[i].tokens))]
        kept = [i for i in kept if i // group_size % distributed.world() == rank]
        batches = pack([examples[i] for i in kept], max_tokens=max_tokens)
        minibatches.append([dataclasses.replace(b, index=torch.tensor(kept)[b.index]) for b in batches])
    return minibatches


def sampler_gap(
    experience: Experience, sampled: Sequence[list[float]], experts: Sequence[Tensor | None] = ()
) -> dict[str, float]:
    """How far the log-probs that answers were drawn with are from those they were scored with.

        sampler_gap_max          largest difference of an answer's means: the unit of log(ratio)
        sampler_gap_mean         mean of |difference| over tokens
        sampler_gap_token_max    largest of these
        experts_flipped_sampler  share of (token, layer) with other experts: where there are experts

    About 1e-7 in fp32; in bf16 the first is 1e-3 over long answers and up to 0.08 over a few tokens, which is why the
    one log-prob never stands in for the other. Over all updates but the first, which are scored in any case.
    """
    gaps, means, flipped = [torch.zeros(0)], [torch.zeros(1)], []
    columns = (x[1:] for x in (experience.minibatches, experience.old_logp, experience.experts))
    for batches, *parts in zip(*columns, strict=True):
        for batch, logp, routed in zip(batches, *parts, strict=True):
            if routed is not None:
                drawn = torch.cat([experts[i] for i in batch.index.tolist()])  # (M, L, k)
                flipped.append(flips(routed.cpu()[batch.scored], drawn).float().flatten())  # (M L,)
            drawn = torch.tensor([lp for i in batch.index.tolist() for lp in sampled[i]])  # (M,)
            gaps.append(logp.cpu() - drawn)
            means.append(sequence_sums(gaps[-1], batch.cu_scored) / batch.lengths)  # (N,)
    gap, mean = torch.cat(gaps).abs(), torch.cat(means).abs()
    facts = {"sampler_gap_max": mean.max().item()}
    facts |= {"experts_flipped_sampler": torch.cat(flipped).mean().item()} if flipped else {}
    return facts | (
        {"sampler_gap_mean": gap.mean().item(), "sampler_gap_token_max": gap.max().item()} if len(gap) else {}
    )
