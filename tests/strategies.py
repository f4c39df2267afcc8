"""What hypothesis draws: shapes, scales and seeds. torch draws the numbers: fast, and failures shrink well."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31 - 1)
CLIPS = st.sampled_from([(3e-4, 4e-4), (0.2, 0.27), (0.0, 0.0)])  # GSPO's, GRPO's, and nothing allowed


@dataclass(frozen=True)
class Answers:
    """N ragged answers, packed end to end, float64."""

    logp: Tensor  # (S,)
    old_logp: Tensor  # (S,)
    cu_seqlens: Tensor  # (N + 1,) int64
    advantages: Tensor  # (N,)

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()  # (N,)

    def sums(self, values: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values.split(self.lengths.tolist())])  # (N,)

    def padded(self, values: Tensor, filler: float) -> Tensor:
        """(S,) -> (N, T), right-padded: the layout TRL and verl work in."""
        parts = values.split(self.lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filler)  # (N, T)


@st.composite
def answers(draw) -> Answers:
    # 1 token: the ratio is the token's; 50: the length matters. Policies from unmoved to far apart, so that with any of
    # CLIPS some answers are clipped on either side and some are not.
    lengths = torch.tensor(draw(st.lists(st.sampled_from([1, 2, 3, 7, 50]), min_size=1, max_size=6)))  # (N,)
    moved = draw(st.sampled_from([0.0, 3e-4, 0.02, 0.3, 2.0]))
    g = torch.Generator().manual_seed(draw(SEEDS))
    S = int(lengths.sum())
    old_logp = torch.randn(S, generator=g, dtype=torch.float64).abs().neg()  # (S,)
    drift = torch.randn(len(lengths), generator=g, dtype=torch.float64).repeat_interleave(lengths)  # (S,)
    noise = torch.randn(S, generator=g, dtype=torch.float64)  # (S,)
    advantages = torch.randn(len(lengths), generator=g, dtype=torch.float64)  # (N,)
    if draw(st.booleans()):
        advantages[0] = 0.0  # an answer of a group of equal rewards
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])  # (N + 1,)
    return Answers(old_logp + moved * (drift + noise), old_logp, cu_seqlens, advantages)


@dataclass(frozen=True)
class Head:
    """A vocabulary head and the rows it scores, float64; .to(dtype) rounds them."""

    hidden: Tensor  # (N, C)
    weight: Tensor  # (V, C)
    targets: Tensor  # (N,) int64
    temperature: float
    softcap: float | None

    @property
    def options(self) -> dict[str, float | None]:
        return {"temperature": self.temperature, "softcap": self.softcap}

    def to(self, dtype: torch.dtype) -> "Head":
        return Head(self.hidden.to(dtype), self.weight.to(dtype), self.targets, self.temperature, self.softcap)

    @property
    def magnitude(self) -> float:
        """max_{n, v} sum_c |hidden[n, c] weight[v, c]| / temperature: eps times this is what a logit may be off by."""
        return (self.hidden.double().abs() @ self.weight.double().abs().T).max().item() / self.temperature


@st.composite
def heads(
    draw, *, rows=(1, 2, 3, 4, 5, 9), vocabulary=(1, 2, 7, 15, 16, 17, 33, 48), margins=(0, 0, 12, 20, -60)
) -> Head:
    """Sizes on both sides of the tiles that tests/test_seq_logprob.py sets: 16 columns and 4 rows.

    margin lifts (or sinks) the target of every second row by so much: at 12 and more p_y > 0.999 in all of them, where
    textbook softmax gradients lose their digits; at -60 the target is where no sampled token ever is.
    """
    N, V, C = draw(st.sampled_from(rows)), draw(st.sampled_from(vocabulary)), draw(st.sampled_from([1, 3, 8, 33]))
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))  # standard deviation of the dot products
    margin = draw(st.sampled_from(margins))
    g = torch.Generator().manual_seed(draw(SEEDS))
    hidden = torch.randn(N, C + 1, generator=g, dtype=torch.float64)  # (N, C + 1)
    weight = torch.randn(V, C + 1, generator=g, dtype=torch.float64) * spread / C**0.5  # (V, C + 1)
    targets = torch.randint(0, V, (N,), generator=g)  # (N,)
    targets[N // 2] = V - 1  # the last column of the last tile
    if margin:
        # One token takes it all: the last column of hidden is on in every second row, and only this token reads it.
        targets[::2] = targets[0]
        weight[:, -1], hidden[:, -1] = 0.0, 0.0
        weight[targets[0], -1], hidden[::2, -1] = 1.0, margin + 10.0 * spread * (margin > 0)
    softcap = draw(st.sampled_from([None, None, 30.0, 5.0]))
    return Head(hidden, weight, targets, draw(st.sampled_from([1.0, 1.0, 0.7, 2.0])), softcap)
