"""kernels/moe.py against float64, and laws of rows that are sorted and put back.

Sizes: tiles are 16 or 64 rows, 32 columns of a result in fp32, 32 numbers of a sum; so widths on both sides of them,
odd ones and 1, and counts of rows of an expert from 0 on. Memory that a kernel is to write is NaN before (torch fills
it so in deterministic mode), and so is everything around a strided input.

Sizes: tiles are 16 or 64 rows, 32 columns of a result in fp32, 32 numbers of a sum; so widths on both sides, odd ones
ones and 1, and counts of rows of an expert from 0 on. Memory that a kernel is to write is NaN before (torch fills it so
in deterministic mode), and so is everything around a strided input.

Run: python -m pytest tests/test_moe_kernel.py
"""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels.int8 import quantize_int8
from kernels.moe import BLOCK_M, FEW_M, combine, grouped_linear, sort_by_expert, spread
from kernels.nf4 import quantize_nf4
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def routed(T: int, k: int, E: int, seed: int, few: int = 10**9) -> torch.Tensor:
    """(T, k) experts of each token, all different: of the first `few` experts (k at least)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, min(E, max(k, few)), generator=generator).argsort(1)[:, :k].to(DEVICE)


def numbers(*shape: int, seed: int, dtype=torch.float32, strided: bool = False) -> torch.Tensor:
    x = torch.full((*shape[:-1], shape[-1] + 3), math.nan, dtype=dtype)
    x[..., 1:-2] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x[..., 1:-2] if strided else x[..., 1:-2].contiguous()).to(DEVICE)


def run(backend, x, weights, w, index, direction):
    """out (T, F) and the gradients of x, each weight and w, of sum over layers of combine(...) times direction."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights, w)]
    x, *weights, w = leaves
    groups = sort_by_expert(index, len(weights[0]))
    ys = grouped_linear(spread(x, groups), weights, groups, backend=backend)
    out = sum(combine(y, w, groups) * (i + 1) for i, y in enumerate(ys))
    return out.detach(), torch.autograd.grad((out * direction).sum(), leaves)


