"""kernels/nf4.py and nf4.cu, bit for bit: bytes against bitsandbytes, values against numpy's fp32 arithmetic.

Sizes stand on both sides of a pair of codes (1, 2, 3), of a block (63, 64, 65), of a program of the Triton
kernel (4096) and of a group of 256 scales (16384), with last blocks that are short. Memory that a kernel is to write is
NaN before.

The whole comparison with bitsandbytes, 10 million values, takes half a minute:
HYPOTHESIS_PROFILE=deep python -m pytest tests/test_nf4.py -k bitsandbytes

Run: python -m pytest tests/test_nf4.py
"""

import ctypes
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.cpp_extension import is_ninja_available

from kernels import nf4 as module
from kernels.nf4 import NF4Tensor, dequantize_nf4, nf4_matmul, quantize_nf4
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
EPS = torch.finfo(torch.float32).eps
ROUND = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # half an ulp, as a part of the number
VALUES = 10_000_001 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 300_001
SOURCE = Path(module.__file__).with_suffix(".cu")
NEEDS_NVCC = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")

SIZES = st.sampled_from([1, 2, 3, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 16383, 16384, 16385, 20001])
BLOCKS = st.sampled_from([64, 64, 32, 128, 4096])


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(n, seed, dtype=torch.float32, smallest=1e-20):
    """Numbers that look for trouble, (n,): every block of 64 is of one of eight kinds."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(-(-n // 64), 64, generator=g)  # (b, 64) trained weights look so
    kind = torch.randint(0, 8, (len(x),), generator=g)
    x[kind == 1] = 0.0
    x[kind == 2] *= 0
    x[kind == 2, 7] = -3.0  # a single spike; the zeros around it may be -0.0
    ties = torch.tensor(module.NF4)
    ties = torch.cat([(ties[:-1] + ties[1:]) / 2, ties, torch.tensor([1.0])]).repeat(2)  # (64,) absmax 1: exact ties
    x[kind == 3] = torch.where(torch.rand(64, generator=g) < 0.5, ties, torch.nextafter(ties, torch.tensor(0.0)))
    near = ties * torch.rand(len(x), 1, generator=g)  # (b, 64) off by a rounding: x * (1 / a) and x / a may differ
    x[kind == 7] = near[kind == 7]
    x[kind == 4] = 0.02  # equal numbers
    x[kind == 5] = -x[kind == 5].abs()
    decades = 10 ** torch.randint(round(math.log10(smallest)), 4, (len(x), 1), generator=g).float()  # (b, 1)
    x = torch.where((kind == 6)[:, None], x * decades, x)  # scales far apart
    return x.flatten()[:n].to(dtype)


def same_bits(a, b):
    """torch.equal also for the sign of zero, and for NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    view = BITS.get(a.dtype)
    return torch.equal(a, b) if view is None else torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def by_hand(q: NF4Tensor, dtype):
    """The weights, from the bytes, in numpy: fp32 operations one at a time, and one rounding to dtype."""
    n = math.prod(q.shape)
    part = {name: x.cpu().numpy() for name, x in q.tensors.items()}
    byte = part["codes"].ravel()
    codes = np.stack([byte // 16, byte % 16], 1).ravel()[:n]  # the high half comes first
    scales = part["absmax"]
    if q.nested:
        groups = np.repeat(part["absmax2"], 256)[: len(scales)]
        scales = part["code2"][scales] * groups + part["offset"]  # numpy never fuses
        assert scales.dtype == np.float32
    values = part["codebook"][codes] * np.repeat(scales, q.block_size)[:n]
    return torch.from_numpy(values).view(q.shape).to(dtype)


# ----------------------------------------------------------------------------
# against bitsandbytes


def bitsandbytes_of(w, block_size, double_quant):
    """Its packed codes, its state, and a function that gives its weights in a dtype. Odd shapes take its compiled torch
    path: run as plain torch here, because compiling takes minutes."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4")

    def dequantize(dtype):
        state.dtype = dtype
        with torch.compiler.set_stance("force_eager"):
            return functional.dequantize_4bit(codes, state).view(w.shape)

    return codes, state, dequantize


def assert_equals_bitsandbytes(w, block_size=64, double_quant=True, dtypes=DTYPES):
    q = quantize_nf4(w, block_size=block_size, double_quant=double_quant)
    codes, state, dequantize = bitsandbytes_of(w, block_size, double_quant)
    assert torch.equal(q.codes, codes)
    assert same_bits(q.absmax, state.absmax)
    assert same_bits(q.codebook, state.code)
    if double_quant:
        assert same_bits(q.absmax2, state.state2.absmax)
        assert same_bits(q.code2, state.state2.code)
        assert same_bits(q.offset, state.offset)
    for dtype in dtypes:
        assert same_bits(dequantize_nf4(q, dtype, backend="torch"), dequantize(dtype)), dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_on_many_values(dtype, double_quant):
    """300 thousand of them, 10 million in the deep profile; the last block is short and the last byte half empty.
    (fp16 has no 1e-20: such blocks are zeros there.)"""
    assert_equals_bitsandbytes(weights(VALUES, seed=0, dtype=dtype), double_quant=double_quant)


@given(SIZES, BLOCKS, SEEDS, st.sampled_from(DTYPES), st.booleans())
def test_bitsandbytes_on_any_size(n, block_size, seed, dtype, double_quant):
    assert_equals_bitsandbytes(weights(n, seed, dtype), block_size, double_quant)


@pytest.mark.parametrize("shape", [(64, 64), (3, 7), (5, 64, 64), (1, 1), (257 * 64,), (2, 3, 5)])
def test_bitsandbytes_on_any_shape(shape):
    assert_equals_bitsandbytes(weights(math.prod(shape), seed=1).view(shape))


def test_bitsandbytes_on_short_last_blocks():
    """It multiplies whole blocks by 1 / absmax and divides short ones by absmax. Seen only beside a threshold."""
    g = torch.Generator().manual_seed(12)
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(module.NF4, module.NF4[1:], strict=False)])
    ratios = torch.cat([midpoints, torch.tensor([1.0])]).repeat(3)  # (48,)
    for absmax in torch.rand(100, generator=g):
        assert_equals_bitsandbytes(ratios * absmax, double_quant=False, dtypes=[])
        assert_equals_bitsandbytes(torch.cat([ratios, ratios[:16]]) * absmax, double_quant=False, dtypes=[])


@pytest.mark.parametrize("last", [64, 63])
def test_bitsandbytes_on_zeros_and_on_equal_scales(last):
    """All scales equal: their distance from the mean is 0, and so is absmax2. A short block of zeros has a scale of
    1e-38 there, a whole one of 0."""
    for fill in (0.0, 1.0, -0.3):
        w = torch.full((300 * 64 + last,), fill)
        assert_equals_bitsandbytes(w)
        assert_equals_bitsandbytes(w, double_quant=False)


@pytest.mark.parametrize("scale", [1e-36, 1e-38, 1e-40, 1e-44, 1e33])
def test_bitsandbytes_at_the_ends_of_fp32(scale):
    """Where the reciprocal of absmax overflows, and where numbers have few bits left. bf16 below 1.2e-38 is rounded
    here; bitsandbytes makes it 0 on CPUs with AVX512-BF16 and only there, so bf16 is compared with its fp32."""
    w = torch.randn(6400, generator=torch.Generator().manual_seed(2)) * scale
    for double_quant in (True, False):
        assert_equals_bitsandbytes(w, double_quant=double_quant, dtypes=DTYPES[1:])
        q = quantize_nf4(w, double_quant=double_quant)
        assert same_bits(dequantize_nf4(q), dequantize_nf4(q, torch.float32).bfloat16())


def test_scales_take_bitsandbytes_detour():
    """Scales go to one of 65,536 positions first, from there to the nearest of 256 codes: not always the nearest.
    Every position once, up to half a step off, 255 to a group beside one spike; a block is a scale here."""
    g = torch.Generator().manual_seed(11)
    v = -1 + 2 * (torch.arange(65536) + torch.rand(65536, generator=g) - 0.5).clamp(0, 65535) / 65535
    v = torch.nn.functional.pad(v, (0, 258 * 255 - 65536)).view(258, 255)  # (258, 255)
    absmax = 3 + torch.cat([torch.ones(258, 1), v], 1).flatten()  # (258 * 256,)
    w = torch.zeros(len(absmax), 64)
    w[:, 5] = absmax
    assert_equals_bitsandbytes(w, dtypes=[])
    q = quantize_nf4(w)
    scaled = (absmax - q.offset) / q.absmax2.repeat_interleave(256)  # (258 * 256,)
    nearest = torch.bucketize(scaled, (q.code2[1:] + q.code2[:-1]) / 2)
    assert (nearest != q.absmax).sum() > 50  # so the test can tell


# ----------------------------------------------------------------------------
# laws of quantising


@given(SIZES, BLOCKS, SEEDS)
def test_every_weight_gets_the_nearest_of_its_blocks_16_values(n, block_size, seed):
    w = weights(n, seed)
    q = quantize_nf4(w, block_size=block_size, double_quant=False)
    scales = q.absmax.double().repeat_interleave(block_size)[:n]  # (n,)
    values = torch.tensor(module.NF4, dtype=torch.float64) * scales[:, None]  # (n, 16)
    best = (values - w.double()[:, None]).abs().amin(1)  # (n,)
    got = (dequantize_nf4(q, torch.float32).double() - w.double()).abs()  # (n,)
    # three fp32 roundings of numbers up to absmax: the reciprocal, the product, and the value itself
    assert (got <= best + 3 * EPS * scales).all()


@given(SIZES, BLOCKS, SEEDS)
def test_quantising_again_changes_nothing(n, block_size, seed):
    """Plain scales: the largest weight of a block is kept exactly, so its scale is, so all else is."""
    q = quantize_nf4(weights(n, seed), block_size=block_size, double_quant=False)
    again = quantize_nf4(dequantize_nf4(q, torch.float32), block_size=block_size, double_quant=False)
    zero = (q.absmax <= 1e-38).repeat_interleave(block_size)[:n]  # a spike's sign aside, zeros decode to 0 * 0
    assert same_bits(again.absmax, q.absmax)
    assert torch.equal(dequantize_nf4(again, torch.float32), dequantize_nf4(q, torch.float32)) or zero.any()
    assert torch.equal(again.codes, q.codes)


@given(st.integers(1, 400), SEEDS, st.integers(-20, 20))
def test_powers_of_two_move_into_the_scale(n, seed, power):
    w = weights(n, seed, smallest=1e-3)
    one, other = (quantize_nf4(x, double_quant=False) for x in (w, w * 2.0**power))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.absmax * 2.0**power, other.absmax) or n % 64
    assert torch.equal(one.codes[: n // 64 * 32], other.codes[: n // 64 * 32])


@given(st.sampled_from([200, 5000, 20000]), SEEDS)
def test_a_block_does_not_see_the_others(n, seed):
    w = weights(n, seed)
    other = w.clone()
    other[64:128] = 1e3
    a, b = quantize_nf4(w, double_quant=False), quantize_nf4(other, double_quant=False)
    keep = torch.arange(len(a.codes)) // 32 != 1
    assert torch.equal(a.codes[keep], b.codes[keep])


def test_chunks_leave_no_seam():
    """A chunk of 4096 weights (64 scales, a quarter of a group) against one of a million."""
    for dtype in (torch.bfloat16, torch.float32):
        w = weights(30_001, seed=3, dtype=dtype)
        whole = quantize_nf4(w)
        with patch.object(module, "CHUNK", 4096):
            cut = quantize_nf4(w)
            values = dequantize_nf4(cut, dtype, backend="torch")
        for name, x in whole.tensors.items():
            assert same_bits(x, cut.tensors[name]), name
        assert same_bits(values, dequantize_nf4(whole, dtype, backend="torch"))


def test_strides_do_not_matter():
    """Blocks run over the weights in the order of their indices, not of their addresses."""
    w = weights(40 * 96, seed=4).view(40, 96)
    for view in (w.T, w[::2], w[:, 1:65], w[3:]):
        a, b = quantize_nf4(view), quantize_nf4(view.contiguous())
        assert all(same_bits(x, b.tensors[name]) for name, x in a.tensors.items())
        assert a.shape == tuple(view.shape)


def test_half_a_byte_a_weight():
    q = quantize_nf4(torch.randn(1024, 1024))
    assert q.nbytes == 524288 + 16384 + 256 + 4 * (16 + 256 + 1)  # codes, absmax, absmax2, tables: the header's numbers
    assert quantize_nf4(torch.randn(1024, 1024), double_quant=False).nbytes == 524288 + 4 * 16384 + 4 * 16


def test_to_moves_every_tensor_and_nothing_else():
    q = quantize_nf4(torch.randn(3, 64))
    moved = q.to("meta")
    assert {x.device.type for x in moved.tensors.values()} == {"meta"} and len(moved.tensors) == 6
    assert (moved.shape, moved.dtype, moved.block_size) == ((3, 64), torch.float32, 64)


def test_parameters_and_other_default_dtypes_and_devices():
    w = torch.nn.Parameter(torch.randn(2, 64))
    plain = quantize_nf4(w.detach())
    with torch.device("meta"):
        q = quantize_nf4(w)
    assert all(same_bits(x, plain.tensors[name]) for name, x in q.tensors.items())
    assert not any(x.requires_grad for x in q.tensors.values())


def test_little_memory_besides_what_is_there():
    """16 million weights: 64 MB, 9 MB quantised; a matrix of distances to the codebook would be 1 GB. A chunk of a
    million needs some eight copies in fp32 or int32 at a time, 32 MB; as much again for what the allocator keeps."""
    script = """
import resource, torch
from kernels.nf4 import dequantize_nf4, quantize_nf4
torch.set_num_threads(1)
w = torch.randn(4096, 4096)
quantize_nf4(w[:8]), dequantize_nf4(quantize_nf4(w[:8]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
a = peak(); q = quantize_nf4(w)
b = peak(); dequantize_nf4(q, torch.float32, out=w)
print(b - a, peak() - b)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    quantising, dequantising = map(int, run.stdout.split())
    assert quantising < 80 and dequantising < 40, run.stdout


# ----------------------------------------------------------------------------
# dequantising


@pytest.mark.parametrize("backend", BACKENDS)
@given(n=SIZES, block_size=BLOCKS, seed=SEEDS, dtype=st.sampled_from(DTYPES), double_quant=st.booleans())
def test_values_are_those_of_the_bytes(backend, n, block_size, seed, dtype, double_quant):
    q = quantize_nf4(weights(n, seed), block_size=block_size, double_quant=double_quant)
    assert same_bits(dequantize_nf4(q.to(DEVICE), dtype, backend=backend).cpu(), by_hand(q, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_bytes_of_any_origin(backend):
    """Random codes, scales and tables, as another program may have stored them; and all 256 bytes. Rounding once where
    (2) rounds twice would change 6 % of the scales."""
    g = torch.Generator().manual_seed(5)
    n = 64 * 2000
    byte = torch.arange(n // 2).to(torch.uint8)[:, None]  # (n / 2, 1)
    q = NF4Tensor(
        codes=byte,
        absmax=torch.randint(0, 256, (2000,), generator=g).to(torch.uint8),
        shape=(2000, 64),
        dtype=torch.bfloat16,
        block_size=64,
        codebook=torch.randn(16, generator=g),
        absmax2=torch.rand(8, generator=g),
        code2=torch.randn(256, generator=g),
        offset=torch.rand((), generator=g),
    )
    for dtype in DTYPES:
        assert same_bits(dequantize_nf4(q.to(DEVICE), dtype, backend=backend).cpu(), by_hand(q, dtype))
    scales = q.code2[q.absmax.long()].double() * q.absmax2.repeat_interleave(256)[:2000].double() + q.offset.double()
    fused = q.codebook[7] * scales.float()  # byte 0x77, block 0: one rounding
    assert (fused != module._scales(q, 0, 2000) * q.codebook[7]).float().mean() > 0.02  # the test can tell


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_nothing_around_it(backend):
    q = quantize_nf4(weights(65 * 63, seed=6).view(65, 63)).to(DEVICE)
    frame = torch.full((65 * 63 + 128,), math.nan, dtype=torch.bfloat16, device=DEVICE)
    out = frame[64:-64].view(65, 63)
    assert dequantize_nf4(q, out=out, backend=backend) is out
    assert same_bits(out.cpu(), by_hand(q, torch.bfloat16))
    assert frame[:64].isnan().all() and frame[-64:].isnan().all()


def test_default_is_bf16_and_torch_here():
    q = quantize_nf4(torch.randn(3, 64))
    assert dequantize_nf4(q).dtype == torch.bfloat16
    assert same_bits(dequantize_nf4(q), dequantize_nf4(q, torch.bfloat16, backend="torch"))


# ----------------------------------------------------------------------------
# products


def operands(M, N, K, seed, dtype, block_size=64, double_quant=True):
    """x (M, K) in a frame of NaN, and weights (N, K): what is read beyond x's edges is NaN, and 0 * NaN is NaN."""
    g = torch.Generator().manual_seed(seed)
    frame = torch.full((M + 2, K + 3), math.nan)
    frame[1:-1, 1:-2] = torch.randn(M, K, generator=g)
    w = weights(N * K, seed, smallest=1e-3).view(N, K) / 100  # so that fp16 holds sums of them
    q = quantize_nf4(w, block_size=block_size, double_quant=double_quant)
    return frame.to(dtype).to(DEVICE)[1:-1, 1:-2], q.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    M=st.sampled_from([1, 2, 15, 16, 17, 33, 64, 65]),
    N=st.sampled_from([1, 7, 16, 17]),
    K=st.sampled_from([32, 64, 192, 144, 65, 6]),  # 144: pieces of 16 weights, and a tile that ends half-way; odd; tiny
    block_size=BLOCKS,
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
)
def test_product_and_gradient(backend, M, N, K, block_size, seed, dtype, double_quant):
    x, q = operands(M, N, K, seed, dtype, block_size, double_quant)
    x = x.detach().requires_grad_(True)
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
    y = nf4_matmul(x, q, backend=backend)
    y.backward(dy)
    assert y.dtype == dtype and x.grad.dtype == dtype and x.grad.shape == (M, K)
    w = by_hand(q, dtype).double()  # (N, K)
    for got, a, b in ((y.detach(), x.detach(), w.T), (x.grad, dy, w)):
        a = a.cpu().double()
        want, size = a @ b, a.abs() @ b.abs()
        # K fp32 additions in any order, then one rounding to dtype (fp16 runs out at 6e-8)
        bound = len(b) * EPS * size + ROUND[dtype] * want.abs() * 1.01 + 2.0**-25
        assert ((got.cpu().double() - want).abs() <= bound).all()


@pytest.mark.isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size, K", [(64, 192), (32, 48), (4096, 160), (128, 320)])
def test_weights_in_the_product_are_the_dequantised_ones(backend, dtype, block_size, K):
    """Rows of the identity pick single weights: any other bit would show."""
    _, q = operands(1, 21, K, 7, dtype, block_size)
    eye = torch.eye(K, dtype=dtype, device=DEVICE)
    got = torch.cat([nf4_matmul(rows, q, backend=backend) for rows in eye.split(64)])  # (K, N)
    want = dequantize_nf4(q, dtype, backend="torch").T
    assert torch.equal(got, want)  # -0.0 plus 0.0 is 0.0


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_see_its_batch(dtype):
    """Batches of one tile and of several, a tile's every second row nan: the others keep their bits."""
    x, q = operands(64, 17, 160, 8, dtype)
    alone = torch.cat([nf4_matmul(row[None], q, backend="triton") for row in x[::9]])  # (8, N)
    for M in (2, 16, 33, 64):
        together = nf4_matmul(x[:M], q, backend="triton")[::9]
        assert same_bits(together, alone[: len(together)])
    poisoned = x[:16].clone()
    poisoned[1::2] = math.nan
    y = nf4_matmul(poisoned, q, backend="triton")
    assert same_bits(y[0], alone[0]) and y[1::2].isnan().all() and not y[::2].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_any_strides(backend):
    _, q = operands(1, 5, 64, 9, torch.float32)
    empty = torch.empty((0, 64), device=DEVICE, requires_grad=True)
    y = nf4_matmul(empty, q, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 5) and empty.grad.shape == (0, 64)
    base = torch.randn(64, 8, device=DEVICE)
    for x in (base.T, base.T[::2], base[:1, :1].expand(8, 64), torch.randn(4, 128, device=DEVICE)[:, ::2]):
        got, want = (nf4_matmul(t, q, backend=backend) for t in (x, x.contiguous()))
        bound = 64 * EPS * (x.abs() @ dequantize_nf4(q, torch.float32).abs().T)  # BLAS may add in another order
        assert ((got - want).abs() <= bound).all()


def test_nothing_is_saved_for_backward():
    x, q = torch.randn(4, 64, requires_grad=True), quantize_nf4(torch.randn(8, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4_matmul(x, q)
    assert saved == []


# ----------------------------------------------------------------------------
# what the compiler makes of it: nothing that an interpreter could show


COMPILE = """
import re, sys
sys.path[:0] = ["tools", "."]
import torch
from compile_kernels import TARGETS, ASTSource, record, specialise, triton
from kernels import nf4

q = nf4.quantize_nf4(torch.randn(64, 1024))
x = torch.randn(64, 1024).bfloat16()
cases = [lambda: nf4.dequantize_nf4(q, backend="triton")]
cases += [lambda: nf4.nf4_matmul(x[:1], q, backend="triton"), lambda: nf4.nf4_matmul(x, q, backend="triton")]
for case in cases:
    [launch], errors = record({"case": case}, hopper=False)
    job = specialise(launch, "sm_90")
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    ptx = triton.compile(source, target=TARGETS["sm_90"][0], options=job.options).asm["ptx"]
    products = re.findall(r"mma\\.sync\\.aligned\\.m\\d+n\\d+k\\d+|wgmma\\S+", ptx)
    print(len(re.findall("fma.rn", ptx)), *sorted(set(products)))
"""


def test_no_fused_multiply_add_and_one_instruction_for_any_number_of_rows():
    """A scale fused into one rounding is another scale. And a row's bits may depend on the instruction that adds it up:
    sm_90 has a second one (wgmma), which Triton takes for tiles of 64 rows where it can."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=root, env=environment)
    instruction = "0 mma.sync.aligned.m16n8k16"
    assert run.stdout.splitlines() == ["0", instruction, instruction], run.stdout + run.stderr


# ----------------------------------------------------------------------------
# nf4.cu

DRIVER = """
#include "nf4.cu"
template <typename T>
static void run(const nf4::Quantised& q, bool nested, T* out) {
    for (int64_t word = 0; word < (q.n + 7) / 8; ++word)
        nested ? nf4::decode<T, true>(q, q.codebook, word, nf4::load(q, word), out)
               : nf4::decode<T, false>(q, q.codebook, word, nf4::load(q, word), out);
}
extern "C" void dequantize(const uint8_t* codes, const void* absmax, const float* absmax2, const float* code2,
                           const float* offset, const float* codebook, int64_t n, int log2_block, int nested, int type,
                           void* out) {
    const nf4::Quantised q{codes, absmax, absmax2, code2, offset, codebook, n, log2_block};
    if (type == 0) run(q, nested, static_cast<__nv_bfloat16*>(out));
    if (type == 1) run(q, nested, static_cast<__half*>(out));
    if (type == 2) run(q, nested, static_cast<float*>(out));
}
"""


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory):
    """The arithmetic of nf4.cu, every word of a tensor in turn, as a function on this CPU."""
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "driver.cu").write_text(DRIVER)
    command = ["nvcc", "-shared", "-O2", "-std=c++17", "-arch=sm_80", "-Xcompiler", "-fPIC,-ffp-contract=off"]
    command += ["-I", str(SOURCE.parent), "-o", str(folder / "driver.so"), str(folder / "driver.cu")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    function = ctypes.CDLL(folder / "driver.so").dequantize
    pointer = ctypes.c_void_p
    function.argtypes = [pointer] * 6 + [ctypes.c_int64] + [ctypes.c_int] * 3 + [pointer]

    def dequantize(q, dtype):
        frame = torch.full((math.prod(q.shape) + 32,), math.nan, dtype=dtype)
        out = frame[16:-16].view(q.shape)
        parts = [x.data_ptr() for x in module._parts(q)]
        function(*parts, out.numel(), q.block_size.bit_length() - 1, q.nested, DTYPES.index(dtype), out.data_ptr())
        assert frame[:16].isnan().all() and frame[-16:].isnan().all()
        return out

    return dequantize


@NEEDS_NVCC
@given(n=SIZES, block_size=BLOCKS, seed=SEEDS, dtype=st.sampled_from(DTYPES), double_quant=st.booleans())
def test_cuda_arithmetic_on_the_cpu(on_the_host, n, block_size, seed, dtype, double_quant):
    q = quantize_nf4(weights(n, seed), block_size=block_size, double_quant=double_quant)
    assert same_bits(on_the_host(q, dtype), by_hand(q, dtype))


@NEEDS_NVCC
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_cuda_compiles_without_spills(target, tmp_path):
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", "-Xptxas", "-v", f"-arch={target}", "-Werror", "all-warnings"]
    run = subprocess.run([*command, "-o", str(tmp_path / "x"), str(SOURCE)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", run.stderr) == [("0", "0", "0")] * 6
    registers = [int(r) for r in re.findall(r"Used (\d+) registers", run.stderr)]
    assert max(registers) <= 40  # 6 blocks of 256 threads share the 65,536 registers of a multiprocessor


@NEEDS_NVCC
@pytest.mark.skipif(not is_ninja_available(), reason="there is no ninja on the PATH")
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_cuda_on_a_gpu(dtype, double_quant):
    for n in (1, 63, 64, 4097, 300_001):
        q = quantize_nf4(weights(n, seed=10), double_quant=double_quant)
        assert same_bits(dequantize_nf4(q.to("cuda"), dtype, backend="cuda").cpu(), by_hand(q, dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_cuda_needs_a_gpu():
    with pytest.raises(ValueError, match="got backend 'cuda' and tensors on cpu, want them on an NVIDIA GPU"):
        dequantize_nf4(quantize_nf4(torch.randn(64)), backend="cuda")


# ----------------------------------------------------------------------------
# what is said when it is wrong


@pytest.mark.parametrize(
    "w, options, text",
    [
        (torch.zeros(4, dtype=torch.int8), {}, "got w of torch.int8, want bfloat16, float16 or float32"),
        (torch.zeros(4, dtype=torch.float64), {}, "got w of torch.float64"),
        (torch.zeros(4), {"block_size": 48}, r"got block size 48, want one of \(32, 64, 128"),
        (torch.zeros(4), {"block_size": 16}, "got block size 16"),
        (torch.zeros(0, 5), {}, r"got w of shape \(0, 5\), want at least one weight"),
        (torch.tensor([1.0, math.nan]), {}, r"got nan at w.flatten\(\)\[1\], want finite weights"),
        (torch.tensor([[1.0, 2.0], [-math.inf, math.nan]]), {}, r"got -inf at w.flatten\(\)\[2\]"),
        (torch.full((640,), 3e38), {}, "got w whose scales add up to more than fp32 holds"),
    ],
)
def test_says_what_it_cannot_quantise(w, options, text):
    with pytest.raises(ValueError, match=text):
        quantize_nf4(w, **options)


def test_finds_nan_in_a_later_chunk():
    w = torch.zeros(10_000)
    w[9001] = math.nan
    with patch.object(module, "CHUNK", 4096), pytest.raises(ValueError, match=r"got nan at w.flatten\(\)\[9001\]"):
        quantize_nf4(w)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"codes": torch.zeros(95, 1, dtype=torch.uint8)}, r"got \(95, 1\) torch.uint8, strides \(1, 1\) for codes of"),
        ({"codes": torch.zeros(96, 1)}, "torch.float32.* for codes"),
        ({"codes": torch.zeros(192, 1, dtype=torch.uint8)[::2]}, r"strides \(2, 1\) for codes .* want 96 contiguous"),
        ({"absmax": torch.zeros(2, dtype=torch.uint8)}, "for absmax .* want 3 contiguous numbers of torch.uint8"),
        ({"absmax": torch.zeros(3, dtype=torch.bfloat16)}, "for absmax .* want 3 contiguous numbers of torch.float32"),
        ({"absmax2": torch.zeros(2)}, r"got \(2,\) .* for absmax2 of \(3, 64\) weights in blocks of 64, want 1"),
        ({"code2": torch.zeros(16)}, "for code2 .* want 256"),
        ({"offset": None}, "got nothing for offset"),
        (
            {"codebook": torch.zeros(16, dtype=torch.float64)},
            "for codebook .* want 16 contiguous numbers of torch.float32",
        ),
        ({"block_size": 65}, "got block size 65"),
        ({"block_size": 128}, "for absmax"),
        ({"shape": (3, 65)}, "for codes"),
        ({"absmax": torch.zeros(1, 3, dtype=torch.uint8)}, r"got \(1, 3\) .* for absmax"),  # a grid of one program
        ({"absmax2": torch.zeros(1, 1)}, r"got \(1, 1\) .* for absmax2"),
        (
            {"codebook": torch.zeros(16, device="meta")},
            "codes on cpu, absmax on cpu, codebook on meta, .*want one device",
        ),
    ],
)
def test_says_which_part_does_not_fit(change, text):
    q = quantize_nf4(torch.randn(3, 64))
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(q, **change)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"dtype": torch.int8}, "got dtype torch.int8, want bfloat16"),
        (
            {"out": torch.empty(64, 3)},
            r"got out \(64, 3\) torch.float32 on cpu, strides \(3, 1\), want a contiguous \(3, 64\)",
        ),
        ({"out": torch.empty(3, 64)}, "want a contiguous .* torch.bfloat16"),
        ({"out": torch.empty(64, 3, dtype=torch.bfloat16).T}, r"strides \(1, 3\), want a contiguous"),
        ({"out": torch.empty(3, 64, dtype=torch.bfloat16, device="meta")}, "on meta"),
        ({"backend": "jax"}, "got backend 'jax', want 'torch', 'triton' or None"),
    ],
)
def test_says_why_it_cannot_dequantise(options, text):
    with pytest.raises(ValueError, match=text):
        dequantize_nf4(quantize_nf4(torch.randn(3, 64)), **options)


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(2, 63), r"got x \(2, 63\) and weights \(3, 64\), want \(M, K\) and \(N, K\)"),
        (torch.zeros(1, 2, 64), r"got x \(1, 2, 64\)"),
        (torch.zeros(2, 64, dtype=torch.float64), "got x of torch.float64 on cpu"),
        (torch.zeros(2, 64, device="meta"), "on meta, want"),
    ],
)
def test_says_why_it_cannot_multiply(x, text):
    with pytest.raises(ValueError, match=text):
        nf4_matmul(x, quantize_nf4(torch.randn(3, 64)))
    with pytest.raises(ValueError, match=r"weights \(64,\), want"):
        nf4_matmul(torch.zeros(2, 64), quantize_nf4(torch.randn(64)))
