"""kernels/int8.py against a loop in Python and numpy's fp32 arithmetic, bit for bit, and laws of rounding.

Sizes stand on both sides of a tile (8 rows, 256 weights of each; in the product 16 rows, 128 weights), and include rows
that do not start on 16 bytes. Memory that a kernel is to write is NaN before.

Run: python -m pytest tests/test_int8.py
"""

import dataclasses
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import int8 as module
from kernels.int8 import Int8Tensor, dequantize_int8, int8_matmul, quantize_int8
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
EPS = torch.finfo(torch.float32).eps
ROUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # half an ulp, as a part of the number
ROWS = st.sampled_from([1, 2, 7, 8, 9, 17])
WIDTHS = st.sampled_from([1, 2, 15, 16, 17, 128, 255, 256, 257, 300])


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(N, K, seed, dtype=torch.float32, decades=8):
    """Rows (N, K) that look for trouble: normal, zero, one spike, halves that tie, equal; scales decades apart."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, K, generator=g)
    kind = torch.randint(0, 6, (N,), generator=g)
    x[kind == 1] = 0.0
    x[kind == 2] *= 0
    x[kind == 2, K // 2] = -3.0
    x[kind == 3] = torch.randint(-254, 255, (N, K), generator=g)[kind == 3] / 2
    x[kind == 3, 0] = 127.0  # the scale is 1: multiples of 1/2 are ties
    x[kind == 4] = 0.02
    scale = 10 ** torch.randint(-decades // 2, decades // 2 - 1, (N, 1), generator=g).float()  # (N, 1)
    return torch.where((kind == 5)[:, None], x * scale, x).to(dtype)


def same_bits(a, b):
    """torch.equal also for the sign of zero, and for NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    view = BITS.get(a.dtype)
    return torch.equal(a, b) if view is None else torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def by_hand(q, dtype):
    """The weights, from the bytes, in numpy: one fp32 multiplication and one rounding to dtype."""
    return torch.from_numpy(q.codes.cpu().numpy().astype(np.float32) * q.scale.cpu().numpy()[:, None]).to(dtype)


# ----------------------------------------------------------------------------
# quantising


@given(ROWS, WIDTHS, SEEDS, st.sampled_from(DTYPES))
def test_codes_are_those_of_a_loop(N, K, seed, dtype):
    w = weights(N, K, seed, dtype)
    q = quantize_int8(w)
    for row, codes, scale in zip(w.float().numpy(), q.codes.tolist(), q.scale.numpy(), strict=True):
        want = np.float32(max(abs(x) for x in row)) / np.float32(127)
        assert scale == want
        # Python's round() takes ties to even
        assert codes == [round(float(x / scale)) if scale > 0 else 0 for x in row]


@given(ROWS, WIDTHS, SEEDS, st.sampled_from(DTYPES))
def test_off_by_half_a_step_at_most(N, K, seed, dtype):
    w = weights(N, K, seed, dtype)
    q = quantize_int8(w)
    got = q.codes.double() * q.scale.double()[:, None]
    # plus what fp32 costs: the scale is rounded, and counted up to 127 times; so is the quotient, up to 127
    bound = q.scale.double() * (0.5 + 2 * 127 * EPS / 2)
    assert ((got - w.double()).abs() <= bound[:, None]).all()
    assert (q.codes.abs().amax(1) == 127 * (w != 0).any(1)).all()  # the largest weight of a row has the largest code


@given(ROWS, WIDTHS, SEEDS)
def test_quantising_again_changes_nothing(N, K, seed):
    q = quantize_int8(weights(N, K, seed))
    again = quantize_int8(dequantize_int8(q, torch.float32))
    assert torch.equal(again.codes, q.codes)
    torch.testing.assert_close(again.scale, q.scale, rtol=EPS, atol=0)  # 127 s / 127 may round


@given(ROWS, WIDTHS, SEEDS, st.integers(-20, 20))
def test_signs_and_powers_of_two_move_out(N, K, seed, power):
    w = weights(N, K, seed)
    q, other = quantize_int8(w), quantize_int8(w * -(2.0**power))
    assert torch.equal(other.codes, -q.codes) and same_bits(other.scale, q.scale * 2.0**power)


@given(ROWS, WIDTHS, SEEDS)
def test_a_row_does_not_see_the_others(N, K, seed):
    w = weights(N, K, seed)
    q = quantize_int8(w)
    for n in range(N):
        alone = quantize_int8(w[n : n + 1])
        assert torch.equal(alone.codes[0], q.codes[n]) and same_bits(alone.scale, q.scale[n : n + 1])


def test_ties_go_to_even_and_zeros_stay_zero():
    w = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], [0.0] * 7, [-0.0] * 7])
    q = quantize_int8(w)
    assert q.codes.tolist() == [[127, 0, 2, 2, 0, -2, -2], [0] * 7, [0] * 7] and q.scale.tolist() == [1.0, 0.0, 0.0]
    assert (dequantize_int8(q)[1:] == 0).all()


