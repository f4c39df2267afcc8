"""kernels/glu.py against float64 and what the model computed before there were kernels, and laws of a gate.

Sizes: F on both sides of BLOCK_F = 1024, odd, and 1; a grid of several rows and several tiles. Memory that a kernel is
to write is NaN before (torch fills it so in deterministic mode), and so is everything around a strided input.

Run: python -m pytest tests/test_glu.py
"""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import glu as module
from kernels.glu import glu, glu_reference
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
ACTIVATIONS = ["silu", "gelu_tanh"]
EPS = torch.finfo(torch.float32).eps
TINY = 2e-38  # below it fp32 loses digits, and a GPU's exp gives 0
# what rounding to nearest costs: half an ulp, and half the distance of the smallest numbers (fp16 runs out at 6e-8)
ROUND = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
SIZES = {"N": st.sampled_from([1, 2, 3, 5]), "F": st.sampled_from([1, 2, 7, 33, 1023, 1024, 1025, 2049])}


def cases(**strategies):
    """given, without shrinking: the cases are small as they are, and in the interpreter it would take minutes."""
    return lambda test: settings(phases=[Phase.explicit, Phase.generate])(given(**strategies)(test))


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(N, F, seed, dtype=torch.float32, scale=3.0, strided=False):
    """gate, up, dy (N, F) on the CPU; gate within +-12, where the float64 oracle's exp stays finite."""
    frame = torch.full((3, N + 2, F + 3), math.nan, dtype=dtype)
    numbers = torch.randn(3, N, F, generator=torch.Generator().manual_seed(seed))
    numbers[0] = (numbers[0] * scale).clamp(-12, 12)
    frame[:, 1:-1, 1:-2] = numbers
    return frame[:, 1:-1, 1:-2] if strided else frame[:, 1:-1, 1:-2].contiguous()


def run(fn, gate, up, dy, device=DEVICE):
    """y, dgate, dup on the CPU."""
    gate, up = (t.detach().to(device).requires_grad_(True) for t in (gate, up))
    y = fn(gate, up)
    y.backward(dy.to(device))
    return y.detach().cpu(), gate.grad.cpu(), up.grad.cpu()


def ours(backend, activation):
    return lambda gate, up: glu(gate, up, activation=activation, backend=backend)


def oracle(gate, up, dy, activation):
    """float64, by hand: y, dgate, dup, the size of the terms of dgate, and how much an error of gate is magnified.

    silu(g) = g / (1 + e^-g). gelu_tanh(g) = 0.5 g (1 + tanh z), where 1 + tanh z is written 2 e^z / (e^z + e^-z): as
    1 + tanh z it has no digits left from g = -9 on, not even in float64.
    """
    g, u, dy = gate.double(), up.double(), dy.double()
    if activation == "silu":
        p, q, slope, size = 1 / (1 + (-g).exp()), 1 / (1 + g.exp()), 1.0, g.abs()
    else:
        z = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        p, q = z.exp() / (z.exp() + (-z).exp()), (-z).exp() / (z.exp() + (-z).exp())  # (1 +- tanh z) / 2
        slope, size = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g**2), 2 * z.abs()
    dgate = dy * u * (p + g * p * q * slope)
    terms = (dy * u).abs() * (p + (g * p * q * slope).abs())
    return g * p * u, dgate, dy * g * p, terms, size


def assert_within(got, want, bound):
    error = (got.double() - want).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), f"off by {error[wrong][:4]}, want {bound.expand_as(error)[wrong][:4]}"


# ----------------------------------------------------------------------------
# against float64


@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS, scale=st.sampled_from([1e-3, 3.0, 12.0]), strided=st.booleans())
def test_triton_float32_matches_float64(activation, N, F, seed, scale, strided):
    """Every number is relatively right, however small: v is off by 4 eps |v|, and the sigmoid by no more than v."""
    gate, up, dy = draw(N, F, seed, scale=scale, strided=strided)
    y, dgate, dup = run(ours("triton", activation), gate, up, dy)
    want_y, want_dgate, want_dup, terms, size = oracle(gate, up, dy, activation)
    c = (12 + 6 * size) * EPS
    assert_within(y, want_y, c * want_y.abs() + TINY * up.abs().clamp(min=1) * 12)
    assert_within(dup, want_dup, c * want_dup.abs() + TINY * dy.abs().clamp(min=1) * 12)
    assert_within(dgate, want_dgate, 2 * c * terms + TINY * (1 + (dy * up).abs()) * 12**4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS)
