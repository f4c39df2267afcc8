"""Ragged examples -> micro-batches the model can run, and the index that takes hidden states to scored tokens.

An example is token ids and a loss mask. A micro-batch is a right-padded rectangle of whole examples whose area,
padding included, stays under a token budget; the examples are sorted by length first, so that little of it is padding.

    tokens   a b c d .        rows, columns say which hidden states predict a scored token (the one *before* it);
             e f g h i        everything else, prompt and padding alike, never reaches the vocabulary head

The same plan is used for every pass over a rollout. GSPO needs that: a matrix product's last bits depend on the shape
of its batch, and at a clip range of 3e-4 such noise is as large as the signal (in bf16, up to 96 % of 64-token answers
fall outside the range from batch shape alone).

Lesson: lessons/10_gspo.md       Tests: tests/test_packing.py
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.seq_logprob import token_logprob
from nanogspo.model import Transformer


@dataclass(frozen=True)
class Example:
    """One row before padding. loss_mask[t] says whether tokens[t] is scored; the first token never can be."""

    tokens: list[int]
    loss_mask: list[bool]

    @classmethod
    def answered(cls, prompt: list[int], answer: list[int]) -> "Example":
        """A prompt and its answer; every token of the answer is scored, its stop token too."""
        return cls(prompt + answer, [False] * len(prompt) + [True] * len(answer))


@dataclass(frozen=True)
class MicroBatch:
    """N examples as a rectangle. S = scored tokens, in example order."""

    tokens: Tensor  # (N, T) int64, right-padded
    rows: Tensor  # (S,) int64, row of the hidden state that predicts each scored token
    columns: Tensor  # (S,) int64, its column
    targets: Tensor  # (S,) int64, the scored tokens
    cu_seqlens: Tensor  # (N + 1,) int64, where each example's scored tokens start in S
    index: Tensor  # (N,) int64, which of the examples given to pack() each row is; stays on the CPU
    real_tokens: int  # without padding

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()  # (N,) scored tokens of each example

    def to(self, device: torch.device | str) -> "MicroBatch":
        moved = {
            name: getattr(self, name).to(device) for name in ("tokens", "rows", "columns", "targets", "cu_seqlens")
        }
        return replace(self, **moved)


def pack(examples: list[Example], *, max_tokens: int, pad_id: int = 0) -> list[MicroBatch]:
    """Cut a list of examples into micro-batches of at most max_tokens, padding included.

    A single example longer than max_tokens gets a micro-batch of its own: nothing is cut and nothing is dropped.
    Raises ValueError for an example without a scored token.
    """
    for i, e in enumerate(examples):
        if len(e.tokens) != len(e.loss_mask) or not any(e.loss_mask[1:]):
            raise ValueError(
                f"example {i}: got {len(e.tokens)} tokens and {sum(e.loss_mask)} scored ones, want at least one scored"
            )
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))
    batches, batch = [], []
    for i in order:  # ascending, so the newest example is the longest of its batch
        if batch and len(examples[i].tokens) * (len(batch) + 1) > max_tokens:
            batches.append(batch)
            batch = []
        batch.append(i)
    return [_micro_batch(examples, batch, pad_id) for batch in (*batches, batch) if batch]


def _micro_batch(examples: list[Example], index: list[int], pad_id: int) -> MicroBatch:
    T = max(len(examples[i].tokens) for i in index)
    tokens = torch.tensor([examples[i].tokens + [pad_id] * (T - len(examples[i].tokens)) for i in index])  # (N, T)
    mask = torch.tensor([examples[i].loss_mask + [False] * (T - len(examples[i].tokens)) for i in index])  # (N, T)
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)  # the token at column + 1 is predicted at column
    counts = mask[:, 1:].sum(1)  # (N,)
    cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0)))  # (N + 1,)
    real = sum(len(examples[i].tokens) for i in index)
    return MicroBatch(tokens, rows, columns, tokens[rows, columns + 1], cu_seqlens, torch.tensor(index), real)


def score(model: Transformer, batch: MicroBatch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy of every scored token under the model: the one scorer behind old and new log-probs.

    returns  (S,) fp32 logp, (S,) fp32 entropy, both differentiable in the model's parameters; (S,) bool, True where the
             token is the model's own first choice
    """
    hidden = model(batch.tokens)[batch.rows, batch.columns]  # (S, C)
    cap = model.config.final_softcap or None
    return token_logprob(hidden, model.head_weight, batch.targets, temperature=temperature, softcap=cap, with_top=True)
