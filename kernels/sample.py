"""Draws a token from each row of logits by inverting its cumulative distribution, with one pass over the logits.

    p = softmax(logits / temperature)        token = first v with sum_{j <= v} p[j] > uniform sum_j p[j]        (1)
    logp = log p[token]

The vocabulary is cut into blocks of 256 tokens. A block's sum of exp(z - m_b), m_b its own maximum, needs no second
look at the logits. With M = max m_b and S_b = exp(m_b - M) sum_b (in float64 from here on), the search is in two steps:
the block b with sum_{c <= b} S_c > uniform sum_c S_c, then the token in it, whose 256 logits are read once more.

Floor for N rows of V tokens: reading 4 N V bytes, 26 us for 128 rows of 151,936 at 3.0 TB/s. Plain torch reads four
times that, writes p, and takes some 40 launches. GPU speed: not measured.

The file reads top to bottom:

    1. reference    plain torch, equation (1), in two steps as well: also the CPU backend
    2. kernels      Triton: sums of blocks; the search
    3. entry        sample: the name other files import

Left out: top_k and top_p, which need an order of the tokens; temperature 0, an argmax.

Tests: tests/test_kernel_sample.py
Shapes: N rows, V tokens, B = ceil(V / 256) blocks
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import check_positive, choose, same_device, tl, triton

BLOCK = 256  # two searches, among V / 256 sums and among 256 tokens, are about equally long for V = 49,152
TILE = 16  # blocks of a _sums_kernel program: 4096 logits are 32 registers in each of 128 threads

# ----------------------------------------------------------------------------
# 1. reference


def sample_reference(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Equation (1): tokens and logp, (N,) both. Sums of blocks in fp32, of blocks' sums in float64."""
    z = logits if temperature == 1 else logits / temperature  # (N, V)
    p, V = z.softmax(-1), z.shape[1]  # (N, V)
    # a running sum over all V in float64 would take a CPU longer than a layer of the model. The sums' rounding, 1e-7,
    # moves a token's probability by as much of itself
    whole = V // BLOCK * BLOCK
    sums = [p[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    sums = torch.cat([*sums, p[:, whole:].sum(-1, keepdim=True)], dim=1).double()  # (N, B)
    ends = sums.cumsum(-1)  # (N, B)
    block, rest = _invert(ends, uniform[:, None] * ends[:, -1:])  # (N, 1) both
    columns = block * BLOCK + torch.arange(BLOCK, device=z.device)  # (N, BLOCK)
    inside = p.gather(1, columns.clamp(max=V - 1)).double()  # (N, BLOCK)
    inside = inside.masked_fill_(columns >= V, 0.0).cumsum_(-1)
    fraction = (rest / sums.gather(1, block)).clamp(0, 1 - 2**-53)  # (N, 1) of the block, below 1 as the uniform is
    token = block * BLOCK + _invert(inside, fraction * inside[:, -1:])[0]  # (N, 1)
    token = token.clamp(max=V - 1)  # only scores that are nan get that far
    best, likeliest = z.amax(-1, keepdim=True), p.amax(-1, keepdim=True)  # the log of a rare p has lost its digits
    return token.squeeze(1), (z.gather(1, token) - best + likeliest.log()).squeeze(1)


def _invert(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First place whose cumulative sum (N, n) is above the target (N, 1), which has probability then, and how far the
    target reaches into it: (N, 1) both."""
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)  # (N, 1)
    return place, target - F.pad(cumulative, (1, 0)).gather(1, place)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _sums_kernel(logits_ptr, peaks_ptr, sums_ptr, stride, V, blocks, cold, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """m_b and sum exp(z - m_b) of TILE blocks of one row."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * TILE + tl.arange(0, TILE)  # (TILE,)
    v = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (TILE, BLOCK)
    z = tl.load(logits_ptr + n * stride + v, mask=v < V, other=-float("inf")) * cold  # (TILE, BLOCK)
    peak = tl.max(z, axis=1)  # (TILE,)
    # a block without a possible token: exp(-inf - 0) = 0, where exp(-inf + inf) would be nan
    e = tl.exp(z - tl.where(peak == -float("inf"), 0.0, peak)[:, None])  # (TILE, BLOCK)
    tl.store(peaks_ptr + n * blocks + b, peak, mask=b < blocks)
    tl.store(sums_ptr + n * blocks + b, tl.sum(e, axis=1), mask=b < blocks)


@triton.jit
def _find(p, target, i, LAST: tl.constexpr):
    """The first place i whose cumulative sum of p is above the target. A place with p = 0 is never found: neither where
    a sum made as a tree falls by a rounding, nor where the target is rounded up to the sum of all."""
    ends = tl.cumsum(p, axis=0)
    possible = p > 0
    place = tl.min(tl.where(possible & (ends > target), i, LAST), axis=0)
    place = tl.where(place == LAST, tl.max(tl.where(possible, i, 0), axis=0), place)
    before = tl.sum(tl.where(i == place, ends - p, 0.0), axis=0)
    return place, before


@triton.jit
def _search_kernel(
    logits_ptr, peaks_ptr, sums_ptr, uniform_ptr, token_ptr, logp_ptr, stride, V, blocks, cold,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The block, then the token in it, of one row."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)  # (BLOCKS,)
    peaks = tl.load(peaks_ptr + n * blocks + b, mask=b < blocks, other=-float("inf"))  # (BLOCKS,)
    top = tl.max(peaks, axis=0)
    s = tl.load(sums_ptr + n * blocks + b, mask=b < blocks, other=0.0).to(tl.float64)  # (BLOCKS,)
    s = s * tl.exp(peaks - top).to(tl.float64)  # (BLOCKS,)
    total = tl.sum(s, axis=0)
    target = tl.load(uniform_ptr + n) * total
    block, before = _find(s, target, b, BLOCKS)
    own = tl.sum(tl.where(b == block, s, 0.0), axis=0)
    fraction = tl.minimum(tl.maximum((target - before) / own, 0.0), 1.0)
    i = tl.arange(0, BLOCK)  # (BLOCK,)
    v = block * BLOCK + i  # (BLOCK,)
    z = tl.load(logits_ptr + n * stride + v, mask=v < V, other=-float("inf")) * cold - top  # (BLOCK,)
    # by the block's own maximum, or a block far below the row's would have no token left with exp > 0
    e = tl.exp(z - tl.max(z, axis=0)).to(tl.float64)  # (BLOCK,)
    place, _ = _find(e, fraction * tl.sum(e, axis=0), i, BLOCK)
    tl.store(token_ptr + n, (block * BLOCK + place).to(tl.int64))
    z_token = tl.sum(tl.where(i == place, z, 0.0), axis=0)
    tl.store(logp_ptr + n, (z_token.to(tl.float64) - tl.log(total)).to(tl.float32))


def _launch(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    (N, V), cold = logits.shape, 1.0 / temperature
    blocks = triton.cdiv(V, BLOCK)
    peaks, sums = (logits.new_empty((N, blocks)) for _ in "ms")  # (N, B), (N, B)
    token, logp = logits.new_empty(N, dtype=torch.int64), logits.new_empty(N)  # (N,), (N,)
    options = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    _sums_kernel[(N, triton.cdiv(blocks, TILE))](
        logits, peaks, sums, logits.stride(0), V, blocks, cold, TILE=TILE, **options
    )
    _search_kernel[(N,)](
        logits, peaks, sums, uniform, token, logp, logits.stride(0), V, blocks, cold,
        BLOCKS=1 << (blocks - 1).bit_length(), **options,
    )  # fmt: skip
    return token, logp


# ----------------------------------------------------------------------------
# 3. entry


@torch.no_grad()
def sample(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row, drawn from softmax(logits / temperature), and its log-probability.

    logits       (N, V) fp32, last dimension contiguous; -inf for a token that must not come
    uniform      (N,) float64 in [0, 1), on the device of logits
    temperature  > 0
    backend      "torch" | "triton" | None = Triton on a GPU, torch elsewhere
    returns      tokens (N,) int64, logp (N,) fp32; no gradient. Nothing is read back: a step can be a CUDA graph

    A token of probability 0 is never drawn. Both backends invert the same sums, rounded differently: a uniform within
    1e-6 of the border of two tokens may give either. The bits of a row do not depend on the other rows (Triton).

    Raises ValueError when shapes, dtypes or the temperature do not fit.

    Elsewhere: FlashInfer sampling_from_probs; vLLM's Gumbel trick, which draws
    N V random numbers.
    """
    if logits.ndim != 2 or uniform.shape != logits.shape[:1] or not logits.shape[1]:
        got = f"logits {tuple(logits.shape)} and uniform {tuple(uniform.shape)}"
        raise ValueError(f"got {got}, want (N, V) with V > 0 and (N,); draw one uniform a row")
    if logits.dtype != torch.float32 or uniform.dtype != torch.float64 or logits.stride(1) != 1 < logits.shape[1]:
        got = f"logits of {logits.dtype} and strides {logits.stride()}, uniform of {uniform.dtype}"
        raise ValueError(f"got {got}, want float32 with stride 1 in a row, and float64; cast them")
    check_positive("temperature", temperature, "; take the argmax for 0")
    same_device(logits=logits, uniform=uniform)
    if not len(logits) or choose(backend, logits) == "torch":
        return sample_reference(logits, uniform, temperature)
    return _launch(logits, uniform, temperature)
