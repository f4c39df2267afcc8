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

Backward goes through (4) from the last chunk to the first. Given dout and dS', the gradient in the memory behind a
chunk, those in its corrections and in the memory before it need no memory:

    du = ((q k^T) * D)^T dout + (D[C-1] k) dS'                                                               (5)
    dS = c[C-1] dS' + (c q)^T dout - w^T du,        w = (T c) k

The rest is sums within a chunk, for all chunks at once. x is the gradient in v - c k S - .., what (2) multiplies by
beta; the transposed system gives it, beta x is that in the right side of (3):

    x = (I + A)^-T du                                                                                        (6)
    dv = beta x,    dbeta = x . (v - c k S - ((k k^T) * D) u)
    dG = (dout u^T) * D,    dL = -beta (x u^T) * D          gradients in q k^T, and in k k^T below its diagonal
    dq = c (dout S^T) + dG k                                                                                 (7)
    dk = D[C-1] (u dS'^T) - c beta (x S^T) + dG^T q + (dL + dL^T) k

g[m] fades what crosses token m: the memory of the start on its way to the tokens i >= m and to the chunk's end, what
tokens j < m wrote on its way to both. Its gradient is the sum of gradient times value of all that crosses:

    dg[m] = sum over i >= m of c[i] (q[i] . (dout S^T)[i] - beta[i] k[i] . (x S^T)[i])  +  c[C-1] <S, dS'>   (8)
          + sum over j < m of (D[C-1, j] k[j] . (u dS'^T)[j]  +  sum over i >= m of E[i, j])
    E = dG * (q k^T) + dL * (k k^T)

The file reads top to bottom:

    1. reference    plain torch: the plan of chunks, (2) to (4), and (1) for one token a row. Also the CPU backend.
    2. kernels      Triton: (3) for all chunks at once; (4), a program walks along a sequence with S in registers; (5)
                    walks back; (6) to (8) for all chunks at once; (1).
    3. autograd     glues them together.
    4. entry        delta_rule and delta_rule_step: the names other files import.

Left out: gradients in one token a row (decoding has none), negative eigenvalues (beta up to 2), a decay for each
channel (Kimi), products in 16 bits.

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

# Triangles and their solve cost C a token or more, memories 1 / C of one: on a CPU heads of 64 are 1.3 times as fast in
# chunks of 32 as in those of 64, heads of 32 1.8 times, heads of 128 no faster. If no sequence is longer, chunks are
# smaller: a row of answers of 10 tokens is a quarter of the work in chunks of 16.
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


def longest_chunk(dk: int, dv: int) -> int:
    return CHUNKS[-1] if max(dk, dv) > 64 else CHUNKS[-2]


@lru_cache(maxsize=64)  # all layers of a row ask for the same
def plan(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device, longest: int) -> Plan:
    """The chunks of segments of these lengths, behind these parents; of at most `longest` tokens."""
    C = next(C for C in CHUNKS if C >= min(longest, max(lengths)))
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
    longest, V = longest_chunk(q.shape[2], v.shape[2]), v.shape[1]
    chunks = plan(segments.lengths, segments.parents, q.device, longest)
    C = chunks.token.shape[1]
    if not chunks.before:
        return v, initial.contiguous()
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
def _put(x, ptr, rows, columns, width, mask):
    """x into what _tile reads there."""
    at = ptr + rows[:, None] * width + columns[None, :]
    tl.store(at, x, mask=mask[:, None] & (columns < width)[None, :])


@triton.jit
def _fades(g_ptr, first, end, h, V, C: tl.constexpr):
    """What is left of the memory of the chunk's start at each token, c (C,); of what each token wrote at the chunk's
    end, D[C - 1] (C,); of the memory at the end, c[C - 1]. All exp of sums of g that cannot cancel."""
    i = tl.arange(0, C)
    t = first + i.to(tl.int64)  # (C,)
    g = tl.load(g_ptr + t * V + h, mask=t < end, other=0.0)  # (C,)
    later = tl.load(g_ptr + (t + 1) * V + h, mask=(t + 1 < end) & (i + 1 < C), other=0.0)  # (C,) g of the token behind
    return tl.exp(tl.cumsum(g, axis=0)), tl.exp(tl.cumsum(later, axis=0, reverse=True)), tl.exp(tl.sum(g, axis=0))


@triton.jit
def _keys_alike(g_ptr, k, first, end, h, V, C: tl.constexpr):
    """D (C, C), 1 above the diagonal; and (k k^T) * D below it, 0 elsewhere."""
    i = tl.arange(0, C)
    t, below = first + i.to(tl.int64), i[:, None] > i[None, :]
    g = tl.load(g_ptr + t * V + h, mask=t < end, other=0.0)  # (C,)
    D = tl.exp(tl.cumsum(tl.where(below, g[:, None], 0.0), axis=0))  # (C, C)
    return D, tl.where(below, tl.dot(k, tl.trans(k), input_precision="ieee") * D, 0.0)


@triton.jit
def _chunk_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, chunks_ptr, u_ptr, w_ptr, attend_ptr, inverse_ptr, V, REPEAT, dk, dv,
    C: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """(3) for a chunk and value head, a row a token: T v (S, V, dv), w = (T c) k (S, V, dk), (q k^T) * D and (I + A)^-1
    (S, V, C)."""
    first, end = tl.load(chunks_ptr + tl.program_id(0) * 2), tl.load(chunks_ptr + tl.program_id(0) * 2 + 1)
    h, i = tl.program_id(1), tl.arange(0, C)
    t = first + i  # (C,) int64: t V dk passes 2^31 at half a million tokens
    inside = t < end
    beta = tl.load(beta_ptr + t * V + h, mask=inside, other=0.0)  # (C,)
    key_row, row, channels = t * (V // REPEAT) + h // REPEAT, t * V + h, tl.arange(0, DK)
    k = _tile(k_ptr, key_row, channels, dk, inside)  # (C, DK)
    D, alike = _keys_alike(g_ptr, k, first, end, h, V, C)  # (C, C) both
    A = alike * beta[:, None]  # (C, C)
    T = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, C):  # row r of the inverse, from those above it
        A_r = tl.sum(tl.where(i[:, None] == r, A, 0.0), axis=0)  # (C,)
        T -= tl.where(i[:, None] == r, tl.sum(A_r[:, None] * T, axis=0)[None, :], 0.0)
    _put(T, inverse_ptr, row, i, C, inside)
    T *= beta[None, :]
    c, _, _ = _fades(g_ptr, first, end, h, V, C)
    _put(tl.dot(T * c[None, :], k, input_precision="ieee"), w_ptr, row, channels, dk, inside)
    q = _tile(q_ptr, key_row, channels, dk, inside)  # (C, DK)
    attend = tl.where(i[:, None] >= i[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * D, 0.0)  # (C, C)
    _put(attend, attend_ptr, row, i, C, inside)
    e = tl.arange(0, DV)
    _put(tl.dot(T, _tile(v_ptr, row, e, dv, inside), input_precision="ieee"), u_ptr, row, e, dv, inside)


@triton.jit
def _scan_kernel(
    q_ptr, k_ptr, g_ptr, u_ptr, w_ptr, attend_ptr, start_ptr, final_ptr, out_ptr, walk_ptr, cu_ptr,
    V, REPEAT, dk, dv, C: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """(4) along a sequence, for BLOCK_V values of a head: columns of S do not read each other.

    KEEP: for backward. u is written over T v, and instead of out the memories that chunks start from, (N, V, dk, dv).
    """
    walk, h = walk_ptr + tl.program_id(0) * 4, tl.program_id(1)
    n, chunk = tl.load(walk), tl.load(walk + 2)
    i, d, e = tl.arange(0, C), tl.arange(0, DK), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    S = _tile(start_ptr, (tl.load(walk + 1) * V + h) * dk + d, e, dv, d < dk)  # (DK, BLOCK_V)
    end = tl.load(cu_ptr + n + 1)
    for first in range(tl.load(cu_ptr + n), end, C):
        t = first + i.to(tl.int64)  # (C,)
        inside, row, key_row = t < end, t * V + h, t * (V // REPEAT) + h // REPEAT
        c, fade, whole = _fades(g_ptr, first, end, h, V, C)
        u = _tile(u_ptr, row, e, dv, inside)  # (C, BLOCK_V)
        u -= tl.dot(_tile(w_ptr, row, d, dk, inside), S, input_precision="ieee")
        if KEEP:
            _put(u, u_ptr, row, e, dv, inside)
            _put(S, out_ptr, (chunk * tl.num_programs(1) + h) * dk + d, e, dv, d < dk)
            chunk += 1
        else:
            read = tl.dot(_tile(q_ptr, key_row, d, dk, inside), S, input_precision="ieee")  # (C, BLOCK_V)
            out = c[:, None] * read + tl.dot(_tile(attend_ptr, row, i, C, inside), u, input_precision="ieee")
            _put(out, out_ptr, row, e, dv, inside)
        k = _tile(k_ptr, key_row, d, dk, inside) * fade[:, None]  # (C, DK)
        S = S * whole + tl.dot(tl.trans(k), u, input_precision="ieee")
    _put(S, final_ptr, (n * V + h) * dk + d, e, dv, d < dk)


@triton.jit
def _back_kernel(
    q_ptr, k_ptr, g_ptr, w_ptr, attend_ptr, dout_ptr, dfinal_ptr, dstart_ptr, du_ptr, dstates_ptr, walk_ptr, cu_ptr,
    V, REPEAT, dk, dv, C: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(5) from the end of a sequence to its start, for BLOCK_V values of a head. dstates: the gradient in the memory
    behind each chunk. A prompt's begins with those of its answers, in their order: no atomics, the same bits twice."""
    walk, h = walk_ptr + tl.program_id(0) * 4, tl.program_id(1)
    n, chunk = tl.load(walk), tl.load(walk + 2)
    i, d, e = tl.arange(0, C), tl.arange(0, DK), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    dS = _tile(dfinal_ptr, (n * V + h) * dk + d, e, dv, d < dk)  # (DK, BLOCK_V)
    for answer in range(n + 1, n + 1 + tl.load(walk + 3)):
        dS += _tile(dstart_ptr, (answer * V + h) * dk + d, e, dv, d < dk)
    start, end = tl.load(cu_ptr + n), tl.load(cu_ptr + n + 1)
    chunks = tl.cdiv(end - start, C)
    for done in range(0, chunks):
        first = start + (chunks - 1 - done) * C
        t = first + i.to(tl.int64)  # (C,)
        inside, row, key_row = t < end, t * V + h, t * (V // REPEAT) + h // REPEAT
        c, fade, whole = _fades(g_ptr, first, end, h, V, C)
        state = (chunk + chunks - 1 - done) * tl.num_programs(1) + h
        _put(dS, dstates_ptr, state * dk + d, e, dv, d < dk)
        dout = _tile(dout_ptr, row, e, dv, inside)  # (C, BLOCK_V)
        du = tl.dot(_tile(k_ptr, key_row, d, dk, inside) * fade[:, None], dS, input_precision="ieee")  # (C, BLOCK_V)
        du += tl.dot(tl.trans(_tile(attend_ptr, row, i, C, inside)), dout, input_precision="ieee")
        _put(du, du_ptr, row, e, dv, inside)
        q = _tile(q_ptr, key_row, d, dk, inside) * c[:, None]  # (C, DK)
        dS = dS * whole + tl.dot(tl.trans(q), dout, input_precision="ieee")
        dS -= tl.dot(tl.trans(_tile(w_ptr, row, d, dk, inside)), du, input_precision="ieee")
    _put(dS, dstart_ptr, (n * V + h) * dk + d, e, dv, d < dk)


@triton.jit
def _gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, chunks_ptr, u_ptr, attend_ptr, inverse_ptr, states_ptr, dstates_ptr,
    dout_ptr, du_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, V, REPEAT, dk, dv,
    C: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(6) to (8) for a chunk and value head: sums over blocks of values first, then what the chunk's tokens share."""
    first, end = tl.load(chunks_ptr + tl.program_id(0) * 2), tl.load(chunks_ptr + tl.program_id(0) * 2 + 1)
    h, i, d = tl.program_id(1), tl.arange(0, C), tl.arange(0, DK)
    t = first + i  # (C,) int64
    inside, row, key_row = t < end, t * V + h, t * (V // REPEAT) + h // REPEAT
    state = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + h) * dk + d  # (DK,)
    beta = tl.load(beta_ptr + row, mask=inside, other=0.0)  # (C,)
    inverse = tl.trans(_tile(inverse_ptr, row, i, C, inside))  # (C, C)
    dout_u, x_u = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    dout_S, x_S = tl.zeros((C, DK), tl.float32), tl.zeros((C, DK), tl.float32)
    u_dS = tl.zeros((C, DK), tl.float32)
    x_v, kept = tl.zeros((C,), tl.float32), 0.0  # x . v, <S, dS'>
    for e0 in range(0, dv, BLOCK_V):
        e = e0 + tl.arange(0, BLOCK_V)
        dout, u = _tile(dout_ptr, row, e, dv, inside), _tile(u_ptr, row, e, dv, inside)  # (C, BLOCK_V) both
        x = tl.dot(inverse, _tile(du_ptr, row, e, dv, inside), input_precision="ieee")  # (C, BLOCK_V)
        _put(beta[:, None] * x, dv_ptr, row, e, dv, inside)
        x_v += tl.sum(x * _tile(v_ptr, row, e, dv, inside), axis=1)
        dout_u += tl.dot(dout, tl.trans(u), input_precision="ieee")
        x_u += tl.dot(x, tl.trans(u), input_precision="ieee")
        S, dS = _tile(states_ptr, state, e, dv, d < dk), _tile(dstates_ptr, state, e, dv, d < dk)  # (DK, BLOCK_V) both
        dout_S += tl.dot(dout, tl.trans(S), input_precision="ieee")
        x_S += tl.dot(x, tl.trans(S), input_precision="ieee")
        u_dS += tl.dot(u, tl.trans(dS), input_precision="ieee")
        kept += tl.sum(S * dS)
    k, q = _tile(k_ptr, key_row, d, dk, inside), _tile(q_ptr, key_row, d, dk, inside)  # (C, DK) both
    D, alike = _keys_alike(g_ptr, k, first, end, h, V, C)
    c, fade, whole = _fades(g_ptr, first, end, h, V, C)
    below = i[:, None] > i[None, :]
    x_kS = c * tl.sum(k * x_S, axis=1)  # (C,)
    tl.store(dbeta_ptr + row, x_v - x_kS - tl.sum(alike * x_u, axis=1), mask=inside)
    E = dout_u * _tile(attend_ptr, row, i, C, inside) - beta[:, None] * x_u * alike  # (C, C)
    # [m, j]: of what token j wrote, the part that tokens i >= m read, and the part left at the end
    passing = tl.cumsum(E, axis=0, reverse=True) + (fade * tl.sum(k * u_dS, axis=1))[None, :]  # (C, C)
    dg = tl.cumsum(c * tl.sum(q * dout_S, axis=1) - beta * x_kS, axis=0, reverse=True) + whole * kept
    tl.store(dg_ptr + row, dg + tl.sum(tl.where(below, passing, 0.0), axis=1), mask=inside)
    dG = tl.where(i[:, None] >= i[None, :], dout_u * D, 0.0)  # (C, C), of q k^T
    _put(c[:, None] * dout_S + tl.dot(dG, k, input_precision="ieee"), dq_ptr, row, d, dk, inside)
    dL = tl.where(below, beta[:, None] * x_u * D, 0.0)  # (C, C), minus that of k k^T
    dkeys = fade[:, None] * u_dS - (c * beta)[:, None] * x_S + tl.dot(tl.trans(dG), q, input_precision="ieee")
    _put(dkeys - tl.dot(dL + tl.trans(dL), k, input_precision="ieee"), dk_ptr, row, d, dk, inside)


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
    _put(S, state_ptr, row * dk + d, e, dv, d < dk)
    tl.store(out_ptr + row * dv + e, tl.sum(q[:, None] * S, axis=0), mask=e < dv)


# ----------------------------------------------------------------------------
# 3. autograd


@lru_cache(maxsize=64)  # all layers of a row ask for the same
def programs(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """What the kernels' programs read, int64. Chunks (N, 2): first token, end of its sequence. Walks, those of prompts
    and those of answers (n, 4): sequence, the one it starts from, its first chunk, how many answers stand behind it."""
    starts, chunks, walks = [0, *accumulate(lengths)], [], ([], [])
    for i, parent in enumerate(parents):
        walks[parent >= 0].append((i, parent if parent >= 0 else i, len(chunks), parents.count(i)))
        chunks += [(first, starts[i + 1]) for first in range(starts[i], starts[i + 1], CHUNKS[0])]
    return tuple(torch.tensor(rows, dtype=torch.int64, device=device) for rows in (chunks, *walks))


class _DeltaRule(torch.autograd.Function):
    """Saves its inputs: 4 (2 dk H / V + dv + 2) bytes a token and value head, and initial states that are no zeros.

    Forward works on 4 (dv + dk + 2 C) bytes a token and value head. Backward makes these and the memories again, and
    works on backward_bytes: 2.7 kB, and two memories a chunk (8 KiB a token) of as many heads at a time as fit SCRATCH,
    for heads of 128.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, segments):
        ctx.save_for_backward(q, k, v, g, beta, initial)
        ctx.segments, initial = segments, initial.contiguous()
        out, final = torch.empty_like(v), torch.empty_like(initial)
        options = _options(q, v, v.shape[1])
        _forward(q, k, v, g, beta, initial, *_scratch(q, v), final, out, segments, options, keep=False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):
        saved, segments = [x.contiguous() for x in ctx.saved_tensors], ctx.segments
        (q, k, v, g, beta, initial), (_, V, dv), (_, H, dk) = saved, saved[2].shape, saved[0].shape
        (chunks, *walks), R = programs(segments.lengths, segments.parents, q.device), V // H
        scratch = (*_scratch(q, v), torch.empty_like(v))  # u, w, attend, inverse, du
        final, dstart = torch.empty_like(initial), torch.empty_like(initial)  # (n, V, dk, dv)
        dqk = v.new_empty(2, *scratch[1].shape)  # (2, S, V, dk): of q and of k, for each value head
        grads, given = [torch.empty_like(x) for x in (v, g, beta)], (dout.contiguous(), dfinal.contiguous())
        heads = min(V, R * max(1, SCRATCH // (8 * R * dk * dv * max(1, len(chunks)))))
        states, dstates = v.new_empty(2, len(chunks), heads, dk, dv)
        for first in range(0, V, heads):
            keys, values = slice(first // R, (first + heads) // R), slice(first, first + heads)
            q, k = (x[:, keys] for x in saved[:2])
            v, g, beta, initial = (x[:, values] for x in saved[2:])
            u, w, attend, inverse, du = (x[:, values] for x in scratch)
            end, dout, dend, dbegin = (x[:, values] for x in (final, *given, dstart))
            options = _options(q, v, V)
            _forward(q, k, v, g, beta, initial, u, w, attend, inverse, end, states, segments, options, keep=True)
            for walk in reversed(walks):  # a prompt's gradient begins with those of its answers
                _launch(
                    _back_kernel, (len(walk), v.shape[1], triton.cdiv(dv, BLOCK_V)), q, k, g, w, attend, dout, dend,
                    dbegin, du, dstates, walk, segments.cu_seqlens, BLOCK_V=BLOCK_V, **options,
                )  # fmt: skip
            _launch(
                _gradient_kernel, (len(chunks), v.shape[1]), q, k, v, g, beta, chunks, u, attend, inverse, states,
                dstates, dout, du, *(x[:, values] for x in (*dqk, *grads)), BLOCK_V=BLOCK_V, **options,
            )  # fmt: skip
        dstart.masked_fill_((segments.prefix >= 0)[:, None, None, None], 0.0)  # where an answer starts is not read
        return *dqk.unflatten(2, (H, R)).sum(3), *grads, dstart, None


def backward_bytes(S: int, V: int, dk: int, dv: int) -> int:
    """What the kernels' backward of a row of S tokens works on, at most, besides the gradients that it returns."""
    C = CHUNKS[0]
    return 4 * S * V * (2 * dv + 3 * dk + 2 * C) + min(SCRATCH, 8 * V * dk * dv * -(-S // C))


def _scratch(q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What _chunk_kernel writes."""
    return tuple(v.new_empty(*v.shape[:2], width) for width in (v.shape[2], q.shape[2], CHUNKS[0], CHUNKS[0]))


def _forward(q, k, v, g, beta, initial, u, w, attend, inverse, final, out, segments, options, *, keep: bool):
    """Launches (3) and (4) for the heads that q and v have. keep: out is for the memories that chunks start from."""
    chunks, *walks = programs(segments.lengths, segments.parents, q.device)
    _launch(
        _chunk_kernel, (len(chunks), v.shape[1]), q, k, v, g, beta, chunks, u, w, attend, inverse,
        DV=_power(v.shape[2]), **options,
    )  # fmt: skip
    for walk, start in zip(walks, (initial, final), strict=True):  # an answer starts from what its prompt has left
        _launch(
            _scan_kernel, (len(walk), v.shape[1], triton.cdiv(v.shape[2], BLOCK_V)), q, k, g, u, w, attend, start,
            final, out, walk, segments.cu_seqlens, BLOCK_V=BLOCK_V, KEEP=keep, **options,
        )  # fmt: skip


def _launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    if all(grid):  # one of 0 programs is an error
        kernel[grid](*arguments, **options)


def _options(q: Tensor, v: Tensor, V: int) -> dict:
    """What all kernels are told: sizes, of V value heads in all, though q and v may have a part of the heads."""
    (_, heads, dv), (_, H, dk) = v.shape, q.shape
    sizes = {"V": V, "REPEAT": heads // H, "dk": dk, "dv": dv, "C": CHUNKS[0], "DK": _power(dk)}
    return {**sizes, "enable_fp_fusion": False, "num_warps": 8 if dk > 64 else 4, "num_stages": 1}


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())  # tl.dot wants 16 at least


# Columns of S a program keeps. Kernels take chunks of 16: matrix units do not make fp32 products, and those of wider
# tiles are unrolled until registers run out (5 kB of spills a thread for chunks of 64 and blocks of 64)
BLOCK_V = 16
SCRATCH = 1 << 30  # bytes of memories that backward keeps at a time, at least those of one key head
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
    token and value head: 4 (5 dk + 4 dv + 6 C), and three states, 12 dk dv, for each chunk. Triton keeps its inputs
    alone, a fifth of that or less, and computes the rest again (_DeltaRule).

    Raises ValueError when shapes do not fit, and for what Triton is asked for and cannot do.

    Elsewhere: fla chunk_gated_delta_rule; transformers torch_chunk_gated_delta_rule.
    """
    _check(q, k, v, g, beta)
    (S, V, dv), n, dk = v.shape, len(segments.lengths), q.shape[2]
    if sum(segments.lengths) != S:
        raise ValueError(f"got {S} tokens and segments of {sum(segments.lengths)}, want as many")
    wide = torch.promote_types(v.dtype, torch.float32)
    if initial is None:  # one 0: a real zero for each number would be kept for backward, 2 MiB a sequence and layer
        initial = torch.zeros((), dtype=wide, device=v.device).expand(n, V, dk, dv)
    if initial.shape != (n, V, dk, dv):
        raise ValueError(f"got initial states {tuple(initial.shape)}, want {(n, V, dk, dv)}")
    same_device(q=q, segments=segments.cu_seqlens, initial=initial)
    inputs = [x.to(wide) for x in (q, k, v, g, beta)]
    if _choose(backend, inputs[0], v) == "torch":
        return delta_rule_reference(*inputs, segments, initial.to(wide))
    return _DeltaRule.apply(*(x.contiguous() for x in inputs), initial.to(wide), segments)


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
    _launch(
        _step_kernel, (n * V, triton.cdiv(dv, BLOCK_V)), *inputs, state, out, V, V // q.shape[1], dk, dv,
        DK=_power(dk), BLOCK_V=BLOCK_V, enable_fp_fusion=False,
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