def test_torch_float32_matches_float64(activation, N, F, seed):
    """The reference's 1 + tanh is absolutely right, not relatively: its bound is on g, not on g sigmoid(g)."""
    gate, up, dy = draw(N, F, seed)
    want_y, want_dgate, want_dup, _, size = oracle(gate, up, dy, activation)
    noise = (12 + 6 * size) * EPS * (1 + gate.abs())
    y, dgate, dup = run(ours("torch", activation), gate, up, dy)
    assert_within(y, want_y, noise * up.abs())
    assert_within(dup, want_dup, noise * dy.abs())
    assert_within(dgate, want_dgate, noise * (dy * up).abs() * (1 + size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS)
def test_16_bit_is_rounded_once(dtype, activation, N, F, seed):
    """And the reference twice or more: row by row, our error is no larger than its error."""
    gate, up, dy = draw(N, F, seed, dtype)
    got = run(ours("triton", activation), gate, up, dy)
    torchs = run(ours("torch", activation), gate, up, dy)
    *want, terms, size = oracle(gate, up, dy, activation)
    u, tiny = ROUND[dtype]
    c = (24 + 12 * size) * EPS
    for g, t, w, sizes in zip(got, torchs, want, (want[0].abs(), terms, want[2].abs()), strict=True):
        assert_within(g, w, u * w.abs() + c * sizes + tiny + TINY * 12**4)
        ours_, theirs = (g.double() - w).norm(dim=1), (t.double() - w).norm(dim=1)
        # where rows are short the two roundings of torch may cancel: half an ulp of the row is always allowed
        assert (ours_ <= theirs + u * w.norm(dim=1) + F**0.5 * tiny).all()
    if F >= 1023:  # and where luck averages out it is smaller
        errors = [sum(((g.double() - w) ** 2).sum() for g, w in zip(x, want, strict=True)) for x in (got, torchs)]
        assert errors[0] < 0.9 * errors[1]


# ----------------------------------------------------------------------------
# the reference


def as_it_was(gate, up, activation):
    """MLP.forward of nanogspo/model.py before there were kernels, without its projections."""
    gate = (
        torch.nn.functional.gelu(gate, approximate="tanh")
        if activation == "gelu_tanh"
        else torch.nn.functional.silu(gate)
    )
    return gate * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS)
