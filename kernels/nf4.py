"""Four-bit weights: NF4, half a byte a number and a scale for every 64 of them.

    a[b] = max |w| in block b of 64 neighbours        code = number of midpoints of the codebook below w / a[b]
    w'   = codebook[code] * a[b]                                                                           (1)

The 16 numbers of the codebook are quantiles of a normal distribution stretched to [-1, 1]: trained weights are close to
normal, so that each code is used about equally often. Scales in fp32 cost half a bit a weight; "double quantisation"
stores them in 8 bits as well, in blocks of 256, and one fp32 mean for the whole tensor:

    a[b] = code2[absmax[b]] * absmax2[b // 256] + offset                 two roundings, never one fused (2)

Bytes and values are bitsandbytes', bit for bit, so that checkpoints can be read, and written back, unchanged.
1024 x 1024 weights: 524288 bytes of codes, 16384 of absmax, 256 of absmax2, 1092 of tables: 0.517 byte a weight.

The file reads top to bottom:

    1. reference    plain torch, in chunks. Equations (1) and (2). Also the CPU backend.
    2. kernels      Triton: dequantise in one launch, and a product of few rows that decodes as it goes.
    3. entry        quantize_nf4, dequantize_nf4, nf4_matmul: the names other files import.

kernels/packed.py chooses among them, launches the product and saves nothing but the codes for its backward.

Decoding reads 0.52 byte a weight and writes 2 (bf16), nothing else: 4.2 GB for 1.7 billion weights. The product for M
rows reads the 0.52 byte, writes none, and does 2 M FLOP a weight; after dequantising it would move 4.5 bytes.
Decoding by hand in CUDA C++: kernels/nf4.cu, backend="cuda".

Left out: a Triton kernel for quantising (a model is quantised once; torch does it on either device), FP4, the product
kernel for rows of weights that 16 does not divide (they are dequantised first).

Lesson: lessons/10_four_bits.md       Tests: tests/test_nf4.py
Shapes: n weights in a tensor, b of its blocks; M rows of a product, N x K weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.backend import FLOATS, same_device, tl, triton
from kernels.packed import Packed

# Quantiles of N(0, 1), scaled to reach exactly -1, 0 and 1: arXiv:2305.14314, appendix E, at fp32 precision.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those bitsandbytes knows
NESTED = 256  # scales that share one absmax2
CHUNK = 2**19  # weights handled at a time: an fp32 copy of a chunk is 2 MB, whatever the size of the tensor


@dataclass(frozen=True, eq=False)
class NF4Tensor(Packed):
    """A quantised tensor. The last three fields are there when its scales are quantised too, else None.

    codes       (ceil(n / 2), 1) uint8: two codes a byte, the first in the high half
    absmax      (b,) float32; uint8 when nested
    shape       of the weights; blocks run over them in the order of memory
    dtype       they had before: bfloat16, float16 or float32
    block_size  weights that share a scale
    codebook    (16,) float32
    absmax2     (ceil(b / 256),) float32
    code2       (256,) float32
    offset      () float32

    Raises ValueError when a tensor does not fit the others.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    codebook: Tensor
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self):
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"got block size {self.block_size}, want one of {BLOCK_SIZES}; the paper's is 64")
        n = prod(self.shape)
        blocks = -(-n // self.block_size)
        want = {
            "codes": ((n + 1) // 2, torch.uint8),
            "absmax": (blocks, torch.uint8 if self.nested else torch.float32),
            "codebook": (16, torch.float32),
        }
        if self.nested:
            want |= {"absmax2": (-(-blocks // NESTED), torch.float32), "code2": (256, torch.float32)}
            want |= {"offset": (1, torch.float32)}
        for name, (count, dtype) in want.items():
            x = getattr(self, name)
            flat = x is not None and (x.ndim == 1 or name in ("codes", "offset"))  # (n, 1) and () are what files hold
            if not flat or x.numel() != count or x.dtype != dtype or not x.is_contiguous():
                got = "nothing" if x is None else f"{tuple(x.shape)} {x.dtype}, strides {x.stride()}"
                raise ValueError(
                    f"got {got} for {name} of {tuple(self.shape)} weights in blocks of {self.block_size}, "
                    f"want {count} contiguous numbers of {dtype}; do all parts come from one tensor?"
                )
        same_device(**self.tensors)

    @property
    def nested(self) -> bool:
        return self.absmax.dtype == torch.uint8

    @property
    def decoders(self) -> dict[str, Callable]:
        return {"torch": _dequantize, "triton": _dequantize_triton, "cuda": _dequantize_cuda}

    def product(self, block_k: int) -> tuple:
        piece = gcd(self.shape[1], self.block_size, block_k)
        keywords = {"NESTED": self.nested, "SIZE": self.block_size, "PIECE": piece, "enable_fp_fusion": False}
        return _matmul_kernel, _parts(self), keywords


# ----------------------------------------------------------------------------
# 1. reference


@cache
def _dynamic_map() -> Tensor:
    """The 256 numbers that scales are rounded to, (256,) rising: 0, 1, and between them, of either sign, 2^e numbers
    a decade, e = 0 (at 1e-6) to 6 (at 1): as with floats the small ones have few digits, but the decades are of ten."""
    numbers = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32, device="cpu")  # (2^e + 1,)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6)  # (2^e,) fp32, not fp64: 72 of them would differ
        numbers += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device="cpu")  # (256,)


def _midpoints(code: Tensor) -> Tensor:
    return (code[:-1] + code[1:]) / 2


def _quantize_blocks(w: Tensor, block_size: int, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (1), a chunk at a time: codes (ceil(n / 2), 1) and absmax (b,)."""
    flat = w.detach().reshape(-1)  # (n,) a copy only if w is not contiguous
    n = flat.numel()
    codes = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=w.device)
    midpoints = _midpoints(codebook)  # (15,)
    for start in range(0, n, CHUNK):
        x = flat[start : start + CHUNK].float()  # (c,)
        c, short = len(x), -len(x) % block_size
        x = pad(x, (0, short)).view(-1, block_size)  # (b, block_size) zeros do not change a maximum of |x|
        a = x.abs().amax(1)  # (b,)
        if not a.isfinite().all():
            where = start + int((~x.isfinite()).flatten().nonzero()[0])
            raise ValueError(f"got {flat[where].item()} at w.flatten()[{where}], want finite weights; is the file ok?")
        # Times the reciprocal, not divided by: bits that bitsandbytes' checkpoints depend on. It guards a block of
        # zeros by 1e-38 (code 7, which is 0), and the last block, if it is a short one, it does divide.
        scaled = x * a.clamp_min(1e-38).reciprocal()[:, None]  # (b, block_size)
        if short:
            a[-1].clamp_(min=1e-38)
            scaled[-1] = x[-1] / a[-1]
        # bucketize counts the midpoints strictly below: a number on a midpoint gets the lower code
        code = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).view(-1, 2)  # (b block_size / 2, 2)
        packed = (code[:, :1] << 4) | code[:, 1:]  # (b block_size / 2, 1)
        codes[start // 2 : (start + c + 1) // 2] = packed[: (c + 1) // 2]
        absmax[start // block_size : start // block_size + len(a)] = a
    return codes, absmax


def _quantize_absmax(absmax: Tensor) -> dict[str, Tensor]:
    """Equation (2), backwards: absmax (b,) uint8, absmax2 (ceil(b / 256),), code2 (256,), offset ()."""
    offset = absmax.cpu().mean().to(absmax.device)  # () a GPU adds in another order, and any byte might change
    if not offset.isfinite():
        raise ValueError("got w whose scales add up to more than fp32 holds, want smaller weights; are they scaled?")
    code2 = _dynamic_map().to(absmax.device)  # (256,)
    short = -len(absmax) % NESTED
    x = pad(absmax - offset, (0, short)).view(-1, NESTED)  # (ceil(b / 256), 256)
    absmax2 = x.abs().amax(1)  # (ceil(b / 256),)
    scaled = (x * absmax2.reciprocal()[:, None]).nan_to_num(nan=-1.0).clamp_(-1, 1)  # 0 * inf: all scales are equal
    # bitsandbytes on a CPU looks codes up in a table of 2^16 positions: scaled is rounded to such a position first, and
    # about 0.3 % of all codes differ from the nearest. The sum below is a fused multiply-add there, one rounding.
    position = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().int()  # (ceil(b / 256), 256)
    code = torch.bucketize(-1 + 2 * position.float() / 65535, _midpoints(code2), out_int32=True)
    code = code.to(torch.uint8).flatten()[: len(absmax)]  # (b,)
    return {"absmax": code.contiguous(), "absmax2": absmax2, "code2": code2, "offset": offset}


def _scales(q: NF4Tensor, first: int, last: int) -> Tensor:
    """Scales of blocks first to last - 1, (last - first,) fp32: equation (2), or as they are stored."""
    stored = q.absmax[first:last]  # (b,)
    if not q.nested:
        return stored
    group = torch.arange(first, last, device=stored.device) // NESTED  # (b,)
    return q.code2[stored.int()] * q.absmax2[group] + q.offset  # (b,) two operations, so two roundings


def _pairs(codebook: Tensor) -> Tensor:
    """The two weights of each byte side by side, (256,) of 8 bytes: one look-up a byte, and no shifts or masks."""
    byte = torch.arange(256, device=codebook.device)  # (256,)
    return torch.stack([codebook[byte >> 4], codebook[byte & 15]], 1).view(torch.int64).flatten()  # (256,)


def _dequantize(q: NF4Tensor, out: Tensor) -> Tensor:
    """Equation (1) forwards, a chunk at a time, into out (contiguous, of q's shape)."""
    flat, n, size = out.view(-1), out.numel(), q.block_size
    codes, pairs = q.codes.view(-1), _pairs(q.codebook)  # (ceil(n / 2),), (256,)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        # index_select with int32 takes a seventh of the time of pairs[index] (one core, 4 million weights)
        values = pairs.index_select(0, codes[start // 2 : (stop + 1) // 2].int()).view(torch.float32)  # (c,)
        a = _scales(q, start // size, -(-stop // size))  # (b,)
        whole = (stop - start) // size  # blocks; the last one of a tensor may be a short one
        values[: whole * size].view(-1, size).mul_(a[:whole, None])  # (b, block_size)
        values[whole * size :].mul_(a[-1])
        flat[start:stop] = values[: stop - start]  # (c,) rounded once, to out's dtype
    return out


# ----------------------------------------------------------------------------
# 2. kernels

# Weights a program decodes, 32 for each of its 128 threads: 16 bytes of codes in one load, 32 fp32 registers.
TILE = 4096


@triton.jit
def _load_scales(b, mask, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED: tl.constexpr):
    """Equation (2) for the blocks b. Launched with enable_fp_fusion=False: a fused multiply-add rounds once, and 6 % of
    all scales would differ from bitsandbytes' in the last bit."""
    stored = tl.load(absmax_ptr + b, mask=mask, other=0)
    if NESTED:
        stored = tl.load(code2_ptr + stored.to(tl.int32))
        stored = stored * tl.load(absmax2_ptr + b // 256, mask=mask, other=0.0)
        stored = stored + tl.load(offset_ptr)
    return stored


@triton.jit
def _decode(codes, codebook, COUNT: tl.constexpr):
    """Bytes -> COUNT codebook values in a row. A gather, not 16 addresses to load from: Triton would send each look-up
    through its asynchronous pipeline, 4 bytes at a time, as if it went far away."""
    codes = codes.to(tl.int32)
    return tl.gather(codebook, tl.reshape(tl.join(codes >> 4, codes & 15), (COUNT,)), 0)  # (COUNT,)


@triton.jit
def _dequantize_kernel(
    out_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, codebook_ptr, n, n_bytes,
    NESTED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[i] = codebook[code[i]] * scale[i // SIZE] for BLOCKS blocks of SIZE weights"""
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,) int64: tensors pass 2^31 weights
    scales = _load_scales(b, b * SIZE < n, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED)  # (BLOCKS,)
    byte = b[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]  # (BLOCKS, SIZE / 2)
    codes = tl.load(codes_ptr + byte, mask=byte < n_bytes, other=0)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))  # (16,)
    w = tl.reshape(_decode(codes, codebook, BLOCKS * SIZE), (BLOCKS, SIZE)) * scales[:, None]  # (BLOCKS, SIZE)
    i = b[:, None] * SIZE + tl.arange(0, SIZE)[None, :]  # (BLOCKS, SIZE)
    tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def _matmul_kernel(
    y_ptr, x_ptr, codes_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, codebook_ptr, M, N, K, stride_m, stride_k,
    NESTED: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[:, n] = sum_k x[:, k] W[n, k] for BLOCK_N rows of weights and all rows of x: each weight is decoded once.

    The product is W x^T, weights on the left: then the instruction, 16 rows by 8 columns, is the same for any M, and k
    runs in the same order, so that the bits of a row of x do not depend on how many there are. PIECE weights of a
    tile's row share a scale for certain.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    m = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    byte = tl.arange(0, BLOCK_K // 2)  # (BLOCK_K / 2,)
    row = codes_ptr + n[:, None] * (K // 2)  # (BLOCK_N, 1)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))  # (16,)
    upcoming = tl.load(row + byte[None, :], mask=(n < N)[:, None] & (byte < K // 2)[None, :], other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        codes = upcoming  # (BLOCK_N, BLOCK_K / 2)
        byte += BLOCK_K // 2
        # the next step's codes travel while this step computes; Triton does so for x, but not behind a gather
        upcoming = tl.load(row + byte[None, :], mask=(n < N)[:, None] & (byte < K // 2)[None, :], other=0)
        k = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        x = tl.load(
            x_ptr + k[:, None] * stride_k + m[None, :].to(tl.int64) * stride_m,
            mask=(k < K)[:, None] & (m < M)[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_M)
        piece = start + tl.arange(0, BLOCK_K // PIECE) * PIECE  # (BLOCK_K / PIECE,) where each begins
        scales = _load_scales(  # (BLOCK_N, BLOCK_K / PIECE)
            (n[:, None] * K + piece[None, :]) // SIZE, (n < N)[:, None] & (piece < K)[None, :],
            absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, NESTED,
        )  # fmt: skip
        w = tl.reshape(_decode(codes, codebook, BLOCK_N * BLOCK_K), (BLOCK_N, BLOCK_K // PIECE, PIECE))
        w = w * scales[:, :, None]  # (BLOCK_N, BLOCK_K / PIECE, PIECE)
        # beyond K both sides must be finite for 0 * w to be 0: codes and scales are masked, and x is 0
        w = tl.reshape(w, (BLOCK_N, BLOCK_K)).to(x.dtype)  # (BLOCK_N, BLOCK_K) the very bits of dequantize_nf4
        acc = tl.dot(w, x, acc, input_precision="ieee")
    y = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]  # (BLOCK_N, BLOCK_M)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def _parts(q: NF4Tensor) -> tuple[Tensor, ...]:
    """The pointers that both kernels take. Where scales are plain the last four are never read."""
    return q.codes, q.absmax, *((q.absmax2, q.code2, q.offset) if q.nested else (q.absmax,) * 3), q.codebook


def _dequantize_triton(q: NF4Tensor, out: Tensor) -> Tensor:
    blocks = max(1, TILE // q.block_size)
    _dequantize_kernel[(triton.cdiv(len(q.absmax), blocks),)](
        # codes.numel(), not n // 2 in the kernel: Triton sees that it divides by 16, and loads 16 bytes at a time
        out, *_parts(q), out.numel(), q.codes.numel(), NESTED=q.nested, SIZE=q.block_size, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@cache
def _extension():
    """kernels/nf4.cu, compiled at its first use and then kept in torch's folder for extensions."""
    from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available, load  # here: it looks for a compiler

    if CUDA_HOME is None or not is_ninja_available():
        raise ValueError("got backend 'cuda' without nvcc or ninja, want both on the PATH; or leave backend out")
    return load("nanogspo_nf4", [str(Path(__file__).with_suffix(".cu"))], extra_cuda_cflags=["-O3"])


def _dequantize_cuda(q: NF4Tensor, out: Tensor) -> Tensor:
    if not out.is_cuda:
        raise ValueError(
            f"got backend 'cuda' and tensors on {out.device}, want them on an NVIDIA GPU; leave backend out"
        )
    if q.codes.data_ptr() % 4 or out.data_ptr() % 16:  # a thread reads 4 bytes at once and writes 16
        raise ValueError("got codes or out at an odd address, want them on multiples of 4 and 16; .clone() them")
    with torch.cuda.device(out.device):
        _extension().dequantize(
            *(x.data_ptr() for x in _parts(q)), out.numel(), q.block_size.bit_length() - 1, q.nested,
            FLOATS.index(out.dtype), out.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return out


# ----------------------------------------------------------------------------
# 3. entry


def quantize_nf4(w: Tensor, *, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Four bits a weight, and a scale for every block_size of them. Equation (1); double_quant: and (2).

    w             any shape, bfloat16, float16 or float32, finite, at least one number
    block_size    32, 64, ... 4096; blocks run over w in the order of memory, and a last one may be short
    double_quant  scales in 8 bits: 0.517 byte a weight and not 0.563
    returns       NF4Tensor on w's device; the same bytes as from bitsandbytes 0.50 on a CPU

    Raises ValueError for another dtype or block size, an empty tensor, and NaN or infinity.

    Source: QLoRA, arXiv:2305.14314, section 3; 8-bit map: arXiv:2110.02861. Elsewhere: bitsandbytes quantize_4bit.
    """
    if w.dtype not in FLOATS:
        raise ValueError(f"got w of {w.dtype}, want bfloat16, float16 or float32; is it quantised?")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"got block size {block_size}, want one of {BLOCK_SIZES}; the paper's is 64")
    if w.numel() == 0:
        raise ValueError(f"got w of shape {tuple(w.shape)}, want at least one weight; leave empty tensors as they are")
    codebook = torch.tensor(NF4, dtype=torch.float32, device=w.device)  # (16,)
    codes, absmax = _quantize_blocks(w, block_size, codebook)
    scales = _quantize_absmax(absmax) if double_quant else {"absmax": absmax}
    return NF4Tensor(codes, shape=tuple(w.shape), dtype=w.dtype, block_size=block_size, codebook=codebook, **scales)


def dequantize_nf4(
    q: NF4Tensor, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The weights that the codes stand for. Equation (1): fp32 inside, rounded once to dtype.

    q        an NF4Tensor
    dtype    bfloat16, float16 or float32
    out      q.shape, dtype, contiguous: written to and returned; None allocates
    backend  "torch" | "triton" | "cuda" (nf4.cu, compiled first) | None = triton on a GPU, else torch: the same bits
    returns  q.shape, dtype

    Raises ValueError when out or dtype do not fit, or the backend cannot run here.

    bitsandbytes agrees in every bit, but on CPUs with AVX512-BF16 it makes bf16 results below 1.2e-38 zero.
    """
    return q.dequantize(dtype, out=out, backend=backend)


def nf4_matmul(x: Tensor, q: NF4Tensor, *, backend: str | None = None) -> Tensor:
    """x @ W.T for quantised weights.

        y[m, n] = sum_k x[m, k] W[n, k]        W = dequantize_nf4(q, x.dtype), sums in fp32

    x        (M, K) bfloat16, float16 or float32; carries a gradient
    q        an NF4Tensor of shape (N, K)
    backend  "torch" | "triton" | None = triton on a GPU, else torch
    returns  (M, N) in x's dtype; differentiable in x. Not made for autocast, which knows the torch path alone

    With triton and M <= 64 weights are decoded on the fly, and a row of the result has the same bits whatever the other
    rows are and however many. Beyond, and where 16 does not divide K, they are decoded into memory first, as in torch.

    Raises ValueError when shapes, dtypes or devices do not line up.

    Elsewhere: bitsandbytes gemm_4bit, which fuses the two roundings of (2): not the bits of its dequantize_4bit.
    """
    return q.matmul(x, backend=backend)
