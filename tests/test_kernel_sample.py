"""kernels/sample.py against a float64 cumulative distribution, and its reference against nanogspo/rollout.py.

Run: python -m pytest tests/test_kernel_sample.py
"""

import math
import re
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sample as module
from kernels.sample import sample
from nanogspo import rollout
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
EPS = torch.finfo(torch.float32).eps


def draw(N, V, seed, spread, banned=0.0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=g) * spread
    hidden = torch.rand(N, V, generator=g) < banned
    hidden[torch.arange(N), torch.randint(0, V, (N,), generator=g)] = False  # one token of each row may come
    uniform = torch.rand(N, generator=g, dtype=torch.float64)
    return logits.masked_fill(hidden, -math.inf).to(DEVICE), uniform.to(DEVICE)


def check(logits, uniform, temperature, token, logp):
    """The uniform lies in the token's part of the distribution, give or take the rounding of fp32 scores and sums: a
    score of size z is off by EPS z, and every p by as much of itself."""
    z = logits.double() / temperature
    p = z.softmax(-1)
    at = token[:, None]
    mine, end = p.gather(1, at), p.cumsum(1).gather(1, at)
    finite = z.masked_fill(z.isinf(), 0.0).abs().amax()
    off = EPS * (16 + 2 * finite.item())
    assert (mine > 0).all()
    assert (uniform[:, None] < end + off).all() and (uniform[:, None] >= end - mine - off).all()
    want = z.log_softmax(-1).gather(1, at).squeeze(1)
    assert logp.dtype == torch.float32 and ((logp - want).abs() <= off).all()


@settings(max_examples=40)
@given(
    N=st.sampled_from([1, 3]),
    V=st.sampled_from([1, 2, 255, 256, 257, 4096, 4097, 9000]),
    seed=SEEDS,
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    banned=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    backend=st.sampled_from(["torch", "triton"]),
)
def test_inverts_the_distribution(N, V, seed, spread, banned, temperature, backend):
    logits, uniform = draw(N, V, seed, spread, banned)
    check(logits, uniform, temperature, *sample(logits, uniform, temperature, backend=backend))


@given(seed=SEEDS, V=st.sampled_from([1, 256, 300, 1000]), temperature=st.sampled_from([1.0, 0.7]))
def test_the_reference_is_what_a_rollout_draws(seed, V, temperature):
    """To the bit: tokens and log-probs on a CPU do not change when a rollout calls this file."""
    logits, uniform = draw(5, V, seed, 3.0, 0.3)
    for a, b in zip(
        sample(logits, uniform, temperature, backend="torch"), rollout.sample(logits, uniform, temperature), strict=True
    ):
        assert torch.equal(a, b)


@BACKENDS
def test_the_ends_of_the_uniform(backend):
    """0 is the first token that can come, 1 - 2^-53 the last: blocks and tokens of probability 0 on both sides."""
    logits = torch.full((2, 1000), -math.inf, device=DEVICE)
    logits[:, 300], logits[:, 600] = 1.0, 2.0
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    token, logp = sample(logits, uniform, backend=backend)
    assert token.tolist() == [300, 600]
    check(logits, uniform, 1.0, token, logp)


@BACKENDS
def test_a_uniform_at_the_border_belongs_to_the_token_behind_it(backend):
    """1024 equal tokens: sums are exact. At k / 1024 the sum up to token k - 1 is not above the target."""
    logits, at = torch.zeros(5, 1024, device=DEVICE), torch.tensor([0, 1, 255, 256, 768], device=DEVICE)
    assert torch.equal(sample(logits, at.double() / 1024, backend=backend)[0], at)


@BACKENDS
def test_the_largest_uniform_draws_what_can_be_drawn(backend):
    """Sums in another order may fall short of the total: then the last token that can come, none behind it."""
    logits, _ = draw(200, 600, 4, 10.0)
    logits[:, 500:] = -math.inf
    uniform = torch.full((200,), 1 - 2**-53, dtype=torch.float64, device=DEVICE)
    assert (sample(logits, uniform, backend=backend)[0] < 500).all()


@BACKENDS
def test_a_token_far_below_the_maximum(backend):
    """Its block's exp would all be 0 next to the row's maximum; its log-prob keeps its digits."""
    logits = torch.full((1, 600), -70.0, device=DEVICE)
    logits[0, 10] = 0.0
    uniform = torch.tensor([1 - 2**-53], dtype=torch.float64, device=DEVICE)
    token, logp = sample(logits, uniform, backend=backend)
    assert abs(logp.item() - (logits[0, token.item()].item())) <= 70 * EPS


def test_rows_do_not_know_each_other():
    logits, uniform = draw(4, 4500, 3, 2.0)
    whole = sample(logits, uniform, backend="triton")
    for n in range(4):
        alone = sample(logits[n : n + 1], uniform[n : n + 1], backend="triton")
        assert all(torch.equal(a, b[n : n + 1]) for a, b in zip(alone, whole, strict=True))


@BACKENDS
def test_frequencies_are_probabilities(backend):
    """Evenly spaced uniforms: each token comes within one of n p times."""
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]], device=DEVICE).repeat(200, 1)
    uniform = (torch.arange(200, dtype=torch.float64, device=DEVICE) + 0.5) / 200
    token, _ = sample(logits, uniform, 0.8, backend=backend)
    want = (logits[0].double() / 0.8).softmax(-1) * 200
    assert ((torch.bincount(token, minlength=4) - want).abs() <= 1).all()


@BACKENDS
def test_strided_rows_nan_and_no_rows(backend):
    logits, uniform = draw(3, 700, 0, 1.0)
    wide = torch.cat((logits, torch.full_like(logits, math.nan)), dim=1)[:, :700]
    for a, b in zip(sample(wide, uniform, backend=backend), sample(logits, uniform, backend=backend), strict=True):
        assert torch.equal(a, b)
    token, _ = sample(logits * math.nan, uniform, backend=backend)
    assert ((token >= 0) & (token < 700)).all()  # any token, but one that exists
    assert [x.shape for x in sample(logits[:0], uniform[:0], backend=backend)] == [(0,), (0,)]


def test_a_tile_of_blocks_is_cut_where_the_row_ends():
    with patch.object(module, "TILE", 2):
        logits, uniform = draw(2, 256 * 3 + 5, 1, 1.0)
        check(logits, uniform, 1.0, *sample(logits, uniform, backend="triton"))


@pytest.mark.parametrize(
    ("logits", "uniform", "temperature", "message"),
    [
        (torch.zeros(3), torch.zeros(3).double(), 1.0, "got logits (3,) and uniform (3,), want (N, V) with V > 0"),
        (torch.zeros(3, 2), torch.zeros(2).double(), 1.0, "got logits (3, 2) and uniform (2,), want"),
        (torch.zeros(3, 0), torch.zeros(3).double(), 1.0, "got logits (3, 0) and uniform (3,), want"),
        (torch.zeros(3, 2).bfloat16(), torch.zeros(3).double(), 1.0, "got logits of torch.bfloat16"),
        (torch.zeros(3, 2), torch.zeros(3), 1.0, "uniform of torch.float32, want float32 with stride 1"),
        (torch.zeros(2, 3).T, torch.zeros(3).double(), 1.0, "strides (1, 3), uniform"),
        (
            torch.zeros(3, 2),
            torch.zeros(3).double(),
            0.0,
            "got temperature 0.0, want a number above 0; take the argmax",
        ),
    ],
)
def test_says_what_is_wrong(logits, uniform, temperature, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(logits, uniform, temperature)