def test_the_reference_has_the_bits_it_always_had(dtype, activation, N, F, seed):
    gate, up, dy = draw(N, F, seed, dtype)
    got = run(ours(None, activation), gate, up, dy, "cpu")
    want = run(lambda g, u: as_it_was(g, u, activation), gate, up, dy, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    inputs = [t.requires_grad_(True) for t in draw(3, 5, 0, torch.float64)[:2]]
    assert torch.autograd.gradcheck(ours(None, activation), inputs)
    assert torch.autograd.gradgradcheck(ours(None, activation), inputs)


# ----------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS, scale=st.sampled_from([0.1, 3.0]))
def test_what_one_sign_lets_through_the_other_holds_back(backend, activation, N, F, seed, scale):
    """act(g) - act(-g) = g, because sigmoid(v) + sigmoid(-v) = 1 and v is odd."""
    gate, up, dy = draw(N, F, seed, scale=scale)
    y, dgate, dup = run(ours(backend, activation), gate, up, dy)
    y_, dgate_, dup_ = run(ours(backend, activation), -gate, up, dy)
    size = (24 + 12 * oracle(gate, up, dy, activation)[-1]) * EPS  # of v, as above
    assert_within((y - y_).double(), (gate * up).double(), 2 * size * (gate * up).abs() + 1e-12)
    assert_within((dup - dup_).double(), (dy * gate).double(), 2 * size * (dy * gate).abs() + 1e-12)
    assert_within((dgate + dgate_).double(), (dy * up).double(), 4 * size * (1 + gate.abs()) * (dy * up).abs() + 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@cases(**SIZES, seed=SEEDS)
def test_linear_in_up(backend, activation, N, F, seed):
    """Twice the up is twice the y and twice the dgate, bit for bit; dup does not see it."""
    gate, up, dy = draw(N, F, seed, scale=1.0)  # not so far out that y is subnormal
    y, dgate, dup = run(ours(backend, activation), gate, up, dy)
    y2, dgate2, dup2 = run(ours(backend, activation), gate, 2 * up, dy)
    assert torch.equal(y2, 2 * y) and torch.equal(dgate2, 2 * dgate) and torch.equal(dup2, dup)


@pytest.mark.isa
@cases(
    **SIZES, seed=SEEDS, activation=st.sampled_from(ACTIVATIONS), dtype=st.sampled_from([torch.bfloat16, torch.float32])
)
def test_a_row_does_not_see_its_batch(N, F, seed, activation, dtype):
    case = draw(N, F, seed, dtype)
    whole = run(ours("triton", activation), *case)
    alone = [run(ours("triton", activation), *(t[n : n + 1] for t in case)) for n in range(N)]
    again = run(ours("triton", activation), *case)
    for i in range(3):
        assert torch.equal(whole[i], torch.cat([part[i] for part in alone])) and torch.equal(whole[i], again[i])


# ----------------------------------------------------------------------------
# nasty but legal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gates_wide_open_and_shut(backend, activation, dtype):
    """From +-200 on up to the largest number there is, the gate is all or nothing: no overflow, no NaN, in y or in a
    gradient. g^3 is infinite from 1e13 on, and exp(200) is in fp32."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([200.0, 1e4, 0.5 * largest, largest]).to(dtype)
    gate = torch.cat([gate, -gate, torch.zeros(1, dtype=dtype)])[None]
    up = torch.full_like(gate, 0.5)
    dy = torch.full_like(gate, 0.25)
    y, dgate, dup = run(ours(backend, activation), gate, up, dy)
    open_, zero = gate.clamp(min=0), torch.zeros_like(gate)
    assert torch.equal(y, open_ / 2) and torch.equal(dup, open_ / 4)
    if backend == "triton" or activation == "silu":  # torch's own gelu gives NaN in dgate, where inf * 0 is left
        assert torch.equal(dgate, torch.where(gate > 0, 0.125, zero).index_fill(1, torch.tensor([8]), 0.0625))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_where_it_is(activation):
    gate, up, dy = draw(1, 33, 0)
    gate[0, 3], up[0, 5], dy[0, 7] = math.nan, math.nan, math.nan
    y, dgate, dup = run(ours("triton", activation), gate, up, dy)
    for out, places in ((y, [3, 5]), (dgate, [3, 5, 7]), (dup, [3, 7])):
        assert out.isnan()[0].nonzero().squeeze(1).tolist() == places


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 7), (2, 1, 3, 7)])
def test_any_number_of_dimensions(backend, shape):
    gate, up = torch.randn(2, *shape)
    y, dgate, dup = run(ours(backend, "silu"), gate, up, torch.ones(shape))
    assert y.shape == dgate.shape == dup.shape == gate.shape
    torch.testing.assert_close(dup, gate * torch.sigmoid(gate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_strides(backend, activation):
    """Halves of a fused projection, neighbours in one, transposes, and an upstream gradient of stride 0."""
    fused = torch.randn(2, 5, 66)
    pairs = [
        fused.chunk(2, dim=-1),
        (fused[..., ::2], fused[..., 1::2]),
        (torch.randn(33, 4).T, torch.randn(4, 33)),
        (torch.randn(1, 33).expand(5, 33), torch.randn(5, 1).expand(5, 33)),
    ]
    for gate, up in pairs:
        one = torch.ones(1, 1).expand(gate.shape)
        got = run(ours(backend, activation), gate, up, one)
        want = run(ours(backend, activation), gate.contiguous(), up.contiguous(), one.contiguous())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=2 * EPS, atol=2 * EPS)  # torch vectorises contiguous rows otherwise


def test_nothing_is_saved_but_gate_and_up():
    """4 F bytes a token in bf16 that are alive anyway: no copy, no activation."""
    gate, up = torch.randn(2, 3, 64, device=DEVICE, requires_grad=True)
    saved = glu(gate, up, activation="silu", backend="triton").grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offsets beyond 2^31 want 18 GB of GPU memory")
def test_offsets_beyond_int32():
    N, F = 2**20 + 3, 2048
    gate = torch.ones(N, F, device=DEVICE, dtype=torch.bfloat16)
    gate[-1] = torch.randn(F, device=DEVICE)
    with torch.no_grad():
        y = glu(gate, gate, activation="silu", backend="triton")
        assert torch.equal(y[-1], glu(gate[-1], gate[-1], activation="silu", backend="triton"))


# ----------------------------------------------------------------------------
# what is said when it is wrong


def test_none_is_torch_where_triton_has_no_kernel():
    gate, up = torch.randn(2, 3, 7, dtype=torch.float64)
    want = glu_reference(gate, up, "silu")
    assert torch.equal(glu(gate, up, activation="silu"), want)
    with patch.object(module, "choose", return_value="triton"):  # as on a GPU
        assert torch.equal(glu(gate, up, activation="silu"), want)
        with pytest.raises(
            ValueError, match="got torch.float64 for Triton, want bf16, fp16 or fp32; use backend='torch'"
        ):
            glu(gate, up, activation="silu", backend="triton")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"activation": "relu"}, "got activation 'relu', want one of silu, gelu_tanh"),
        ({"up": torch.ones(3)}, r"got gate \(2, 3\) and up \(3,\), want one shape \(..., F\), F > 0"),
        ({"gate": torch.ones(()), "up": torch.ones(())}, r"got gate \(\) and up \(\)"),
        ({"gate": torch.ones(2, 0), "up": torch.ones(2, 0)}, r"got gate \(2, 0\) and up \(2, 0\)"),
        ({"up": torch.ones(2, 3).half()}, "got gate torch.float32 and up torch.float16, want one float dtype"),
        ({"gate": torch.ones(2, 3).int(), "up": torch.ones(2, 3).int()}, "got gate torch.int32"),
        ({"backend": "cuda"}, r"got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, text):
    call = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3), "activation": "silu"} | change
    with pytest.raises(ValueError, match=text):
        glu(**call)
