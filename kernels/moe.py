"""Experts: many small linear layers, of which every row of x takes its own. And the order of rows that makes it fast.

    index (T, k)  ->  Groups      the T k pairs of a token and an expert, sorted by expert                     (1)
    rows  = spread(x, groups)     rows[n] = x[token of pair n]                             (T, C) -> (N, C)    (2)
    y     = grouped_linear(rows, (W,), groups)      y[n] = W[expert of pair n] rows[n]     N = T k             (3)
    out   = combine(y, w, groups)                   out[t] = sum over j of w[t, j] y[pair (t, j)]              (4)

Sorted, the rows of an expert are neighbours, and (3) is one matrix product an expert. (2) and the sum in (4) are each
other's transpose, so each is the other's backward pass; both add in the order j = 0 .. k - 1 and use no atomics.

Floor of a layer of Qwen3-30B-A3B (E = 128, k = 8, C = 2048, F = 768): its weights are 1.21 GB in bf16, read once: 0.36
ms at 3.35 TB/s, when a step of decoding hits every expert. 32,768 tokens are 2.5 TFLOP forward: 3.1 ms at 800 TFLOP/s.

The file reads top to bottom:

    1. reference    a torch.mm for each expert that has rows: also fast on a CPU.
    2. kernels      Triton: a program is a tile of rows of one expert; a table on the device says of which, so the host
                    never learns how many rows an expert has and nothing waits. gate and up are one launch, x read once.
    3. autograd     (3) saves rows and weights; (2) and (4) each other.
    4. entry        sort_by_expert, spread, grouped_linear, combine: the names other files import.

What bits depend on. Triton: a row's own numbers and N; which other rows there are never shows. torch: a CPU's matmul
may sum in another order for another number of rows, here the expert's. So a token's last bits can depend on what others
of its batch are routed to. Equal batches give equal bits, which is all that a first ratio of exactly 1 needs.

Left out: gather and combine inside the matmul's loads and stores (scattermoe), gradients of gradients, wgmma tiles.

Lesson: lessons/16_experts.md       Tests: tests/test_moe_kernel.py
Shapes: T tokens, k experts each, N = T k rows, E experts; in and out of a weight.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import FLOATS, choose, inner, or_torch, same_device, tl, triton
from kernels.packed import Packed

# 64 x 64 tiles of two fp32 sums are 64 registers for each of 128 threads. Where an expert has few rows (decoding), 16
# of them, the least tl.dot takes: reading weights is then all the time there is. The choice sees N and E, never counts.
# fp32 has half as many columns: it has no tensor cores to feed, and all operands of a step lie in registers.
BLOCK_M, FEW_M, BLOCK_K = 64, 16, 32
BLOCK_N = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
Weights = Tensor | Sequence[Packed]  # (E, out, in), or that in packed pieces (out, in)


@dataclass(frozen=True)
class Groups:
    """(1): pairs (t, j) are counted t k + j; sorted by expert, ties by that number."""

    order: Tensor  # (N,) int64, pair of each row
    token: Tensor  # (N,) int64, token of each row
    place: Tensor  # (T, k) int64, row of each pair
    start: Tensor  # (E + 1,) int64, where each expert's rows begin

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of experts with rows. On a GPU this waits for it."""
        bounds = self.start.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]

    @cached_property
    def tiles(self) -> tuple[int, Tensor, Tensor]:
        """(BLOCK_M, expert, first row) of the tiles of rows: (N / BLOCK_M + E,) int64, because each expert may have one
        that is not full. Those that are not needed begin behind the last row of expert E - 1."""
        N, E = len(self.order), len(self.start) - 1
        size = BLOCK_M if N > FEW_M * E else FEW_M
        t = torch.arange(triton.cdiv(N, size) + E, device=self.start.device)  # (tiles,)
        count = (self.start.diff() + size - 1) // size  # (E,) tiles of each expert
        end = count.cumsum(0)  # (E,)
        expert = torch.searchsorted(end, t, right=True).clamp(max=E - 1)  # (tiles,)
        return size, expert, self.start[expert] + (t - (end - count)[expert]) * size


