"""kernels/rms_norm.py against float64 and what the model computed before there were kernels, and laws of a norm.

Sizes: W on both sides of powers of two (tiles are powers of two, masked), of 1024 (4 rows a program), and of 4096, from
where a row has a program of its own; N on both sides of the rows of a program. Memory that a kernel is to write is NaN
before (torch fills it so in deterministic mode), and so is everything around a strided input.

Run: python -m pytest tests/test_rms_norm.py
"""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import rms_norm as module
from kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
EPS = torch.finfo(torch.float32).eps
# what rounding to nearest costs: half an ulp, and half the distance of the smallest numbers (fp16 runs out at 6e-8)
ROUND = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
SIZES = {"N": st.sampled_from([1, 2, 3, 5, 9]), "W": st.sampled_from([1, 2, 7, 33, 64, 127, 1023, 1024, 1025, 4097])}


def cases(**strategies):
    """given, without shrinking: the cases are small as they are, and in the interpreter it would take minutes."""
    return lambda test: settings(phases=[Phase.explicit, Phase.generate])(given(**strategies)(test))


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(N, W, seed, dtype=torch.float32, scale=1.0, strided=False):
    """x, delta, dy, dsum (N, W) and a weight (W,) well off 1, on the CPU. Strided: x and dy are windows in a frame of
    NaN; the two others stay contiguous, so that no stride can stand in for another."""
    g = torch.Generator().manual_seed(seed)
    frame = torch.full((4, N + 2, W + 3), math.nan, dtype=dtype)
    frame[:, 1:-1, 1:-2] = torch.randn(4, N, W, generator=g) * torch.tensor([scale, 0.5 * scale, 1, 1])[:, None, None]
    windows = frame[:, 1:-1, 1:-2]
    parts = [t if strided and i in (0, 2) else t.contiguous() for i, t in enumerate(windows)]
    weight = (1 + 0.5 * torch.randn(W, generator=g)).to(dtype)
    return (*parts, weight)


def run(fn, tensors, upstream, device=DEVICE):
    """Outputs and gradients of fn(*tensors), back on the CPU. An upstream of None leaves that output unused."""
    leaves = [t.detach().to(device).requires_grad_(True) for t in tensors]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(y, d.to(device)) for y, d in zip(outputs, upstream, strict=True) if d is not None]
    torch.autograd.backward(*zip(*used, strict=True))
    return [y.detach().cpu() for y in outputs], [leaf.grad.cpu() for leaf in leaves]


def ours(backend, eps=1e-6, plus_one=False):
    return lambda x, *more: (add_rms_norm if len(more) == 2 else rms_norm)(
        x, *more, eps=eps, plus_one=plus_one, backend=backend
    )


def oracle(x, weight, dy, eps, plus_one):
    """float64, by hand: y, dx, dweight, and the size of the terms that dx and dweight are sums of."""
    x, weight, dy = x.double(), weight.double() + plus_one, dy.double()
    W = x.shape[1]
    rms = ((x * x).sum(1, keepdim=True) / W + eps).sqrt()  # (N, 1)
    # the Jacobian of x / rms: 1 / rms on the diagonal, minus x x^T / (W rms^3) everywhere
    dh = dy * weight
    dx = dh / rms - x * (x * dh).sum(1, keepdim=True) / (W * rms**3)
    terms = dh.abs() / rms + x.abs() * (x * dh).abs().sum(1, keepdim=True) / (W * rms**3)
    dweight = dy * x / rms
    return x / rms * weight, dx, dweight.sum(0), terms, dweight.abs().sum(0)


def assert_within(got, want, bound):
    error = (got.double() - want).abs()
    assert (error <= bound).all(), (
        f"off by {error[~(error <= bound)][:4]}, want {bound.expand_as(error)[error > bound][:4]}"
    )


# ----------------------------------------------------------------------------
# against float64


