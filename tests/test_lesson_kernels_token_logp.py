"""The three kernels of lesson 06 against float64: one set of tests for all versions, and for their torch reference.

Run: python -m pytest tests/test_lesson_kernels_token_logp.py
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.backend import HAVE_TRITON
from lessons.kernels import token_logp_v1, token_logp_v2, token_logp_v3
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", *["triton"] * HAVE_TRITON]
VERSIONS = [token_logp_v1, token_logp_v2, token_logp_v3]
EPS = torch.finfo(torch.float32).eps
# One tile is 4096 logits: 1, a prime, one under, exactly, one over, and into a third tile.
VOCAB = st.sampled_from([1, 2, 7, 4095, 4096, 4097, 9001])
ROWS = st.sampled_from([1, 2, 5])

versions = pytest.mark.parametrize("version", VERSIONS, ids=lambda m: m.__name__[-2:])
backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of the inf and nan a GPU just returns
few = settings(max_examples=12)


def draw(N, V, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator) * scale  # (N, V)
    targets = torch.randint(0, V, (N,), generator=generator)  # (N,)
    targets[-1] = V - 1  # the last column of the last tile
    return logits.to(DEVICE), targets.to(DEVICE), torch.randn(N, generator=generator).to(DEVICE)


def value_and_grad(function, logits, targets, dlogp):
    logits = logits.detach().clone().requires_grad_()
    out = function(logits, targets)
    out.backward(dlogp.to(out.dtype))
    return out.detach(), logits.grad


def oracle(logits, targets):
    return torch.log_softmax(logits.double(), dim=1).gather(1, targets[:, None]).squeeze(1)


@versions
@backends
@few
@given(ROWS, VOCAB, SEEDS, st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
@example(5, 9001, 0, 30.0)
def test_value_and_gradient(version, backend, N, V, seed, scale):
    logits, targets, dlogp = draw(N, V, seed, scale)
    call = lambda x, y: version.token_logp(x, y, backend=backend)  # noqa: E731
    got, got_grad = value_and_grad(call, logits, targets, dlogp)
    want, want_grad = value_and_grad(oracle, logits.double(), targets, dlogp)
    # chosen - lse: each is rounded at its own size, up to 5 deviations. The sum of V terms adds less than log2(V) eps.
    assert (got - want).abs().max() <= EPS * (2 * 5 * scale + math.log2(2 * V) + 4)
    # exp(x - lse) carries the absolute error of x - lse as its relative one
    assert ((got_grad - want_grad).abs() <= dlogp.abs()[:, None] * EPS * (2 * 5 * scale + 16)).all()
    assert got.dtype == torch.float32 and got_grad.dtype == logits.dtype


@versions
@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(version, backend, dtype):
    """Not a digit may be lost in between: the value is that of the same logits in fp32, the gradient one rounding."""
    logits, targets, dlogp = draw(3, 4097, 0, scale=5.0)
    logits = logits.to(dtype)
    call = lambda x, y: version.token_logp(x, y, backend=backend)  # noqa: E731
    got, got_grad = value_and_grad(call, logits, targets, dlogp)
    want, want_grad = value_and_grad(oracle, logits.double(), targets, dlogp)
    assert (got - want).abs().max() <= EPS * (2 * 25 + 17)
    assert got_grad.dtype == dtype
    tiny = torch.finfo(dtype).smallest_normal  # fp16 has a floor: 6e-5, below which digits are lost
    assert ((got_grad.double() - want_grad).abs() <= want_grad.abs() * torch.finfo(dtype).eps + tiny).all()


@versions
@backends
@few
@given(ROWS, VOCAB, SEEDS)
def test_gradients_of_a_row_sum_to_zero(version, backend, N, V, seed):
    logits, targets, dlogp = draw(N, V, seed)
    _, grad = value_and_grad(lambda x, y: version.token_logp(x, y, backend=backend), logits, targets, dlogp)
    # V roundings of numbers that sum to 2 in absolute value
    assert (grad.double().sum(1).abs() <= dlogp.abs() * 32 * EPS).all()


@versions
@backends
@few
@given(ROWS, VOCAB, SEEDS, st.sampled_from([-64.0, 0.5, 256.0]))
def test_a_shift_changes_nothing(version, backend, N, V, seed, shift):
    """softmax(x + c) = softmax(x): a forgotten maximum overflows at 256 and underflows at -64 with fp32's exp."""
    logits, targets, _ = draw(N, V, seed)
    a = version.token_logp(logits, targets, backend=backend)
    b = version.token_logp(logits + shift, targets, backend=backend)
    assert (a - b).abs().max() <= EPS * 3 * (abs(shift) + 16)


