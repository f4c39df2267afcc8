"""kernels/rope.py against float64 and what the model computed before there were kernels, and laws of a rotation.

Sizes: D a power of two and not, up to 256; R = D, R < D, R = 2; more query heads than key heads, odd numbers of both (a
tile of 16 heads then ends within a token); one position, and rows with positions of their own. Few heads in all: the
interpreter takes some 10 ms a tile. cos and sin are random numbers, in both halves, except where a law needs angles: so
that every index is told from every other.
Memory that a kernel is to write is NaN before, and so is everything around a strided input.

Run: python -m pytest tests/test_rope.py
"""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import rope as module
from kernels.rope import rope
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
EPS = torch.finfo(torch.float32).eps
ROUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # half an ulp
SIZES = {
    "B": st.sampled_from([1, 2]),
    "T": st.sampled_from([1, 3]),
    "heads": st.sampled_from([(1, 1), (4, 2), (3, 1), (5, 5)]),
    "widths": st.sampled_from([(2, 2), (33, 32), (16, 6), (40, 40), (64, 64), (128, 32), (256, 256)]),
    "shared": st.booleans(),
}
# none: no norm. The flag is plus_one.
NORMS = st.sampled_from([None, False, True])


def cases(**strategies):
    """given, without shrinking: the cases are small as they are, and in the interpreter it would take minutes."""
    return lambda test: settings(phases=[Phase.explicit, Phase.generate])(given(**strategies)(test))


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """q, k, their upstream gradients, cos, sin and weights well off 1, on the CPU."""

    def __init__(self, B, T, heads, widths, shared, norm, seed, dtype=torch.float32, strided=False):
        (H, K), (D, R) = heads, widths
        g = torch.Generator().manual_seed(seed)

        def numbers(*shape):
            return torch.randn(shape, generator=g).to(dtype)

        self.q, self.k = numbers(B, T, H, D) * 3, numbers(B, T, K, D)
        if strided:  # slices of one fused projection, NaN between and behind
            fused = torch.full((B, T + 1, H * D + K * D + 5), math.nan, dtype=dtype)
            fused[:, :T, : H * D], fused[:, :T, H * D + 2 : -3] = self.q.flatten(2), self.k.flatten(2)
            self.q = fused[:, :T, : H * D].unflatten(2, (H, D))
            self.k = fused[:, :T, H * D + 2 : -3].unflatten(2, (K, D))
        self.dq, self.dk = numbers(B, T, H, D), numbers(B, T, K, D)
        self.cos, self.sin = numbers(2, 1 if shared else B, T, 1, R)
        self.weights = [] if norm is None else [(1 + 0.5 * numbers(D)).to(dtype) for _ in range(2)]
        self.plus_one = bool(norm)

    def run(self, fn, device=DEVICE):
        """[q, k] and [dq, dk, dq_weight, dk_weight], on the CPU; fn takes q, k, cos, sin, q_weight, k_weight."""
        leaves = [t.detach().to(device).requires_grad_(True) for t in (self.q, self.k, *self.weights)]
        weights = leaves[2:] or [None, None]
        out = fn(leaves[0], leaves[1], self.cos.to(device), self.sin.to(device), *weights)
        torch.autograd.backward(out, [self.dq.to(device), self.dk.to(device)])
        return [y.detach().cpu() for y in out], [leaf.grad.cpu() for leaf in leaves]

    def ours(self, backend, device=DEVICE, eps=1e-6):
        def call(q, k, cos, sin, q_weight, k_weight):
            options = {"eps": eps, "plus_one": self.plus_one, "backend": backend}
            return rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, **options)

        return self.run(call, device)

    def row(self, rows):
        """The same case with some of the batch."""
        part = object.__new__(Case)
        part.__dict__.update(self.__dict__)
        for name in ("q", "k", "dq", "dk"):
            setattr(part, name, getattr(self, name)[rows])
        if self.cos.shape[0] > 1:
            part.cos, part.sin = self.cos[rows], self.sin[rows]
        return part


