"""Log-probability and entropy of the next token, without a (N, V) matrix of logits in memory.

    x[n, v]    = hidden[n] . weight[v]
    z[n, v]    = softcap * tanh(x[n, v] / softcap) / temperature                        (no tanh when softcap is None)
    logp[n]    = z[n, y] - logsumexp_v z[n, v]            with y = targets[n]                       (1)
    entropy[n] = -sum_v p[n, v] log p[n, v]               with p = softmax_v z[n, v]                (2)

For Qwen3-0.6B (V = 151936) one row of fp32 logits is 0.6 MB: 8192 tokens would need 5 GB, three times over with the
softmax and its gradient. Here one tile of logits is alive at a time. Choices, because GSPO clips the length-normalised
ratio at 3e-4:

  * logits and sums are fp32 whatever the inputs are. With bf16 logits the mean over 1024 tokens has an error of 1.6e-4
    (standard deviation), and 6 % of all sequences would leave the clip range from rounding alone.
  * the target is left out of the sum. With any m near max z and s = sum exp(z - m) over the *other* tokens,

        logp = log_sigmoid(z_y - m - log s)                                                         (3)

    is (1) with nothing cancelled: at p_y = 1 - 1e-8 the fp32 form of (1) rounds to 0, (3) gives -1e-8. It needs no
    second case: far below the maximum log_sigmoid(x) is x, which is (1) again, and exp never sees a large number.
  * the gradient of the target's logit is formed as -expm1(logp), never as 1 - p_y, for the same reason. Most sampled
    tokens are confident ones: the subtraction costs 3 % of their gradient in fp32 at 1 - p_y = 1e-6 and all of it below
    3e-8; in bf16 all of it from p_y = 0.998 on.
  * where the head is frozen (LoRA), the gradient is the same direction G[n] whatever the loss turns out to be,

        G[n] = d logp[n] / d hidden[n] = (1 - p_y) d_y weight[y] - sum_{v != y} p_v d_v weight[v]   (4)

    with d = dz / dx. Forward has every p_v in its hands, so it sums (4) as well, and backward only scales it: two
    matrix products instead of three (x, x again, dz @ weight). A trained head needs dz itself: its tiles come again.
  * rows go through every product in blocks of one height, the last one padded, and their width is a multiple of 64
    bytes. A matrix library picks its kernel by the shape and by where in memory a row begins, and another kernel adds
    in another order: a row scored alone would differ in its last bits from the same row in a batch. So a row's bits
    depend on the row, the head and the options: not on its neighbours, nor on whether gradients are wanted.

What the matrix products cost, in units of 2 N V C operations, and what is stored:

    no gradient          1   four floats a row
    head frozen          2   G (N, C) and hidden.       A gradient through the entropy: 2 more, only if one arrives
    head trained         4   hidden and four floats a row

The file reads top to bottom:

    1. reference    plain torch: forward and backward over tiles. Equations (1) to (4). Also the CPU backend.
    2. kernels      Triton: what happens to a tile of logits, in one pass instead of eight; and a matrix product that
                    never writes its logits.
    3. autograd     glues them together; saves hidden, weight, targets, four floats a row and G, never a logit.
    4. entry        token_logprob, seq_logprob, sequence_sums: the names other files import.

Left out: gradients of gradients, label smoothing, gradients through infinite weights (0 * inf; values are fine), the
entropy's own G (a third product in every forward, for a bonus few people use), float64 in Triton, skipping tiles whose
p_v are all tiny (CCE; it buys little once (4) runs at the full rate, and rounds).

Lessons: lessons/08_never_build_the_logits.md, lessons/09_its_backward.md
Tests: tests/test_seq_logprob.py, tests/test_seq_logprob_triton.py
Shapes: N rows (= scored tokens), C model width, V vocabulary; (r, v) one tile of (N, V); S tokens of a packed row.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, pad

from kernels.backend import INTS, bf16_products, check_positive, choose, is_hopper, or_torch, same_device, tl, triton

IGNORE = -100  # a target without a loss, as in torch.nn.functional.cross_entropy

# CPU tiles. Measured on one core at N = 512, V = 49152, C = 576: 256 rows by 2048 columns score as fast as any larger
# tile (within 7 %); 128 rows are 15 % slower and would waste less where a handful of rows is scored.
TILE = 2**19  # logits in a tile, 2 MB of fp32
TILE_VOCAB = 2048
TALLEST = 512  # rows: where V = 20, a tile of 2**19 logits would pad every batch to 26,214 of them
ALIGN = 16  # rows and columns: MKL gave rows of 9, 33 and 34 fp32 other bits by their place, and blocks of 9 rows too

# GPU tiles: 2048 x 8192 logits are 67 MB in fp32 and 34 MB in bf16 (which fits the 50 MB cache of an H100). 2048 rows
# give the second product, (2048, V) @ (V, C), 128 output tiles of 128 x 128 for the 132 processors at C = 1024.
ROWS, COLUMNS = 2048, 8192

# Which of the two GPU paths. The epilogue saves the 8 bytes a logit that fp32 logits cost on their way to memory and
# back, whatever C is: 3.3 ms of an H100 (3.0 TB/s) at N = 8192, V = 151936. Its product is Triton's, some 450 to 550
# TFLOP/s against 700 of cuBLAS, which costs 1.0 to 2.0 ms for each 1024 of C: the two meet between C = 1700 and 3400.
# Arithmetic, not a measurement; benchmarks/kernels.py times both.
EPILOGUE_BELOW = 3072

UNDERFLOW = -1000.0  # exp(-1000) is exactly 0 in fp32 and fp64: a floor that changes nothing, except -inf * 0 = nan
FAR = 60.0  # exp(60) * 256k tokens * their weights stays below 3e38. A sampled token never has a logp of -60


@dataclass(frozen=True)
class _Options:
    """What is the same for all rows. path: "torch", "rows" (cuBLAS, Triton on its tiles) or "epilogue"."""

    temperature: float
    softcap: float | None
    path: str
    keep: bool  # sum up G in forward, for a backward of one product less


# ----------------------------------------------------------------------------
# 1. reference


def _tiles(N: int, V: int, options: _Options) -> tuple[list[slice], list[slice], int, int]:
    """Slices of the rows and of the vocabulary, height and width. The height must not depend on N: see above."""
    wide, height = (TILE_VOCAB, 0) if options.path == "torch" else (COLUMNS, ROWS)
    width = max(1, min(V, wide))
    height = height or max(ALIGN, min(TILE // width, TALLEST) // ALIGN * ALIGN)
    rows = [slice(n, n + height) for n in range(0, N, height)]  # the last one ends in padding
    return rows, [slice(v, min(v + width, V)) for v in range(0, V, width)], height, width


def _pad(x: Tensor, height: int, dtype: torch.dtype) -> Tensor:
    """x with zero rows below, until a whole number of blocks is full; always a fresh, contiguous, aligned copy."""
    padded = x.new_zeros((-(-len(x) // height) * height, *x.shape[1:]), dtype=dtype)  # (N', ...)
    padded[: len(x)] = x
    return padded


def _dtypes(hidden: Tensor, weight: Tensor, options: _Options) -> tuple[torch.dtype, torch.dtype]:
    """What sums are kept in, and what matrix products read. A product of two bf16 or fp16 numbers is exact in fp32."""
    sums = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tensor_cores = hidden.is_cuda or options.path != "torch"  # bf16 in, fp32 sums, fp32 out
    narrow = tensor_cores and _narrow(hidden, weight)
    return sums, torch.bfloat16 if narrow else sums  # fp16 is upcast: a gradient of 1e-8 is 0 there


def _narrow(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.dtype == weight.dtype == torch.bfloat16


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the dtype of `out`, and in its memory where torch can. (Autocast does not reach calls with out=.)"""
    if a.dtype != out.dtype and a.is_cuda:
        # (r, v) a CPU has no such product: there the operands are widened
        return torch.mm(a, b, out=out, out_dtype=out.dtype)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # (r, v)


