import pytest
import torch

from kernels.nf4 import NF4
from lessons.exercises import load

normal_float = load("ex10").normal_float


def test_four_bits_are_the_codebook():
    """To 2e-7: the published numbers were computed in fp32."""
    want = torch.tensor(NF4, dtype=torch.float64)
    torch.testing.assert_close(normal_float(4), want, rtol=0, atol=4e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_any_number_of_bits(bits):
    values = normal_float(bits)
    assert values.shape == (2**bits,) and (values.diff() > 0).all()
    assert values[0] == -1.0 and values[-1] == 1.0
    assert values[2 ** (bits - 1) - 1] == 0.0  # one value less on the left


@pytest.mark.parametrize("bits", [3, 4])
def test_better_than_evenly_spaced(bits):
    """On normal weights in blocks of 256. Not so with 6 bits: equally likely is not least error, and the tails pay."""
    w = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = w / w.abs().amax(1, keepdim=True)
    errors = []
    for values in (normal_float(bits), torch.linspace(-1, 1, 2**bits, dtype=torch.float64)):
        code = torch.bucketize(w, (values[1:] + values[:-1]) / 2)
        errors.append((values[code] - w).square().mean())
    assert errors[0] < 0.9 * errors[1]
