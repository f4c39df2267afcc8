"""Log-probability and entropy of the next token, without a (N, V) matrix of logits in memory.

    z[n, v]    = softcap * tanh((hidden[n] . weight[v]) / softcap) / temperature        (no tanh when softcap is None)
    logp[n]    = z[n, y] - logsumexp_v z[n, v]            with y = targets[n]                       (1)
    entropy[n] = -sum_v p[n, v] log p[n, v]               with p = softmax_v z[n, v]                (2)

For Qwen3-0.6B (V = 151936) one row of fp32 logits is 0.6 MB: 8192 tokens would need 5 GB, three times over with the
softmax and its gradient. Here one tile of logits, at most 16 MB, is alive at a time, and backward computes it again.
Three choices, because GSPO clips the length-normalised ratio at 3e-4:

  * logits and sums are fp32 whatever the inputs are. With bf16 logits the mean over 1024 tokens has an error of 1.6e-4
    (standard deviation), and 6 % of all sequences would leave the clip range from rounding alone.
  * the target is left out of the sum. With m = max z and s = sum exp(z - m) over the *other* tokens,

        logp = log_sigmoid(z_y - m - log s)                                                         (3)

    is (1) with nothing cancelled: at p_y = 1 - 1e-8 the fp32 form of (1) rounds to 0, (3) gives -1e-8. It needs no
    second case: far below the maximum log_sigmoid(x) is x, which is (1) again, and exp never sees a positive number.
  * the gradient of the target's logit is formed as -expm1(logp), never as 1 - p_y, for the same reason. Most sampled
    tokens are confident ones; in bf16 the subtraction costs up to 38 % of their gradient.

The file reads top to bottom:

    1. reference    plain torch: forward and backward over tiles. Equations (1) to (3). Also the CPU backend.
    2. autograd     glues them together; saves hidden, weight, targets and four floats a row, never a logit.
    3. entry        token_logprob, seq_logprob, sequence_sums: the names other files import.

Left out: gradients of gradients, label smoothing, gradients through infinite weights (0 * inf; values are fine).

Tests: tests/test_seq_logprob.py
Shapes: N rows (= scored tokens), C model width, V vocabulary; (r, v) one tile of (N, V); S tokens of a packed row.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

IGNORE = -100  # a target without a loss, as in torch.nn.functional.cross_entropy

# Measured on one CPU core at N = 512, C = 576, V = 49152: tiles of 2 to 16 MB are within 4 % of each other, 0.5 MB is
# 10 % slower (thin products), 100 MB 38 % (out of cache). A GPU wants 1024 rows or more in a product; not measured.
TILE = 4 * 2**20  # logits in a tile, 16 MB of fp32: 1024 rows by 4096 columns. Forward holds two tiles.
TILE_VOCAB = 4096  # a smaller vocabulary gets more rows: V = 20 is one tile up to 200k rows
UNDERFLOW = -1000.0  # exp(-1000) is exactly 0 in fp32 and fp64: a floor that changes nothing, except -inf * 0 = nan

# ----------------------------------------------------------------------------
# 1. reference


def _tiles(N: int, V: int) -> tuple[list[slice], list[slice], int]:
    """Slices of the rows, slices of the vocabulary, and how many logits the largest tile holds."""
    width = max(1, min(V, TILE_VOCAB))
    height = min(N, max(1, TILE // width))
    rows = [slice(n, min(n + height, N)) for n in range(0, N, max(1, height))]
    return rows, [slice(v, min(v + width, V)) for v in range(0, V, width)], height * width


def _dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What sums are kept in, and what matrix products read. A product of two bf16 or fp16 numbers is exact in fp32."""
    sums = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    tensor_cores = hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16  # bf16 in, fp32 sums, fp32 out
    return sums, torch.bfloat16 if tensor_cores else sums  # fp16 is upcast: a gradient of 1e-8 is 0 there


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b in the dtype of `out`, and in its memory where torch can. (Autocast does not reach calls with out=.)"""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype)


def _addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in the dtype of `out`."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, out=out, **mixed)


def _cap(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Dot products -> logits, in place."""
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)  # (r, v)
    return z if temperature == 1.0 else z.div_(temperature)  # (r, v)