def _addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the dtype of `out`."""
    if a.dtype != out.dtype and a.is_cuda:
        torch.addmm(out, a, b, out=out, out_dtype=out.dtype)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def _cap(z: Tensor, options: _Options) -> Tensor:
    """Dot products -> logits, in place."""
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)  # (r, v)
    return z if options.temperature == 1.0 else z.div_(options.temperature)  # (r, v)


def _slope(x: Tensor, softcap: float) -> Tensor:
    """1 - tanh(x / softcap)^2 as 4 t / (1 + t)^2 with t = exp(-2 |x| / softcap): 1 - tanh^2 has no digits left where
    |x| >> softcap. (1 / cosh^2 has them, but torch's cosh gives the last few numbers of a tensor other bits.)"""
    t = x.abs().mul_(-2 / softcap).exp_()  # (r, v)
    return (4 * t).div_((1 + t).square_())  # (r, v)


def _find(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in this slice of the vocabulary, clamped into it, and whether it is really there."""
    column = (targets - vocab.start)[:, None]  # (r, 1)
    width = vocab.stop - vocab.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)  # (r, 1), (r, 1)


def _put(tile: Tensor, column: Tensor, inside: Tensor, values: Tensor) -> None:
    """tile[n, column[n]] = values[n] where inside[n]. A boolean index would do the same and make a GPU wait."""
    tile.scatter_(1, column, torch.where(inside, values, tile.gather(1, column)))  # (r, v)


def _fold(x: Tensor, e: Tensor, targets: Tensor, vocab: slice, state: Tensor, options: _Options) -> Tensor:
    """Takes a tile of dot products into the running numbers of its rows. Of the tokens that are not the target:

        m = max z        s = sum exp(z - m)        a = sum exp(z - m) (z - m)

    x        (r, v) dot products; overwritten
    e        (r, v) empty; then exp(z - m), times the slope of the soft-cap when G is wanted, 0 at the target
    state    (r, 5) m, s, a, z_y and x_y (logit and dot product of the target); updated
    returns  (r,) exp(old m - new m): what sums over earlier tiles must be multiplied by
    """
    m, s, a, z_y, x_y = state.unbind(1)  # (r,) each
    column, inside = _find(targets, vocab)  # (r, 1), (r, 1)
    x_y[:] = torch.where(inside, x.gather(1, column), x_y[:, None]).squeeze(1)  # (r,)
    slope = _slope(x, options.softcap) if options.keep and options.softcap is not None else None  # (r, v)
    z = _cap(x, options)  # (r, v)
    z_y[:] = torch.where(inside, z.gather(1, column), z_y[:, None]).squeeze(1)  # (r,)
    _put(z, column, inside, z.new_full((), -math.inf))  # the target is not one of the others
    top = torch.maximum(m, z.amax(1))  # (r,)
    z = z.sub_(top[:, None]).clamp_min_(UNDERFLOW)  # (r, v)
    torch.exp(z, out=e)  # (r, v)
    down = m - top  # (r,) <= 0: the sums so far are rescaled to the new maximum
    scale = down.exp()  # (r,)
    a[:] = (a + s * down) * scale + z.mul_(e).sum(1)  # (r,)
    s[:] = s * scale + e.sum(1)  # (r,)
    m[:] = top  # (r,)
    if slope is not None:
        e.mul_(slope)  # (r, v) after the sums: p_v itself is not damped, only its part in the gradient
    return scale


def _finish(gap: Tensor, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gap = z_y - m, s and a, all (N,) -> logp, entropy, logp_m, all (N,). logp_m is the log-prob that a token with the
    logit m has, so that log p[v] = logp_m + (z[v] - m): small numbers even where z and its logsumexp are 1e4."""
    # No other token at all (V = 1), or all of them banned or underflown: log 0 would be -inf, and -inf + inf is nan
    log_s = torch.where(s == 0, UNDERFLOW, s.log())  # (N,)
    margin = gap - log_s  # (N,) log-odds of the target against all others together
    logp = logsigmoid(margin)  # (N,) equation (3)
    logp_m = logsigmoid(-margin) - log_s  # (N,)
    # (2) as target plus others, where sum_others p log p = (1 - p_y) (logp_m + mean): two terms >= 0, no cancelling
    floor = torch.finfo(s.dtype).min  # of a banned target: 0 * -inf would be nan
    mean = a / torch.where(s == 0, 1.0, s)  # (N,) of z - m, over the others
    entropy = logp.expm1() * (logp_m + mean) - logp.exp() * logp.clamp_min(floor)  # (N,)
    return logp, entropy, logp_m


def _gradient(
    g: Tensor, weight: Tensor, targets: Tensor, x_y: Tensor, logp: Tensor, logp_m: Tensor, options: _Options
) -> None:
    """g = sum_{v != y} exp(z[v] - m) slope[v] weight[v] of some rows, (r, C) -> G of equation (4), in place."""
    own, others = -logp.expm1() / options.temperature, logp_m.exp() / options.temperature  # (r,), (r,)
    if options.softcap is not None:
        own = own * _slope(x_y, options.softcap)  # (r,)
    g.mul_(-others[:, None]).addcmul_(own[:, None], weight[targets].to(g.dtype))  # (r, C)


def _stored(hidden: Tensor) -> torch.dtype:
    """In bf16 G takes one rounding, of 0.4 % at most, as the gradient itself does. In fp16 1e-8 is 0: fp32 instead."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, ...]:
    """One pass over the tiles.

    returns  logp, entropy, m, logp_m, first, all (N,), and G (N, C) or None. first (bool) says that no other token is
             likelier than the target.
    """
    N, V = len(hidden), len(weight)
    fold = _fold if options.path == "torch" else _launch_fold
    sums, operand = _dtypes(hidden, weight, options)
    info, store = torch.finfo(sums), _stored(hidden)
    row_slices, vocab_slices, height, width = _tiles(N, V, options)
    hidden, targets = _pad(hidden, height, operand), _pad(targets, height, targets.dtype)  # (N', C), (N',)
    state = hidden.new_zeros((len(hidden), 5), dtype=sums)  # (N', 5)
    state[:, 0] = info.min / 2  # finite: after a first tile of only -inf, -inf would give -inf + inf = nan
    g = state.new_zeros(hidden.shape) if options.keep else None  # (N', C)
    buffer_x = state.new_empty(height * width)
    buffer_e = buffer_x.new_empty(len(buffer_x), dtype=sums if fold is _fold else operand)
    for vocab in vocab_slices:
        w = weight[vocab].to(operand)  # (v, C) upcast once and used by all rows: why vocabulary is the outer loop
        size = height * len(w)
        for rows in row_slices:
            x = _mm(hidden[rows], w.T, buffer_x[:size].view(height, len(w)))  # (r, v)
            e = buffer_e[:size].view(height, len(w))  # (r, v)
            scale = fold(x, e, targets[rows], vocab, state[rows], options)  # (r,)
            if g is not None:
                g[rows].mul_(scale[:, None])  # (r, C)
                _addmm(g[rows], e.to(operand), w)  # (r, C)
    m, s, a, z_y, x_y = state.T.contiguous()  # (N',) each
    logp, entropy, logp_m = _finish(z_y - m, s, a)  # (N',) each
    if g is not None:
        for rows in row_slices:
            _gradient(g[rows], weight, targets[rows], x_y[rows], logp[rows], logp_m[rows], options)
        g = g[:N].to(store)  # (N, C)
    # first compares logits, because equal ones need not have logps of equal bits
    return *(x[:N] for x in (logp, entropy, m, logp_m, z_y >= m)), g


def _dz(x: Tensor, dx: Tensor, targets: Tensor, vocab: slice, numbers: Tensor, entropic: bool, options: _Options):
    """The gradient of a tile of dot products x, from the six numbers of each row that _backward lists; overwrites x."""
    m, logp_m, entropy, dlogp, dentropy, dz_y = (c[:, None] for c in numbers.unbind(1))  # (r, 1) each
    slope = None if options.softcap is None else _slope(x, options.softcap)  # (r, v)
    log_p = _cap(x, options).sub_(m).add_(logp_m)  # (r, v)
    pull = dlogp + dentropy * (log_p + entropy) if entropic else dlogp  # (r, v) or (r, 1)
    dz = log_p.exp_().mul_(pull).neg_()  # (r, v)
    _put(dz, *_find(targets, vocab), dz_y)  # (r, v)
    if slope is not None:
        dz.mul_(slope)  # (r, v)
    dx.copy_(dz)  # (r, v) bf16 keeps each p[v] to 0.4 %, the target's 1 - p[y] as well


def _backward(
    saved: tuple[Tensor, ...], options: _Options, dlogp: Tensor, dentropy: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The tiles again, now as the gradient of the dot products x = hidden @ weight.T:

        dz[v] = -p[v] (dlogp + dentropy (log p[v] + entropy))                                v != y
        dz[y] = (1 - p[y]) dlogp - p[y] dentropy (logp + entropy)
        dx = dz (1 - tanh(x / softcap)^2) / temperature

    returns  dhidden = dx @ weight (N, C) in fp32, dweight = dx.T @ hidden (V, C) in its own dtype; None if not needed
    """
    hidden, weight, targets, logp, entropy, m, logp_m = saved
    N, V = len(hidden), len(weight)
    dz = _dz if options.path == "torch" else _launch_dz
    sums, operand = _dtypes(hidden, weight, options)
    entropic = dentropy is not None
    dlogp = dlogp / options.temperature  # (N,) once a row instead of once a logit
    dentropy = dentropy / options.temperature if entropic else torch.zeros_like(dlogp)  # (N,)
    dz_y = -logp.expm1() * dlogp  # (N,)
    if entropic:
        dz_y = dz_y - logp.exp() * dentropy * (logp + entropy)  # (N,)
    row_slices, vocab_slices, height, width = _tiles(N, V, options)
    numbers = _pad(torch.stack([m, logp_m, entropy, dlogp, dentropy, dz_y], 1), height, sums)  # (N', 6)
    hidden, targets = _pad(hidden, height, operand), _pad(targets, height, targets.dtype)  # (N', C), (N',)
    dhidden = numbers.new_zeros(hidden.shape) if needs[0] else None  # (N', C)
    dweight = torch.empty_like(weight) if needs[1] else None  # (V, C)
    buffer_x = numbers.new_empty(height * width)
    buffer_dx = buffer_x if operand == sums else buffer_x.new_empty(len(buffer_x), dtype=operand)
    for vocab in vocab_slices:
        w = weight[vocab].to(operand)  # (v, C)
        size = height * len(w)
        dw = numbers.new_zeros(w.shape) if needs[1] else None  # (v, C) fp32 until all rows are in
        for rows in row_slices:
            x = _mm(hidden[rows], w.T, buffer_x[:size].view(height, len(w)))  # (r, v)
            dx = buffer_dx[:size].view(height, len(w))  # (r, v)
            dz(x, dx, targets[rows], vocab, numbers[rows], entropic, options)
            if dhidden is not None:
                _addmm(dhidden[rows], dx, w)  # (r, C)
            if dw is not None:
                _addmm(dw, dx.T, hidden[rows])  # (v, C)
        if dweight is not None:
            dweight[vocab] = dw
    return None if dhidden is None else dhidden[:N], dweight


# ----------------------------------------------------------------------------
# 2. kernels
#
# Path "rows": the loops above, with cuBLAS for the products and a kernel for what happens to a tile between them.
# Path "epilogue": a matrix product whose programs turn their logits into exp(z - shift) before anything is written.
#
# Floor for N = 8192, V = 151936, C = 1024: each product 2.5e12 operations, 3.2 ms at the 790 TFLOP/s an H100 does.
# Bytes a logit to and from memory: "rows" writes 4 and reads 4 (and 4 more out of the cache), then writes and reads 2
# of e; "epilogue" writes and reads 2, under the product. GPU speed: not measured.
#
# Without gradients the same binary runs, told by a number (stored_rows = 0) to leave out its stores. A constexpr would
# make a second binary, and the compiler could order its additions differently: the first ratio would not be 1.

LAUNCH = {"enable_fp_fusion": False}  # a * b + c rounds twice, as written, on every Triton: 3.9 fuses, 3.10 does not
ROW_BLOCK = 4096  # logits of a row in one step of _fold_kernel: 32 fp32 registers in each of 4 x 32 threads
STEP = 1024  # numbers of a row that _shift_kernel and _reduce_kernel take at a time, 8 in each of 128 threads

# Rows, columns and depth of an _epilogue_kernel program, its warps and pipeline stages, by bytes of an operand and
# soft-cap. Registers decide: a thread has 255. Compiled for sm_80 and sm_90 by Triton 3.6, 3.7 and 3.9 none of these
# spills; 128 x 256 in 8 warps would read less, and spills 88 bytes on sm_80 with 3.6 and 3.7.
#   bf16          98 KB of shared memory; on an MI300 the 64 KB that a program may have there. On an H100 153 registers
#                 leave room for one program a multiprocessor; limited to 128, which spills nothing, there are two, and
#                 one multiplies while the other takes exps and stores
#   with soft-cap the slope needs the dot products until the end, beside e: the sums are spread over twice the warps
#   fp32          no tensor cores without rounding to tf32: for completeness and for tests
PRODUCT = {
    (2, False): (128, 128, 64, 8, 3),
    (2, True): (128, 128, 64, 16, 3),
    (4, False): (64, 64, 32, 4, 3),
    (4, True): (64, 64, 32, 4, 3),
}


@triton.jit
def _capped(x, softcap, cold, SOFTCAP: tl.constexpr):
    """_cap, with cold = 1 / temperature. |tanh u| = 1 - 2 r with r = t / (1 + t), t = exp(-2 |u|) is off by 1e-7, so
    the logit by 1e-7 softcap: what fp32 rounds off a logit of that size. (The interpreter lacks Triton's tanh.)"""
    if SOFTCAP:
        t = tl.exp(tl.abs(x) * (-2.0 / softcap))
        x = tl.where(x < 0.0, -softcap, softcap) * (1.0 - 2.0 * (t / (1.0 + t)))
    return x * cold


@triton.jit
def _damped(e, x, softcap, SOFTCAP: tl.constexpr):
    """e times _slope(x) = 4 r (1 - r), where r <= 1 / 2: nothing cancels."""
    if SOFTCAP:
        t = tl.exp(tl.abs(x) * (-2.0 / softcap))
        r = t / (1.0 + t)
        e = e * (4.0 * r * (1.0 - r))
    return e


@triton.jit
def _fold_kernel(
    x_ptr, e_ptr, state_ptr, scale_ptr, targets_ptr, start, width, stored_rows, softcap, cold,
    SOFTCAP: tl.constexpr, UNDERFLOW: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """_fold for one row: once over the slice for its maximum, once more (out of the cache) for sums and e."""
    n = tl.program_id(0).to(tl.int64)
    x_ptr += n * width
    e_ptr += n * width
    state_ptr += n * 5
    y = tl.load(targets_ptr + n) - start
    m_old = tl.load(state_ptr)
    m = m_old
    stored = tl.where(n < stored_rows, width, 0)
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < width, other=0.0)  # (BLOCK_V,)
        z = _capped(x, softcap, cold, SOFTCAP)
        m = tl.maximum(m, tl.max(tl.where((v == y) | (v >= width), -float("inf"), z), axis=0))
    s = 0.0
    a = 0.0
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + v, mask=v < width, other=0.0)  # (BLOCK_V,)
        z = _capped(x, softcap, cold, SOFTCAP)
        tl.store(state_ptr + 3 + 0 * v, z, mask=v == y)  # z_y and x_y: one lane at most, in one slice
        tl.store(state_ptr + 4 + 0 * v, x, mask=v == y)
        z = tl.where((v == y) | (v >= width), -float("inf"), z) - m
        z = tl.where(z < UNDERFLOW, UNDERFLOW, z)  # not tl.maximum, which drops a nan
        e = tl.exp(z)
        s += tl.sum(e, axis=0)
        a += tl.sum(e * z, axis=0)
        tl.store(e_ptr + v, _damped(e, x, softcap, SOFTCAP), mask=v < stored)
    down = m_old - m
    scale = tl.exp(down)
    s_old = tl.load(state_ptr + 1)
    a_old = tl.load(state_ptr + 2)
    tl.store(state_ptr, m)
    tl.store(state_ptr + 1, s_old * scale + s)
    tl.store(state_ptr + 2, (a_old + s_old * down) * scale + a)
    tl.store(scale_ptr + n, scale)


@triton.jit
def _dz_kernel(
    x_ptr, dx_ptr, numbers_ptr, targets_ptr, start, width, softcap, cold,
    SOFTCAP: tl.constexpr, ENTROPIC: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """_dz for BLOCK_V dot products of one row."""
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    numbers_ptr += n * 6
    x = tl.load(x_ptr + n * width + v, mask=v < width, other=0.0)  # (BLOCK_V,)
    z = _capped(x, softcap, cold, SOFTCAP)
    log_p = z - tl.load(numbers_ptr) + tl.load(numbers_ptr + 1)
    pull = tl.load(numbers_ptr + 3)
    if ENTROPIC:
        pull = pull + tl.load(numbers_ptr + 4) * (log_p + tl.load(numbers_ptr + 2))
    dz = -tl.exp(log_p) * pull
    dz = tl.where(v == tl.load(targets_ptr + n) - start, tl.load(numbers_ptr + 5), dz)
    tl.store(dx_ptr + n * width + v, _damped(dz, x, softcap, SOFTCAP), mask=v < width)


@triton.jit
def _shift_kernel(
    hidden_ptr, weight_ptr, targets_ptr, shift_ptr, stride_v, stride_c, C, softcap, cold,
    SOFTCAP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """shift[n] = the logit of the target, by a plain fp32 dot product. Near what the big product finds is enough."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(targets_ptr + n)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        h = tl.load(hidden_ptr + n * C + c, mask=c < C, other=0.0).to(tl.float32)  # (BLOCK_C,)
        w = tl.load(weight_ptr + y * stride_v + c * stride_c, mask=c < C, other=0.0).to(tl.float32)  # (BLOCK_C,)
        sums += h * w
    tl.store(shift_ptr + n, _capped(tl.sum(sums, axis=0), softcap, cold, SOFTCAP))


@triton.jit
def _epilogue_kernel(
    hidden_ptr, weight_ptr, targets_ptr, shift_ptr, e_ptr, parts_ptr, own_ptr,
    stride_v, stride_c, stride_e, start, width, C, first_tile, n_tiles, rows, stored_rows, softcap, cold,
    SOFTCAP: tl.constexpr, UNDERFLOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of hidden @ weight.T that stays in registers: only e = exp(z - shift) slope is written, and for each row

        parts[:, n, tile] = max (z - shift), sum exp(z - shift), sum exp(z - shift) (z - shift)     over v != y

    each by one program: no atomics, so nothing depends on who comes first. And own[n] = (z_y - shift, x_y), from the
    program that meets the target: with the same bits as a twin of the target elsewhere, so that ties are ties.
    """
    # Programs of one column of tiles run side by side: they share weight, which is far larger than hidden.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # offsets within a chunk of ROWS rows fit int32
    tile = tl.program_id(1)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        # both are masked: what lies behind a row is the next one, and 0 * nan = nan
        h = tl.load(hidden_ptr + n[:, None] * C + c[None, :], mask=c[None, :] < C, other=0.0)  # (BLOCK_N, BLOCK_C)
        w = tl.load(
            weight_ptr + v[None, :].to(tl.int64) * stride_v + c[:, None] * stride_c,
            mask=(v[None, :] < width) & (c[:, None] < C),
            other=0.0,
        )  # (BLOCK_C, BLOCK_V)
        x = tl.dot(h, w, x, input_precision="ieee")  # (BLOCK_N, BLOCK_V)
    y = tl.load(targets_ptr + n) - start  # (BLOCK_N,)
    hit = v[None, :] == y[:, None]  # (BLOCK_N, BLOCK_V)
    here = (y >= tile * BLOCK_V) & (y < tile * BLOCK_V + BLOCK_V)  # (BLOCK_N,)
    shift = tl.load(shift_ptr + n)  # (BLOCK_N,)
    x_y = tl.sum(tl.where(hit, x, 0.0), axis=1)  # (BLOCK_N,)
    tl.store(own_ptr + 2 * n, _capped(x_y, softcap, cold, SOFTCAP) - shift, mask=here)
    tl.store(own_ptr + 2 * n + 1, x_y, mask=here)
    z = _capped(x, softcap, cold, SOFTCAP) - shift[:, None]  # (BLOCK_N, BLOCK_V)
    z = tl.where(hit | (v[None, :] >= width), -float("inf"), z)
    part = parts_ptr + n * n_tiles + first_tile + tile
    plane = rows.to(tl.int64) * n_tiles
    tl.store(part, tl.max(z, axis=1))
    z = tl.where(z < UNDERFLOW, UNDERFLOW, z)
    e = tl.exp(z)
    tl.store(part + plane, tl.sum(e, axis=1))
    tl.store(part + 2 * plane, tl.sum(e * z, axis=1))
    kept = (n[:, None] < stored_rows) & (v[None, :] < width)
    tl.store(e_ptr + n[:, None] * stride_e + v[None, :], _damped(e, x, softcap, SOFTCAP), mask=kept)


@triton.jit
def _reduce_kernel(parts_ptr, sums_ptr, n_tiles, rows, BLOCK: tl.constexpr):
    """The tiles' parts of one row, (3, rows, n_tiles) -> (3, rows): always in the same order."""
    n = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64) * n_tiles
    peak = -float("inf")
    s = 0.0
    a = 0.0
    for first in range(0, n_tiles, BLOCK):
        i = first + tl.arange(0, BLOCK)
        part = parts_ptr + n * n_tiles + i
        peak = tl.maximum(peak, tl.max(tl.load(part, mask=i < n_tiles, other=-float("inf")), axis=0))
        s += tl.sum(tl.load(part + plane, mask=i < n_tiles, other=0.0), axis=0)
        a += tl.sum(tl.load(part + 2 * plane, mask=i < n_tiles, other=0.0), axis=0)
    tl.store(sums_ptr + n, peak)
    tl.store(sums_ptr + rows + n, s)
    tl.store(sums_ptr + 2 * rows + n, a)


def _scalars(options: _Options) -> dict:
    return {
        "softcap": options.softcap or 1.0,
        "cold": 1.0 / options.temperature,
        "SOFTCAP": options.softcap is not None,
    }


def _launch_fold(x: Tensor, e: Tensor, targets: Tensor, vocab: slice, state: Tensor, options: _Options) -> Tensor:
    """_fold by one program a row. e keeps what it held when G is not wanted."""
    rows, width = x.shape
    scale = torch.empty_like(state[:, 0], memory_format=torch.contiguous_format)  # (r,)
    _fold_kernel[(rows,)](
        x, e, state, scale, targets, vocab.start, width, rows if options.keep else 0,
        UNDERFLOW=UNDERFLOW, BLOCK_V=ROW_BLOCK, num_warps=4, **_scalars(options), **LAUNCH,
    )  # fmt: skip
    return scale


def _launch_dz(
    x: Tensor, dx: Tensor, targets: Tensor, vocab: slice, numbers: Tensor, entropic: bool, options: _Options
):
    rows, width = x.shape
    _dz_kernel[(rows, triton.cdiv(width, ROW_BLOCK))](
        x, dx, numbers, targets, vocab.start, width,
        ENTROPIC=entropic, BLOCK_V=ROW_BLOCK, num_warps=4, **_scalars(options), **LAUNCH,
    )  # fmt: skip


def _forward_epilogue(hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, ...]:
    """_forward by a matrix product with an exp in its epilogue: ROWS rows at a time.

    Nothing is known about a row's maximum when its first tile is finished, so exp needs another shift: the target's own
    logit, one cheap dot product. It is near the maximum for every token that was ever sampled. A row with some logit
    FAR above it is scored once more, by _forward; whether it is depends on nothing but the row.
    """
    parts = [_chunk(hidden[n : n + ROWS], weight, targets[n : n + ROWS], options) for n in range(0, len(hidden), ROWS)]
    *out, peak = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    far = peak > FAR  # (N,)
    if far.any():
        rows = far.nonzero().squeeze(1)  # (n,)
        again = _forward(hidden[rows], weight, targets[rows], options)
        for x, better in zip(out, again, strict=True):
            if x is not None:
                x[rows] = better
    return tuple(out)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> tuple[Tensor, ...]:
    """At most ROWS rows: what _forward returns, and how far above its shift each row's largest logit lies, (n,)."""
    N, C, V = *hidden.shape, len(weight)
    _, operand = _dtypes(hidden, weight, options)
    block_n, block_v, block_c, warps, stages = PRODUCT[operand.itemsize, options.softcap is not None]
    limit = {"maxnreg": 128} if is_hopper(hidden) and operand.itemsize == 2 and options.softcap is None else {}
    _, vocab_slices, _, width = _tiles(N, V, options)
    tiles = [triton.cdiv(vocab.stop - vocab.start, block_v) for vocab in vocab_slices]
    store, n_tiles = _stored(hidden), sum(tiles)
    h, y = _pad(hidden, ROWS, operand), _pad(targets, ROWS, torch.int64)  # (ROWS, C), (ROWS,)
    shift = h.new_empty(ROWS, dtype=torch.float32)  # (ROWS,)
    _shift_kernel[(N,)](
        h, weight, y, shift, weight.stride(0), weight.stride(1), C,
        BLOCK_C=STEP, num_warps=4, **_scalars(options), **LAUNCH,
    )  # fmt: skip
    parts, own = shift.new_empty((3, ROWS, n_tiles)), shift.new_empty((ROWS, 2))
    stride_e = triton.cdiv(width, 16) * 16  # cuBLAS wants rows that start at multiples of 16 bytes
    e = h.new_empty((ROWS, stride_e) if options.keep else (1, stride_e))
    g = shift.new_zeros((ROWS, C)) if options.keep else None  # (ROWS, C)
    for vocab, first_tile in zip(vocab_slices, [sum(tiles[:i]) for i in range(len(tiles))], strict=True):
        w = weight[vocab].to(operand)  # (v, C)
        # Padding is multiplied in the second product only, whose shape must not depend on N: what it holds is dropped.
        _epilogue_kernel[(triton.cdiv(N, block_n), triton.cdiv(len(w), block_v))](
            h, w, y, shift, e, parts, own, w.stride(0), w.stride(1), stride_e, vocab.start, len(w), C,
            first_tile, n_tiles, ROWS, ROWS if options.keep else 0, UNDERFLOW=UNDERFLOW,
            BLOCK_N=block_n, BLOCK_V=block_v, BLOCK_C=block_c, num_warps=warps, num_stages=stages,
            **limit, **_scalars(options), **LAUNCH,
        )  # fmt: skip
        if g is not None:
            _addmm(g, e[:, : len(w)], w)  # (ROWS, C)
    sums = shift.new_empty((3, ROWS))
    _reduce_kernel[(N,)](parts, sums, n_tiles, ROWS, BLOCK=STEP, num_warps=4, **LAUNCH)
    peak, s, a = sums  # (ROWS,) each
    gap, x_y = own.T.contiguous()  # (ROWS,), (ROWS,)
    logp, entropy, logp_m = _finish(gap, s, a)  # (ROWS,) each
    if g is not None:
        _gradient(g, weight, y, x_y, logp, logp_m, options)
        g = g[:N].to(store)  # (N, C)
    return *(x[:N] for x in (logp, entropy, shift, logp_m, gap >= peak)), g, peak[:N]


# ----------------------------------------------------------------------------
# 3. autograd


class _TokenLogprob(torch.autograd.Function):
    """Saves hidden (N, C), weight (V, C), targets and four floats a row: 24 bytes a token besides what exists. With a
    frozen head also G, (N, C) in bf16 or fp32; hidden is then kept only for a gradient through the entropy."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, options):
        forward = _forward_epilogue if options.path == "epilogue" else _forward
        with bf16_products(_narrow(hidden, weight)):
            logp, entropy, m, logp_m, first, G = forward(hidden, weight, targets, options)
        ctx.save_for_backward(hidden, weight, targets, logp, entropy, m, logp_m, *([G] if options.keep else []))
        ctx.options = options
        ctx.mark_non_differentiable(first)
        ctx.set_materialize_grads(False)  # no entropy in the loss is None here, and its half of the work is skipped
        return logp, entropy, first

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, _):
        saved, G = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        hidden, logp, needs = saved[0], saved[3], ctx.needs_input_grad[:2]
        if G and dentropy is None:
            return (dlogp[:, None] * G[0]).to(hidden.dtype), None, None, None  # (N, C)
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp  # (N,)
        with bf16_products(_narrow(hidden, saved[1])):
            dhidden, dweight = _backward(saved, ctx.options, dlogp, dentropy, needs)
        if dhidden is not None:
            dhidden = dhidden.to(hidden.dtype)  # (N, C) one rounding, after all tiles are summed
        return dhidden, dweight, None, None


# ----------------------------------------------------------------------------
# 4. entry


def _path(hidden: Tensor, weight: Tensor, backend: str | None) -> str:
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    unfit = "float64 with backend 'triton', want float32 or less" if wide else ""
    if or_torch(choose(backend, hidden), backend, unfit) == "torch":
        return "torch"
    return "epilogue" if hidden.shape[1] < EPILOGUE_BELOW else "rows"


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
    with_top: bool = False,
) -> tuple[Tensor, ...]:
    """Log-probability the model gave to each target, and the entropy of the distribution it stood in.

        z = softcap tanh(hidden @ weight.T / softcap) / temperature
        logp = log_softmax(z)[targets]        entropy = -sum softmax(z) log_softmax(z)

    hidden       (N, C) bf16, fp16, fp32 or fp64: final hidden states, normalised; carries a gradient
    weight       (V, C) float: rows of the vocabulary head; carries a gradient if it wants one
    targets      (N,)   int: in [0, V), or IGNORE
    temperature  > 0; the one answers were sampled with, or the ratio compares two other policies
    softcap      Gemma 2's final_logit_softcapping; None for none
    backend      "torch" | "triton" | None = Triton on a GPU, torch elsewhere and for float64
    with_top     also return whether the target is the likeliest token (ties count): token accuracy at no cost
    returns      logp (N,) and entropy (N,), float32 (float64 if an input is); differentiable in hidden and weight;
                 with_top: and (N,) bool, False at IGNORE

    A row whose target is IGNORE gives logp 0, entropy 0 and a gradient of 0, whatever it holds, and costs nothing.
    The bits of a row do not depend on the rows beside it, nor on whether gradients are enabled: a scoring pass without
    them gives a ratio of exactly 1. Where weight does not require a gradient, forward does what backward would.

    Raises ValueError when shapes do not line up, a target is out of range, or a number makes no sense.

    Source: the target apart from the sum, arXiv:2610.31642; recomputing the tile in backward, arXiv:2411.09009 (CCE);
    gradients in forward, Liger and Unsloth; the exp in the epilogue, QuACK, with the target's logit for its shift.
    Elsewhere: TRL kernels/chunked_logprob.py; verl FusedLinearForPPO (returns bf16); Liger fused_linear_cross_entropy.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, targets))
        raise ValueError(
            f"got hidden, weight, targets of shapes {shapes}, want (N, C), (V, C), (N,); check the reshape"
        )
    same_device(hidden=hidden, weight=weight, targets=targets)
    V = len(weight)
    if not (hidden.is_floating_point() and weight.is_floating_point() and targets.dtype in INTS):
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (hidden, weight, targets))
        raise ValueError(f"got hidden, weight, targets of {dtypes}, want floats, floats and int64; cast them")
    check_positive("temperature", temperature, "; greedy answers are scored at 1.0")
    check_positive("softcap", softcap, "; pass None for no soft-cap")
    path = _path(hidden, weight, backend)
    scored = targets != IGNORE  # (N,)
    wrong = scored & ((targets < 0) | (targets >= V))  # (N,)
    if wrong.any():  # on a GPU this waits for the kernels before it; a bad index there would kill the process
        n = int(wrong.nonzero()[0])
        raise ValueError(f"got targets[{n}] = {int(targets[n])}, want 0 <= target < {V} or {IGNORE}; wrong tokenizer?")
    if odd := -weight.shape[1] % ALIGN:  # of no known model: zeros that change no dot product
        hidden, weight = pad(hidden, (0, odd)), pad(weight, (0, odd))  # (N, C'), (V, C')
    keep = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    options = _Options(float(temperature), None if softcap is None else float(softcap), path, keep)
    if len(targets) and scored.all():
        out = _TokenLogprob.apply(hidden, weight, targets.long(), options)  # (N,), (N,), (N,)
        return out if with_top else out[:2]
    kept = scored.nonzero().squeeze(1)  # (K,) ignored rows are left out before anything is multiplied: no 0 * nan
    if not len(kept):  # a GPU cannot launch 0 programs
        options = replace(options, path="torch")
    out = _TokenLogprob.apply(hidden[kept], weight, targets[kept].long(), options)  # (K,), (K,), (K,)
    out = [x.new_zeros(targets.shape).index_copy(0, kept, x) for x in out]  # (N,), (N,), (N,)
    return tuple(out if with_top else out[:2])


