"""kernels/prepacked.py against the layers it stands for.

Run: python -m pytest tests/test_prepacked.py
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.prepacked import FP32_FROM, Layer, PrepackedLinear, can_prepack, can_prepack_head, padded_rows
from nanogspo import tiny
from nanogspo.fast.fused_linear import FusedLinears
from tests.strategies import SEEDS

BF16 = torch.ones(1, 1, dtype=torch.bfloat16)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN on this machine")
DTYPES = [torch.float32] + [torch.bfloat16] * can_prepack(BF16)  # oneDNN multiplies bf16 where the CPU has units for it


@st.composite
def groups(draw, dtypes=DTYPES):
    """One to three layers of one x: (in, [Layer]). Some with a bias, some with an adapter of their own rank."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    dtype, wide = draw(st.sampled_from(dtypes)), draw(st.sampled_from([1, 3, 16, 33, 64]))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        out, r = draw(st.sampled_from([1, 5, 16, 48])), draw(st.sampled_from([0, 0, 1, 4]))
        weight = torch.randn(out, wide, generator=g).to(dtype)
        bias = torch.randn(out, generator=g).to(dtype) if draw(st.booleans()) else None
        A, B = (torch.randn(r, wide, generator=g), torch.randn(out, r, generator=g)) if r else (None, None)
        layers.append(Layer(weight, bias, A, B, draw(st.sampled_from([0.5, 2.0]))))
    return wide, layers


def truth(x, layer):
    """y in float64, and the size of what is added up."""
    y, size = F.linear(x.double(), layer.weight.double()), F.linear(x.double().abs(), layer.weight.double().abs())
    if layer.bias is not None:
        y, size = y + layer.bias.double(), size + layer.bias.double().abs()
    if layer.A is not None:
        A, B = layer.A.double(), layer.B.double() * layer.scale
        y, size = y + x.double() @ A.T @ B.T, size + x.double().abs() @ A.abs().T @ B.abs().T
    return y, size


@pytest.mark.isa
@given(group=groups(), rows=st.sampled_from([(1,), (2, 3), (33,), (3, 11), (0,)]), seed=SEEDS)
def test_the_same_as_the_layers(group, rows, seed):
    """fp32: the order of sums. bf16: the result is rounded; and A, B and x A.T, by half an eps each."""
    wide, layers = group
    x = torch.randn(*rows, wide, generator=torch.Generator().manual_seed(seed)).to(layers[0].weight.dtype)
    outs = PrepackedLinear(layers).linear(x)
    assert len(outs) == len(layers)
    for layer, got in zip(layers, outs, strict=True):
        want, size = truth(x, layer)
        assert got.shape == want.shape and got.dtype == x.dtype
        eps = torch.finfo(x.dtype).eps
        assert ((got.double() - want).abs() <= (8 * eps if x.dtype == torch.float32 else 2.1 * eps) * size).all()


@given(group=groups([torch.float32]))
def test_a_copy_that_carries_no_gradient(group):
    wide, layers = group
    x = torch.randn(3, wide)
    layers[0].weight.requires_grad_(True)
    layer_group = PrepackedLinear(layers)
    before = [y.clone() for y in layer_group.linear(x)]
    with torch.no_grad():
        layers[0].weight.add_(1)
        after = layer_group.linear(x)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("dtype", "wide", "layer", "head"),
    [
        (torch.float64, 512, False, False),
        (torch.float32, FP32_FROM - 1, False, False),
        (torch.float32, FP32_FROM, True, True),
        (torch.float16, 512, False, True),
        (torch.bfloat16, 2, can_prepack(BF16), True),
        (torch.int8, 512, False, False),
    ],
)
def test_what_is_prepacked(dtype, wide, layer, head):
    weight = torch.ones(2, wide, dtype=dtype)
    assert (can_prepack(weight), can_prepack_head(weight)) == (layer, head)
    assert can_prepack(weight.to("meta")) == layer  # the planner asks about weights that are not there yet
    elsewhere = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=weight.shape)
    assert not can_prepack(elsewhere) and not can_prepack_head(elsewhere)


def test_the_tiny_model_is_not_prepacked():
    """Its layers are faster as they are, and oneDNN would keep 0.6 MB for each number of rows."""
    fused = FusedLinears(tiny.build("abc", seed=0)[1])
    assert set(fused._fused.values()) == {None} and fused._head is None


def test_rows_are_padded_by_an_eighth_at_most():
    for n in range(2049):
        assert n <= padded_rows(n) <= 1.125 * n and padded_rows(padded_rows(n)) == padded_rows(n)
    assert [padded_rows(n) for n in (0, 1, 15, 16, 17, 32, 33, 512)] == [0, 1, 15, 16, 18, 32, 36, 512]


class Heights(TorchDispatchMode):
    """The numbers of rows that oneDNN's matmul is called with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_linear_pointwise" in str(func):
            self.seen.add(args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


def test_few_matmuls_are_compiled():
    """Rows of a rollout finish one by one. oneDNN keeps a compiled matmul for each number of them."""
    layers, x = PrepackedLinear([Layer(torch.ones(2, 3))]), torch.ones(128, 3)
    with torch.no_grad(), Heights() as heights:
        for n in range(1, len(x) + 1):
            layers.linear(x[None, :n])
    assert len(heights.seen) == 16 + 3 * 8  # 1 to 16, and eight in each of (16, 32], (32, 64], (64, 128]
