import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.backend import HAVE_TRITON, INTERPRETED
from lessons.exercises import load
from lessons.kernels.count_bytes import triton_bytes

add_normed = load("ex07").add_normed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="needs Triton: pip install triton")


def draw(N, W, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    x, delta, weight = torch.randn(N, W, generator=g), torch.randn(N, W, generator=g), torch.randn(W, generator=g)
    return [t.to(dtype).to(DEVICE) for t in (x, delta, 0.5 * weight)]


@given(
    N=st.sampled_from([0, 1, 3]),
    W=st.sampled_from([1, 7, 64, 129]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31 - 1),
)
def test_matches_float64(N, W, dtype, seed):
    x, delta, weight = draw(N, W, seed, dtype)
    y = add_normed(x, delta, weight, eps=1e-6)
    wide = delta.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    want = x.double() + normed
    # one rounding to the dtype, and a few in fp32 of terms that may cancel
    bound = (2.0**-8 if dtype == torch.bfloat16 else 0) * want.abs() + 30 * 2.0**-23 * (x.double().abs() + normed.abs())
    assert y.dtype == dtype and ((y.double() - want).abs() <= bound).all()


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in the interpreter")
def test_every_number_moves_once():
    x, delta, weight = draw(4, 100, 0, torch.bfloat16)
    with triton_bytes() as traffic:
        add_normed(x, delta, weight, eps=1e-6)
    assert traffic.read <= (2 * 2 * 100 + 2 * 100) * 4  # x and delta; and the weight, once a program
    assert traffic.written == 2 * 100 * 4