@versions
@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_a_row_does_not_see_its_neighbours(version):
    logits, targets, _ = draw(5, 4097, 1)
    whole = version.token_logp(logits, targets, backend="triton")
    alone = [version.token_logp(logits[n : n + 1], targets[n : n + 1], backend="triton") for n in range(5)]
    assert torch.equal(torch.cat(alone), whole)
    poisoned = logits.clone()
    poisoned[2] = math.nan
    rest = version.token_logp(poisoned, targets, backend="triton")
    assert torch.equal(rest[[0, 1, 3, 4]], whole[[0, 1, 3, 4]]) and rest[2].isnan()


@versions
@backends
def test_banned_tokens(version, backend):
    """-inf logits, whole tiles of them first, in the middle and last; and the lowest finite numbers."""
    logits, targets, dlogp = draw(4, 9001, 2)
    logits[0, :4096] = -math.inf
    logits[1, 4096:8192] = -math.inf
    logits[2, 8192:] = -math.inf
    logits[3, 1:] = torch.finfo(torch.float32).min
    targets = torch.tensor([8000, 3, 3, 0], device=DEVICE)
    call = lambda x, y: version.token_logp(x, y, backend=backend)  # noqa: E731
    got, got_grad = value_and_grad(call, logits, targets, dlogp)
    want, want_grad = value_and_grad(oracle, logits.double(), targets, dlogp)
    assert (got - want).abs().max() <= EPS * 40 and got[3] == 0
    assert (got_grad - want_grad).abs().max() <= EPS * 40
    everything_banned = version.token_logp(logits.fill_(-math.inf), targets, backend=backend)
    assert everything_banned.isnan().all()  # 0 / 0, as in torch: no number is right


@versions
@backends
def test_strides(version, backend):
    """A slice of a wider matrix is read in place, and nothing beside it is: what is beside it is nan."""
    logits, targets, dlogp = draw(3, 4097, 3)
    wide = torch.full((6, 5000), math.nan, device=DEVICE)
    view = wide[::2, 7:4104]  # (3, 4097) rows 10000 apart
    view.copy_(logits)
    call = lambda x, y: version.token_logp(x, y, backend=backend)  # noqa: E731
    assert torch.equal(call(view, targets), call(logits, targets))
    leaf = wide.requires_grad_()
    call(leaf[::2, 7:4104], targets).backward(dlogp)
    inside = leaf.grad[::2, 7:4104]
    assert torch.equal(inside, value_and_grad(call, logits, targets, dlogp)[1])
    assert leaf.grad.count_nonzero() == inside.count_nonzero()
    expanded = dlogp[:1].expand(3)  # a gradient with stride 0, as from .sum()
    a, b = (value_and_grad(call, logits, targets, d)[1] for d in (expanded, expanded.contiguous()))
    assert torch.equal(a, b)


@versions
@backends
def test_no_rows(version, backend):
    logits = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    out = version.token_logp(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), backend=backend)
    out.sum().backward()
    assert out.shape == (0,) and logits.grad.shape == (0, 5)


@versions
@backends
def test_little_is_saved(version, backend):
    """Triton's versions keep logits, targets and a float a row. The reference keeps more: that is what it costs."""
    logits = torch.zeros(4, 4096, device=DEVICE, requires_grad=True)
    out = version.token_logp(logits, torch.zeros(4, dtype=torch.int64, device=DEVICE), backend=backend)
    if backend == "triton":
        assert sum(t.numel() for t in out.grad_fn.saved_tensors) == logits.numel() + 4 + 4


@versions
@pytest.mark.parametrize(
    "logits, targets, text",
    [
        (torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64), r"got logits and targets of shapes \(2, 3\) and \(5,\)"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"shapes \(3,\) and \(3,\), want \(N, V\) and \(N,\)"),
        (torch.zeros(3, 2).T, torch.zeros(2, dtype=torch.int64), r"strides \(1, 2\), want 1 along V; call .contiguous"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "got targets from 0 to 3, want 0 <= target < 3"),
        (torch.zeros(2, 3), torch.tensor([-100, 0]), "got targets from -100 to 0, want"),
    ],
)
def test_says_what_is_wrong(version, logits, targets, text):
    with pytest.raises(ValueError, match=text):
        version.token_logp(logits, targets)


@pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")
def test_version_1_knows_its_limit():
    logits, targets = torch.zeros(1, 16385, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="got V = 16385, want at most 16384: a row has to fit in registers; take v2"):
        token_logp_v1.token_logp(logits, targets, backend="triton")
    assert token_logp_v1.token_logp(logits, targets, backend="torch").item() == pytest.approx(-math.log(16385))
