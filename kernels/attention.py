"""Attention over one packed row of many sequences, where a prompt stands once and all its answers read it.

    score[i, j] = cap(q[i] . k[j] * scale)           for the keys j that query i sees                       (1)
    lse[i]      = log sum_j exp score[i, j]
    out[i]      = sum_j p[i, j] v[j]                 with p[i, j] = exp(score[i, j] - lse[i])               (2)

A query sees the keys of its own sequence up to itself, and if its sequence is an answer, all keys of its prompt. No
row is padded and no prompt repeated: one of 512 tokens with 16 answers of 64 is a row of 1536 tokens, not of 9216.

    packed row   | prompt 0 . . . . | answer | answer . . | answer . | prompt 1 . . | answer | ...
    position       0 1 2 3 4          5 6      5 6 7 8      5 6 7      0 1 2 3        4 5        (of a token: for RoPE)

Keys may be taken in any pieces. Two pieces a and b of the same query join by their log-sum-exp,

    lse = log(exp lse_a + exp lse_b)        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b           (3)

and backward does not even need that: once lse and out are known for the whole, each piece stands alone,

    dv[j]        = sum_i p[i, j] dout[i]
    dscore[i, j] = p[i, j] (dout[i] . v[j] - delta[i])      with delta[i] = dout[i] . out[i]                (4)
    dq[i] = scale sum_j dscore[i, j] cap' k[j]              dk[j] = scale sum_i dscore[i, j] cap' q[i]

A prompt's dk and dv are sums over its own queries and those of all its answers: the exact gradient, the same as if it
were repeated for each answer.

What it costs, for S queries that see n keys each: 4 S n H D operations forward, 10 S n H D backward (the scores are
made again). Reading q, k, v and writing out moves 2 S D (H + K) elements; S x S scores are never in memory. The row of
1536 tokens above has 0.69 M pairs of a query and a key it sees, against 2.7 M when the prompt is repeated.

The file reads top to bottom:

    1. reference    Segments; plain torch by pieces, equations (3) and (4). Also the CPU backend.
    2. kernels      Triton: flash attention over tiles; forward, dq, and dk with dv.
    3. autograd     glues them together; saves q, k, v, out and one float a query and head.
    4. entry        attention: the name other files import.

Left out: dropout, sinks, bidirectional parts, prefixes of prefixes, other head widths of v, gradients of gradients,
float64 in Triton, a loop without masks for tiles that need none (a few percent), thread-block clusters and TMA.

Lessons: lessons/13_packing.md      Tests: tests/test_attention.py
Shapes: S tokens of the packed row, H query heads, K key/value heads, D head width; a piece has n blocks of T queries
and as many of J keys.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import check_positive, choose, inner, is_hopper, or_torch, tl, triton

# ----------------------------------------------------------------------------
# 1. reference


@dataclass(frozen=True)
class Segments:
    """Which tokens of a packed row belong together. Built once a row, read by every layer; make it with `build`.

    cu_seqlens  (n + 1,) int32: segment i is tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1
    prefix      (n,) int32: the segment that stands before this one (its prompt), or -1
    positions   (S,) int64: tokens before this one, those of its prefix included
    lengths     the same as Python numbers, because a CPU plans its pieces, and a GPU its grid, on the host
    parents
    """

    cu_seqlens: Tensor
    prefix: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    _tiles: dict = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def build(lengths: list[int], prefix: list[int] | None = None, device: torch.device | str = "cpu") -> "Segments":
        """A row of segments of these lengths, 0 allowed. prefix[i] is the segment before segment i, or -1.

        Raises ValueError unless each prompt is directly followed by its answers and has no prompt itself.
        """
        prefix = [-1] * len(lengths) if prefix is None else prefix
        if len(prefix) != len(lengths) or min(lengths, default=0) < 0:
            raise ValueError(f"got lengths {lengths} and prefix {prefix}, want as many of each, and no length below 0")
        for i, parent in enumerate(prefix):
            if parent == -1:
                continue
            if not 0 <= parent < i or prefix[parent] != -1 or (parent != i - 1 and prefix[i - 1] != parent):
                raise ValueError(
                    f"got prefix[{i}] = {parent} in {prefix}, want an earlier segment without a prefix that only "
                    f"segments of the same prefix stand between; lay out prompt 0, its answers, prompt 1, its answers"
                )
        before = [lengths[p] if p >= 0 else 0 for p in prefix]
        spans = [torch.arange(b, b + n) for b, n in zip(before, lengths, strict=True)]
        positions = torch.cat([torch.arange(0), *spans])  # (S,)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # (n + 1,)
        tensors = (cu_seqlens, torch.tensor(prefix, dtype=torch.int32), positions)
        return Segments(*(x.to(device) for x in tensors), tuple(map(int, lengths)), tuple(map(int, prefix)))

    def tiles(self, height: int) -> Tensor:
        """(n_tiles, 6) int32: the row cut into blocks of at most `height` tokens, none with tokens of two segments.

            first token of the tile | start, end of its segment | start, length of its prefix | end of its last answer

        A tile starts where its segment does, or whole tiles later: what a sequence's sums look like, to the last bit,
        does not depend on its neighbours. The keys with most readers come first: a GPU starts programs in this order,
        and the longest ones must not start last.
        """
        if height not in self._tiles:
            table = torch.tensor(self._cut(height), dtype=torch.int32).reshape(-1, 6)  # (n_tiles, 6)
            self._tiles[height] = table.to(self.cu_seqlens.device)
        return self._tiles[height]

    def _cut(self, height: int) -> list[tuple[int, ...]]:
        """The rows of tiles()."""
        starts = [0, *accumulate(self.lengths)]
        family_end = starts[1:]
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                family_end[parent] = starts[i + 1]
        rows = []
        for i, parent in enumerate(self.parents):
            before = (starts[parent], self.lengths[parent]) if parent >= 0 else (0, 0)
            for first in range(starts[i], starts[i + 1], height):
                rows.append((first, starts[i], starts[i + 1], *before, family_end[i]))
        return sorted(rows, key=lambda tile: tile[0] - tile[5])

    def key_tiles(self, height: int) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
        """(n, 7) int32: a program for dk and dv each, longest first. And the prompts whose dk and dv come in parts.

            tile's first token | start, end of its segment | length of its prefix | start, end of the queries | slot

        A prompt that more than PART queries read is cut by queries too: its tiles are few, and each would be one long
        program while most of the GPU idles. A part goes to a slot of its own, -1: there is one part, the result. How
        often a prompt is cut depends on its own family alone, so its bits do too.

        prompts  (start, end, first slot, parts of a tile); the slots of a tile follow each other, and tiles too
        """
        if -height not in self._tiles:
            rows, prompts, slots = [], {}, 0
            for first, start, end, _, before, last in self._cut(height):
                n_tiles, parts = triton.cdiv(end - start, height), triton.cdiv(last - start, PART)
                parts = max(1, min(parts, PART_TILES // n_tiles)) if last > end else 1
                if parts > 1 and start not in prompts:
                    prompts[start] = (start, end, slots, parts)
                    slots += n_tiles * parts
                count = triton.cdiv(last - first, parts)
                for part in range(parts):
                    slot = prompts[start][2] + (first - start) // height * parts + part if parts > 1 else -1
                    queries = (min(first + part * count, last), min(first + (part + 1) * count, last))
                    rows.append((first, start, end, before, *queries, slot))
            rows.sort(key=lambda row: row[4] - row[5])
            table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 7)  # (n, 7)
            self._tiles[-height] = table.to(self.cu_seqlens.device), list(prompts.values())
        return self._tiles[-height]


@dataclass(frozen=True)
class _Options:
    """What is the same for all tokens. path: "fused" (torch's own kernel for CPUs), "plain" or "triton"."""

    scale: float
    softcap: float | None
    window: int
    path: str


@dataclass(frozen=True)
class _Piece:
    """`count` blocks of `rows` queries from token `first` on, each with its own `keys` keys from token `key` on.

    The first query of a block stands `lead` positions behind the first key. window 0: too wide to matter here.
    """

    first: int
    count: int
    rows: int
    key: int
    keys: int
    lead: int
    window: int
    own: bool  # keys of the queries' own segment: the one piece that comes first, and that every query has

    @property
    def causal(self) -> bool:
        return self.lead == 0 and self.rows == self.keys and not self.window

    @property
    def whole(self) -> bool:
        """Every query sees every key."""
        return self.lead >= self.keys - 1 and not self.window


# Queries of a piece, where pieces are cut. 256: the part of the scores that a window masks is at most 256 columns on
# either side. 128: written-out scores of 9 heads by 128 queries by 512 keys are 2.4 MB, about a core's cache.
WINDOWED, WRITTEN_OUT = 256, 128


@lru_cache(maxsize=64)
def _pieces(lengths: tuple[int, ...], parents: tuple[int, ...], window: int, fused: bool) -> tuple[_Piece, ...]:
    """Every pair of a query and a key it sees, once: a few calls instead of a mask over the whole row.

    Own keys: a call for each run of segments of one length, which is a view of the row. Nothing is padded: against one
    padded call, forward and backward on one core take 0.8 of the time for 32 segments of 56 to 104 tokens, 1.1 for 128
    of 10 to 40, 1.5 for 256 of 5 to 12, and 0.15 where lengths run from 2 to 1000 (fp32; in bf16 always below 0.5).
    Prefix: all answers of a prompt stand side by side, so they are one block of queries. Segments longer than the
    window are cut, as written-out scores always are, to bound what is in memory.
    """
    starts, out = [0, *accumulate(lengths)], []

    def cut(first: int, rows: int, key: int, keys: int, lead: int, own: bool, bound: int) -> None:
        height = WRITTEN_OUT if not fused else WINDOWED if bound else max(rows, 1)
        for i in range(0, rows, height):
            n = min(height, rows - i)
            low = max(0, lead + i - bound + 1) if bound else 0  # the first key that the first query sees
            high = min(keys, lead + i + n)  # behind the last key that the last query sees
            bites = bound if bound and lead + i + n - low > bound else 0
            out.append(_Piece(first + i, 1, n, key + low, high - low, lead + i - low, bites, own))

    for T, same in groupby(range(len(lengths)), key=lambda i: lengths[i]):
        run, bound = list(same), window if window < T else 0
        together = 1 if bound or not T else len(run) if fused else max(1, WRITTEN_OUT // T)
        for i in range(run[0], run[-1] + 1, together):
            count = min(together, run[-1] + 1 - i)
            if count > 1:
                out.append(_Piece(starts[i], count, T, starts[i], T, 0, 0, True))
            else:
                cut(starts[i], T, starts[i], T, 0, True, bound)
    for parent, answers in groupby(range(len(lengths)), key=lambda i: parents[i]):
        family, before = list(answers), lengths[parent] if parent >= 0 else 0
        if not before:
            continue
        if not window or before + max(lengths[i] for i in family) <= window:
            cut(starts[family[0]], sum(lengths[i] for i in family), starts[parent], before, before, False, 0)
        else:
            for i in family:  # token window - 1 of an answer, and all that follow, see nothing of the prompt
                cut(starts[i], min(lengths[i], window - 1), starts[parent], before, before, False, window)
    return tuple(out)


def _blocks(x: Tensor, first: int, count: int, rows: int) -> Tensor:
    """Tokens of a packed row as a batch; a view."""
    return x[first : first + count * rows].unflatten(0, (count, rows)).transpose(1, 2)  # (n, heads, T, ...)


def _visible(piece: _Piece, device: torch.device) -> Tensor | None:
    """(T, J) bool, True where a query may look; None for everywhere."""
    if piece.whole:
        return None
    query = torch.arange(piece.lead, piece.lead + piece.rows, device=device)[:, None]  # (T, 1) from the first key on
    key = torch.arange(piece.keys, device=device)  # (J,)
    visible = key <= query  # (T, J)
    return visible & (key > query - piece.window) if piece.window else visible


def _flash_arguments(piece: _Piece, q: Tensor, scale: float) -> tuple[bool, dict]:
    """is_causal, and the keywords of torch's fused kernel. It can mask by itself only what is square."""
    if piece.causal or piece.whole:
        return piece.causal and not piece.whole, {"scale": scale}
    hidden = ~_visible(piece, q.device)  # (T, J)
    return False, {"scale": scale, "attn_mask": q.new_zeros(hidden.shape).masked_fill_(hidden, -math.inf)}


def _slope(x: Tensor) -> Tensor:
    """1 - tanh(x)^2 as 4 t / (1 + t)^2 with t = exp(-2 |x|): 1 - tanh^2 has no digits left where |x| >> 1."""
    t = x.abs().mul_(-2).exp_()
    return (4 * t).div_((1 + t).square_())


def _scores(q: Tensor, k: Tensor, piece: _Piece, options: _Options) -> tuple[Tensor, Tensor | None]:
    """Equation (1), written out, and the slope of the cap. Query heads of one key head are rows of one product."""
    (n, H, T, D), K = q.shape, k.shape[1]
    scores = q.reshape(n, K, H // K * T, D) @ k.transpose(2, 3) * options.scale  # (n, K, H // K * T, J)
    scores, slope = scores.view(n, H, T, -1), None  # (n, H, T, J)
    if options.softcap is not None:
        scores = scores / options.softcap  # (n, H, T, J)
        slope = _slope(scores)  # (n, H, T, J)
        scores = torch.tanh(scores) * options.softcap  # (n, H, T, J)
    visible = _visible(piece, q.device)
    return scores if visible is None else scores.masked_fill(~visible, -math.inf), slope


def _forward_piece(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, options: _Options) -> tuple[Tensor, Tensor]:
    """q (n, H, T, D) and k, v (n, K, J, D) -> out (n, H, T, D) and lse (n, H, T), of these keys alone."""
    if options.path == "fused":
        causal, keywords = _flash_arguments(piece, q, options.scale)
        # under scaled_dot_product_attention, which does not give back the lse
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, **keywords)
    scores, _ = _scores(q, k, piece, options)  # (n, H, T, J)
    lse = scores.logsumexp(-1)  # (n, H, T)
    p = (scores - lse[..., None]).exp_()  # (n, H, T, J)
    return (p.reshape(len(k), k.shape[1], -1, piece.keys) @ v).view(q.shape), lse  # (n, H, T, D)


def _backward_piece(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: _Piece, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (4): what these pairs add to dq (n, H, T, D) and to dk, dv (n, K, J, D). out and lse are the whole's."""
    if options.path == "fused":
        causal, keywords = _flash_arguments(piece, q, options.scale)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(dout, q, k, v, out, lse, 0.0, causal, **keywords)
    (n, H, T, D), K = q.shape, k.shape[1]
    scores, slope = _scores(q, k, piece, options)  # (n, H, T, J)
    p = (scores - lse[..., None]).exp_()  # (n, H, T, J)
    delta = (dout * out).sum(-1, keepdim=True)  # (n, H, T, 1)
    q, dout = q.reshape(n, K, -1, D), dout.reshape(n, K, -1, D)  # (n, K, H // K * T, D) both
    dv = p.view(n, K, -1, piece.keys).transpose(2, 3) @ dout  # (n, K, J, D)
    dscores = p.mul_((dout @ v.transpose(2, 3)).view(p.shape) - delta)  # (n, H, T, J)
    if slope is not None:
        dscores.mul_(slope)  # (n, H, T, J)
    dscores = dscores.mul_(options.scale).view(n, K, -1, piece.keys)  # (n, K, H // K * T, J)
    return (dscores @ k).view(n, H, T, D), dscores.transpose(2, 3) @ q, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: _Options) -> tuple[Tensor, Tensor]:
    """out (S, H, D) in q's dtype, and lse (S, H)."""
    # bf16 and fp16 are widened: exact, and on a CPU backward is twice as fast for it on answers of 100 tokens
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])  # (S, H, D), (S, H)
    for piece in _pieces(segments.lengths, segments.parents, options.window, options.path == "fused"):
        queries, keys = (piece.first, piece.count, piece.rows), (piece.key, piece.count, piece.keys)
        part, part_lse = _forward_piece(_blocks(q, *queries), _blocks(k, *keys), _blocks(v, *keys), piece, options)
        o, whole = _blocks(out, *queries), _blocks(lse, *queries)  # (n, H, T, D), (n, H, T)
        if piece.own:
            o.copy_(part)
            whole.copy_(part_lse)
            continue
        joined = torch.logaddexp(whole, part_lse)  # (n, H, T) equation (3)
        o.mul_((whole - joined).exp_()[..., None]).add_(part.mul_((part_lse - joined).exp_()[..., None]))
        whole.copy_(joined)
    return out.to(dtype), lse


