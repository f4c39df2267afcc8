"""One decode step's attention: N rows, one new token each, many of them continuations of the same prompt.

    x[n, h, j] = softcap * tanh(scale * q[n, h] . key[n, j, h // (H / K)] / softcap)      (no tanh when softcap is None)
    out[n, h]  = sum_j softmax_j(x[n, h])[j] value[n, j, h // (H / K)]                                              (1)

over the prefix of row n's prompt, slots 0 .. prefix_lengths[prompt[n]] - 1, and then its own, 0 .. lengths[n] - 1. The
prompt is stored once for all its rows, so it can be read once too: all rows of a prompt are one block of queries, and
what was a matrix times a vector for each becomes a product of matrices. Softmax does not mind being cut in two. With
m = max x, s = sum exp(x - m) and a = sum exp(x - m) value of either part,

    out = (exp(m_1 - m) a_1 + exp(m_2 - m) a_2) / (exp(m_1 - m) s_1 + exp(m_2 - m) s_2),    m = max(m_1, m_2)       (2)

and of as many parts as one likes: long contexts are cut into splits, so that few rows still fill a GPU.

The work is reading keys and values. Qwen3-0.6B (H = 16, K = 8, D = 128, bf16: 4 KiB a token and layer) for 8 prompts
of 512 tokens x 16 answers that have 512 tokens so far:

                                                                                a layer
    bytes, every row its own prompt    2 K D e sum_n (prefix_length + length)         537 MB     e bytes a number
    bytes, the floor                   2 K D e (sum_p prefix_length + sum_n length)   285 MB     95 us at 3.0 TB/s
    FLOPs                              4 H D sum_n (prefix_length + length)           1.1 G      4 a byte: 260 are free

The H / K query heads that share a key head are rows of the same product (GQA packing). Left apart, keys and values
would be read H / K times.

The file reads top to bottom:

    1. reference    plain torch: equation (1), one softmax over both parts. Also the CPU backend, hence few calls.
    2. kernels      Triton: prefixes, suffixes, and equation (2). Splits depend on capacities alone, so the bits of a
                    row do not depend on the other rows; nothing is read back, so a step can be a CUDA graph.
    3. entry        decode_attention: the name other files import.

Left out: gradients (answers are sampled, not differentiated; kernels/attention.py has them), more than one new token a
row, prefixes of prefixes, pages (slots of a row are evenly spaced), keys and values in 8 bits.

Tests: tests/test_decode_attention.py
Shapes: N rows, P prompts, H query heads, K kv heads, D head width, Sp and Ss slots of a prefix and of a row (capacity).
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import FLOATS, INTS, check_positive, choose, or_torch, same_device, tl, triton

# Query rows of a prefix program: rows of a prompt x H / K. 32 x 128 sums in fp32 are 32 registers for each of 128
# threads; compiled for sm_80 and sm_90, 64 rows spill. 16 is the least tl.dot takes, for a row by itself; and for fp32,
# whose products are made of FMAs with both operands in registers.
PREFIX_QUERIES = 32
SUFFIX_QUERIES = 16
# Bytes of a tile of keys, and of values: 64 slots of D = 128 in bf16. Two of each in flight are 64 KB: three programs a
# multiprocessor on an H100, where 3.3 TB/s and a latency of 0.8 us ask for 20 KB in flight; and all an MI300 has.
# Narrow heads do not get more slots than TILE_SLOTS: scores take registers too. fp32 gets 16, or it spills as well.
TILE_BYTES = 16 * 1024
TILE_SLOTS = 64
# A split writes D + 2 floats a head and reads 2 D slots / (H / K) numbers a head. At 128 slots in bf16 and H / K = 2
# writing and reading them again is 3 % on top. 16 splits x 8 kv heads are 128 programs from the very first row.
SPLIT_SLOTS = 128
MAX_SPLITS = 16
# On a CPU a block of the prefixes costs some 50 us of calls a layer: as long as copying 300 slots of 3 heads of 64 (or
# 60 of 8 heads of 128; it is counted in slots all the same, because it decides about a few milliseconds a step).
COPIED = 300

# ----------------------------------------------------------------------------
# 1. reference


@dataclass(frozen=True)
class DecodePlan:
    """What the layers of one decode step have in common: worked out once a step (and window), not once a layer.

    blocks   (prompts, rows, slots) of each product with prefixes: a single one when all prompts have equally many rows
             and see the same slots, else one a prompt. A prompt without rows, or without slots to see, has none
    width    columns of the scores that belong to blocks: the slots of the widest
    suffix   slots of k and v that any row sees
    one_block blocks is a single one, of all rows
    copied   None, or (prompt, slots): blocks would be many and small, so each row's prefix is copied to its own slots
    hidden   (N, 1, width + slots) fp32: 0 where a row sees a column, -inf where not; None when all rows see all
    unused   (1, N, slots, 1) bool: slots behind the end of a row, while others go on; None when all are equally long
    """

    blocks: tuple[tuple[slice, slice, slice], ...]
    width: int
    suffix: slice
    hidden: Tensor | None
    unused: Tensor | None
    one_block: bool
    copied: tuple[Tensor, slice] | None
    rows: int
    window: int

    @staticmethod
    def build(prompt: Tensor, prefix_lengths: Tensor, lengths: Tensor, *, window: int = 0) -> "DecodePlan":
        """All as in decode_attention. On a GPU this waits for it.

        Raises ValueError when rows are not in the order of their prompts, and for lengths that cannot be.
        """
        own, prefix, length = prompt.tolist(), prefix_lengths.tolist(), lengths.tolist()
        P, N = len(prefix), len(own)
        if any(a > b for a, b in zip(own, own[1:], strict=False)) or not all(0 <= p < P for p in own):
            shown = str(own if N <= 8 else own[:8] + [...]).replace("Ellipsis", "...")
            raise ValueError(f"got prompt {shown}, want numbers from 0 to {P - 1} that never fall; sort the rows")
        if min(prefix, default=0) < 0 or min(length, default=1) < 1:
            got = f"a prefix_length of {min(prefix, default=0)} and a length of {min(length, default=1)}"
            raise ValueError(f"got {got}, want at least 0 and 1; a row's newest token counts")
        # the first position each row sees: its own, prefix + length - 1, is the last of the window
        oldest = [max(0, prefix[p] + n - window) if window else 0 for p, n in zip(own, length, strict=True)]
        blocks, first = [], []
        for p in range(P):
            rows = slice(bisect_left(own, p), bisect_left(own, p + 1))
            start = min(oldest[rows] + [prefix[p]])
            first += [start] * (rows.stop - rows.start)
            if rows.start < rows.stop and start < prefix[p]:
                blocks.append((slice(p, p + 1), rows, slice(start, prefix[p])))
        if len(blocks) == P and len({(r.stop - r.start, s.start, s.stop) for _, r, s in blocks}) == 1:
            blocks = [(slice(0, P), slice(0, N), blocks[0][2])]
        copied, width = None, max((slots.stop - slots.start for _, _, slots in blocks), default=0)
        if len(blocks) > 1 and N * width < COPIED * len(blocks):
            start, stop = min(slots.start for *_, slots in blocks), max(slots.stop for *_, slots in blocks)
            copied, blocks, width, first = (prompt, slice(start, stop)), [], stop - start, [start] * N
        suffix = slice(
            min((max(0, o - prefix[p]) for o, p in zip(oldest, own, strict=True)), default=0), max(length, default=0)
        )

        column = lambda numbers: torch.tensor(numbers, device=prompt.device)[:, None]  # noqa: E731  (N, 1)
        oldest, end = column(oldest), column([prefix[p] for p in own])  # (N, 1), (N, 1)
        slot = column(first) + torch.arange(width, device=prompt.device)  # (N, width) of a prefix: a position
        mine = torch.arange(suffix.start, suffix.stop, device=prompt.device)  # (slots,)
        unused = mine >= lengths[:, None]  # (N, slots)
        dead = torch.cat(((slot >= end) | (slot < oldest), unused | (mine + end < oldest)), dim=1)  # (N, width + slots)
        if copied:
            unused, width = torch.cat((slot >= end, unused), dim=1), 0  # (N, width + slots) a row's own, all of them
        hidden = torch.zeros(dead.shape, device=dead.device).masked_fill_(dead, -math.inf)  # (N, width + slots)
        return DecodePlan(
            blocks=tuple(blocks),
            width=width,
            suffix=suffix,
            hidden=hidden[:, None] if dead.any() else None,
            unused=unused[None, :, :, None] if unused.any() else None,
            copied=copied,
            one_block=len(blocks) == 1 and blocks[0][0] == slice(0, P),
            rows=N,
            window=window,
        )


def decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    plan: DecodePlan,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Equation (1), in fp32 unless the cache is fp64: (N, H, D) in the dtype of q.

    Everything is laid out (K, N, H / K, ...). There the heads of a kv head and the rows of a prompt are neighbours, so
    that prefix and suffix are a torch.bmm each, on views. Calls are few, because at these sizes a call is as dear as
    its arithmetic: between two of them, products of weights have swept the processor's caches.
    """
    (N, H, D), K = q.shape, len(k)
    G, dtype = H // K, torch.promote_types(k.dtype, torch.float32)

    def stack(x: Tensor, slots: slice) -> Tensor:
        return x.narrow(2, slots.start, slots.stop - slots.start).to(dtype).flatten(0, 1)  # (K n, slots, D)

    queries = q.new_empty((K, N, G, D), dtype=dtype)  # (K, N, G, D)
    queries.copy_(q.reshape(N, K, G, D).transpose(0, 1)).mul_(scale)  # (K, N, G, D)
    keys, values = stack(k, plan.suffix), stack(v, plan.suffix)  # (K N, slots, D), (K N, slots, D)
    if plan.copied is not None:
        prompt, slots = plan.copied
        before = (stack(x.index_select(1, prompt), slots) for x in (prefix_k, prefix_v))  # (K N, slots, D) both
        keys, values = (torch.cat(pair, dim=1) for pair in zip(before, (keys, values), strict=True))
    if plan.unused is not None:  # a row may find anything behind its end, and 0 * nan is nan
        keys, values = (x.view(K, N, -1, D).masked_fill(plan.unused, 0.0).view_as(x) for x in (keys, values))
    scores = torch.bmm(queries.view(K * N, G, D), keys.mT).view(K, N, G, -1)  # (K, N, G, slots)

    # the softmax is over prefix and suffix at once: two of them and their merge, (2), are 8 calls more
    if plan.one_block:  # one product, and all its columns are seen
        [(_, _, slots)] = plan.blocks
        prefix_keys, prefix_values = stack(prefix_k, slots), stack(prefix_v, slots)  # (K P, slots, D) both
        shared = torch.bmm(queries.view(len(prefix_keys), -1, D), prefix_keys.mT).view(K, N, G, -1)  # (K, N, G, width)
        scores = torch.cat((shared, scores), dim=-1)  # (K, N, G, width + slots)
    elif plan.blocks:
        # zeros, because columns that no product writes get -inf by addition
        scores = torch.cat((scores.new_zeros((K, N, G, plan.width)), scores), dim=-1)  # (K, N, G, width + slots)
        for prompts, rows, slots in plan.blocks:
            block = queries[:, rows].reshape(K * (prompts.stop - prompts.start), -1, D)  # (K p, rows G, D) p: 1 or P
            shared = torch.bmm(block, stack(prefix_k[:, prompts], slots).mT)  # (K p, rows G, slots)
            scores[:, rows, :, : shared.shape[2]].copy_(shared.view(K, -1, G, shared.shape[2]))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)  # (K, N, G, S)
    if plan.hidden is not None:
        scores.add_(plan.hidden)  # (K, N, G, S) three to five times as fast as masked_fill_
    p = scores.softmax(-1)  # (K, N, G, S)

    out = torch.bmm(p.view(K * N, G, -1)[..., plan.width :], values)  # (K N, G, D)
    if plan.one_block:
        share = p.view(len(prefix_values), -1, p.shape[-1])[..., : plan.width]  # (K P, rows G, width)
        out.view(len(prefix_values), -1, D).baddbmm_(share, prefix_values)  # (K P, rows G, D)
    else:
        out = out.view(K, N, G, D)  # (K, N, G, D)
        for prompts, rows, slots in plan.blocks:
            size, columns = K * (prompts.stop - prompts.start), slots.stop - slots.start
            share = p[:, rows, :, :columns].reshape(size, -1, columns)  # (K p, rows G, slots)
            out[:, rows] += torch.bmm(share, stack(prefix_v[:, prompts], slots)).view(K, -1, G, D)
    return q.new_empty((N, K, G, D)).copy_(out.view(K, N, G, D).transpose(0, 1)).view(N, H, D)  # (N, H, D)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _attend(
    q, m, s, acc, k_ptr, v_ptr, stride_ks, stride_vs, start, stop, oldest, alive, scale, softcap, D,
    SOFTCAP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Slots start .. stop - 1 of one kv head, added to the running m, s and acc = a of (2), for M queries. m starts at
    -1e30, not at -inf: a tile without a visible key would give inf - inf.

    oldest  (M,) int32: the first slot a query sees        alive  (M,) bool: queries that see these slots at all

    A tile of which a query sees nothing changes none of its bits: its exp(-inf) add 0 and the old sums are scaled by
    exp(0). So rows can share tiles, and tiles can be skipped.
    """
    i, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)  # (BLOCK_S,), (BLOCK_D,)
    # within a tile int32 is enough, and half the registers: only where the tile begins does a cache pass 2^31 numbers
    k_tile, v_tile = i[:, None] * stride_ks + d[None, :], i[:, None] * stride_vs + d[None, :]  # (BLOCK_S, BLOCK_D) both
    for first in range(start, stop, BLOCK_S):
        slot = first + i  # (BLOCK_S,)
        inside = slot < stop  # (BLOCK_S,)
        there = inside[:, None] & (d < D)[None, :]  # (BLOCK_S, BLOCK_D) what is masked may be nan, and 0 * nan is nan
        begin = tl.cast(first, tl.int64)
        k = tl.load(k_ptr + begin * stride_ks + k_tile, mask=there, other=0.0)  # (BLOCK_S, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (M, BLOCK_S)
        if SOFTCAP:
            t = tl.exp(-2.0 * tl.abs(x / softcap))  # (M, BLOCK_S) tanh by a number in (0, 1]: Triton has none
            x = tl.where(x < 0, -softcap, softcap) * ((1.0 - t) / (1.0 + t))  # (M, BLOCK_S)
        seen = alive[:, None] & inside[None, :] & (slot[None, :] >= oldest[:, None])  # (M, BLOCK_S)
        x = tl.where(seen, x, -float("inf"))  # (M, BLOCK_S)
        top = tl.maximum(m, tl.max(x, axis=1))  # (M,)
        e = tl.exp(x - top[:, None])  # (M, BLOCK_S)
        shrink = tl.exp(m - top)  # (M,)
        v = tl.load(v_ptr + begin * stride_vs + v_tile, mask=there, other=0.0)  # (BLOCK_S, BLOCK_D)
        s = s * shrink + tl.sum(e, axis=1)  # (M,)
        acc = acc * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")  # (M, BLOCK_D)
        m = top
    return m, s, acc


@triton.jit
def _store(m, s, acc, m_ptr, s_ptr, acc_ptr, part, valid, D, BLOCK_D: tl.constexpr):
    """One part of each query: s always, m and a where the query sees a key."""
    d = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    full = valid & (s > 0)  # (M,)
    tl.store(s_ptr + part, s, mask=valid)
    tl.store(m_ptr + part, m, mask=full)
    tl.store(acc_ptr + part[:, None] * D + d[None, :], acc, mask=full[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["parts"])
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, prompt_ptr, prefix_lengths_ptr, lengths_ptr, m_ptr, s_ptr, acc_ptr,
    stride_qn, stride_qh, stride_kk, stride_kp, stride_ks, stride_vk, stride_vp, stride_vs,
    N, H, D, capacity, chunk, window, parts, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one kv head (of G query heads), one split of the prefixes.

    Rows are in the order of their prompts, so a tile of rows has a few neighbouring prompts, mostly one: they are read
    in turn, each once, and the rows of the others look away. That needs no list of which rows are whose, and a grid
    that does not know how many rows a prompt still has.
    """
    # int64 for the head as well: stored as (K, N, Ss, D), a head is N Ss D numbers from the next
    tile, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = tl.arange(0, BLOCK_M)  # (M,) query i is head i % G of row i // G
    d = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    n = tile * ROWS + i // G  # (M,)
    valid = (i < ROWS * G) & (n < N)  # (M,)
    n = n.to(tl.int64)
    h = head * G + i % G  # (M,)
    prompt = tl.load(prompt_ptr + n, mask=valid, other=-1).to(tl.int32)  # (M,)
    length = tl.load(lengths_ptr + n, mask=valid, other=0).to(tl.int32)  # (M,)
    ends = tl.load(prefix_lengths_ptr + prompt, mask=length > 0, other=0).to(tl.int32)  # (M,)
    busy = ends > split * chunk  # (M,) a split behind a row's prefix, or before its window, reads nothing, not even q
    if WINDOW:
        busy = busy & (ends + length - window < split * chunk + chunk)
    at = n * stride_qn + h * stride_qh  # (M,)
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=busy[:, None] & (d < D)[None, :], other=0.0)  # (M, BLOCK_D)
    last = tl.load(prompt_ptr + tl.minimum(tile * ROWS + ROWS, N) - 1).to(tl.int32)
    m = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)  # (M,)
    s = tl.zeros((BLOCK_M,), dtype=tl.float32)  # (M,)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # (M, BLOCK_D)
    for p in range(tl.load(prompt_ptr + tile * ROWS).to(tl.int32), last + 1):
        end = tl.minimum(tl.load(prefix_lengths_ptr + p).to(tl.int32), capacity)  # never past the memory
        alive = valid & (prompt == p) & (length > 0)  # (M,)
        oldest = tl.zeros((BLOCK_M,), dtype=tl.int32)  # (M,)
        if WINDOW:
            oldest = tl.maximum(end + length - window, 0)  # (M,) position of the query - window + 1
        # the first slot that any of these rows sees; a prompt whose rows have all left is not read
        start = tl.min(tl.where(alive, oldest, capacity), axis=0)
        start = split * chunk + tl.maximum(start - split * chunk, 0) // BLOCK_S * BLOCK_S  # tiles stay where they are
        base = tl.cast(p, tl.int64)
        m, s, acc = _attend(
            q, m, s, acc, k_ptr + base * stride_kp + head * stride_kk, v_ptr + base * stride_vp + head * stride_vk,
            stride_ks, stride_vs, start, tl.minimum(split * chunk + chunk, end), oldest, alive, scale, softcap, D,
            SOFTCAP, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    _store(m, s, acc, m_ptr, s_ptr, acc_ptr, (n * H + h) * parts + split, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=["parts", "first_part"])
def _suffix_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, m_ptr, s_ptr, acc_ptr,
    stride_qn, stride_qh, stride_kk, stride_kn, stride_ks, stride_vk, stride_vn, stride_vs,
    H, D, capacity, chunk, window, parts, first_part, scale, softcap,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row, one kv head (of G query heads), one split of the row's own slots."""
    n, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = tl.arange(0, BLOCK_M)  # (M,)
    d = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    valid = i < G  # (M,)
    h = head * G + i  # (M,)
    length = tl.load(lengths_ptr + n).to(tl.int32)
    start = split * chunk
    stop = tl.minimum(start + chunk, tl.minimum(length, capacity))
    oldest = tl.zeros((BLOCK_M,), dtype=tl.int32)  # (M,)
    if WINDOW:
        oldest += tl.maximum(length - window, 0)  # (M,) the prefix cancels: slot = position - prefix length
        start += tl.maximum(length - window - start, 0) // BLOCK_S * BLOCK_S
    at = n * stride_qn + h * stride_qh  # (M,)
    busy = i < tl.where(start < stop, G, 0)  # (M,) none in a split behind the row's end or before its window
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=busy[:, None] & (d < D)[None, :], other=0.0)  # (M, BLOCK_D)
    m = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)  # (M,)
    s = tl.zeros((BLOCK_M,), dtype=tl.float32)  # (M,)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)  # (M, BLOCK_D)
    m, s, acc = _attend(
        q, m, s, acc, k_ptr + n * stride_kn + head * stride_kk, v_ptr + n * stride_vn + head * stride_vk,
        stride_ks, stride_vs, start, stop, oldest, valid, scale, softcap, D, SOFTCAP, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    _store(m, s, acc, m_ptr, s_ptr, acc_ptr, (n * H + h) * parts + first_part + split, valid, D, BLOCK_D)


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(m_ptr, s_ptr, acc_ptr, out_ptr, D, parts, BLOCK_PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Equation (2) for one row and head, over all its parts at once: one tree of additions, the same every run."""
    nh = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_PARTS)  # (parts,)
    d = tl.arange(0, BLOCK_D)  # (BLOCK_D,)
    s = tl.load(s_ptr + nh * parts + part, mask=part < parts, other=0.0)  # (parts,)
    full = s > 0  # (parts,) parts without a key left acc as it was, which may be nan
    m = tl.load(m_ptr + nh * parts + part, mask=full, other=-1.0e30)  # (parts,)
    weight = tl.where(full, tl.exp(m - tl.max(m, axis=0)), 0.0)  # (parts,)
    at = (nh * parts + part)[:, None] * D + d[None, :]  # (parts, BLOCK_D)
    acc = tl.load(acc_ptr + at, mask=full[:, None] & (d < D)[None, :], other=0.0)  # (parts, BLOCK_D)
    total = tl.sum(weight * s, axis=0)
    out = tl.sum(weight[:, None] * acc, axis=0) / tl.where(total > 0, total, 1.0)  # (BLOCK_D,) sees nothing: 0
    tl.store(out_ptr + nh * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def _split(capacity: int, block: int) -> tuple[int, int]:
    """Splits of so many slots, and slots of a split: whole tiles. A function of the capacity, never of the batch."""
    chunk = max(SPLIT_SLOTS, triton.cdiv(capacity, MAX_SPLITS))
    chunk = triton.cdiv(chunk, block) * block
    return triton.cdiv(capacity, chunk), chunk


def _launch(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor, k: Tensor, v: Tensor, lengths: Tensor,
    prompt: Tensor, scale: float, softcap: float | None, window: int,
) -> Tensor:  # fmt: skip
    """(N, H, D). Three launches, two without prefixes. Parts take 4 (D + 2) bytes a row, head and split."""
    (N, H, D), (K, _, Ss, _), Sp = q.shape, k.shape, prefix_k.shape[2]
    G = H // K
    block_d = max(16, 1 << (D - 1).bit_length())
    fp32 = k.dtype == torch.float32
    block_s = 16 if fp32 else max(16, min(TILE_SLOTS, TILE_BYTES // (block_d * k.element_size())))
    (prefix_splits, prefix_chunk), (splits, chunk) = _split(Sp, block_s), _split(Ss, block_s)
    parts = prefix_splits + splits
    m, s = (q.new_empty((N, H, parts), dtype=torch.float32) for _ in "ms")  # (N, H, parts), (N, H, parts)
    acc = q.new_empty((N, H, parts, D), dtype=torch.float32)  # (N, H, parts, D)
    out = q.new_empty((N, H, D))  # (N, H, D)
    heads = 1 << (G - 1).bit_length()
    options = {
        "SOFTCAP": softcap is not None, "WINDOW": window > 0, "G": G, "BLOCK_S": block_s,
        "BLOCK_D": block_d, "num_warps": 4 if block_d <= 128 else 8, "num_stages": 2, "enable_fp_fusion": False,
    }  # fmt: skip
    shared = (lengths, m, s, acc, q.stride(0), q.stride(1))
    cap = 0.0 if softcap is None else softcap
    if prefix_splits:
        block_m = max(16 if fp32 else PREFIX_QUERIES, heads)
        rows = block_m // G
        _prefix_kernel[(triton.cdiv(N, rows), K, prefix_splits)](
            q, prefix_k, prefix_v, prompt, prefix_lengths, *shared, *prefix_k.stride()[:3], *prefix_v.stride()[:3],
            N, H, D, Sp, prefix_chunk, window, parts, scale, cap, ROWS=rows, BLOCK_M=block_m, **options,
        )  # fmt: skip
    _suffix_kernel[(N, K, splits)](
        q, k, v, *shared, *k.stride()[:3], *v.stride()[:3],
        H, D, Ss, chunk, window, parts, prefix_splits, scale, cap, BLOCK_M=max(SUFFIX_QUERIES, heads), **options,
    )  # fmt: skip
    # room for the most parts there can be, masked: as many loads, and a longer row compiles nothing
    most = 1 << (2 * MAX_SPLITS - 1).bit_length()
    _merge_kernel[(N * H,)](
        m, s, acc, out, D, parts, BLOCK_PARTS=most, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False
    )
    return out


# ----------------------------------------------------------------------------
# 3. entry


@torch.no_grad()
def decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    prompt: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int = 0,
    plan: DecodePlan | Callable[[], DecodePlan] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of N new tokens, each over the prefix of its prompt and then over what its own row has written.

        x = softcap tanh(scale q . key / softcap)          out = softmax(x) value

    q               (N, H, D) bf16, fp16 or fp32 (torch: fp64 too), last dimension contiguous
    prefix_k        (K, P, Sp, D) keys of the prompts, prefix_v their values; query head h reads kv head h // (H // K)
    prefix_lengths  (P,) int32 or int64: slots in use, 0 allowed
    k, v            (K, N, Ss, D) keys and values of the rows, the newest token's included; any strides but the last
    lengths         (N,) int: slots in use, at least 1. The query stands at position prefix_length + length - 1.
                    Triton: 0 for a row that reads nothing, neither prefix nor slots, and gives 0
    prompt          (N,) int, never falling: which prefix a row has. A prompt may have any number of rows, also none
    scale           what q . k is multiplied with, 1 / sqrt(D) for most
    softcap         Gemma 2's attn_logit_softcapping; None for none
    window          > 0: only keys whose position > query position - window; 0: all
    plan            torch only: DecodePlan.build(prompt, prefix_lengths, lengths, window=window) of this step, or what
                    gives it when called, so that 30 layers share it
    returns         (N, H, D) dtype of q, contiguous; carries no gradient

    Keys and values have one dtype: q's, or for torch fp32 under a bf16 q, where 16-bit slots in use would be widened at
    every call. Sums are fp32. Slots behind a length may hold anything.
    Triton: the bits of a row depend on the capacities Sp and Ss, and not on the other rows. Lengths and prompts are
    read on the device, unchecked but for the memory's end.

    Raises ValueError when shapes, dtypes or strides do not fit; torch: and when a length or prompt is out of range.

    Source: prefix and suffix apart, Hydragen arXiv:2402.05099; splits, Flash-Decoding (PyTorch blog, October 2023).
    Elsewhere: FlashInfer MultiLevelCascadeAttention; vLLM cascade_attention; flash-attn mha_fwd_kvcache, num_splits.
    """
    backend = _check(q, prefix_k, prefix_v, prefix_lengths, k, v, lengths, prompt, softcap, window, backend)
    if not len(q):
        return torch.empty_like(q)  # (0, H, D) a grid of 0 programs is an error
    if backend == "triton":
        return _launch(q, prefix_k, prefix_v, prefix_lengths, k, v, lengths, prompt, scale, softcap, window)
    plan = plan() if callable(plan) else plan or DecodePlan.build(prompt, prefix_lengths, lengths, window=window)
    if (plan.rows, plan.window) != (len(q), window):
        got = f"a plan of {plan.rows} rows and window {plan.window} for {len(q)} rows and window {window}"
        raise ValueError(f"got {got}, want its own plan for every step and window; call DecodePlan.build")
    longest = max((slots.stop for *_, slots in (*plan.blocks, *([plan.copied] if plan.copied else []))), default=0)
    if longest > prefix_k.shape[2] or plan.suffix.stop > k.shape[2]:
        got = f"lengths up to {longest} and {plan.suffix.stop} for {prefix_k.shape[2]} and {k.shape[2]} slots"
        raise ValueError(f"got {got} of prefix_k and k, want them to fit; the cache is too small")
    return decode_attention_reference(q, prefix_k, prefix_v, k, v, plan, scale, softcap)


def _check(q, prefix_k, prefix_v, prefix_lengths, k, v, lengths, prompt, softcap, window, backend) -> str:
    """The backend, once everything fits. Reads no tensor: on a GPU that would wait for it."""
    shapes = [tuple(x.shape) for x in (q, prefix_k, prefix_v, k, v)]
    if [len(shape) for shape in shapes] != [3, 4, 4, 4, 4]:
        raise ValueError(
            f"got q, prefix_k, prefix_v, k, v {shapes}, want (N, H, D), (K, P, Sp, D) x 2, (K, N, Ss, D) x 2"
        )
    (N, H, D), (K, P, Sp, _), Ss = shapes[0], shapes[1], k.shape[2]
    if shapes[1:] != [(K, P, Sp, D)] * 2 + [(K, N, Ss, D)] * 2 or not K or H % K:
        want = "one N, K and D, and H a multiple of K"
        raise ValueError(f"got q, prefix_k, prefix_v, k, v {shapes}, want {want}; layout is (heads, rows, slots, D)")
    for name, x, size in (("prefix_lengths", prefix_lengths, P), ("lengths", lengths, N), ("prompt", prompt, N)):
        if x.shape != (size,) or x.dtype not in INTS:
            got = f"{name} of shape {tuple(x.shape)} and {x.dtype}"
            raise ValueError(f"got {got}, want ({size},) of int32 or int64; one number for each")
    caches = {x.dtype for x in (prefix_k, prefix_v, k, v)}
    if len(caches) > 1 or not q.is_floating_point() or torch.promote_types(q.dtype, k.dtype) != k.dtype:
        words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in caches))
        raise ValueError(
            f"got q of {q.dtype} and keys and values of {words}, want one dtype, q's or fp32; cast with .to()"
        )
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (q, prefix_k, prefix_v, k, v)):
        raise ValueError("got heads whose D numbers are apart, want stride 1 in the last dimension; call .contiguous()")
    same_device(q=q, prefix_k=prefix_k, prefix_lengths=prefix_lengths, k=k, lengths=lengths, prompt=prompt)
    check_positive("softcap", softcap, "; pass None for no soft-cap")
    if window < 0:
        raise ValueError(f"got window {window}, want at least 1 position, or 0 for no window")
    return choose_backend(q, k, backend)


def choose_backend(q: Tensor, k: Tensor, backend: str | None = None) -> str:
    """ "torch", which wants a DecodePlan, or "triton". Raises ValueError for what Triton is asked for and cannot do."""
    D, fits = q.shape[-1], k.dtype == q.dtype and k.dtype in FLOATS and q.shape[-1] <= 256
    got = f"D = {D}, q of {q.dtype} and keys of {k.dtype} for Triton, want at most 256 and one of bf16, fp16 and fp32"
    return or_torch(choose(backend, q), backend, "" if fits else got)
