import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.backend import HAVE_TRITON
from lessons.exercises import load

pytestmark = [
    pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy tells of the 0 * inf behind a row's end
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
row_entropy = load("ex06").row_entropy


def a_batch(seed: int, N: int, V: int, scale: float) -> torch.Tensor:
    return (scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def in_float64(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.double().softmax(1)).sum(1)


@given(
    seed=st.integers(0, 2**31 - 1),
    N=st.sampled_from([1, 3]),
    V=st.sampled_from([1, 2, 1023, 1024, 1025, 3000]),  # both sides of a tile, and a third one
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_it_is_the_entropy(seed, N, V, scale):
    logits = a_batch(seed, N, V, scale)
    # log s and a / s, each below log V = 8, a few roundings of 2**-24 each; x - m is off by 2**-24 of |x|, 150 at most
    torch.testing.assert_close(row_entropy(logits).double(), in_float64(logits), rtol=0, atol=4e-5)


def test_the_maximum_may_come_first_or_last():
    logits = torch.arange(3000.0, device=DEVICE).repeat(2, 1) / 100  # rises: every tile moves the maximum
    logits[1] = logits[1].flip(0)  # falls: no tile but the first does
    torch.testing.assert_close(row_entropy(logits).double(), in_float64(logits), rtol=0, atol=4e-5)


def test_large_logits_do_not_overflow():
    logits = a_batch(seed=0, N=2, V=1500, scale=1.0)
    torch.testing.assert_close(row_entropy(logits + 500), row_entropy(logits), rtol=0, atol=1e-3)


def test_what_everybody_knows():
    equal, certain = torch.zeros(1, 1500, device=DEVICE), torch.zeros(1, 1500, device=DEVICE)
    certain[0, 1300] = 200
    assert row_entropy(equal).item() == pytest.approx(math.log(1500), abs=1e-5)
    assert row_entropy(certain).item() == pytest.approx(0, abs=1e-6)


def test_rows_of_a_wider_matrix_and_bf16():
    wide = a_batch(seed=1, N=4, V=2000, scale=3.0).bfloat16()
    view = wide[:, 100:1200]
    torch.testing.assert_close(row_entropy(view).double(), in_float64(view), rtol=0, atol=4e-5)