@pytest.mark.parametrize("absmax", [1e-36, 1e-38, 1e-43, 1e-45, 3e38])
def test_the_ends_of_fp32(absmax):
    """A scale below 1.2e-38 has few bits left: rows of such weights are off by absmax at most, and never nan."""
    w = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * absmax
    got = dequantize_int8(quantize_int8(w), torch.float32)
    assert ((got - w).abs() <= (absmax if absmax < 1e-35 else absmax / 250)).all()


def test_chunks_leave_no_seam():
    w = weights(50, 33, seed=1)
    whole = quantize_int8(w)
    for chunk in (1, 33, 100):  # less than a row, one row, three
        with patch.object(module, "CHUNK", chunk):
            q = quantize_int8(w)
            assert torch.equal(q.codes, whole.codes) and same_bits(q.scale, whole.scale)
            assert same_bits(dequantize_int8(q, backend="torch"), by_hand(whole, torch.bfloat16))


def test_bytes_devices_strides_and_parameters():
    w = torch.nn.Parameter(torch.randn(6, 8))
    q = quantize_int8(w)
    assert q.nbytes == 48 + 24 and q.shape == (6, 8) and not q.scale.requires_grad
    moved = q.to("meta")
    assert moved.codes.device.type == moved.scale.device.type == "meta"
    for view in (w.T, w[::2], w[:, 1:7]):
        a, b = quantize_int8(view), quantize_int8(view.contiguous())
        assert torch.equal(a.codes, b.codes) and same_bits(a.scale, b.scale)


# ----------------------------------------------------------------------------
# dequantising


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_nothing_around_it(backend):
    q = quantize_int8(weights(9, 257, seed=2)).to(DEVICE)
    frame = torch.full((9 * 257 + 128,), math.nan, dtype=torch.bfloat16, device=DEVICE)
    out = frame[64:-64].view(9, 257)
    assert dequantize_int8(q, out=out, backend=backend) is out
    assert same_bits(out.cpu(), by_hand(q, torch.bfloat16))
    assert frame[:64].isnan().all() and frame[-64:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@given(N=ROWS, K=WIDTHS, seed=SEEDS, dtype=st.sampled_from(DTYPES))
def test_values_are_those_of_the_bytes(backend, N, K, seed, dtype):
    """All 256 codes, -128 among them: another program may have stored it."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (N, K), generator=g).to(torch.int8)
    q = Int8Tensor(codes, torch.rand(N, generator=g))
    assert same_bits(dequantize_int8(q.to(DEVICE), dtype, backend=backend).cpu(), by_hand(q, dtype))


# ----------------------------------------------------------------------------
# products


def operands(M, N, K, seed, dtype):
    """x (M, K) in a frame of NaN, and weights (N, K): what is read beyond x's edges is NaN, and 0 * NaN is NaN."""
    g = torch.Generator().manual_seed(seed)
    frame = torch.full((M + 2, K + 3), math.nan)
    frame[1:-1, 1:-2] = torch.randn(M, K, generator=g)
    return frame.to(dtype).to(DEVICE)[1:-1, 1:-2], quantize_int8(weights(N, K, seed, decades=4)).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    M=st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65]),
    N=st.sampled_from([1, 7, 16, 17]),
    K=st.sampled_from([16, 32, 128, 144, 65, 6]),
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
)
def test_product_and_gradient(backend, M, N, K, seed, dtype):
    x, q = operands(M, N, K, seed, dtype)
    x = x.detach().requires_grad_(True)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
    y = int8_matmul(x, q, backend=backend)
    y.backward(dy)
    assert y.dtype == dtype and x.grad.dtype == dtype and x.grad.shape == (M, K)
    w = by_hand(q, dtype).double()  # (N, K)
    for got, a, b in ((y.detach(), x.detach(), w.T), (x.grad, dy, w)):
        a = a.cpu().double()
        want, size = a @ b, a.abs() @ b.abs()
        # K fp32 additions in any order, then one rounding to dtype (fp16 runs out at 6e-8)
        bound = len(b) * EPS * size + ROUND[dtype] * want.abs() * 1.01 + 2.0**-25
        assert ((got.cpu().double() - want).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [16, 144, 33])