def _backward(saved: tuple[Tensor, ...], segments: Segments, options: _Options, dout: Tensor) -> tuple[Tensor, ...]:
    q, k, v, out, lse = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in saved)
    dout = dout.to(q.dtype)
    dq, dk, dv = torch.zeros(q.shape, dtype=q.dtype, device=q.device), torch.zeros_like(k), torch.zeros_like(v)
    for piece in _pieces(segments.lengths, segments.parents, options.window, options.path == "fused"):
        queries, keys = (piece.first, piece.count, piece.rows), (piece.key, piece.count, piece.keys)
        parts = _backward_piece(
            *(_blocks(dout, *queries), _blocks(q, *queries), _blocks(k, *keys), _blocks(v, *keys)),
            *(_blocks(out, *queries), _blocks(lse, *queries), piece, options),
        )
        for whole, part, block in zip((dq, dk, dv), parts, (queries, keys, keys), strict=True):
            _blocks(whole, *block).add_(part)
    return tuple(x.to(saved[0].dtype) for x in (dq, dk, dv))


# ----------------------------------------------------------------------------
# 2. kernels
#
# A program owns a tile of queries (forward, dq) or of keys (dk and dv) and walks over the other side. No sum is shared
# by two programs, so there are no atomics and no order to wait for. What a key tile of a prompt walks over is one
# stretch of the row, its own queries and then those of all its answers: they stand side by side. A long stretch is cut:
# each part of dk and dv is a program's own, in fp32, and the parts are added in their order.
#
# Whether a query sees a key is read off positions: key <= query, and key > query - window. Within a family that is all,
# because every answer starts behind its prompt. Logarithms are to base 2 here, since exp2 is what the hardware has.
#
# Forward reads k and v once for each tile of queries, out of the cache: 128 queries make 128 operations of every byte,
# which is what 790 TFLOP/s need of some 6 TB/s. GPU speed: not measured.