def seq_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of whole answers: token_logprob summed over each sequence of a packed row.

        seq_logp[i] = sum_{t = cu_seqlens[i]}^{cu_seqlens[i + 1] - 1} logp[t]

    hidden      (S, C), weight (V, C), targets (S,), temperature, softcap, backend: as in token_logprob
    cu_seqlens  (N + 1,) int32 or int64, from 0 to S, never falling
    returns     (N,) float32; 0 for an empty sequence; differentiable in hidden and weight

    Raises ValueError as token_logprob does, and when cu_seqlens does not cut the row from end to end.
    """
    logp, _ = token_logprob(hidden, weight, targets, temperature=temperature, softcap=softcap, backend=backend)  # (S,)
    return sequence_sums(logp, cu_seqlens)


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each sequence of a packed row, in an order that no other sequence can change.

    values      (S,) float; carries the gradient
    cu_seqlens  (N + 1,) int32 or int64, from 0 to S, never falling
    returns     (N,) dtype of values; 0 for an empty sequence

    Raises ValueError when cu_seqlens does not cut the row from end to end.
    """
    if values.ndim != 1 or cu_seqlens.ndim != 1 or cu_seqlens.dtype not in INTS:
        got = f"values {tuple(values.shape)} and cu_seqlens {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
        raise ValueError(f"got {got}, want (S,) and (N + 1,) of int32 or int64; build cu_seqlens with cumsum")
    same_device(values=values, cu_seqlens=cu_seqlens)
    S = len(values)
    cuts = cu_seqlens.tolist()
    if cuts[:1] != [0] or cuts[-1] != S or any(a > b for a, b in zip(cuts, cuts[1:], strict=False)):
        shown = cuts if len(cuts) <= 8 else f"{cuts[:4]} … {cuts[-4:]}".replace("] … [", ", …, ")
        raise ValueError(f"got cu_seqlens {shown}, want it to rise from 0 to {S} (the tokens); build it with cumsum")
    # fp64, one token after another: 4096 fp32 additions would lose 1e-6 of the sum, and a padded or a cumulative sum
    # gives a sequence other bits when its neighbours change. A column, because a GPU sums 1-D segments as a tree
    column = values.double()[:, None]  # (S, 1)
    sums = torch.segment_reduce(column, "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)  # (N, 1)
    return sums.squeeze(1).to(values.dtype)  # (N,)