def oracle(case, eps=1e-6):
    """float64, the rotation as a matrix and the Jacobian of the norm written out: y of q and k; dq, dk, dweights; each
    with the size of the terms that it is a sum of."""
    cos, sin = case.cos.double(), case.sin.double()
    R = cos.shape[-1]
    turn = torch.zeros(R, R, dtype=torch.float64)  # h @ turn = (-h[second half], h[first half])
    for i in range(R // 2):
        turn[i + R // 2, i], turn[i, i + R // 2] = -1.0, 1.0
    found = []
    for n, (x, dy) in enumerate(((case.q.double(), case.dq.double()), (case.k.double(), case.dk.double()))):
        D = x.shape[-1]
        normed = bool(case.weights)
        s = case.weights[n].double() + case.plus_one if normed else torch.ones(D, dtype=torch.float64)
        rms = (x.pow(2).sum(-1, keepdim=True) / D + eps).sqrt() if normed else torch.ones(1, dtype=torch.float64)
        h = x / rms * s
        y, sizes = h.clone(), h.abs()
        y[..., :R] = h[..., :R] * cos + h[..., :R] @ turn * sin
        sizes[..., :R] = (h[..., :R] * cos).abs() + (h[..., :R] @ turn * sin).abs()
        dh, dh_sizes = dy.clone(), dy.abs()
        dh[..., :R] = dy[..., :R] * cos + (dy[..., :R] * sin) @ turn.T
        dh_sizes[..., :R] = (dy[..., :R] * cos).abs() + ((dy[..., :R] * sin) @ turn.T).abs()
        dweight, dweight_sizes = (dh * x / rms).sum((0, 1, 2)), (dh_sizes * (x / rms).abs()).sum((0, 1, 2))
        dx, dx_sizes = dh * s / rms, dh_sizes * s.abs() / rms
        if normed:
            dx = dx - x * (dh * s * x).sum(-1, keepdim=True) / (D * rms**3)
            dx_sizes = dx_sizes + x.abs() * (dh_sizes * (s * x).abs()).sum(-1, keepdim=True) / (D * rms**3)
        found.append([(y, sizes), (dx, dx_sizes), (dweight, dweight_sizes)])
    q, k = found
    return [q[0], k[0]], [q[1], k[1], *([q[2], k[2]] if case.weights else [])]


def assert_within(got, want, bound):
    error = (got.double() - want).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), f"off by {error[wrong][:4]}, want {bound.expand_as(error)[wrong][:4]}"


# ----------------------------------------------------------------------------
# against float64


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, norm=NORMS, seed=SEEDS, strided=st.booleans())
def test_float32_matches_float64(backend, B, T, heads, widths, shared, norm, seed, strided):
    """A dozen roundings, each relative to the term it rounds; sums of D squares in another order, D / 16 more at most;
    dweight is a sum over all heads."""
    case = Case(B, T, heads, widths, shared, norm, seed, strided=strided)
    outputs, grads = case.ours(backend)
    want, want_grads = oracle(case)
    c = (16 + widths[0] / 16) * EPS
    for got, (w, sizes) in zip(outputs + grads[:2], want + want_grads[:2], strict=True):
        assert_within(got, w, c * sizes)
    for got, (w, sizes), n in zip(grads[2:], want_grads[2:], heads, strict=False):
        assert_within(got, w, (c + B * T * n * EPS) * sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cases(**SIZES, norm=NORMS, seed=SEEDS)
def test_16_bit_is_rounded_once(dtype, B, T, heads, widths, shared, norm, seed):
    """y, dx and dweight each half an ulp off at most, and the noise of fp32; and never further from the truth than the
    reference, which rounds up to five times on the way."""
    case = Case(B, T, heads, widths, shared, norm, seed, dtype)
    (outputs, grads), (torch_outputs, torch_grads) = case.ours("triton"), case.ours("torch")
    want, want_grads = oracle(case)
    u, tiny = ROUND[dtype], 2.0**-25 if dtype == torch.float16 else 0.0  # fp16 runs out at 6e-8
    c = (32 + widths[0] / 8 + B * T * heads[0]) * EPS
    for got, theirs, (w, sizes) in zip(outputs + grads, torch_outputs + torch_grads, want + want_grads, strict=True):
        assert_within(got, w, u * w.abs() + c * sizes + tiny)
        error, torch_error = ((x.double() - w).norm() for x in (got, theirs))
        # where there are few numbers the roundings of torch may cancel: half an ulp is always allowed
        assert error <= torch_error + (u * w.norm() if w.numel() < 500 else 0.02 * torch_error)


# ----------------------------------------------------------------------------
# the reference


def as_it_was(q, k, cos, sin, q_weight, k_weight, eps, plus_one):
    """RMSNorm.forward and rotate of nanogspo/model.py before there were kernels."""

    def norm(x, weight):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        return (h * (1.0 + weight.float())).to(x.dtype) if plus_one else weight * h.to(x.dtype)

    def rotate(x):
        rotary_dim = cos.shape[-1]
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned

    if q_weight is not None:
        q, k = norm(q, q_weight), norm(k, k_weight)
    return rotate(q), rotate(k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@cases(**SIZES, norm=NORMS, seed=SEEDS)
def test_the_reference_has_the_bits_it_always_had(dtype, B, T, heads, widths, shared, norm, seed):
    case = Case(B, T, heads, widths, shared, norm, seed, dtype)
    got = sum(case.ours(None, "cpu"), [])
    want = sum(case.run(lambda *tensors: as_it_was(*tensors, 1e-6, case.plus_one), "cpu"), [])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("norm", [None, False, True])
def test_gradcheck_of_the_reference(norm):
    case = Case(2, 2, (2, 1), (6, 4), False, norm, 0, torch.float64)
    inputs = [t.requires_grad_(True) for t in (case.q, case.k, *case.weights)]

    def fn(q, k, q_weight=None, k_weight=None):
        return rope(q, k, case.cos, case.sin, q_weight=q_weight, k_weight=k_weight, eps=1e-3, plus_one=case.plus_one)

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


# ----------------------------------------------------------------------------
# laws


def angles(positions, R):
    """cos and sin as the model makes them: (B or 1, T, 1, R), both halves alike. positions (B or 1, T)."""
    f = 1e4 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    angle = (positions[..., None].double() * f).repeat(1, 1, 2)[:, :, None]
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS)
def test_turning_back_and_keeping_lengths(backend, B, T, heads, widths, shared, seed):
    """By an angle and by its opposite is nothing; a pair keeps its length; what is behind R keeps its bits."""
    case = Case(B, T, heads, widths, shared, None, seed)
    g = torch.Generator().manual_seed(seed)
    case.cos, case.sin = angles(torch.randint(0, 5000, (1 if shared else B, T), generator=g), widths[1])
    (yq, yk), _ = case.ours(backend)
    R = widths[1]
    for x, y in ((case.q, yq), (case.k, yk)):
        lengths = [(t[..., : R // 2] ** 2 + t[..., R // 2 : R] ** 2).sqrt() for t in (x, y)]
        torch.testing.assert_close(*lengths, rtol=4 * EPS, atol=0)
        assert torch.equal(x[..., R:], y[..., R:])
    back, forth = (rope(q.to(DEVICE), k.to(DEVICE), case.cos.to(DEVICE), (s * case.sin).to(DEVICE), backend=backend)
                   for q, k, s in ((yq, yk, -1), (case.q, case.k, 1)))  # fmt: skip
    for x, y in ((case.q, back[0]), (case.k, back[1])):
        size = x.abs().amax(-1, keepdim=True)
        assert ((x - y.cpu()).abs() <= 8 * EPS * size).all()
    assert torch.equal(forth[0].cpu(), yq)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_the_distance(backend):
    """q . k after the rotation is that of both moved on by 1000: for R = D, and for the turned part of R < D."""
    q, k = torch.randn(2, 1, 4, 1, 64, generator=torch.Generator().manual_seed(0))
    scores = []
    for start in (0, 1000):
        cos, sin = angles(torch.arange(start, start + 4)[None], 32)
        a, b = (t.cpu().double() for t in rope(*(t.to(DEVICE) for t in (q, k, cos, sin)), backend=backend))
        scores.append(torch.einsum("bthd,bshd->bts", a, b))
    torch.testing.assert_close(*scores, rtol=0, atol=64 * EPS * 4)


@cases(**SIZES, seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_backward_is_the_rotation_by_minus_the_angle(B, T, heads, widths, shared, seed, dtype):
    """Triton without a norm, bit for bit."""
    case = Case(B, T, heads, widths, shared, None, seed, dtype)
    half = widths[1] // 2
    case.cos, case.sin = (t[..., :half].repeat(1, 1, 1, 2) for t in (case.cos, case.sin))
    _, grads = case.ours("triton")
    case.q, case.k, case.sin = case.dq, case.dk, -case.sin
    outputs, _ = case.ours("triton")
    assert all(torch.equal(a, b) for a, b in zip(grads, outputs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS, plus_one=st.booleans())
def test_the_norm_and_then_the_rotation(backend, B, T, heads, widths, shared, seed, plus_one):
    """Scaling a head changes nothing and moves no gradient along it, where eps does not count."""
    case = Case(B, T, heads, widths, shared, plus_one, seed)
    outputs, grads = case.ours(backend, eps=1e-20)
    _, want_grads = oracle(case, eps=1e-20)
    for x, dx, (_, sizes) in zip((case.q, case.k), grads[:2], want_grads[:2], strict=True):
        bound = (16 + widths[0] / 16) * EPS * (sizes * x.abs()).sum(-1)
        assert ((dx.double() * x).sum(-1).abs() <= bound).all()
    case.q, case.k = 8 * case.q, 0.25 * case.k
    scaled, _ = case.ours(backend, eps=1e-20)
    for a, b in zip(outputs, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * EPS, atol=8 * EPS)


@cases(**SIZES, norm=NORMS, seed=SEEDS, dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_head_does_not_see_its_batch(B, T, heads, widths, shared, norm, seed, dtype):
    """Triton, bit for bit, forward and dx: the last row of the batch alone, the last head alone. And twice is the
    same, dweight included."""
    case = Case(B, T, heads, widths, shared, norm, seed, dtype)
    outputs, grads = case.ours("triton")
    assert all(torch.equal(a, b) for a, b in zip(outputs + grads, sum(case.ours("triton"), []), strict=True))
    part, part_grads = case.row(slice(B - 1, B)).ours("triton")
    pairs = zip(part + part_grads[:2], outputs + grads[:2], strict=True)
    assert all(torch.equal(a, b[B - 1 :]) for a, b in pairs)
    case.q, case.dq = case.q[:, :, -1:], case.dq[:, :, -1:]
    part, part_grads = case.ours("triton")
    assert torch.equal(part[0], outputs[0][:, :, -1:]) and torch.equal(part_grads[0], grads[0][:, :, -1:])
    assert torch.equal(part[1], outputs[1]) and torch.equal(part_grads[1], grads[1])


@cases(T=st.integers(1, 5), heads=st.sampled_from([(4, 2), (5, 3)]), most=st.sampled_from([1, 2, 4]), seed=SEEDS)
def test_dweight_however_the_heads_are_split(T, heads, most, seed):
    """D = 256 has 8 heads a tile; programs take several tiles each, and the last one fewer."""
    case = Case(1, T, heads, (256, 64), True, False, seed)
    _, whole = case.ours("triton")
    with patch.object(module, "MAX_PARTIALS", most):
        _, grads = case.ours("triton")
    assert torch.equal(grads[0], whole[0]) and torch.equal(grads[1], whole[1])
    _, want = oracle(case)
    for got, (w, sizes) in zip(grads[2:], want[2:], strict=True):
        assert_within(got, w, (40 + T * heads[0]) * EPS * sizes)


# ----------------------------------------------------------------------------
# nasty but legal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_turn(backend, shape):
    case = Case(*shape, (4, 2), (8, 8), True, False, 0)
    outputs, grads = case.ours(backend)
    assert outputs[0].shape == (*shape, 4, 8) and outputs[1].shape == (*shape, 2, 8)
    assert grads[0].shape == (*shape, 4, 8) and (grads[2] == 0).all() and (grads[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_nan_heads(backend):
    """A head of zeros is divided by sqrt(eps), a NaN stays in its head."""
    case = Case(1, 3, (4, 2), (16, 6), True, False, 0)
    case.q[0, 1, 2], case.k[0, 2, 1, 0] = 0.0, math.nan
    (yq, yk), (dq, dk, dq_weight, dk_weight) = case.ours(backend)
    assert (yq[0, 1, 2] == 0).all() and yq.isfinite().all() and dq.isfinite().all() and dq_weight.isfinite().all()
    assert dq[0, 1, 2].abs().max() > 100
    for t in (yk, dk):
        assert t.isnan().any(-1).nonzero().tolist() == [[0, 2, 1]]
    assert dk_weight.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [None, False])
def test_any_strides(backend, norm):
    """Heads before positions, as attention has them; channels last but strided; expanded; gradients of stride 0."""
    case = Case(2, 5, (4, 4), (16, 8), True, norm, 0)
    case.dq, case.dk = torch.ones(1).expand(2, 5, 4, 16), case.dk.transpose(1, 2).contiguous().transpose(1, 2)
    views = [
        case.q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.randn(2, 5, 4, 32)[..., ::2],
        torch.randn(2, 5, 1, 16).expand(2, 5, 4, 16),
        torch.randn(1, 5, 4, 16).expand(2, 5, 4, 16),
    ]
    case.cos, case.sin = torch.randn(2, 1, 5, 1, 16)[..., ::2]
    for view in views:
        case.q, case.k = view, view.flip(1)
        got = sum(case.ours(backend), [])
        plain = case.row(slice(None))
        for name in ("q", "k", "dq", "dk", "cos", "sin"):
            setattr(plain, name, getattr(case, name).contiguous())
        for a, b in zip(got, sum(plain.ours(backend), []), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=16 * EPS)  # torch may sum strided rows in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [None, False])
def test_only_one_of_the_two_is_used(backend, norm):
    case = Case(1, 3, (4, 2), (16, 16), True, norm, 0)
    _, want = case.ours(backend)
    leaves = [t.clone().to(DEVICE).requires_grad_(True) for t in (case.q, case.k)]
    weights = [w.to(DEVICE) for w in case.weights] or [None, None]
    _, yk = rope(
        *leaves, case.cos.to(DEVICE), case.sin.to(DEVICE), q_weight=weights[0], k_weight=weights[1], backend=backend
    )
    yk.backward(case.dk.to(DEVICE))
    assert torch.equal(leaves[1].grad.cpu(), want[1])
    assert leaves[0].grad is None or (leaves[0].grad == 0).all()


class Spy:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids, self.options = kernel, [], {}

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.grids.append(grid)
            self.options.update(options)
            self.kernel[grid](*arguments, **options)

        return launch


def test_one_launch_and_no_partial_sums_for_frozen_weights():
    case = Case(2, 5, (4, 2), (64, 64), True, False, 0)
    _, want = case.ours("triton")
    leaves = [t.clone().to(DEVICE).requires_grad_(True) for t in (case.q, case.k)]
    weights = {"q_weight": case.weights[0].to(DEVICE), "k_weight": case.weights[1].to(DEVICE)}
    forward, backward = Spy(module._forward_kernel), Spy(module._backward_kernel)
    with patch.multiple(module, _forward_kernel=forward, _backward_kernel=backward):
        out = rope(*leaves, case.cos.to(DEVICE), case.sin.to(DEVICE), **weights, backend="triton")
        torch.autograd.backward(out, [case.dq.to(DEVICE), case.dk.to(DEVICE)])
    assert forward.grids == backward.grids == [(2 + 1,)]  # 40 and 20 heads of 64, 32 a tile
    assert backward.options["DWEIGHT"] is False
    assert torch.equal(leaves[0].grad.cpu(), want[0]) and torch.equal(leaves[1].grad.cpu(), want[1])


def test_one_frozen_weight():
    case = Case(2, 5, (4, 2), (64, 64), True, False, 0)
    _, want = case.ours("triton")
    q_weight, k_weight = (w.to(DEVICE) for w in case.weights)
    k_weight.requires_grad_(True)
    tensors = (t.to(DEVICE) for t in (case.q, case.k, case.cos, case.sin))
    out = rope(*tensors, q_weight=q_weight, k_weight=k_weight, backend="triton")
    torch.autograd.backward(out, [case.dq.to(DEVICE), case.dk.to(DEVICE)])
    assert q_weight.grad is None and torch.equal(k_weight.grad.cpu(), want[3])


@pytest.mark.parametrize("norm", [None, False])
def test_little_is_saved_for_backward(norm):
    """Without a norm only cos and sin, which all layers share; with one q and k themselves, no copies, no rstd."""
    case = Case(2, 5, (4, 2), (64, 64), True, norm, 0)
    tensors = [t.to(DEVICE) for t in (case.q, case.k, case.cos, case.sin, *case.weights)]
    tensors[0].requires_grad_(True)
    weights = dict(zip(("q_weight", "k_weight"), tensors[4:], strict=False))
    yq, _ = rope(*tensors[:4], **weights, backend="triton")
    saved = {t.data_ptr() for t in yq.grad_fn.saved_tensors}
    assert saved == {t.data_ptr() for t in (tensors[2:4] if norm is None else tensors)}


# ----------------------------------------------------------------------------
# what is said when it is wrong


def test_none_is_torch_where_triton_has_no_kernel():
    case = Case(1, 2, (2, 1), (8, 8), True, None, 0, torch.float64)
    tensors = (case.q, case.k, case.cos, case.sin)
    want = rope(*tensors, backend="torch")
    with patch.object(module, "choose", return_value="triton"):  # as on a GPU
        assert all(torch.equal(a, b) for a, b in zip(rope(*tensors), want, strict=True))
        with pytest.raises(
            ValueError, match="got torch.float64 for Triton, want bf16, fp16 or fp32; use backend='torch'"
        ):
            rope(*tensors, backend="triton")


GOOD = {"q": (2, 3, 4, 8), "k": (2, 3, 2, 8), "cos": (1, 3, 1, 8), "sin": (1, 3, 1, 8)}


@pytest.mark.parametrize(
    "change, text",
    [
        ({"q": (3, 4, 8)}, r"got q \(3, 4, 8\), k \(2, 3, 2, 8\), .*, want \(B, T, H, D\), \(B, T, K, D\) and twice"),
        ({"k": (2, 4, 2, 8)}, r"k \(2, 4, 2, 8\)"),
        ({"k": (2, 3, 2, 16)}, r"k \(2, 3, 2, 16\)"),
        ({"cos": (1, 3, 1, 4)}, r"cos \(1, 3, 1, 4\), sin \(1, 3, 1, 8\)"),
        ({"cos": (3, 3, 1, 8), "sin": (3, 3, 1, 8)}, r"cos \(3, 3, 1, 8\)"),
        ({"cos": (1, 2, 1, 8), "sin": (1, 2, 1, 8)}, r"cos \(1, 2, 1, 8\)"),
        ({"cos": (1, 3, 4, 8), "sin": (1, 3, 4, 8)}, r"cos \(1, 3, 4, 8\)"),
        (
            {"cos": (1, 3, 1, 7), "sin": (1, 3, 1, 7)},
            "cos of width 7 for heads of width 8, want an even number up to 8",
        ),
        ({"cos": (1, 3, 1, 10), "sin": (1, 3, 1, 10)}, "cos of width 10 for heads of width 8"),
        ({"cos": (1, 3, 1, 0), "sin": (1, 3, 1, 0)}, "cos of width 0"),
        ({"q_weight": (8,)}, r"got q_weight, k_weight \(8,\), None, want \(8,\) twice, or None twice"),
        ({"q_weight": (8,), "k_weight": (4,)}, r"k_weight \(8,\), \(4,\), want"),
    ],
)
def test_says_which_shape_is_wrong(change, text):
    call = {name: torch.zeros(shape) for name, shape in (GOOD | change).items()}
    with pytest.raises(ValueError, match=text):
        rope(**call)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"cos": torch.zeros(1, 3, 1, 8).bfloat16()}, "got dtypes bfloat16, float32 among q, k, cos, sin and weights"),
        ({"k": torch.zeros(2, 3, 2, 8).half()}, "got dtypes float16, float32"),
        ({"eps": 0.0, "q_weight": torch.ones(8), "k_weight": torch.ones(8)}, "got eps 0.0, want a number above 0"),
        ({"backend": "cuda"}, r"got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, text):
    call = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(ValueError, match=text):
        rope(**call)
