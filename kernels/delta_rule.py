"""The gated delta rule: a memory of fixed size that is read, corrected and faded at every token.

    S <- exp(g) S;    S <- S + k (beta (v - k S))^T;    out = q S                                            (1)

S (dk, dv) maps keys to values. A token fades it by exp(g), g <= 0, reads what the memory holds under its key k, and
moves that towards its value v by the fraction beta; then its query reads. Attention instead keeps all keys and values:
its memory grows with every token, this one is dk dv numbers a head for ever.

(1) is a loop over tokens of small vector products. A chunk of C <= 64 tokens can be done by matrix products, because
within it the corrections u[i] = beta (v - k S) of the chunk's tokens depend on each other linearly. With
D[i, j] = exp(g[j+1] + .. + g[i]), what is left at token i of what token j wrote, and c[i] = exp(g[0] + .. + g[i]):

    u[i] = beta[i] (v[i] - c[i] k[i] S - sum over j < i of D[i, j] (k[i] . k[j]) u[j])                       (2)
    (I + A) u = beta (v - c k S),     A = strictly lower triangle of beta (k k^T) * D
    u = T v - (T c) k S,              T = (I + A)^-1 beta, one triangular solve a chunk                      (3)
    out = c (q S) + ((q k^T) * D) u,        S' = c[C-1] S + (D[C-1] k)^T u                                   (4)

Only S goes from chunk to chunk; T and the products of q and k are made for all chunks at once. A packed row of many
sequences (kernels/attention.py: Segments) is a forest of chunks: the first chunk of an answer follows its prompt's
last one, and a sequence without a prompt starts anew. Round r takes all chunks with r chunks before them.

D is exp of sums of the g in between. Differences of sums from the chunk's start would cancel: behind a token that
forgets all (g = -1e4) they have lost four digits.

The file reads top to bottom:

    1. reference    plain torch: the plan of chunks, (2) to (4), and (1) for one token a row. Also the CPU backend.
    2. kernels      Triton: (3) for all chunks at once; (4), a program walks along a sequence with S in registers; (1).
    3. autograd     forward by the kernels; backward computes the reference again, and goes back through it.
    4. entry        delta_rule and delta_rule_step: the names other files import.

Left out: backward kernels, gradients in one token a row (decoding has none), negative eigenvalues (beta up to 2), a
decay for each channel (Kimi), products in 16 bits.

Lesson: lessons/17_delta_rule.md       Tests: tests/test_delta_rule.py
Source: Gated Delta Networks, arXiv:2412.06464; chunks by a triangular solve (UT transform): arXiv:2406.06484.
Shapes: S tokens of the packed row, n sequences, N chunks of C tokens, H query and key heads, V value heads (each key
head serves V // H), dk and dv their widths.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import Segments
from kernels.backend import choose, or_torch, same_device, tl, triton

# The triangular solve costs C^2 a token, the states 1 / C of one; 64 is what everybody uses, 128 was not measured. If
# no sequence is longer, chunks are smaller: a row of answers of 10 tokens is a quarter of the work in chunks of 16.
CHUNKS = (16, 32, 64)

# ----------------------------------------------------------------------------
# 1. reference


@dataclass(frozen=True)
class Plan:
    """A packed row as chunks, those of one round side by side.

    token   (N, C) the token of the row at each place of a chunk; S, a row of zeros, where a sequence ends before
    place   (S,) the inverse: where in (N * C) each token is
    before  for each round: what its chunks start from, numbers of chunks in the round before; in round 0 of sequences
    last    (n,) the chunk that each sequence ends with; N + i: none, it ends with what sequence i starts from
    """

    token: Tensor
    place: Tensor
    before: tuple[Tensor, ...]
    last: Tensor


def chunk_size(lengths: tuple[int, ...]) -> int:
    return next(C for C in CHUNKS if C == CHUNKS[-1] or C >= max(lengths))


@lru_cache(maxsize=64)  # all layers of a row ask for the same
def plan(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> Plan:
    """The chunks of segments of these lengths, behind these parents."""
    C = chunk_size(lengths)
    starts = [0, *accumulate(lengths)]
    chunks, ends = [], []  # (round, chunk before it or None, first token, end); (last chunk or None, first sequence)
    for i, parent in enumerate(parents):
        before, root = ends[parent] if parent >= 0 else (None, i)
        for first in range(starts[i], starts[i + 1], C):
            depth = 0 if before is None else chunks[before][0] + 1
            chunks.append((depth, root if before is None else before, first, min(first + C, starts[i + 1])))
            before = len(chunks) - 1
        ends.append((before, root))
    order = sorted(range(len(chunks)), key=lambda c: chunks[c][0])  # stable: sequences keep their order
    rank = {c: r for r, c in enumerate(order)}
    token, rounds = torch.full((len(chunks), C), starts[-1]), []
    for c, (_, _, first, end) in enumerate(chunks):
        token[rank[c], : end - first] = torch.arange(first, end)
    for depth, members in groupby(order, key=lambda c: chunks[c][0]):
        offset, befores = sum(map(len, rounds[:-1])), [chunks[c][1] for c in members]  # where the round before starts
        rounds.append(torch.tensor([rank[b] - offset for b in befores] if depth else befores, device=device))
    place = torch.empty(starts[-1] + 1, dtype=torch.int64)  # (S + 1,) the row of zeros has a place too
    place[token.flatten()] = torch.arange(token.numel())
    last = torch.tensor([len(chunks) + root if end is None else rank[end] for end, root in ends], dtype=torch.int64)
    return Plan(token.to(device), place[:-1].to(device), tuple(rounds), last.to(device))


class _Chunked(torch.autograd.Function):
    """(S, ...) -> (N, C, ...), zeros where a chunk has no token. Backward is a gather too; indexing would scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[token]

    @staticmethod
    def backward(ctx, dx: Tensor):
        return dx.flatten(0, 1)[ctx.saved_tensors[0]], None, None