# dk and dv of a prompt: the queries of a part, and the most parts of all its tiles together: with 8 key heads 512
# programs, for 132 multiprocessors. A part of 128 keys x 8 heads x 128 x 8 bytes is 1 MB: 64 MB at most.
PART, PART_TILES = 2048, 64
LAUNCH = {"enable_fp_fusion": True}  # said, because Triton's default changes; bits are compared within one build only


def _tiling(q: Tensor, options: _Options) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """(tokens of the owned tile, tokens of the walked tile, warps, pipeline stages): forward, backward.

    Widths are D as a power of two. Sums of 128 x 128 are 64 registers in each of 256 threads, and backward holds two
    such, of 64 keys each. 128 queries and two stages of 64 keys and values of 128 bf16 are 96 KB of shared memory, of
    163 KB on an A100. Hopper's matrix unit takes 64 rows from four warps: for a tile of 64, the second four would halve
    its columns to 16 and reach 40 % of its rate. 128 keys take 252 registers there, and spill 24 bytes with a soft-cap.
    fp32 does without tensor cores, which would round to tf32: it is here for completeness and for tests. There a
    thread holds whole rows, so tiles are tiny, and above a width of 64 registers spill.
    """
    width = _width(q)
    if q.element_size() == 4:
        return (32, 32, 4, 1) if width <= 64 else (16, 16, 4, 1), (16, 16, 4, 1)
    if width <= 128:
        owned = 128 if is_hopper(q) and width == 128 and options.softcap is None else 64
        return (128, 64, 8, 2), (owned, 32, 4 if width <= 64 else 8, 2)
    return (64, 32, 8, 2), (32, 32, 8, 2)


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(x / softcap), and its slope. tanh u = (1 - t) / (1 + t) with t = exp(-2 |u|) is off by 6e-8 at
    most, and so the score by 6e-8 of softcap, which p shows as a relative error."""
    slope = x  # read only where there is a cap: a tile of ones would be registers
    if SOFTCAP:
        t = tl.exp(-2.0 * tl.abs(x / softcap))
        slope = 4.0 * t / ((1.0 + t) * (1.0 + t))
        x = tl.where(x < 0.0, -softcap, softcap) * (1.0 - t) / (1.0 + t)
    return x, slope


@triton.jit
def _load(ptr, row, d, stride, mask, D: tl.constexpr, WIDTH: tl.constexpr):
    """A tile whose first row ptr points to; row and d count from there and are (rows, 1) and (1, width), or (1, rows)
    and (width, 1) for its transpose. Zeros where there is no row or no such channel: 0 * nan is nan, so both operands
    of a product must be clean. Within a tile 32 bits count far enough, and take half the registers."""
    if D < WIDTH:
        mask = mask & (d < D)
    return tl.load(ptr + row * stride + d, mask=mask, other=0.0)


@triton.jit
def _query_tile(tiles_ptr):
    """This program's row of Segments.tiles: first token, start and end of its segment, start and length of its prefix.
    Tiles with the most readers stand first, those that read most come last in their segment: backwards, then."""
    tile = tiles_ptr + 6 * (tl.num_programs(0) - 1 - tl.program_id(0))
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)


@triton.jit
def _first_keys(first, start, before, window, WINDOW: tl.constexpr, WALKED: tl.constexpr):
    """The first key a tile of queries sees, down to a whole tile of keys: of the prompt, and of its own."""
    lowest = first * 0
    own_lowest = first * 0
    if WINDOW:
        far = before + first - start - window + 1
        lowest = tl.maximum(far, 0) // WALKED * WALKED
        own_lowest = tl.maximum(far - before, 0) // WALKED * WALKED
    return lowest, own_lowest


@triton.jit
def _forward_walk(
    out, m, s, q, position, k_ptr, v_ptr, stride_k, stride_v, first, last, before, scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes keys first .. last - 1 of a segment into the running maximum m, sum s and out of a tile of queries.

    position is that of the queries (M,); key j of the segment has position before + j.
    """
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, BLOCK)
    k_ptr += first.to(tl.int64) * stride_k
    v_ptr += first.to(tl.int64) * stride_v
    for start in range(first, last, BLOCK):
        j = start + row
        k = _load(k_ptr, row[None, :], d[:, None], stride_k, j[None, :] < last, D, WIDTH)  # (WIDTH, BLOCK)
        x, slope = _capped(tl.dot(q, k, input_precision="ieee") * scale, softcap, SOFTCAP)  # (M, BLOCK)
        key = before + j[None, :]
        visible = (j[None, :] < last) & (key <= position[:, None])
        if WINDOW:
            visible = visible & (key > position[:, None] - window)
        x = tl.where(visible, x * 1.4426950408889634, -float("inf"))  # log2(e)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        p = tl.exp2(x - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        s = s * rescale + tl.sum(p, axis=1)
        v = _load(v_ptr, row[:, None], d[None, :], stride_v, j[:, None] < last, D, WIDTH)  # (BLOCK, WIDTH)
        out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")  # (M, WIDTH)
        m = m_new
        k_ptr += BLOCK * stride_k
        v_ptr += BLOCK * stride_v
    return out, m, s


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, S, scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """Equation (2) for a tile of queries of one head: over the keys of the prompt, then over the segment's own."""
    first, start, end, prefix, before = _query_tile(tiles_ptr)
    h = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, OWNED)
    row = first + lane
    d = tl.arange(0, WIDTH)
    position = before + tl.minimum(row, end - 1) - start  # rows behind the segment's end see something too, else 0 / 0
    q_ptr += h * stride_qh + first.to(tl.int64) * stride_qs
    q = _load(q_ptr, lane[:, None], d[None, :], stride_qs, row[:, None] < end, D, WIDTH)  # (OWNED, WIDTH)
    out = tl.zeros((OWNED, WIDTH), tl.float32)
    # a finite start: a first tile of which a query sees nothing would give exp(-inf + inf) = nan
    m = tl.full((OWNED,), -1e30, tl.float32)
    s = tl.zeros((OWNED,), tl.float32)
    k_ptr += (h // GROUP) * stride_kh
    v_ptr += (h // GROUP) * stride_vh
    lowest, own_lowest = _first_keys(first, start, before, window, WINDOW, WALKED)
    out, m, s = _forward_walk(
        out, m, s, q, position, k_ptr + prefix.to(tl.int64) * stride_ks, v_ptr + prefix.to(tl.int64) * stride_vs,
        stride_ks, stride_vs, lowest, before, 0, scale, softcap, window, SOFTCAP, WINDOW, D, WIDTH, WALKED,
    )  # fmt: skip
    out, m, s = _forward_walk(
        out, m, s, q, position, k_ptr + start.to(tl.int64) * stride_ks, v_ptr + start.to(tl.int64) * stride_vs,
        stride_ks, stride_vs, own_lowest, tl.minimum(first + OWNED, end) - start, before, scale, softcap, window,
        SOFTCAP, WINDOW, D, WIDTH, WALKED,
    )  # fmt: skip
    at = (row.to(tl.int64)[:, None] * tl.num_programs(1) + h) * D + d[None, :]
    tl.store(out_ptr + at, out / s[:, None], mask=(row[:, None] < end) & (d[None, :] < D))
    tl.store(lse_ptr + h * S + row, m + tl.log2(s), mask=row < end)


@triton.jit
def _dq_walk(
    dq, q, dout, lse, delta, position, k_ptr, v_ptr, stride_k, stride_v, first, last, before, scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds what keys first .. last - 1 of a segment give to dq, but for the factor scale."""
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, BLOCK)
    k_ptr += first.to(tl.int64) * stride_k
    v_ptr += first.to(tl.int64) * stride_v
    for start in range(first, last, BLOCK):
        j = start + row
        k = _load(k_ptr, row[None, :], d[:, None], stride_k, j[None, :] < last, D, WIDTH)  # (WIDTH, BLOCK)
        v = _load(v_ptr, row[None, :], d[:, None], stride_v, j[None, :] < last, D, WIDTH)  # (WIDTH, BLOCK)
        x, slope = _capped(tl.dot(q, k, input_precision="ieee") * scale, softcap, SOFTCAP)  # (M, BLOCK)
        key = before + j[None, :]
        visible = (j[None, :] < last) & (key <= position[:, None])
        if WINDOW:
            visible = visible & (key > position[:, None] - window)
        p = tl.exp2(tl.where(visible, x * 1.4426950408889634 - lse[:, None], -float("inf")))
        dx = p * (tl.dot(dout, v, input_precision="ieee") - delta[:, None])  # (M, BLOCK)
        if SOFTCAP:
            dx = dx * slope
        dq = tl.dot(dx.to(k.dtype), tl.trans(k), dq, input_precision="ieee")  # (M, WIDTH)
        k_ptr += BLOCK * stride_k
        v_ptr += BLOCK * stride_v
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, S, scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """delta and dq of equation (4) for a tile of queries of one head. delta is written for _dkdv_kernel."""
    first, start, end, prefix, before = _query_tile(tiles_ptr)
    h = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    lane = tl.arange(0, OWNED)
    row = first + lane
    d = tl.arange(0, WIDTH)
    inside = row[:, None] < end
    position = before + tl.minimum(row, end - 1) - start  # rows behind the segment's end see something too, else 0 / 0
    q_ptr += h * stride_qh + first.to(tl.int64) * stride_qs
    q = _load(q_ptr, lane[:, None], d[None, :], stride_qs, inside, D, WIDTH)  # (OWNED, WIDTH)
    here = (first.to(tl.int64) * H + h) * D
    out = _load(out_ptr + here, lane[:, None], d[None, :], H * D, inside, D, WIDTH)  # (OWNED, WIDTH)
    dout = _load(dout_ptr + here, lane[:, None], d[None, :], H * D, inside, D, WIDTH)  # (OWNED, WIDTH)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    tl.store(delta_ptr + h * S + row, delta, mask=row < end)
    lse = tl.load(lse_ptr + h * S + row, mask=row < end, other=0.0)
    dq = tl.zeros((OWNED, WIDTH), tl.float32)
    k_ptr += (h // GROUP) * stride_kh
    v_ptr += (h // GROUP) * stride_vh
    lowest, own_lowest = _first_keys(first, start, before, window, WINDOW, WALKED)
    dq = _dq_walk(
        dq, q, dout, lse, delta, position,
        k_ptr + prefix.to(tl.int64) * stride_ks, v_ptr + prefix.to(tl.int64) * stride_vs,
        stride_ks, stride_vs, lowest, before, 0, scale, softcap, window, SOFTCAP, WINDOW, D, WIDTH, WALKED,
    )  # fmt: skip
    dq = _dq_walk(
        dq, q, dout, lse, delta, position,
        k_ptr + start.to(tl.int64) * stride_ks, v_ptr + start.to(tl.int64) * stride_vs,
        stride_ks, stride_vs, own_lowest, tl.minimum(first + OWNED, end) - start, before, scale, softcap, window,
        SOFTCAP, WINDOW, D, WIDTH, WALKED,
    )  # fmt: skip
    at = (row.to(tl.int64)[:, None] * H + h) * D + d[None, :]
    tl.store(dq_ptr + at, dq * scale, mask=inside & (d[None, :] < D))


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, positions_ptr, dk_ptr, dv_ptr, parts_ptr, tiles_ptr, part_size,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, S, scale, softcap, window,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    OWNED: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of equation (4) for a tile of keys of one key head: over all query heads that read it, one after the
    other, and over the queries of its segment and of all answers to it, or a part of them: see Segments.key_tiles.
    Scores are keys by queries here: no product has to be transposed before the next one reads it."""
    tile = tiles_ptr + 7 * tl.program_id(0)
    first = tl.load(tile)
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    before = tl.load(tile + 3)
    walk = tl.load(tile + 4)
    last = tl.load(tile + 5)
    slot = tl.load(tile + 6)
    kv = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1) * GROUP
    lane = tl.arange(0, OWNED)
    row = first + lane
    d = tl.arange(0, WIDTH)
    inside = row[:, None] < end
    key = before + row - start
    begin = first.to(tl.int64)
    k_ptr += kv * stride_kh + begin * stride_ks
    v_ptr += kv * stride_vh + begin * stride_vs
    k = _load(k_ptr, lane[:, None], d[None, :], stride_ks, inside, D, WIDTH)  # (OWNED, WIDTH)
    v = _load(v_ptr, lane[:, None], d[None, :], stride_vs, inside, D, WIDTH)  # (OWNED, WIDTH)
    if WINDOW:
        # answers start at position before + end - start: too far for the tile's last key, if its window ends by then
        reach = first + OWNED - 1 + window
        last = tl.where(reach <= end, tl.minimum(reach, last), last)
    step = tl.arange(0, WALKED)
    dk = tl.zeros((OWNED, WIDTH), tl.float32)
    dv = tl.zeros((OWNED, WIDTH), tl.float32)
    for g in range(GROUP):
        h = kv * GROUP + g
        q_at = q_ptr + h * stride_qh + walk.to(tl.int64) * stride_qs
        dout_at = dout_ptr + (walk.to(tl.int64) * H + h) * D
        for start_i in range(walk, last, WALKED):
            i = start_i + step
            here = i < last
            q = _load(q_at, step[None, :], d[:, None], stride_qs, here[None, :], D, WIDTH)  # (WIDTH, WALKED)
            dout = _load(dout_at, step[:, None], d[None, :], H * D, here[:, None], D, WIDTH)  # (WALKED, WIDTH)
            lse = tl.load(lse_ptr + h * S + i, mask=here, other=0.0)
            delta = tl.load(delta_ptr + h * S + i, mask=here, other=0.0)
            query = tl.load(positions_ptr + i, mask=here, other=0).to(tl.int32)
            x, slope = _capped(tl.dot(k, q, input_precision="ieee") * scale, softcap, SOFTCAP)  # (OWNED, WALKED)
            visible = here[None, :] & (key[:, None] <= query[None, :])
            if WINDOW:
                visible = visible & (key[:, None] > query[None, :] - window)
            p = tl.exp2(tl.where(visible, x * 1.4426950408889634 - lse[None, :], -float("inf")))
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")  # (OWNED, WIDTH)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")  # (OWNED, WALKED)
            dx = p * (dp - delta[None, :])  # (OWNED, WALKED)
            if SOFTCAP:
                dx = dx * slope
            dk = tl.dot(dx.to(q.dtype), tl.trans(q), dk, input_precision="ieee")  # (OWNED, WIDTH)
            q_at += WALKED * stride_qs
            dout_at += WALKED * H * D
    kept = inside & (d[None, :] < D)
    within = lane[:, None] * tl.num_programs(1) * D + d[None, :]
    if slot < 0:
        at = (begin * tl.num_programs(1) + kv) * D
        tl.store(dk_ptr + at + within, dk * scale, mask=kept)
        tl.store(dv_ptr + at + within, dv, mask=kept)
    else:
        at = (slot.to(tl.int64) * OWNED * tl.num_programs(1) + kv) * D
        tl.store(parts_ptr + at + within, dk * scale, mask=kept)
        tl.store(parts_ptr + part_size + at + within, dv, mask=kept)


def _launch(q: Tensor, k: Tensor, v: Tensor, options: _Options, tiling: tuple[int, int, int, int]) -> dict:
    """What all three kernels are told."""
    owned, walked, warps, stages = tiling
    strides = (f"stride_{name}{letter}" for name in "qkv" for letter in "sh")
    return {
        **dict(zip(strides, (n for x in (q, k, v) for n in x.stride()[:2]), strict=True)),
        "S": len(q), "scale": options.scale, "softcap": options.softcap or 1.0, "window": options.window,
        "SOFTCAP": options.softcap is not None, "WINDOW": options.window > 0, "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2], "WIDTH": _width(q), "OWNED": owned, "WALKED": walked,
        "num_warps": warps, "num_stages": stages, **LAUNCH,
    }  # fmt: skip


def _width(q: Tensor) -> int:
    """D up to a power of two, and to the 16 a tensor core wants."""
    return max(16, 1 << (q.shape[2] - 1).bit_length())


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: _Options) -> tuple[Tensor, Tensor]:
    """out (S, H, D), and lse (H, S) to base 2."""
    tiling = _tiling(q, options)[0]
    tiles = segments.tiles(tiling[0])  # (n_tiles, 6)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # (S, H, D)
    lse = q.new_empty((q.shape[1], len(q)), dtype=torch.float32)  # (H, S)
    if len(tiles):
        _forward_kernel[(len(tiles), q.shape[1])](q, k, v, out, lse, tiles, **_launch(q, k, v, options, tiling))
    return out, lse


