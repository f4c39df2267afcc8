"""Ragged examples -> micro-batches the model can run, and the index that takes hidden states to scored tokens.

An example is token ids and a loss mask. A micro-batch is one row of tokens without padding: examples stand side by
side, and examples that begin with the same prompt share it (kernels/attention.py says who sees whom).

    tokens       p0 p1 p2 | p3 a0 a1 | p3 b0 b1 b2 | ...     a prompt p0 .. p3 and its answers a0 a1 a2, b0 .. b3
    positions     0  1  2    3  4  5    3  4  5  6
    predicts                a0 a1 a2   b0 b1 b2 b3            the hidden state *before* a scored token scores it

The prompt's last token stands once for each answer, because it predicts another token for each; no example's last
token stands anywhere, because it predicts nothing. 8 answers of 64 tokens to a prompt of 40 are 551 tokens and not
832. Everything that is not scored never reaches the vocabulary head.

The same plan is used for every pass over a rollout. GSPO needs that: a matrix product's last bits depend on the shape
of its batch, and at a clip range of 3e-4 such noise is as large as the signal (in bf16, up to 96 % of 64-token answers
fall outside the range from batch shape alone).

Lessons: lessons/12_gspo.md, 13_packing.md       Tests: tests/test_packing.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention import Segments
from kernels.seq_logprob import token_logprob
from nanogspo.model import Linear, Transformer, separate

# Prompts shorter than this are repeated: a piece of attention more a prompt and layer costs a CPU about 0.1 ms, as much
# as some 10 tokens of a small model
SHARE_PROMPT_FROM = 16


@dataclass(frozen=True)
class Example:
    """Token ids of one example. loss_mask[t] says whether tokens[t] is scored; the first token never can be."""

    tokens: list[int]
    loss_mask: list[bool]

    @classmethod
    def answered(cls, prompt: list[int], answer: list[int]) -> "Example":
        """A prompt and its answer; every token of the answer is scored, its stop token too."""
        return cls(prompt + answer, [False] * len(prompt) + [True] * len(answer))

    @property
    def prefix(self) -> list[int]:
        """The prompt without its last token: what stands before the token that predicts the first scored one."""
        return self.tokens[: self.loss_mask.index(True, 1) - 1]


@dataclass(frozen=True)
class MicroBatch:
    """N examples in one row of S tokens. M = scored tokens, in the order of the examples."""

    tokens: Tensor  # (S,) int64
    segments: Segments  # of S tokens
    scored: Tensor  # (M,) int64, the hidden state that predicts each scored token
    targets: Tensor  # (M,) int64, the scored tokens
    cu_scored: Tensor  # (N + 1,) int64, where each example's scored tokens start in M
    index: Tensor  # (N,) int64, which of the examples given to pack() each is; stays on the CPU

    @property
    def lengths(self) -> Tensor:
        return self.cu_scored.diff()  # (N,) scored tokens of each example

    def to(self, device: torch.device | str) -> "MicroBatch":
        """All numbers in one copy, which the CPU does not wait for: from pinned memory, to a GPU."""
        if torch.device(device).type == self.tokens.device.type:
            return self
        names, s = ("tokens", "scored", "targets", "cu_scored"), self.segments
        parts = [getattr(self, name) for name in names] + [s.cu_seqlens, s.prefix, s.positions]
        numbers = torch.cat([part.long() for part in parts])
        if torch.device(device).type == "cuda":
            numbers = numbers.pin_memory()
        *moved, cu_seqlens, prefix, positions = numbers.to(device, non_blocking=True).split([len(x) for x in parts])
        segments = Segments(cu_seqlens.int(), prefix.int(), positions, s.lengths, s.parents)
        return replace(self, segments=segments, **dict(zip(names, moved, strict=True)))


def pack(examples: list[Example], *, max_tokens: int) -> list[MicroBatch]:
    """Cut a list of examples into micro-batches of at most max_tokens.

    Neighbours that begin with the same prompt share it. A single example longer than max_tokens gets a micro-batch of
    its own: nothing is cut and nothing is dropped. Raises ValueError for an example without a scored token.
    """
    for i, e in enumerate(examples):
        if len(e.tokens) != len(e.loss_mask) or not any(e.loss_mask[1:]):
            raise ValueError(
                f"example {i}: got {len(e.tokens)} tokens and {sum(e.loss_mask)} scored ones, want at least one scored"
            )
    batches: list[list[list[int]]] = []  # batches of families of examples
    used = max_tokens
    for family in _families(examples):
        prefix, begun = len(examples[family[0]].prefix) if len(family) > 1 else 0, False
        for i in family:
            new = len(examples[i].tokens) - 1 - prefix
            if used + new + prefix * (not begun) > max_tokens:
                batches.append([])
                used, begun = 0, False
            if not begun:
                batches[-1].append([])
                used, begun = used + prefix, True
            batches[-1][-1].append(i)
            used += new
    return [_micro_batch(examples, batch) for batch in batches]


def _families(examples: list[Example]) -> Iterator[list[int]]:
    """Examples that share a prompt, then those that share none. By length, so that equal ones are neighbours: attention
    takes them in one call."""
    length = lambda i: (len(examples[i].tokens), i)  # noqa: E731
    alone, first = [], 0
    while first < len(examples):
        prefix, last = examples[first].prefix, first + 1
        while len(prefix) >= SHARE_PROMPT_FROM and last < len(examples) and examples[last].prefix == prefix:
            last += 1
        if last - first > 1:
            yield sorted(range(first, last), key=length)
        else:
            alone.append(first)
        first = last
    for i in sorted(alone, key=length):
        yield [i]


def _micro_batch(examples: list[Example], families: list[list[int]]) -> MicroBatch:
    tokens, lengths, parents, scored, targets, counts = [], [], [], [], [], []
    for family in families:
        prefix, parent = [], -1
        if len(family) > 1:  # one example of a family by itself shares with nobody
            prefix, parent = examples[family[0]].prefix, len(lengths)
            tokens += prefix
            lengths.append(len(prefix))
            parents.append(-1)
        for e in (examples[i] for i in family):
            own, mask = e.tokens[len(prefix) :], e.loss_mask[len(prefix) :]
            hits = [t for t in range(len(own) - 1) if mask[t + 1]]  # the token at t + 1 is predicted at t
            scored += [len(tokens) + t for t in hits]
            targets += [own[t + 1] for t in hits]
            counts.append(len(hits))
            tokens += own[:-1]
            lengths.append(len(own) - 1)
            parents.append(parent)
    cu_scored = torch.tensor([0, *counts]).cumsum(0)  # (N + 1,)
    index = torch.tensor([i for family in families for i in family])  # (N,)
    columns = (torch.tensor(x) for x in (scored, targets))
    return MicroBatch(torch.tensor(tokens), Segments.build(lengths, parents), *columns, cu_scored, index)


def score(
    model: Transformer, batch: MicroBatch, *, temperature: float = 1.0, linear: Linear = separate
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy of every scored token under the model: the one scorer behind old and new log-probs.

    linear   as in Transformer.forward: `separate`, or a Routing around it, which keeps or replays experts
    returns  (M,) fp32 logp, (M,) fp32 entropy, both differentiable in the model's parameters; (M,) bool, True where the
             token is the model's own first choice
    """
    hidden = model(batch.tokens[None], segments=batch.segments, linear=linear)[0, batch.scored]  # (M, C)
    cap = model.config.final_softcap or None
    return token_logprob(hidden, model.head_weight, batch.targets, temperature=temperature, softcap=cap, with_top=True)
