"""lessons/kernels/rms_norm_v1.py to v3.py by the tests of kernels/rms_norm.py, and the bytes that the lesson counts.

Run: python -m pytest tests/test_lesson_kernels_rms_norm.py
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import glu, rms_norm, rope
from kernels.backend import INTERPRETED
from lessons.kernels import rms_norm_v1, rms_norm_v2, rms_norm_v3
from lessons.kernels.count_bytes import TorchBytes, triton_bytes
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {
    "v1": rms_norm_v1.rms_norm,
    "v2": rms_norm_v2.rms_norm,
    "v3": rms_norm_v3.rms_norm,
    "final": lambda x, weight, eps: rms_norm.rms_norm(x, weight, eps=eps, backend="triton"),
}
EPS = torch.finfo(torch.float32).eps
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp
interpreted = pytest.mark.skipif(not INTERPRETED, reason="loads and stores are counted in the interpreter only")


def draw(N, W, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(N, W, generator=g), 1 + 0.5 * torch.randn(W, generator=g)
    return x.to(dtype), weight.to(dtype)


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("version", VERSIONS)
@given(
    N=st.sampled_from([0, 1, 3, 5]),
    W=st.sampled_from([1, 7, 128, 1023, 1024, 1025, 2500]),
    dtype=st.sampled_from(list(UNIT)),
    seed=SEEDS,
)
def test_every_version_matches_float64(version, N, W, dtype, seed):
    """Two roundings to the dtype (of h and of the product), and fp32 noise of a sum of W squares."""
    x, weight = draw(N, W, seed, dtype)
    y = VERSIONS[version](x.to(DEVICE), weight.to(DEVICE), eps=1e-6).cpu()
    wide = x.double()
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    bound = (2.01 * UNIT[dtype] + (24 + W / 32) * EPS) * want.abs() + 2.0**-23 * (dtype == torch.float16)
    assert y.dtype == dtype and ((y.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_does_not_see_its_batch(version):
    x, weight = (t.to(DEVICE) for t in draw(9, 1025, 0))
    whole = VERSIONS[version](x, weight, eps=1e-6)
    alone = [VERSIONS[version](x[n : n + 1], weight, eps=1e-6) for n in range(9)]
    assert torch.equal(whole, torch.cat(alone))


# ----------------------------------------------------------------------------
# bytes


@interpreted
@pytest.mark.parametrize("version, read, written", [("v1", 4, 2), ("v2", 4, 2), ("v3", 2, 2), ("final", 2, 2)])
def test_bytes_of_every_version(version, read, written):
    """Per number of bf16. Besides: the weight, once a program; rstd, 4 bytes a row, where there is one in memory."""
    N, W = 8, 1024
    x, weight = draw(N, W, 0, torch.bfloat16)
    with triton_bytes() as traffic:
        VERSIONS[version](x, weight, eps=1e-6)
    programs = 2 if version == "final" else N
    rstd = {"v1": (4 * N, 4 * N), "final": (0, 4 * N)}.get(version, (0, 0))
    assert traffic.read == read * N * W + 2 * W * programs + rstd[0]
    assert traffic.written == written * N * W + rstd[1]


def gradients(outputs):
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


@interpreted
def test_the_floors_in_the_docstrings():
    """Forward and backward of every kernel read each number once and write each result once: the tables of rms_norm.py,
    rope.py and glu.py, bf16. On top: weights once a program (rope: for both halves), cos and sin once a head."""
    N, W, F, H, K, D = 8, 1024, 1024, 4, 4, 128

    def new(*shape):
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(True)

    def count(fn, *inputs):
        found = []
        with triton_bytes() as forward:
            y = fn(*inputs)
            outputs = y if isinstance(y, tuple) else (y,)
        with triton_bytes() as backward:
            gradients(outputs)
        for traffic in (forward, backward):
            found.append(traffic.total)
        return found

    x, delta, weight = new(N, W), new(N, W), new(W).detach()
    programs = 2  # 4 rows of 1024 each
    norm = count(lambda x: rms_norm.rms_norm(x, weight, eps=1e-6, backend="triton"), x)
    assert norm == [N * (4 * W + 4) + programs * 2 * W, N * (6 * W + 4) + programs * 2 * W]
    both = count(lambda x, d: rms_norm.add_rms_norm(x, d, weight, eps=1e-6, backend="triton"), x, delta)
    assert both == [N * (8 * W + 4) + programs * 2 * W, N * (8 * W + 4) + programs * 2 * W]
    gate, up = new(N, F), new(N, F)
    assert count(lambda g, u: glu.glu(g, u, activation="silu", backend="triton"), gate, up) == [6 * N * F, 10 * N * F]
    q, k, cos, sin = new(1, N, H, D), new(1, N, K, D), *torch.randn(2, 1, N, 1, D).bfloat16()
    weights, heads = {"q_weight": new(D).detach(), "k_weight": new(D).detach()}, N * (H + K)
    plain = count(lambda q, k: rope.rope(q, k, cos, sin, backend="triton"), q, k)
    assert plain == [heads * (4 * D + 4 * D)] * 2
    normed = count(lambda q, k: rope.rope(q, k, cos, sin, **weights, backend="triton"), q, k)
    assert normed == [heads * (4 * D + 4 * D) + 4 * 2 * D, heads * (6 * D + 4 * D) + 4 * 2 * D]  # 16 heads a program


def test_bytes_of_torch_operations():
    """What the docstrings say of eager code: 36 bytes a number of a norm; 10 forward and 18 backward of a SwiGLU."""
    N, W = 64, 256
    x, weight = (t.bfloat16() for t in draw(N, W, 0))
    with TorchBytes() as mode:
        rms_norm.rms_norm(x, weight, eps=1e-6, backend="torch")
    # to fp32, square, mean, scale, round, weight; the rest is a few numbers a row, and one weight
    assert 36 * N * W < mode.traffic.total < 36 * N * W + 40 * N + 4 * W
    gate, up = torch.randn(2, N, W, dtype=torch.bfloat16)
    gate.requires_grad_(True), up.requires_grad_(True)
    with TorchBytes() as mode:
        y = glu.glu(gate, up, activation="silu", backend="torch")
    assert mode.traffic.total == 10 * N * W and mode.traffic.steps == 2
    dy = torch.ones_like(y)
    with TorchBytes() as mode:
        y.backward(dy)
    assert mode.traffic.total == 18 * N * W and mode.traffic.steps == 3


def test_views_and_expanded_tensors_move_nothing_twice():
    x = torch.ones(1, 8).expand(4, 8)
    with TorchBytes() as mode:
        y = x.T[2:].unsqueeze(0).chunk(2, dim=1)
    assert mode.traffic.total == 0 and len(y) == 2
    with TorchBytes() as mode:
        x + 1.0
    assert (mode.traffic.read, mode.traffic.written) == (32, 128)