def _launch_backward(saved: tuple[Tensor, ...], segments: Segments, options: _Options, dout: Tensor):
    q, k, v, out, lse = saved
    dout, delta = dout.contiguous(), torch.empty_like(lse)  # (S, H, D), (H, S)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    tiling = _tiling(q, options)[1]
    tiles, keywords = segments.tiles(tiling[0]), _launch(q, k, v, options, tiling)
    if not len(tiles):
        return dq, dk, dv
    _dq_kernel[(len(tiles), q.shape[1])](q, k, v, out, dout, lse, delta, dq, tiles, **keywords)
    tiles, prompts = segments.key_tiles(tiling[0])
    slots = sum(triton.cdiv(end - start, tiling[0]) * parts for start, end, _, parts in prompts)
    sums = lse.new_empty((2, slots, tiling[0], *k.shape[1:]))  # (2, slots, T, K, D)
    _dkdv_kernel[(len(tiles), k.shape[1])](
        q, k, v, dout, lse, delta, segments.positions, dk, dv, sums, tiles, sums[0].numel(), **keywords
    )
    for start, end, slot, parts in prompts:  # a sum over one dimension: in the same order every time
        some = sums[:, slot : slot + triton.cdiv(end - start, tiling[0]) * parts]  # (2, tiles parts, T, K, D)
        dk[start:end], dv[start:end] = some.unflatten(1, (-1, parts)).sum(2).flatten(1, 2)[:, : end - start]
    return dq, dk, dv