def sort_by_expert(index: Tensor, experts: int) -> Groups:
    """index (T, k) int64, the experts of each token, in 0 .. experts - 1. Nothing waits for a GPU."""
    expert, order = index.flatten().sort(stable=True)  # (N,), (N,)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))  # (N,)
    start = torch.searchsorted(expert, torch.arange(experts + 1, device=order.device))  # (E + 1,)
    return Groups(order, order // index.shape[1], place.view(index.shape), start)


# ----------------------------------------------------------------------------
# 1. reference


def _rows_reference(x: Tensor, weights: Sequence[Weights], groups: Groups, turned: bool = False) -> list[Tensor]:
    """x W^T for each of the weights, or turned: x W."""
    out = [x.new_empty(len(x), weight[0].shape[turned]) for weight in weights]  # (N, out or in) each
    for y, weight in zip(out, weights, strict=True):
        for e, rows in groups.slices:
            w = weight[e] if isinstance(weight, Tensor) else weight[e].dequantize(x.dtype)  # (out, in)
            torch.mm(x[rows], w if turned else w.T, out=y[rows])
    return out


def _dw_reference(dy: Tensor, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    dw = torch.empty_like(weight)  # (E, out, in)
    dw[groups.start.diff() == 0] = 0  # experts without rows
    for e, rows in groups.slices:
        torch.mm(dy[rows].T, x[rows], out=dw[e])
    return dw


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _rows_kernel(
    x_ptr, w_ptr, v_ptr, y_ptr, z_ptr, expert_ptr, row_ptr, start_ptr,
    F, K, stride_x, w_e, w_f, w_k, v_e, v_f, v_k,
    PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[n, f] = sum_k x[n, k] w[e, f, k] for a tile of rows n of expert e; with PAIR also z from v, x read once.

    Strides make w its own transpose: the same kernel is dx = dy W.
    """
    e, row = tl.load(expert_ptr + tl.program_id(0)), tl.load(row_ptr + tl.program_id(0))  # int64: N K may pass 2^31
    stop = tl.load(start_ptr + e + 1)
    n = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    if row < stop:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        other = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
            inside = (n < stop)[:, None] & (k < K)[None, :]  # (BLOCK_M, BLOCK_K)
            x = tl.load(x_ptr + n[:, None] * stride_x + k[None, :], mask=inside, other=0.0)  # (BLOCK_M, BLOCK_K)
            inside = (k < K)[:, None] & (f < F)[None, :]  # (BLOCK_K, BLOCK_N)
            w = tl.load(w_ptr + e * w_e + f[None, :] * w_f + k[:, None] * w_k, mask=inside, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            if PAIR:
                v = tl.load(v_ptr + e * v_e + f[None, :] * v_f + k[:, None] * v_k, mask=inside, other=0.0)
                other = tl.dot(x, v, other, input_precision="ieee")
        at = n[:, None] * F + f[None, :]  # (BLOCK_M, BLOCK_N)
        inside = (n < stop)[:, None] & (f < F)[None, :]  # (BLOCK_M, BLOCK_N)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
        if PAIR:
            tl.store(z_ptr + at, other.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights_kernel(
    dy_ptr, x_ptr, dw_ptr, start_ptr, F, K, stride_dy, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[e, f, k] = sum_n dy[n, f] x[n, k] over the rows n of expert e = program 2, in their order; 0 where none is."""
    e = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
    stop = tl.load(start_ptr + e + 1)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for row in range(tl.load(start_ptr + e), stop, BLOCK_M):
        n = row + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
        inside = (n < stop)[None, :] & (f < F)[:, None]  # (BLOCK_N, BLOCK_M)
        dy = tl.load(dy_ptr + n[None, :] * stride_dy + f[:, None], mask=inside, other=0.0)
        inside = (n < stop)[:, None] & (k < K)[None, :]  # (BLOCK_M, BLOCK_K)
        x = tl.load(x_ptr + n[:, None] * stride_x + k[None, :], mask=inside, other=0.0)
        acc = tl.dot(dy, x, acc, input_precision="ieee")
    inside = (f < F)[:, None] & (k < K)[None, :]  # (BLOCK_N, BLOCK_K)
    tl.store(dw_ptr + (e * F + f[:, None]) * K + k[None, :], acc.to(dw_ptr.dtype.element_ty), mask=inside)


def _rows(x: Tensor, weights: Sequence[Tensor], groups: Groups, turned: bool = False) -> list[Tensor]:
    """What _rows_reference does, for one weight, or two of one shape in one launch."""
    weights = [w.mT if turned else w for w in weights]  # (E, F, K) each
    (N, K), F, x = x.shape, weights[0].shape[1], inner(x)
    out, (size, expert, row) = [x.new_empty(N, F) for _ in weights], groups.tiles  # (N, F) each
    if N:  # a grid of 0 programs is an error
        w, v, y, z = weights[0], weights[-1], out[0], out[-1]
        _rows_kernel[(len(row), triton.cdiv(F, BLOCK_N[x.dtype]))](
            x, w, v, y, z, expert, row, groups.start, F, K, x.stride(0), *w.stride(), *v.stride(), PAIR=len(out) > 1,
            BLOCK_M=size, BLOCK_N=BLOCK_N[x.dtype], BLOCK_K=BLOCK_K, num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _dw(dy: Tensor, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """What _dw_reference does."""
    (E, F, K), dy, x, dw = weight.shape, inner(dy), inner(x), weight.new_empty(weight.shape)
    _weights_kernel[(triton.cdiv(F, BLOCK_N[x.dtype]), triton.cdiv(K, 64), E)](
        dy, x, dw, groups.start, F, K, dy.stride(0), x.stride(0),
        BLOCK_M=32, BLOCK_N=BLOCK_N[x.dtype], BLOCK_K=64, num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return dw


# ----------------------------------------------------------------------------
# 3. autograd


class _Grouped(torch.autograd.Function):
    """(3) for weights that read the same rows. Saves rows and weights; packed weights are unpacked a second time."""

    @staticmethod
    def forward(ctx, x, groups, backend, packed, *weights):
        ctx.groups, ctx.packed = groups, packed
        ctx.rows, ctx.dw = (_rows, _dw) if backend == "triton" else (_rows_reference, _dw_reference)
        ctx.save_for_backward(x, *weights)
        return tuple(ctx.rows(x, packed or weights, groups))  # (N, out) each

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        (x, *weights), groups, wanted = ctx.saved_tensors, ctx.groups, ctx.needs_input_grad
        dx = None
        if wanted[0]:
            parts = zip(dys, ctx.packed or weights, strict=True)
            dx = functools.reduce(torch.add, (ctx.rows(dy, [w], groups, True)[0] for dy, w in parts))  # (N, in)
        pairs = zip(dys, weights, wanted[4:], strict=False)  # (E, out, in) each
        return dx, None, None, None, *(ctx.dw(dy, x, w, groups) if needed else None for dy, w, needed in pairs)


class _Spread(torch.autograd.Function):
    """(2). Backward: (4) with all weights 1."""

    @staticmethod
    def forward(ctx, x, groups):
        ctx.groups = groups
        return x[groups.token]  # (N, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        return _sum(drows, None, ctx.groups), None  # (T, C)


class _Combine(torch.autograd.Function):
    """(4). Saves y and w. dy[n] = w dout[token of n], dw = <dout, y>."""

    @staticmethod
    def forward(ctx, y, w, groups):
        ctx.save_for_backward(y, w)
        ctx.groups = groups
        return _sum(y, w, groups)  # (T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (y, w), groups = ctx.saved_tensors, ctx.groups
        rows = dout[groups.token]  # (N, C)
        dw = (rows.float() * y.float()).sum(-1)[groups.place].to(w.dtype)  # (T, k)
        return rows * w.flatten()[groups.order, None], dw, None


def _sum(y: Tensor, w: Tensor | None, groups: Groups) -> Tensor:
    """out[t] = sum over j of w[t, j] y[place[t, j]], added in fp32 one j after the other, rounded once. (T, C)"""
    total = None
    for j in range(groups.place.shape[1]):
        part = y[groups.place[:, j]].float()  # (T, C)
        part = part if w is None else part * w[:, j, None]
        total = part if total is None else total.add_(part)
    return total.to(y.dtype)


# ----------------------------------------------------------------------------
# 4. entry


def spread(x: Tensor, groups: Groups) -> Tensor:
    """(2): x (T, C) -> (N, C), the row of each pair, sorted by expert. Differentiable in x."""
    return _Spread.apply(x, groups)


def combine(y: Tensor, w: Tensor, groups: Groups) -> Tensor:
    """(4): y (N, C) sorted by expert, w (T, k) the weights of each token's experts -> (T, C) in y's dtype, summed in
    fp32. Differentiable in both. transformers rounds every product and every sum to the model's dtype."""
    return _Combine.apply(y, w, groups)


def grouped_linear(
    x: Tensor, weights: Sequence[Weights], groups: Groups, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """Each row times the weight of its expert; for several weights that read the same rows, in one launch.

        y[n] = W[e] x[n]        rows n of expert e: groups.start[e] .. groups.start[e + 1] - 1

    x        (N, in) bf16, fp16 or fp32 (torch: fp64 too), sorted by expert; carries a gradient
    weights  one or two of (E, out, in), x's dtype, any strides, carrying gradients; or as many sequences of E packed
             weights (out, in), which are frozen and unpacked one expert at a time, by torch on any device
    groups   what sort_by_expert made
    backend  "torch" | "triton" | None, which is Triton on a GPU and torch elsewhere
    returns  (N, out) in x's dtype for each weight

    Raises ValueError when shapes, dtypes or devices do not fit.

    Source: MegaBlocks, arXiv 2211.15841; ScatterMoE, arXiv 2403.08245.
    Elsewhere: torch._grouped_mm; transformers integrations/moe.py; vLLM fused_moe; Liger fused_moe.
    """
    (N, E), shapes = (len(groups.order), len(groups.start) - 1), [(len(w), *w[0].shape) for w in weights]
    if len(set(shapes)) != 1 or len(shapes) > 2 or shapes[0][::2] != (E, x.shape[-1]) or x.shape[:-1] != (N,):
        want = f"({N}, in) and one or two weights of one shape ({E}, out, in)"
        raise ValueError(f"got rows {tuple(x.shape)} and weights {shapes}, want {want}; spread(x, groups) makes rows")
    if packed := () if isinstance(weights[0], Tensor) else tuple(weights):
        return _Grouped.apply(x, groups, "torch", packed)  # (N, out) each
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(f"got rows of {x.dtype} and weights of {weights[0].dtype}, want one dtype; cast with .to()")
    same_device(x=x, weight=weights[0], groups=groups.start)
    unfit = "" if x.dtype in FLOATS else f"{x.dtype} for Triton, want bf16, fp16 or fp32"
    return _Grouped.apply(x, groups, or_torch(choose(backend, x), backend, unfit), (), *weights)  # (N, out) each
