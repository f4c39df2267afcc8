"""kernels/backend.py and tools/interpreter.py: the right body runs, and the interpreter computes what a GPU would."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreter import matmul

from kernels.backend import INTERPRETED, bf16_products, choose, is_hopper, tl, triton
from kernels.glu import glu
from kernels.int8 import Int8Tensor
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from tests.strategies import SEEDS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.zeros(1)
DEVICE = "cpu" if INTERPRETED else "cuda"


def test_none_is_torch_on_a_cpu():
    assert choose(None, CPU) == "torch"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_none_is_triton_on_a_gpu():
    assert choose(None, CPU.cuda()) == "triton"


@pytest.mark.parametrize(
    ("capability", "hip", "hopper"), [((9, 0), None, True), ((8, 0), None, False), ((9, 0), "6.4", False)]
)
def test_hopper_is_sm_90_and_no_amd_card(capability, hip, hopper, monkeypatch):
    """An MI250 says (9, 0) as well, and Triton refuses options there that it takes for an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    card = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert is_hopper(card) == hopper and not is_hopper(CPU)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"got backend 'cuda', want 'torch', 'triton' or None"):
        choose("cuda", CPU)


def test_tensors_on_two_devices_are_refused():
    """By every entry, before a kernel reads the memory of another device."""
    x, weight, elsewhere = torch.zeros(2, 4), torch.ones(4), torch.zeros(2, 4, device="meta")
    q, cos = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4, device="meta")
    for call, text in (
        (lambda: rms_norm(x, weight.to("meta"), eps=1e-6), "x on cpu, weight on meta"),
        (lambda: add_rms_norm(x, elsewhere, weight, eps=1e-6), "x on cpu, delta on meta, weight on cpu"),
        (lambda: glu(x, elsewhere, activation="silu"), "gate on cpu, up on meta"),
        (lambda: rope(q, q, cos, cos), "q on cpu, k on cpu, cos on meta, sin on meta"),
        (lambda: Int8Tensor(x.to(torch.int8), torch.ones(2, device="meta")), "codes on cpu, scale on meta"),
    ):
        with pytest.raises(ValueError, match=f"got {text}, want one device; move them with"):
            call()


SETTING = torch.backends.mkldnn.matmul


@pytest.fixture
def setting():
    before = SETTING.fp32_precision
    yield SETTING
    SETTING.fp32_precision = before


@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
@pytest.mark.parametrize("wanted", [True, False])
def test_bf16_products_leave_the_setting_as_it_was(before, wanted, setting):
    """Also after an exception and when nested. A setting left behind would round every fp32 product that follows."""
    setting.fp32_precision = before
    within = "bf16" if wanted else before
    with bf16_products(wanted):
        assert setting.fp32_precision == within
        with bf16_products(True):
            assert setting.fp32_precision == "bf16"
        assert setting.fp32_precision == within
        with bf16_products(False):  # is not "no bf16", but "leave it"
            assert setting.fp32_precision == within
    assert setting.fp32_precision == before
    with pytest.raises(RuntimeError, match="inside"), bf16_products(wanted):
        raise RuntimeError("inside")
    assert setting.fp32_precision == before