# ----------------------------------------------------------------------------
# 3. autograd


class _Attention(torch.autograd.Function):
    """Saves q, k, v and out, which their projections keep anyway, and lse: 4 bytes a query and head."""

    @staticmethod
    def forward(ctx, q, k, v, segments, options):
        forward = _launch_forward if options.path == "triton" else _forward
        with torch.autocast(q.device.type, enabled=False):  # products stay in the dtype they are given
            out, lse = forward(q, k, v, segments, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.options = segments, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        backward = _launch_backward if ctx.options.path == "triton" else _backward
        with torch.autocast(dout.device.type, enabled=False):
            return *backward(ctx.saved_tensors, ctx.segments, ctx.options, dout), None, None


# ----------------------------------------------------------------------------
# 4. entry


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    softcap: float | None = None,
    window: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention within each sequence of a packed row, and from each answer to its prompt.

        scores = cap(q . k * scale);   out = softmax(scores) v        over the keys each query sees

    q         (S, H, D) bf16, fp16, fp32 or fp64, rotated already; carries a gradient
    k, v      (S, K, D) the same dtype; carry gradients. Query head h reads key head h // (H // K)
    segments  Segments.build(lengths, prefix, device): S tokens in all
    scale     the scores' factor, 1 / sqrt(D) in most models
    softcap   Gemma 2's attn_logit_softcapping, cap(x) = softcap tanh(x / softcap); None for none
    window    a query at position t sees positions t - window + 1 .. t only; 0 for all before it
    backend   "torch" | "triton" | None = Triton on a GPU, torch elsewhere and for float64
    returns   (S, H, D) in q's dtype; differentiable in q, k and v. Sums are fp32 (fp64 for fp64)

    The bits of a prompt and its answers, and of their gradients, do not depend on what else is in the row, nor on
    whether gradients are enabled. (But for written-out scores of segments of a few tokens: matrix libraries add up a
    batch of tiny products in another order than one.)

    Raises ValueError when shapes, dtypes or the number of tokens do not fit, or a number makes no sense.

    Source: tiles and the running maximum, FlashAttention arXiv:2205.14135 and 2307.08691; prompts stored once in
    training, Prefix Grouper arXiv:2506.05433; joining pieces by their lse, arXiv:2402.05099 (Hydragen).
    Elsewhere: flash_attn_varlen_func, which has no shared prefix; FlexAttention with a mask over documents and prefix.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q[:, 0].shape != k[:, 0].shape or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"got q, k, v of shapes {shapes}, want (S, H, D), (S, K, D), (S, K, D) with H a multiple of K; "
            f"drop the batch dimension of a packed row"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or not q.is_floating_point():
        raise ValueError(f"got q, k, v of {q.dtype}, {k.dtype}, {v.dtype}, want one float dtype; cast the odd one")
    if segments.positions.device != q.device:
        raise ValueError(
            f"got q on {q.device} and segments on {segments.positions.device}, want one device; build them with it"
        )
    if len(q) != sum(segments.lengths):
        raise ValueError(f"got {len(q)} tokens, want the {sum(segments.lengths)} of the segments; build them anew")
    check_positive("scale", scale, f", 1 / sqrt({q.shape[2]}) by default")
    check_positive("softcap", softcap, "; pass None for no soft-cap")
    if window < 0:
        raise ValueError(f"got window {window}, want 0 for no window, or how many positions a query sees")
    unfit = "float64 with backend 'triton', want float32 or less" if q.dtype == torch.float64 else ""
    if or_torch(choose(backend, q), backend, unfit) == "triton":
        path = "triton"
        if q.shape[2] > 256:
            raise ValueError(f"got heads of width {q.shape[2]}, want at most 256; use backend='torch'")
    else:  # torch's fused kernel knows no soft-cap, and is for CPUs
        path = "fused" if softcap is None and q.device.type == "cpu" else "plain"
    q, k, v = inner(q), inner(k), inner(v)
    options = _Options(float(scale), None if softcap is None else float(softcap), int(window), path)
    return _Attention.apply(q, k, v, segments, options)
