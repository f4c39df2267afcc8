"""lessons/kernels/nf4_v1.py to v3.py give the bits of kernels/nf4.py: the same test for all of them.

Run: python -m pytest tests/test_lesson_kernels_nf4.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import nf4
from lessons.kernels import nf4_v1, nf4_v2, nf4_v3
from tests.strategies import SEEDS
from tests.test_nf4 import BLOCKS, DEVICE, DTYPES, EPS, by_hand, same_bits, weights

SIZES = st.sampled_from([1, 2, 3, 63, 64, 65, 4095, 4096, 4097])
VERSIONS = {"v1": nf4_v1.dequantize, "v2": nf4_v2.dequantize, "v3": nf4_v3.dequantize, "final": nf4.dequantize_nf4}


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("version", VERSIONS)
@given(n=SIZES, block_size=BLOCKS, seed=SEEDS, dtype=st.sampled_from(DTYPES), double_quant=st.booleans())
def test_values_are_those_of_the_bytes(version, n, block_size, seed, dtype, double_quant):
    q = nf4.quantize_nf4(weights(n, seed), block_size=block_size, double_quant=double_quant)
    assert same_bits(VERSIONS[version](q.to(DEVICE), dtype).cpu(), by_hand(q, dtype))


@given(st.sampled_from([64, 640]), st.sampled_from([32, 64]), SEEDS)
def test_v1_takes_the_nearest_value(n, block_size, seed):
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    q, final = nf4_v1.quantize(w, block_size), nf4.quantize_nf4(w, block_size=block_size, double_quant=False)
    assert torch.equal(q.absmax, final.absmax) and q.codes.shape == final.codes.shape
    off, best = ((by_hand(x, torch.float32) - w).abs() for x in (q, final))
    assert (off <= best + 4 * EPS * q.absmax.repeat_interleave(block_size)).all()  # codes differ only near a tie