def _find(targets: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Column of each target in this slice of the vocabulary, clamped into it, and whether it is really there."""
    column = (targets - vocab.start)[:, None]  # (r, 1)
    width = vocab.stop - vocab.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)  # (r, 1), (r, 1)


def _put(tile: Tensor, column: Tensor, inside: Tensor, values: Tensor) -> None:
    """tile[n, column[n]] = values[n] where inside[n]. A boolean index would do the same and make a GPU wait."""
    tile.scatter_(1, column, torch.where(inside, values, tile.gather(1, column)))  # (r, v)


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, ...]:
    """One pass over the tiles. Of the tokens that are not the target, three running numbers a row are kept:

        m = max z        s = sum exp(z - m)        a = sum exp(z - m) (z - m)

    returns  logp, entropy, m, logp_m, first, all (N,). logp_m is the log-prob of the likeliest other token, so that
             log p[v] = logp_m + (z[v] - m): small numbers even where z and its logsumexp are 1e4. first (bool) says
             that no other token is likelier than the target.
    """
    N, V = len(hidden), len(weight)
    dtype, operand = _dtypes(hidden, weight)
    info = torch.finfo(dtype)
    # Finite starts. From -inf and 0 a first tile of only -inf, or V = 1, would give -inf + inf = nan.
    m = hidden.new_full((N,), info.min / 2, dtype=dtype)  # (N,)
    s = torch.full_like(m, info.tiny)  # (N,) the maximum adds 1 to it, so 1e-38 is not seen again
    a, z_y = torch.zeros_like(m), torch.zeros_like(m)  # (N,), (N,)
    hidden = hidden.to(operand)  # (N, C)
    row_slices, vocab_slices, size = _tiles(N, V)
    buffer_z, buffer_e = m.new_empty((2, size))
    for vocab in vocab_slices:
        w = weight[vocab].to(operand)  # (v, C) upcast once and used by all rows: why vocabulary is the outer loop
        for rows in row_slices:
            h = hidden[rows]  # (r, C)
            z = _mm(h, w.T, buffer_z[: len(h) * len(w)].view(len(h), len(w)))  # (r, v)
            z = _cap(z, temperature, softcap)  # (r, v)
            column, inside = _find(targets[rows], vocab)  # (r, 1), (r, 1)
            z_y[rows] = torch.where(inside, z.gather(1, column), z_y[rows, None]).squeeze(1)  # (r,)
            _put(z, column, inside, z.new_full((), -math.inf))  # the target is not one of the others
            top = torch.maximum(m[rows], z.amax(1))  # (r,)
            z = z.sub_(top[:, None]).clamp_min_(UNDERFLOW)  # (r, v)
            e = torch.exp(z, out=buffer_e[: z.numel()].view_as(z))  # (r, v)
            down = m[rows] - top  # (r,) <= 0: the sums so far are rescaled to the new maximum
            a[rows] = (a[rows] + s[rows] * down) * down.exp() + z.mul_(e).sum(1)  # (r,)
            s[rows] = s[rows] * down.exp() + e.sum(1)  # (r,)
            m[rows] = top
    log_s = s.log()  # (N,)
    margin = z_y - m - log_s  # (N,) log-odds of the target against all others together
    logp = logsigmoid(margin)  # (N,) equation (3)
    logp_m = logsigmoid(-margin) - log_s  # (N,)
    # (2) as target plus others, where sum_others p log p = (1 - p_y) (logp_m + a / s): two terms >= 0, no cancelling
    entropy = logp.expm1() * (logp_m + a / s) - logp.exp() * logp.clamp_min(info.min)  # (N,) clamp: 0 * -inf = nan
    return logp, entropy, m, logp_m, z_y >= m  # logits, because equal ones need not have logps of equal bits


def _backward(
    saved: tuple[Tensor, ...],
    temperature: float,
    softcap: float | None,
    dlogp: Tensor,
    dentropy: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The tiles again, now as the gradient of the dot products x = hidden @ weight.T:

        dz[v] = -p[v] (dlogp + dentropy (log p[v] + entropy))                                v != y
        dz[y] = (1 - p[y]) dlogp - p[y] dentropy (logp + entropy)
        dx = dz (1 - tanh(x / softcap)^2) / temperature

    returns  dhidden = dx @ weight (N, C) in fp32, dweight = dx.T @ hidden (V, C) in its own dtype; None if not needed
    """
    hidden, weight, targets, logp, entropy, m, logp_m = saved
    N, V = len(hidden), len(weight)
    _, operand = _dtypes(hidden, weight)
    dlogp = dlogp / temperature  # (N,) once a row instead of once a logit
    dz_y = -logp.expm1() * dlogp  # (N,)
    if dentropy is not None:
        dentropy = dentropy / temperature  # (N,)
        dz_y = dz_y - logp.exp() * dentropy * (logp + entropy)  # (N,)
    dhidden = m.new_zeros(hidden.shape) if needs[0] else None  # (N, C)
    dweight = torch.empty_like(weight) if needs[1] else None  # (V, C)
    hidden = hidden.to(operand)  # (N, C)
    row_slices, vocab_slices, size = _tiles(N, V)
    buffer = m.new_empty(size)
    for vocab in vocab_slices:
        w = weight[vocab].to(operand)  # (v, C)
        dw = m.new_zeros(w.shape) if needs[1] else None  # (v, C) fp32 until all rows are in
        for rows in row_slices:
            h = hidden[rows]  # (r, C)
            x = _mm(h, w.T, buffer[: len(h) * len(w)].view(len(h), len(w)))  # (r, v)
            # 1 / cosh^2, because 1 - tanh^2 has no digits left where |x| >> softcap
            slope = None if softcap is None else (x / softcap).cosh_().pow_(-2)  # (r, v)
            log_p = _cap(x, temperature, softcap).sub_(m[rows, None]).add_(logp_m[rows, None])  # (r, v)
            pull = dlogp[rows, None]  # (r, 1)
            if dentropy is not None:
                pull = pull + dentropy[rows, None] * (log_p + entropy[rows, None])  # (r, v)
            dx = log_p.exp_().mul_(pull).neg_()  # (r, v)
            _put(dx, *_find(targets[rows], vocab), dz_y[rows, None])  # (r, v)
            if slope is not None:
                dx.mul_(slope)  # (r, v)
            dx = dx.to(operand)  # (r, v) bf16 keeps each p[v] to 0.4 %, the target's 1 - p[y] as well
            if dhidden is not None:
                _addmm(dhidden[rows], dx, w)  # (r, C)
            if dw is not None:
                _addmm(dw, dx.T, h)  # (v, C)
        if dweight is not None:
            dweight[vocab] = dw
    return dhidden, dweight


# ----------------------------------------------------------------------------
# 2. autograd


class _TokenLogprob(torch.autograd.Function):
    """Saves hidden (N, C), weight (V, C), targets and four floats a row: 24 bytes a token besides what exists."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, softcap):
        logp, entropy, m, logp_m, first = _forward(hidden, weight, targets, temperature, softcap)
        ctx.save_for_backward(hidden, weight, targets, logp, entropy, m, logp_m)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.mark_non_differentiable(first)
        ctx.set_materialize_grads(False)  # no entropy in the loss is None here, and its half of the work is skipped
        return logp, entropy, first

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogp, dentropy, _):
        logp = ctx.saved_tensors[3]
        dlogp = torch.zeros_like(logp) if dlogp is None else dlogp  # (N,)
        needs = ctx.needs_input_grad[:2]
        dhidden, dweight = _backward(ctx.saved_tensors, ctx.temperature, ctx.softcap, dlogp, dentropy, needs)
        if dhidden is not None:
            dhidden = dhidden.to(ctx.saved_tensors[0].dtype)  # (N, C) one rounding, after all tiles are summed
        return dhidden, dweight, None, None, None


# ----------------------------------------------------------------------------
# 3. entry


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
    backend      "torch" | None, which is "torch"
    with_top     also return whether the target is the likeliest token (ties count): token accuracy at no cost
    returns      logp (N,) and entropy (N,), float32 (float64 if an input is); differentiable in hidden and weight;
                 with_top: and (N,) bool, False at IGNORE

    A row whose target is IGNORE gives logp 0, entropy 0 and a gradient of 0, whatever it holds, and costs nothing.
    The bits do not depend on whether gradients are enabled: a scoring pass without them gives a ratio of exactly 1.

    Raises ValueError when shapes do not line up, a target is out of range, or a number makes no sense.

    Source: the target apart from the sum, arXiv:2610.31642; recomputing the tile in backward, arXiv:2411.09009 (CCE).
    Elsewhere: TRL kernels/chunked_logprob.py; verl FusedLinearForPPO (returns bf16); Liger fused_linear_cross_entropy.
    """
    V = len(weight)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, targets))
        raise ValueError(
            f"got hidden, weight, targets of shapes {shapes}, want (N, C), (V, C), (N,); check the reshape"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"got temperature {temperature}, want a number above 0; greedy answers are scored at 1.0")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"got softcap {softcap}, want a number above 0; pass None for no soft-cap")
    if backend not in (None, "torch"):
        raise ValueError(f"got backend {backend!r}, want 'torch' or None; leave it out")
    scored = targets != IGNORE  # (N,)
    wrong = scored & ((targets < 0) | (targets >= V))  # (N,)
    if wrong.any():  # on a GPU this waits for the kernels before it; a bad index there would kill the process
        n = int(wrong.nonzero()[0])
        raise ValueError(f"got targets[{n}] = {int(targets[n])}, want 0 <= target < {V} or {IGNORE}; wrong tokenizer?")
    if scored.all():
        out = _TokenLogprob.apply(hidden, weight, targets.long(), temperature, softcap)  # (N,), (N,), (N,)
        return out if with_top else out[:2]
    kept = scored.nonzero().squeeze(1)  # (K,) ignored rows are left out before anything is multiplied: no 0 * nan
    out = _TokenLogprob.apply(hidden[kept], weight, targets[kept].long(), temperature, softcap)  # (K,), (K,), (K,)
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
    S = len(values)
    cuts = cu_seqlens.tolist()
    if cuts[:1] != [0] or cuts[-1] != S or any(a > b for a, b in zip(cuts, cuts[1:], strict=False)):
        shown = cuts if len(cuts) <= 8 else f"{cuts[:4]} … {cuts[-4:]}".replace("] … [", ", …, ")
        raise ValueError(f"got cu_seqlens {shown}, want it to rise from 0 to {S} (the tokens); build it with cumsum")
    # fp64, one token after another: 4096 fp32 additions would lose 1e-6 of the sum, and a padded or a cumulative sum
    # gives a sequence other bits when its neighbours change
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)  # (N,)
    return sums.to(values.dtype)  # (N,)