def _heads(x: Tensor, V: int) -> Tensor:
    """(N, H, ...) -> (N, V, ...): a key head serves V // H value heads next to each other."""
    return x if x.shape[1] == V else x.repeat_interleave(V // x.shape[1], dim=1)


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, segments: Segments, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Equations (2) to (4): (S, V, dv) and the final states (n, V, dk, dv). All of one dtype, fp32 or fp64."""
    chunks, V = plan(segments.lengths, segments.parents, q.device), v.shape[1]
    C = chunks.token.shape[1]
    if not chunks.before:
        return v, initial
    q, k, v, g, beta = (_Chunked.apply(x, chunks.token, chunks.place).transpose(1, 2) for x in (q, k, v, g, beta))
    strict = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)  # (C, C)
    D = (g[..., None] * strict).cumsum(-2).masked_fill(strict.T, -torch.inf).exp()  # (N, V, C, C)
    c = g.cumsum(-1).exp()[..., None]  # (N, V, C, 1)
    A = _heads(k @ k.mT, V) * D * beta[..., None]  # (N, V, C, C)
    attend = _heads(q @ k.mT, V) * D  # (N, V, C, C)
    one = torch.eye(C, dtype=q.dtype, device=q.device).expand_as(A)
    # unitriangular: neither A's diagonal nor what is above it is read
    T = torch.linalg.solve_triangular(A, one, upper=False, unitriangular=True) * beta[..., None, :]  # (N, V, C, C)
    q, k = _heads(q, V), _heads(k, V)  # (N, V, C, dk) both
    corrections, read = T @ v, (T * c.mT) @ k  # (N, V, C, dv), (N, V, C, dk)
    write, fade = (D[..., -1, :, None] * k).mT, c[..., -1:, :]  # (N, V, dk, C), (N, V, 1, 1)
    sizes = [len(before) for before in chunks.before]
    states, starts, us, state = [], [], [], initial
    for before, *parts in zip(chunks.before, *(x.split(sizes) for x in (corrections, read, write, fade)), strict=True):
        starts.append(state[before])  # (chunks of the round, V, dk, dv)
        us.append(parts[0] - parts[1] @ starts[-1])  # (chunks, V, C, dv)
        state = parts[3] * starts[-1] + parts[2] @ us[-1]  # (chunks, V, dk, dv)
        states.append(state)
    out = c * (q @ torch.cat(starts)) + attend @ torch.cat(us)  # (N, V, C, dv)
    return out.transpose(1, 2).flatten(0, 1)[chunks.place], torch.cat((*states, initial))[chunks.last]


def step_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Equation (1) for a token of each row, fp32: (n, V, dv). Changes state (n, V, dk, dv)."""
    q, k = _heads(q, v.shape[1]), _heads(k, v.shape[1])  # (n, V, dk) both
    fade = g.exp()[..., None]  # (n, V, 1)
    held, found = (torch.stack((k, q), dim=2) @ state * fade[..., None]).unbind(2)  # (n, V, dv): k S, q S, of the old S
    u = beta[..., None] * (v - held)  # (n, V, dv)
    state.mul_(fade[..., None]).addcmul_(k[..., None], u[..., None, :])
    return found + (q * k).sum(-1, keepdim=True) * u


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _tile(ptr, rows, columns, width, mask):
    """ptr[rows, columns] of a matrix whose rows are `width` apart, 0 where masked."""
    return tl.load(
        ptr + rows[:, None] * width + columns[None, :], mask=mask[:, None] & (columns < width)[None, :], other=0.0
    )


@triton.jit
def _chunk_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, tiles_ptr, u_ptr, w_ptr, attend_ptr, V, REPEAT, dk, dv,
    C: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """(3) for a chunk and value head: T v (S, V, dv), (T c) k (S, V, dk) and (q k^T) * D (S, V, C), a row a token."""
    first = tl.load(tiles_ptr + tl.program_id(0) * 6).to(tl.int64)
    end, h, i = tl.load(tiles_ptr + tl.program_id(0) * 6 + 2), tl.program_id(1), tl.arange(0, C)
    t = first + i  # (C,) int64: t V dk passes 2^31 at half a million tokens
    inside = t < end
    g = tl.load(g_ptr + t * V + h, mask=inside, other=0.0)  # (C,)
    beta = tl.load(beta_ptr + t * V + h, mask=inside, other=0.0)  # (C,)
    below, equal = i[:, None] > i[None, :], i[:, None] == i[None, :]
    D = tl.exp(tl.cumsum(tl.where(below, g[:, None], 0.0), axis=0))  # (C, C); 1 above the diagonal, masked below
    key_row, row, channels = t * (V // REPEAT) + h // REPEAT, t * V + h, tl.arange(0, DK)
    k = _tile(k_ptr, key_row, channels, dk, inside)  # (C, DK)
    A = tl.where(below, tl.dot(k, tl.trans(k), input_precision="ieee") * D * beta[:, None], 0.0)  # (C, C)
    T = tl.where(equal, 1.0, 0.0)
    for r in range(1, C):  # row r of the inverse, from those above it
        A_r = tl.sum(tl.where(i[:, None] == r, A, 0.0), axis=0)  # (C,)
        T -= tl.where(i[:, None] == r, tl.sum(A_r[:, None] * T, axis=0)[None, :], 0.0)
    T *= beta[None, :]
    w = tl.dot(T * tl.exp(tl.cumsum(g, axis=0))[None, :], k, input_precision="ieee")  # (C, DK)
    tl.store(w_ptr + row[:, None] * dk + channels[None, :], w, mask=inside[:, None] & (channels < dk)[None, :])
    q = _tile(q_ptr, key_row, channels, dk, inside)  # (C, DK)
    attend = tl.where(below | equal, tl.dot(q, tl.trans(k), input_precision="ieee") * D, 0.0)  # (C, C)
    tl.store(attend_ptr + row[:, None] * C + i[None, :], attend, mask=inside[:, None])
    e = tl.arange(0, DV)
    u = tl.dot(T, _tile(v_ptr, row, e, dv, inside), input_precision="ieee")  # (C, DV)
    tl.store(u_ptr + row[:, None] * dv + e[None, :], u, mask=inside[:, None] & (e < dv)[None, :])


@triton.jit
def _scan_kernel(
    q_ptr, k_ptr, g_ptr, u_ptr, w_ptr, attend_ptr, start_ptr, final_ptr, out_ptr, sequence_ptr, from_ptr, cu_ptr,
    V, REPEAT, dk, dv, C: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(4) along a sequence, for BLOCK_V values of a head: columns of S do not read each other."""
    n, h = tl.load(sequence_ptr + tl.program_id(0)), tl.program_id(1)
    i, d, e = tl.arange(0, C), tl.arange(0, DK), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    S = _tile(start_ptr, (tl.load(from_ptr + tl.program_id(0)) * V + h) * dk + d, e, dv, d < dk)  # (DK, BLOCK_V)
    end = tl.load(cu_ptr + n + 1)
    for first in range(tl.load(cu_ptr + n), end, C):
        t = first + i.to(tl.int64)  # (C,)
        inside, row, key_row = t < end, t * V + h, t * (V // REPEAT) + h // REPEAT
        g = tl.load(g_ptr + row, mask=inside, other=0.0)  # (C,)
        later = tl.load(g_ptr + row + V, mask=(t + 1 < end) & (i + 1 < C), other=0.0)  # (C,) g of the token behind
        u = _tile(u_ptr, row, e, dv, inside)  # (C, BLOCK_V)
        u -= tl.dot(_tile(w_ptr, row, d, dk, inside), S, input_precision="ieee")
        read = tl.dot(_tile(q_ptr, key_row, d, dk, inside), S, input_precision="ieee")  # (C, BLOCK_V)
        out = tl.exp(tl.cumsum(g, axis=0))[:, None] * read
        out += tl.dot(_tile(attend_ptr, row, i, C, inside), u, input_precision="ieee")
        tl.store(out_ptr + row[:, None] * dv + e[None, :], out, mask=inside[:, None] & (e < dv)[None, :])
        k = _tile(k_ptr, key_row, d, dk, inside) * tl.exp(tl.cumsum(later, axis=0, reverse=True))[:, None]  # (C, DK)
        S = S * tl.exp(tl.sum(g, axis=0)) + tl.dot(tl.trans(k), u, input_precision="ieee")
    where = final_ptr + ((n * V + h) * dk + d)[:, None] * dv + e[None, :]
    tl.store(where, S, mask=(d < dk)[:, None] & (e < dv)[None, :])


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, out_ptr, V, REPEAT, dk, dv,
    DK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(1) for BLOCK_V values of a head of a row: S is read and written once."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DK)  # row of n * V
    e, key_row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), row // V * (V // REPEAT) + row % V // REPEAT
    k = tl.load(k_ptr + key_row * dk + d, mask=d < dk, other=0.0)  # (DK,)
    q = tl.load(q_ptr + key_row * dk + d, mask=d < dk, other=0.0)  # (DK,)
    v = tl.load(v_ptr + row * dv + e, mask=e < dv, other=0.0)  # (BLOCK_V,)
    S = _tile(state_ptr, row * dk + d, e, dv, d < dk) * tl.exp(tl.load(g_ptr + row))  # (DK, BLOCK_V)
    u = tl.load(beta_ptr + row) * (v - tl.sum(k[:, None] * S, axis=0))  # (BLOCK_V,)
    S += k[:, None] * u[None, :]
    tl.store(state_ptr + (row * dk + d)[:, None] * dv + e[None, :], S, mask=(d < dk)[:, None] & (e < dv)[None, :])
    tl.store(out_ptr + row * dv + e, tl.sum(q[:, None] * S, axis=0), mask=e < dv)


# ----------------------------------------------------------------------------
# 3. autograd


class _DeltaRule(torch.autograd.Function):
    """Saves its inputs, 4 (2 dk + dv + 2) bytes a token and head; backward makes the reference's graph of one layer."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, segments):
        ctx.save_for_backward(q, k, v, g, beta, initial)
        ctx.segments, (S, V, dv), dk = segments, v.shape, q.shape[2]
        C = CHUNKS[0]
        u, w, attend, out = (v.new_empty(S, V, width) for width in (dv, dk, C, dv))
        final, cu = torch.empty_like(initial), segments.cu_seqlens
        sizes, DK, DV = (V, V // q.shape[1], dk, dv), _power(dk), _power(dv)
        tiles = segments.tiles(C)
        launch = {"enable_fp_fusion": False, "num_warps": 8 if DK > 64 else 4, "num_stages": 1}
        if len(tiles):
            _chunk_kernel[(len(tiles), V)](
                q, k, v, g, beta, tiles, u, w, attend, *sizes, C=C, DK=DK, DV=DV, **launch
            )  # fmt: skip
        for answers, start in ((False, initial), (True, final)):  # an answer starts from what its prompt has left
            rows = [(i, p if answers else i) for i, p in enumerate(segments.parents) if (p >= 0) == answers]
            if rows:
                which = torch.tensor(rows, device=q.device).T.contiguous()  # (2, sequences)
                _scan_kernel[(len(rows), V, triton.cdiv(dv, BLOCK_V))](
                    q, k, g, u, w, attend, start, final, out, *which, cu, *sizes,
                    C=C, DK=DK, BLOCK_V=BLOCK_V, **launch,
                )  # fmt: skip
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = delta_rule_reference(*leaves[:5], ctx.segments, leaves[5])
        return *torch.autograd.grad(outputs, leaves, (dout, dfinal), materialize_grads=True), None


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())  # tl.dot wants 16 at least


# Columns of S a program keeps. Kernels take chunks of 16: matrix units do not make fp32 products, and those of wider
# tiles are unrolled until registers run out (5 kB of spills a thread for chunks of 64 and blocks of 64)
BLOCK_V = 16
WIDEST = 128  # dk and dv that fit into registers; no model has more

# ----------------------------------------------------------------------------
# 4. entry


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    segments: Segments,
    *,
    initial: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a packed row: what every token's query reads, and what each sequence remembers.

    q, k      (S, H, dk), as the rule reads them: normalised and scaled by the caller
    v         (S, V, dv), V a multiple of H
    g, beta   (S, V), log of what is kept of the memory, <= 0; how far a value is corrected, 0 .. 1
    segments  of the S tokens. An answer starts from what its prompt remembers
    initial   (n, V, dk, dv) fp32, where the sequences without a prompt start; default: zeros
    backend   "torch" | "triton" | None, which is Triton on a GPU and torch elsewhere
    returns   (S, V, dv) and (n, V, dk, dv), fp32 (fp64 for fp64), differentiable in all tensors

    All arithmetic is fp32: in bf16 a memory drifts over thousands of tokens. Bytes that torch keeps for backward, a
    token and value head: 4 (5 dk + 4 dv + 6 C), and three states, 12 dk dv, for each chunk.

    Raises ValueError when shapes do not fit, and for what Triton is asked for and cannot do.

    Elsewhere: fla chunk_gated_delta_rule; transformers torch_chunk_gated_delta_rule.
    """
    _check(q, k, v, g, beta)
    (S, V, dv), n, dk = v.shape, len(segments.lengths), q.shape[2]
    if sum(segments.lengths) != S:
        raise ValueError(f"got {S} tokens and segments of {sum(segments.lengths)}, want as many")
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial is None:
        initial = torch.zeros(n, V, dk, dv, dtype=wide, device=v.device)
    if initial.shape != (n, V, dk, dv):
        raise ValueError(f"got initial states {tuple(initial.shape)}, want {(n, V, dk, dv)}")
    same_device(q=q, segments=segments.cu_seqlens, initial=initial)
    inputs = [x.to(wide) for x in (q, k, v, g, beta)]
    if _choose(backend, inputs[0], v) == "torch":
        return delta_rule_reference(*inputs, segments, initial.to(wide))
    return _DeltaRule.apply(*(x.contiguous() for x in (*inputs, initial.to(wide))), segments)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, backend: str | None = None
) -> Tensor:
    """One more token for each of n rows: (n, V, dv) fp32. Carries no gradient; a CUDA graph can capture it.

    q, k, v, g, beta  as those of delta_rule, n for S
    state             (n, V, dk, dv) fp32, what each row remembers; is changed in place
    backend           as of delta_rule

    Raises ValueError when shapes do not fit.
    """
    _check(q, k, v, g, beta)
    if (
        state.shape != (*v.shape[:2], q.shape[2], v.shape[2])
        or state.dtype != torch.float32
        or not state.is_contiguous()
    ):
        want = (*v.shape[:2], q.shape[2], v.shape[2])
        raise ValueError(f"got states {tuple(state.shape)} {state.dtype}, want {want} float32, contiguous")
    same_device(q=q, state=state)
    inputs, (n, V, dv), dk = [x.float().contiguous() for x in (q, k, v, g, beta)], v.shape, q.shape[2]
    if _choose(backend, inputs[0], v) == "torch":
        return step_reference(*inputs, state)
    out = torch.empty_like(inputs[2])  # (n, V, dv)
    if n:  # a grid of 0 programs is an error
        _step_kernel[(n * V, triton.cdiv(dv, BLOCK_V))](
            *inputs, state, out, V, V // q.shape[1], dk, dv, DK=_power(dk), BLOCK_V=BLOCK_V, enable_fp_fusion=False
        )  # fmt: skip
    return out


def _choose(backend: str | None, q: Tensor, v: Tensor) -> str:
    fits = q.dtype == torch.float32 and max(q.shape[2], v.shape[2]) <= WIDEST
    unfit = f"{q.dtype} and heads of {q.shape[2]} and {v.shape[2]} for Triton, want float32 and at most {WIDEST}"
    return or_torch(choose(backend, q), backend, "" if fits else unfit)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    same_device(q=q, k=k, v=v, g=g, beta=beta)
    fits = (
        q.ndim == v.ndim == 3 and q.shape == k.shape and len(q) == len(v) and q.shape[1] and not v.shape[1] % q.shape[1]
    )
    if not fits or not g.shape == beta.shape == v.shape[:2]:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkvgb", (q, k, v, g, beta), strict=True))
        raise ValueError(f"got {got}, want q, k (S, H, dk), v (S, V, dv) with V a multiple of H, and g, beta (S, V)")