def test_weights_in_the_product_are_the_dequantised_ones(backend, dtype, K):
    """Rows of the identity pick single weights: any other bit would show."""
    _, q = operands(1, 21, K, 3, dtype)
    eye = torch.eye(K, dtype=dtype, device=DEVICE)
    got = torch.cat([int8_matmul(rows, q, backend=backend) for rows in eye.split(64)])  # (K, N)
    assert torch.equal(got, dequantize_int8(q, dtype, backend="torch").T)  # -0.0 plus 0.0 is 0.0


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_its_batch(dtype):
    """Batches of one tile and of several, a tile's every second row nan: the others keep their bits."""
    x, q = operands(64, 17, 160, 4, dtype)
    alone = torch.cat([int8_matmul(row[None], q, backend="triton") for row in x[::9]])  # (8, N)
    for M in (2, 16, 33, 64):
        together = int8_matmul(x[:M], q, backend="triton")[::9]
        assert same_bits(together, alone[: len(together)])
    poisoned = x[:16].clone()
    poisoned[1::2] = math.nan
    y = int8_matmul(poisoned, q, backend="triton")
    assert same_bits(y[0], alone[0]) and y[1::2].isnan().all() and not y[::2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_any_strides(backend):
    _, q = operands(1, 5, 64, 5, torch.float32)
    empty = torch.empty((0, 64), device=DEVICE, requires_grad=True)
    y = int8_matmul(empty, q, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 5) and empty.grad.shape == (0, 64)
    base = torch.randn(64, 8, device=DEVICE)
    for x in (base.T, base.T[::2], base[:1, :1].expand(8, 64), torch.randn(4, 128, device=DEVICE)[:, ::2]):
        got, want = (int8_matmul(t, q, backend=backend) for t in (x, x.contiguous()))
        bound = 64 * EPS * (x.abs() @ dequantize_int8(q, torch.float32).abs().T)  # BLAS may add in another order
        assert ((got - want).abs() <= bound).all()


def test_nothing_is_saved_for_backward():
    x, q = torch.randn(4, 64, requires_grad=True), quantize_int8(torch.randn(8, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        int8_matmul(x, q)
    assert saved == []


# ----------------------------------------------------------------------------
# what is said when it is wrong


@pytest.mark.parametrize(
    "w, text",
    [
        (torch.zeros(2, 3, dtype=torch.int8), "got w of torch.int8, want bfloat16, float16 or float32"),
        (torch.zeros(2, 3, dtype=torch.float64), "got w of torch.float64"),
        (torch.zeros(6), r"got w of shape \(6,\), want \(N, K\)"),
        (torch.zeros(3, 0), r"got w of shape \(3, 0\), want \(N, K\) and at least one weight"),
        (torch.tensor([[1.0, 2.0], [3.0, math.nan]]), r"got nan at w\[1, 1\], want finite weights"),
        (torch.tensor([[1.0, -math.inf]]), r"got -inf at w\[0, 1\]"),
    ],
)
def test_says_what_it_cannot_quantise(w, text):
    with pytest.raises(ValueError, match=text):
        quantize_int8(w)


def test_finds_nan_in_a_later_chunk():
    w = torch.zeros(90, 10)
    w[77, 3] = math.nan
    with patch.object(module, "CHUNK", 40), pytest.raises(ValueError, match=r"got nan at w\[77, 3\]"):
        quantize_int8(w)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"codes": torch.zeros(3, 4)}, r"got codes \(3, 4\) torch.float32 and scale \(3,\) torch.float32, want"),
        ({"codes": torch.zeros(4, 3, dtype=torch.int8).T}, "want contiguous"),
        ({"codes": torch.zeros(12, dtype=torch.int8)}, r"got codes \(12,\)"),
        (
            {"scale": torch.zeros(4)},
            r"and scale \(4,\) torch.float32, want contiguous \(N, K\) int8 and \(N,\) float32",
        ),
        ({"scale": torch.zeros(3, dtype=torch.bfloat16)}, r"scale \(3,\) torch.bfloat16"),
    ],
)
def test_says_which_part_does_not_fit(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(quantize_int8(torch.randn(3, 4)), **change)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"dtype": torch.int8}, "got dtype torch.int8, want bfloat16"),
        (
            {"out": torch.empty(4, 3, dtype=torch.bfloat16)},
            r"got out \(4, 3\) torch.bfloat16 on cpu, strides \(3, 1\), want",
        ),
        ({"out": torch.empty(3, 4)}, r"want a contiguous \(3, 4\) torch.bfloat16 on cpu"),
        ({"out": torch.empty(4, 3, dtype=torch.bfloat16).T}, r"strides \(1, 3\), want a contiguous"),
        ({"out": torch.empty(3, 4, dtype=torch.bfloat16, device="meta")}, "on meta"),
        ({"backend": "cuda"}, "got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_why_it_cannot_dequantise(options, text):
    with pytest.raises(ValueError, match=text):
        dequantize_int8(quantize_int8(torch.randn(3, 4)), **options)


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(2, 5), r"got x \(2, 5\) and weights \(3, 4\), want \(M, K\) and \(N, K\)"),
        (torch.zeros(1, 2, 4), r"got x \(1, 2, 4\)"),
        (torch.zeros(2, 4, dtype=torch.float64), "got x of torch.float64 on cpu"),
        (torch.zeros(2, 4, device="meta"), "on meta, want"),
    ],
)
def test_says_why_it_cannot_multiply(x, text):
    with pytest.raises(ValueError, match=text):
        int8_matmul(x, quantize_int8(torch.randn(3, 4)))