@pytest.mark.parametrize("backend", BACKENDS)
@cases(
    **SIZES,
    seed=SEEDS,
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    plus_one=st.booleans(),
    strided=st.booleans(),
    add=st.booleans(),
)
def test_float32_matches_float64(backend, N, W, seed, scale, plus_one, strided, add):
    """A sum of W squares is good to (W / 32 + log W) eps as these machines add (in 32 lanes or pairwise), the rest is a
    handful of roundings, each relative to the term it rounds. With add, x + delta is rounded before all else."""
    x, delta, dy, dsum, weight = draw(N, W, seed, scale=scale, strided=strided)
    c = (24 + W / 32) * EPS
    if add:
        (y, total), (dx, ddelta, dweight) = run(ours(backend, plus_one=plus_one), (x, delta, weight), (dy, dsum))
        assert torch.equal(total, x + delta) and torch.equal(dx, ddelta)
        x = total
    else:
        (y,), (dx, dweight) = run(ours(backend, plus_one=plus_one), (x, weight), (dy,))
        dsum = torch.zeros_like(dy)
    want_y, want_dx, want_dweight, terms, dweight_terms = oracle(x, weight, dy, 1e-6, plus_one)
    assert_within(y, want_y, c * (want_y.abs() + 1e-30))
    assert_within(dx, want_dx + dsum, c * (terms + dsum.abs()) + 1e-30)
    assert_within(dweight, want_dweight, (c + N * EPS) * dweight_terms + 1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cases(**SIZES, seed=SEEDS, plus_one=st.booleans(), add=st.booleans())
def test_16_bit_is_rounded_where_it_says(dtype, N, W, seed, plus_one, add):
    """Triton's error is what (2) and (3) allow: one rounding of y for Gemma, two for Llama, one of dx and of dweight.
    The reference rounds dy * weight, too, and its dx can be three roundings off."""
    x, delta, dy, dsum, weight = draw(N, W, seed, dtype)
    u, tiny = ROUND[dtype]
    c = (24 + W / 32) * EPS
    if add:
        (y, total), (dx, _, dweight) = run(ours("triton", plus_one=plus_one), (x, delta, weight), (dy, dsum))
        assert torch.equal(total, x + delta)
        x = total
    else:
        (y,), (dx, dweight) = run(ours("triton", plus_one=plus_one), (x, weight), (dy,))
        dsum = torch.zeros_like(dy)
    want_y, want_dx, want_dweight, terms, dweight_terms = oracle(x, weight, dy, 1e-6, plus_one)
    want_dx = want_dx + dsum.double()
    roundings = 1 if plus_one else 2.01  # 2 u + u^2
    scale_of_h = weight.double().abs().clamp(min=1)  # half an ulp of a tiny h is multiplied by the weight
    assert_within(y, want_y, (roundings * u + c) * want_y.abs() + 2 * tiny * scale_of_h)
    assert_within(dx, want_dx, u * want_dx.abs() + 2 * c * (terms + dsum.double().abs()) + tiny)
    assert_within(dweight, want_dweight, u * want_dweight.abs() + 2 * (c + N * EPS) * dweight_terms + tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("plus_one", [False, True])
def test_both_rounding_orders_bit_for_bit(dtype, plus_one):
    """Rows of +-1 have a mean square of exactly 1 however it is summed; then (2) and (3) leave no freedom, and with
    eps = 0.3 h is 0.877, which no 16-bit number is."""
    signs = torch.randint(0, 2, (6, 129), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(dtype)
    weight = draw(1, 129, 1, dtype)[-1]
    out = [run(ours(b, 0.3, plus_one), (signs, weight), (signs,))[0][0] for b in BACKENDS]
    if dtype != torch.float32:
        assert torch.equal(*out)
        h = signs.float() * 1.3**-0.5
        wrong = (1 + weight) * h.to(dtype) if plus_one else (h * weight.float()).to(dtype)
        assert (out[1] != wrong).any()  # the other order would show
    else:  # the reciprocal root itself may be an ulp off
        torch.testing.assert_close(*out, rtol=2 * EPS, atol=0)


# ----------------------------------------------------------------------------
# the reference


def as_it_was(x, weight, eps, plus_one):
    """RMSNorm.forward of nanogspo/model.py before there were kernels, kept here so that it cannot move."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + weight.float())).to(x.dtype) if plus_one else weight * h.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@cases(**SIZES, seed=SEEDS, plus_one=st.booleans())
def test_the_reference_has_the_bits_it_always_had(dtype, N, W, seed, plus_one):
    """Forward and backward, alone and with the addition: a CPU run gives what it gave."""
    x, delta, dy, dsum, weight = draw(N, W, seed, dtype)

    def apart(x, delta, weight):
        total = x + delta
        return as_it_was(total, weight, 1e-6, plus_one), total

    pairs = [
        (run(lambda x, w: as_it_was(x, w, 1e-6, plus_one), (x, weight), (dy,), "cpu"), (x, weight), (dy,)),
        (run(apart, (x, delta, weight), (dy, dsum), "cpu"), (x, delta, weight), (dy, dsum)),
    ]
    for want, tensors, upstream in pairs:
        got = run(ours(None, plus_one=plus_one), tensors, upstream, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(sum(got, []), sum(want, []), strict=True))


@pytest.mark.parametrize("plus_one", [False, True])
def test_gradcheck_of_the_reference(plus_one):
    x, delta, _, _, weight = draw(3, 5, 0, torch.float64)
    inputs = [t.requires_grad_(True) for t in (x, delta, weight)]
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, eps=1e-3, plus_one=plus_one), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: add_rms_norm(*t, eps=1e-3, plus_one=plus_one), inputs)


# ----------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS)
def test_a_scaled_row_is_normalised_to_the_same(backend, N, W, seed):
    """y(c x) = y(x): exactly, where c is a power of two and eps goes along. Nothing but eps sets a scale."""
    x, _, dy, _, weight = draw(N, W, seed)
    [y], [dx, dweight] = run(ours(backend, eps=1e-2), (x, weight), (dy,))
    [y4], [dx4, dweight4] = run(ours(backend, eps=0.16), (4 * x, weight), (dy,))
    torch.testing.assert_close(y4, y, rtol=2 * EPS, atol=0)  # a GPU's rsqrt may differ by an ulp
    torch.testing.assert_close(4 * dx4, dx, rtol=4 * EPS, atol=8 * EPS)
    torch.testing.assert_close(dweight4, dweight, rtol=4 * EPS, atol=8 * N * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS)
def test_no_gradient_along_the_row(backend, N, W, seed):
    """Without eps scaling a row changes nothing, so dx is orthogonal to x: what a forgotten second term would break."""
    x, _, dy, _, weight = draw(N, W, seed)
    _, [dx, _] = run(ours(backend, eps=1e-30), (x, weight), (dy,))
    _, _, _, terms, _ = oracle(x, weight, dy, 1e-30, False)
    along = (dx.double() * x).sum(1)
    assert (along.abs() <= (24 + W / 32) * EPS * (terms * x.abs()).sum(1)).all()


@pytest.mark.isa
@cases(**SIZES, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.bfloat16]), add=st.booleans())
def test_a_row_does_not_see_its_batch(N, W, seed, dtype, add):
    """Triton, bit for bit, forward and dx: each row alone, and in another place of another tile. Twice is the same,
    too, dweight included."""
    x, delta, dy, dsum, weight = draw(N, W, seed, dtype)
    tensors = (x, delta) if add else (x,)
    upstream = (dy, dsum) if add else (dy,)
    fn = ours("triton")
    outputs, grads = run(fn, (*tensors, weight), upstream)
    again = run(fn, (*tensors, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(outputs + grads, sum(again, []), strict=True))
    for rows in (slice(N - 1, N), slice(N // 2, None)):
        part, part_grads = run(fn, (*(t[rows] for t in tensors), weight), tuple(d[rows] for d in upstream))
        whole = [t[rows] for t in (*outputs, *grads[:-1])]
        assert all(torch.equal(a, b) for a, b in zip(part + part_grads[:-1], whole, strict=True))


@cases(tiles=st.integers(1, 9), most=st.sampled_from([1, 2, 4]), short=st.integers(0, 3), seed=SEEDS)
def test_dweight_however_the_rows_are_split(tiles, most, short, seed):
    """W = 1024 has 4 rows a tile. 5 tiles for at most 4 programs are 2 each, for 3 programs; the last may be ragged."""
    N = max(1, 4 * tiles - short)
    x, _, dy, _, weight = draw(N, 1024, seed)
    with patch.object(module, "MAX_PARTIALS", most):
        _, [dx, dweight] = run(ours("triton"), (x, weight), (dy,))
    _, [whole_dx, _] = run(ours("triton"), (x, weight), (dy,))
    assert torch.equal(dx, whole_dx)
    _, _, want, _, terms = oracle(x, weight, dy, 1e-6, False)
    assert_within(dweight, want, (60 + N) * EPS * terms)


# ----------------------------------------------------------------------------
# nasty but legal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter is numpy
def test_zero_huge_and_nan_rows(backend, plus_one, dtype):
    """Zeros are divided by sqrt(eps); squares beyond fp32 make rstd 0 and the row with it, as they always have; a NaN
    stays in its row."""
    x, _, dy, _, weight = draw(4, 33, 0, dtype)
    x[0], x[1, 3] = 0.0, math.nan
    x[2] = 3e30
    [y], [dx, dweight] = run(ours(backend, plus_one=plus_one), (x, weight), (dy,))
    assert (y[0] == 0).all() and y[1].isnan().all() and (y[2] == 0).all() and y[3].isfinite().all()
    want = 1e3 * (dy[0].double() * (weight.double() + plus_one))
    torch.testing.assert_close(dx[0].double(), want, rtol=3 * 2**-8 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert dx[1].isnan().all() and (dx[2] == 0).all() and dx[3].isfinite().all() and dweight.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 7), (2, 1, 3, 7)])
def test_any_number_of_dimensions(backend, shape):
    x, weight = torch.randn(shape), torch.rand(7)
    [y, total], [dx, _, dweight] = run(ours(backend), (x, x, weight), (torch.ones(shape), torch.ones(shape)))
    assert y.shape == total.shape == dx.shape == x.shape
    want = (x.reshape(-1, 7) / (x.reshape(-1, 7).pow(2).mean(1, keepdim=True) + 1e-6 / 4).sqrt()).sum(0)
    torch.testing.assert_close(dweight, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """Heads of a fused projection, a transpose, an expanded row, and an upstream gradient of stride 0."""
    fused = torch.randn(2, 5, 40)
    weight = torch.randn(24)[::3]
    views = [
        fused[..., 8:16],
        fused[..., 8:24].view(2, 5, 2, 8),
        torch.randn(8, 6).T,
        torch.randn(1, 8).expand(5, 8),
        torch.randn(6, 16)[::2, ::2],
        torch.randn(2, 8, 3).transpose(1, 2),
    ]
    for x in views:
        got, want = [], []
        for out, tensor, w in ((got, x, weight), (want, x.contiguous(), weight.contiguous())):
            leaf = tensor.to(DEVICE).detach().requires_grad_(True)
            y, total = add_rms_norm(leaf, leaf, w.to(DEVICE), eps=1e-6, backend=backend)
            (y.sum() + total.sum()).backward()
            out += [y.detach(), total.detach(), leaf.grad]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=4 * EPS)  # torch may sum a strided row in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_nobody_uses(backend, unused):
    """The last layer's sum goes nowhere; and where only the sum is used, its gradient passes through untouched."""
    x, delta, dy, dsum, weight = draw(3, 33, 0)
    upstream, zero = [dy, dsum], [dy, dsum]
    upstream[unused], zero[unused] = None, torch.zeros_like(dy)
    fn = ours(backend)
    leaves = [t.to(DEVICE).clone().requires_grad_(True) for t in (x, delta, weight)]
    fn(*leaves)[1 - unused].backward(upstream[1 - unused].to(DEVICE))
    _, want = run(fn, (x, delta, weight), zero)
    for leaf, w in zip(leaves, want, strict=True):
        assert (leaf.grad is None and (w == 0).all()) or torch.equal(leaf.grad.cpu(), w)


def test_a_frozen_weight_costs_nothing():
    """LoRA: no gradient, no partial sums, and the bits of dx are those it has with them."""
    x, _, dy, _, weight = draw(9, 1024, 0)
    both, alone = x.to(DEVICE).clone().requires_grad_(True), x.to(DEVICE).clone().requires_grad_(True)
    live = weight.to(DEVICE).clone().requires_grad_(True)
    rms_norm(both, live, eps=1e-6, backend="triton").backward(dy.to(DEVICE))
    launched, kernel = {}, module._backward_kernel

    class Spy:
        def __getitem__(self, grid):
            return lambda *arguments, **options: (launched.update(options), kernel[grid](*arguments, **options))

    with patch.object(module, "_backward_kernel", Spy()):
        rms_norm(alone, weight.to(DEVICE), eps=1e-6, backend="triton").backward(dy.to(DEVICE))
    assert launched["DWEIGHT"] is False and torch.equal(both.grad, alone.grad) and live.grad is not None


def test_little_is_saved_for_backward():
    """x itself, not a copy; the weight; 4 bytes a row."""
    x, weight = torch.randn(12, 64, device=DEVICE, requires_grad=True), torch.ones(64, device=DEVICE)
    y, total = add_rms_norm(x, x, weight, eps=1e-6, backend="triton")
    saved = y.grad_fn.saved_tensors
    assert sum(t.numel() for t in saved) == 12 * 64 + 64 + 12
    assert total.data_ptr() in [t.data_ptr() for t in saved]
    saved = rms_norm(x, weight, eps=1e-6, backend="triton").grad_fn.saved_tensors
    assert x.data_ptr() in [t.data_ptr() for t in saved]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offsets beyond 2^31 want 18 GB of GPU memory")
def test_offsets_beyond_int32():
    N, W = 2**21 + 3, 1024
    x, weight = (
        torch.ones(N, W, device=DEVICE, dtype=torch.bfloat16),
        torch.ones(W, device=DEVICE, dtype=torch.bfloat16),
    )
    x[-1] = torch.randn(W, device=DEVICE)
    leaf = x[-1:].clone().requires_grad_(True)
    x.requires_grad_(True)
    y, last = (rms_norm(t, weight, eps=1e-6, backend="triton") for t in (x, leaf))
    dy = torch.randn(W, device=DEVICE, dtype=torch.bfloat16)
    y.backward(dy.expand_as(y))
    last.backward(dy[None])
    assert torch.equal(y[-1], last[0]) and torch.equal(x.grad[-1], leaf.grad[0])


# ----------------------------------------------------------------------------
# what is said when it is wrong


def test_none_is_torch_where_triton_has_no_kernel():
    """float64, and rows too wide for registers."""
    for x in (torch.randn(2, 7, dtype=torch.float64), torch.randn(1, module.MAX_WIDTH + 1)):
        w = torch.ones(x.shape[1], dtype=x.dtype)
        assert torch.equal(rms_norm(x, w, eps=1e-6), rms_norm_reference(x, w, 1e-6, False))
        with patch.object(module, "choose", return_value="triton"):  # as on a GPU
            assert torch.equal(rms_norm(x, w, eps=1e-6), rms_norm_reference(x, w, 1e-6, False))
            with pytest.raises(
                ValueError, match=r"for Triton, want at most 8192 of bf16, fp16 or fp32; use backend='torch'"
            ):
                rms_norm(x, w, eps=1e-6, backend="triton")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"weight": torch.ones(4)}, r"got x \(2, 3\) and weight \(4,\), want \(..., W\) and \(W,\)"),
        ({"weight": torch.ones(2, 3)}, r"weight \(2, 3\), want"),
        ({"x": torch.ones(()), "delta": torch.ones(())}, r"got x \(\) and weight \(3,\)"),
        ({"weight": torch.ones(0), "x": torch.ones(2, 0)}, r"got x \(2, 0\) and weight \(0,\)"),
        ({"delta": torch.ones(3)}, r"got x \(2, 3\) and delta \(3,\), want one shape; expand it first"),
        ({"weight": torch.ones(3).bfloat16()}, r"dtypes bfloat16, float32, want one float dtype"),
        ({"delta": torch.ones(2, 3).half()}, r"dtypes float16, float32"),
        ({"eps": 0.0}, r"got eps 0.0, want a number above 0"),
        ({"eps": math.nan}, r"got eps nan"),
        ({"backend": "cuda"}, r"got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, text):
    call = {"x": torch.ones(2, 3), "delta": torch.ones(2, 3), "weight": torch.ones(3), "eps": 1e-6} | change
    with pytest.raises(ValueError, match=text):
        add_rms_norm(**call)
    if "delta" not in change or "x" in change:
        del call["delta"]
        with pytest.raises(ValueError, match=text):
            rms_norm(**call)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="dtypes int64, want one float dtype"):
        rms_norm(torch.ones(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), eps=1e-6)