def oracle(x, weights, w, index, direction):
    """The same in float64, a loop over tokens and their experts, with torch's gradients of a plain sum of products."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights, w)]
    x, *weights, w = leaves
    rows = []
    for t, experts in enumerate(index.tolist()):
        parts = [w[t, j] * (i + 1) * (W[e] @ x[t]) for j, e in enumerate(experts) for i, W in enumerate(weights)]
        rows.append(sum(parts))
    out = torch.stack(rows)
    return out.detach(), torch.autograd.grad((out * direction.double()).sum(), leaves)


@settings(phases=[Phase.explicit, Phase.generate], max_examples=12)
@given(
    T=st.sampled_from([1, 3, 17, 70]), k=st.sampled_from([1, 2]), E=st.sampled_from([2, 5]),
    few=st.sampled_from([1, 9]), K=st.sampled_from([1, 31, 33]), F=st.sampled_from([1, 33, 65]), seed=SEEDS,
    strided=st.booleans(), pair=st.booleans(), turned=st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_float64(backend, T, k, E, few, K, F, seed, strided, pair, turned):
    """Sums of at most n = 2 k max(T, K, F) products of numbers around 1, each weighed at most 6: errors of rounding
    grow like sqrt(n), so 8 eps sqrt(n) of the largest entry leaves room; a lost row is as large as an entry."""
    x = numbers(T, K, seed=seed, strided=strided)
    weights = [numbers(E, *((K, F) if turned else (F, K)), seed=seed + i, strided=strided) for i in range(1 + pair)]
    weights = [W.mT for W in weights] if turned else weights
    w, direction = numbers(T, k, seed=seed + 3), numbers(T, F, seed=seed + 4)
    index = routed(T, k, E, seed, few)
    out, grads = run(backend, x, weights, w, index, direction)
    want, theirs = oracle(x, weights, w, index, direction)
    bound = 8 * EPS * math.sqrt(2 * k * max(T, K, F))
    for got, truth in ((out, want), *zip(grads, theirs, strict=True)):
        assert (got.double() - truth).abs().max() <= bound * truth.abs().max().clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_rounds_each_result_once(backend):
    """Rows, weights and results in bf16, sums in fp32: a number of y is within half an ulp, 2^-9, of the float64 sum of
    the same bf16 numbers, and 40 eps of the sum of absolute products."""
    x, W = numbers(40, 48, seed=1, dtype=torch.bfloat16), numbers(3, 20, 48, seed=2, dtype=torch.bfloat16)
    index = routed(40, 2, 3, 5)
    groups = sort_by_expert(index, 3)
    [y] = grouped_linear(spread(x, groups), [W], groups, backend=backend)
    products = W.double()[index] * x.double()[:, None, None]  # (T, k, F, K)
    want, size = products.sum(-1), products.abs().sum(-1)
    got = y[groups.place]  # (T, k, F)
    assert y.dtype == torch.bfloat16 and ((got - want).abs() <= 2.0**-8 * want.abs() + 40 * EPS * size).all()
    w = numbers(40, 2, seed=3, dtype=torch.bfloat16)
    out = combine(y, w, groups)
    assert torch.equal(out, (got.float() * w[..., None]).sum(1).bfloat16())  # fp32 until the last step


def test_rows_are_sorted_by_expert_then_by_pair():
    groups = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert groups.order.tolist() == [1, 2, 0, 4, 3, 5] and groups.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert groups.place.tolist() == [[2, 0], [1, 4], [3, 5]] and groups.start.tolist() == [0, 2, 2, 4, 6, 6]
    assert groups.slices == [(0, slice(0, 2)), (2, slice(2, 4)), (3, slice(4, 6))]


@pytest.mark.parametrize(("rows", "E"), [(1, 1), (FEW_M * 3, 3), (FEW_M * 3 + 1, 3), (2 * BLOCK_M, 2), (200, 7)])
def test_tiles_cover_every_row_once(rows, E):
    groups = sort_by_expert(torch.arange(rows)[:, None] % E, E)
    size, expert, row = groups.tiles
    covered = [n for e, first in zip(expert.tolist(), row.tolist(), strict=True)
               for n in range(first, min(first + size, int(groups.start[e + 1])))]  # fmt: skip
    assert sorted(covered) == list(range(rows)) and size == (BLOCK_M if rows > FEW_M * E else FEW_M)


def test_bits_of_a_token_do_not_depend_on_the_others_where_triton_runs():
    """Other tokens replaced, and sent elsewhere: the first five keep every bit, forward and backward."""
    weights = [numbers(4, 33, 40, seed=i) for i in (1, 2)]
    first, results = numbers(5, 40, seed=3), []
    index, w, direction = routed(5, 2, 4, 0), numbers(70, 2, seed=4), numbers(70, 33, seed=5)
    for seed, few in ((7, 9), (8, 2)):
        x = torch.cat([first, numbers(65, 40, seed=seed)])
        others = torch.cat([index, routed(65, 2, 4, seed, few)])
        out, (dx, *_, dw) = run("triton", x, weights, w, others, direction)
        results.append((out[:5], dx[:5], dw[:5]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_batches_have_equal_bits_with_and_without_gradients(backend):
    """What a first ratio of exactly 1 needs: scoring runs without gradients, the update with them."""
    x, W, w = numbers(70, 40, seed=1), numbers(5, 33, 40, seed=2), numbers(70, 2, seed=3)
    groups = sort_by_expert(routed(70, 2, 5, 4), 5)
    forward = lambda x, W: combine(grouped_linear(spread(x, groups), [W], groups, backend=backend)[0], w, groups)  # noqa: E731
    with torch.no_grad():
        scored = forward(x, W)
    assert torch.equal(forward(x.requires_grad_(), W.requires_grad_()), scored)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_packed_experts_are_the_weights_that_their_codes_stand_for(quantize):
    packs = [[quantize(numbers(24, 64, seed=10 * i + e)) for e in range(3)] for i in (1, 2)]
    dense = [torch.stack([q.dequantize(torch.float32) for q in pack]) for pack in packs]
    x, index = numbers(9, 64, seed=3).requires_grad_(), routed(9, 2, 3, 1, 2)
    groups, results = sort_by_expert(index, 3), []
    for weights in (packs, dense):
        ys = grouped_linear(spread(x, groups), weights, groups, backend="torch")
        results.append((*ys, *torch.autograd.grad(sum((i + 1) * y.sum() for i, y in enumerate(ys)), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_does_not_fit_is_refused():
    groups = sort_by_expert(routed(4, 2, 3, 0), 3)
    x, W = numbers(8, 6, seed=0), numbers(3, 5, 6, seed=1)
    for rows, weights in (
        (x[:4], [W]),
        (x, [W[:2]]),
        (x, [W, W[:, :4]]),
        (x, [W] * 3),
        (x[:, :5], [W]),
        (x[None], [W]),
    ):
        with pytest.raises(ValueError, match=r"want \(8, in\) and one or two weights of one shape \(3, out, in\)"):
            grouped_linear(rows, weights, groups)
    with pytest.raises(ValueError, match="one dtype"):
        grouped_linear(x, [W.bfloat16()], groups)
    with pytest.raises(ValueError, match="float64 for Triton"):
        grouped_linear(x.double(), [W.double()], groups, backend="triton")
    assert grouped_linear(x.double(), [W.double()], groups)[0].dtype == torch.float64