@given(
    M=st.sampled_from([1, 3, 64]),
    K=st.sampled_from([1, 31, 512]),
    N=st.sampled_from([1, 17, 300]),
    seed=st.integers(0, 2**31 - 1),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_bf16_products_of_bf16_numbers_are_fp32_sums(M, K, N, seed, scale):
    """Rounding the sums, or the result, to bf16 would be off by 4e-3 of it; this allows K roundings of 6e-8 each.
    300 x 512 is more than a unit's tile, 1 x 1 less."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(M, K, generator=generator) * scale).bfloat16()  # (M, K)
    w = torch.randn(N, K, generator=generator).bfloat16()  # (N, K)
    truth, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T  # (M, N)
    with bf16_products(True):
        by_linear, by_mm = torch.nn.functional.linear(x.float(), w.float()), x.float() @ w.float().T  # (M, N)
    for got in (by_linear, by_mm):
        assert got.dtype == torch.float32
        assert ((got.double() - truth).abs() <= K * torch.finfo(torch.float32).eps * size).all()


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_triton_on_a_cpu_wants_the_interpreter():
    code = """
import torch
from kernels.backend import choose
try: choose("triton", torch.zeros(1))
except ValueError as e: print(e)
"""
    assert "TRITON_INTERPRET=1 set before Python starts" in run(code)
    assert run(code, TRITON_INTERPRET="1") == ""


def test_every_kernel_file_loads_without_triton():
    """A name of tl used outside a kernel body, or triton.something at import, would break macOS and Windows."""
    names = [f"kernels.{path.stem}" for path in (ROOT / "kernels").glob("*.py")]
    code = f"""
import sys
sys.modules["triton"] = None
import importlib, torch
for name in {names!r}: importlib.import_module(name)
from kernels.backend import HAVE_TRITON, choose
print(HAVE_TRITON)
try: choose("triton", torch.zeros(1))
except ValueError as e: print(e)
"""
    first, second = run(code).splitlines()
    assert first == "False"
    assert second.startswith("got backend 'triton' without Triton, want it installed")


@triton.jit
def _bf16_kernel(x_ptr, y_ptr, sum_ptr, dot_ptr, down_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    square = n[:, None] * N + n[None, :]
    x, y = tl.load(x_ptr + square), tl.load(y_ptr + square)
    tl.store(sum_ptr + square, x + y)
    tl.store(dot_ptr + square, tl.dot(x, y))
    tl.store(down_ptr + square, (x.to(tl.float32) * 1.7 + y.to(tl.float32)).to(tl.bfloat16))


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 1e4]))
def test_bf16_in_a_kernel_rounds_as_torch_does(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 16, 16, generator=generator) * scale).bfloat16().to(DEVICE)
    total, down = torch.empty_like(x), torch.empty_like(x)
    dot = torch.empty(16, 16, device=DEVICE)
    _bf16_kernel[(1,)](x, y, total, dot, down, N=16, enable_fp_fusion=False)
    assert torch.equal(total, x + y)
    assert torch.equal(down, (x.float() * 1.7 + y.float()).bfloat16())
    # products of bf16 are exact in fp32; 16 additions round at most 16 times
    truth = x.double() @ y.double()
    bound = 16 * torch.finfo(torch.float32).eps * (x.double().abs() @ y.double().abs())
    assert ((dot.double() - truth).abs() <= bound).all()


@pytest.mark.isa
@given(seed=SEEDS, M=st.integers(1, 65), K=st.sampled_from([1, 3, 16, 64, 129]), N=st.sampled_from([1, 7, 16, 33, 64]))
def test_a_row_of_a_tile_has_its_bits_wherever_it_stands(seed, M, K, N):
    """As on a GPU, whose tensor cores know no rows. Without it numpy's BLAS multiplies, and on CPUs without AVX-512 a
    row's last bits follow its place in the tile: every test of batch invariance then fails on right kernels."""
    rng = np.random.default_rng(seed)
    a, b, d = (rng.standard_normal(shape, dtype=np.float32) for shape in ((M, K), (K, N), (M, N)))
    whole, rows, columns = matmul(a, b, d), rng.permutation(M), rng.permutation(N)
    assert np.array_equal(matmul(a[rows], b, d[rows]), whole[rows])
    assert np.array_equal(matmul(a[:, :], np.ascontiguousarray(b[:, columns]), d[:, columns]), whole[:, columns])
    alone = [matmul(a[m : m + 1], b, d[m : m + 1])[0] for m in rows[:5]]
    assert np.array_equal(alone, whole[rows[:5]])
    assert np.array_equal(matmul(np.stack([a, a]), np.stack([b, b]), np.stack([d, d])), [whole, whole])
    truth = a.astype(np.float64) @ b.astype(np.float64) + d
    bound = (K + 1) * np.finfo(np.float32).eps * (np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(d))
    assert (np.abs(whole - truth) <= bound).all()  # K products and K + 1 sums round once each
