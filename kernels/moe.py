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
    2. kernels      Triton: a program is a tile of rows of one expert. Which expert, it looks up: the host never learns
                    how many rows an expert has, so nothing waits for the GPU. gate and up are one launch and read x once
    3. autograd     (3) saves rows and weights; (2) and (4) each other.
    4. entry        sort_by_expert, spread, grouped_linear, combine: the names other files import.

What bits depend on. Triton: a row's own numbers and N; which other rows there are never shows. torch: a CPU's matmul
may sum in another order for another number of rows, here the expert's. So a token's last bits can depend on what others
of its batch are routed to. Equal batches give equal bits, which is all that a first ratio of exactly 1 needs.

Left out: gather and combine inside the matmul's loads and stores (scattermoe), gradients of gradients, wgmma tiles.

Lesson: lessons/16_experts.md       Tests: tests/test_moe_kernel.py
Shapes: T tokens, k experts each, N = T k rows, E experts; in and out of a weight.
"""

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
BLOCK_M, FEW_M, BLOCK_N, BLOCK_K = 64, 16, 64, 32
Weights = Tensor | Sequence[Packed]  # (E, out, in), or that in packed pieces (out, in)


@dataclass(frozen=True)
class Groups:
    """(1): pairs (t, j) are counted t k + j; sorted by expert, ties by that number."""

    order: Tensor  # (N,) int64, pair of each row
    place: Tensor  # (T, k) int64, row of each pair
    start: Tensor  # (E + 1,) int64, where each expert's rows begin

    @property
    def token(self) -> Tensor:
        return self.order // self.place.shape[1]  # (N,)

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        """(expert, its rows) of experts with rows. On a GPU this waits for it."""
        bounds = self.start.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]


def sort_by_expert(index: Tensor, experts: int) -> Groups:
    """index (T, k) int64, the experts of each token, in 0 .. experts - 1. Nothing waits for a GPU."""
    expert, order = index.flatten().sort(stable=True)  # (N,), (N,)
    place = torch.empty_like(order)  # (N,)
    place[order] = torch.arange(len(order), device=order.device)
    start = torch.searchsorted(expert, torch.arange(experts + 1, device=order.device))  # (E + 1,)
    return Groups(order, place.view(index.shape), start)


# ----------------------------------------------------------------------------
# 1. reference


def _dense(weight: Weights, e: int, x: Tensor) -> Tensor:
    """Expert e's (out, in), unpacked into x's dtype if it is packed."""
    return weight[e].detach() if isinstance(weight, Tensor) else weight[e].dequantize(x.dtype)


def _forward_reference(x: Tensor, weights: tuple[Weights, ...], groups: Groups) -> list[Tensor]:
    out = [x.new_empty(len(x), _shape(w)[1]) for w in weights]  # (N, out) each
    for e, rows in groups.slices:
        for y, weight in zip(out, weights, strict=True):
            torch.mm(x[rows], _dense(weight, e, x).T, out=y[rows])
    return out


def _dx_reference(dy: Tensor, weight: Weights, groups: Groups) -> Tensor:
    dx = dy.new_empty(len(dy), _shape(weight)[2])  # (N, in)
    for e, rows in groups.slices:
        torch.mm(dy[rows], _dense(weight, e, dy), out=dx[rows])
    return dx


def _dw_reference(dy: Tensor, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    dw = torch.zeros_like(weight)  # (E, out, in): 0 for experts without rows
    for e, rows in groups.slices:
        torch.mm(dy[rows].T, x[rows], out=dw[e])
    return dw


def _shape(weight: Weights) -> tuple[int, int, int]:
    return tuple(weight.shape) if isinstance(weight, Tensor) else (len(weight), *weight[0].shape)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _tile(start_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of its rows) of the tile of rows that this program is to make: tiles are counted over
    experts, each of which begins a new one. Programs beyond the last tile get an empty one of expert E - 1."""
    e = tl.arange(0, BLOCK_E)  # (BLOCK_E,)
    first = tl.load(start_ptr + e, mask=e < E, other=0)  # (BLOCK_E,)
    end = tl.load(start_ptr + e + 1, mask=e < E, other=0)  # (BLOCK_E,)
    tiles = (end - first + BLOCK_M - 1) // BLOCK_M  # (BLOCK_E,)
    before = tl.cumsum(tiles, 0)  # (BLOCK_E,) tiles up to and with this expert
    t = tl.program_id(0)
    expert = tl.minimum(tl.sum((before <= t).to(tl.int32), 0), E - 1)
    mine = e == expert
    begun = tl.sum(tl.where(mine, before - tiles, 0), 0)
    stop = tl.sum(tl.where(mine, end, 0), 0)
    return expert, tl.sum(tl.where(mine, first, 0), 0) + (t - begun) * BLOCK_M, stop


@triton.jit
def _rows_kernel(
    x_ptr, w_ptr, v_ptr, y_ptr, z_ptr, start_ptr, E, F, K, stride_x, w_e, w_f, w_k, v_e, v_f, v_k,
    PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[n, f] = sum_k x[n, k] w[e, f, k] for a tile of rows n of expert e; with PAIR also z from v, x read once.

    Strides make w its own transpose: the same kernel is dx = dy W.
    """
    e, row, stop = _tile(start_ptr, E, BLOCK_M, BLOCK_E)
    n = row.to(tl.int64) + tl.arange(0, BLOCK_M)  # (BLOCK_M,) int64: N K may pass 2^31
    f = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    e = e.to(tl.int64)
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
        n = row + tl.arange(0, BLOCK_M).to(tl.int64)  # (BLOCK_M,)
        inside = (n < stop)[None, :] & (f < F)[:, None]  # (BLOCK_N, BLOCK_M)
        dy = tl.load(dy_ptr + n[None, :] * stride_dy + f[:, None], mask=inside, other=0.0)
        inside = (n < stop)[:, None] & (k < K)[None, :]  # (BLOCK_M, BLOCK_K)
        x = tl.load(x_ptr + n[:, None] * stride_x + k[None, :], mask=inside, other=0.0)
        acc = tl.dot(dy, x, acc, input_precision="ieee")
    inside = (f < F)[:, None] & (k < K)[None, :]  # (BLOCK_N, BLOCK_K)
    tl.store(dw_ptr + (e * F + f[:, None]) * K + k[None, :], acc.to(dw_ptr.dtype.element_ty), mask=inside)


def _rows(x: Tensor, weights: tuple[Tensor, ...], groups: Groups) -> list[Tensor]:
    """Launch _rows_kernel for one weight (E, F, K) or two of one shape, of any strides."""
    (N, K), (E, F, _) = x.shape, weights[0].shape
    x, out = inner(x), [x.new_empty(N, F) for _ in weights]  # (N, F) each
    block_m = BLOCK_M if N > FEW_M * E else FEW_M
    if N:  # a grid of 0 programs is an error
        w, v, y, z = weights[0], weights[-1], out[0], out[-1]
        # every expert may have a tile that is not full
        _rows_kernel[(triton.cdiv(N, block_m) + E, triton.cdiv(F, BLOCK_N))](
            x, w, v, y, z, groups.start, E, F, K, x.stride(0), *w.stride(), *v.stride(),
            PAIR=len(weights) > 1, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            BLOCK_E=triton.next_power_of_2(E), num_warps=4, num_stages=3, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _dw(dy: Tensor, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Launch _weights_kernel: (E, F, K), contiguous."""
    E, F, K = weight.shape
    dy, x, dw = inner(dy), inner(x), weight.new_empty(weight.shape)
    _weights_kernel[(triton.cdiv(F, BLOCK_N), triton.cdiv(K, 64), E)](
        dy, x, dw, groups.start, F, K, dy.stride(0), x.stride(0),
        BLOCK_M=32, BLOCK_N=BLOCK_N, BLOCK_K=64, num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return dw


# ----------------------------------------------------------------------------
# 3. autograd


class _Grouped(torch.autograd.Function):
    """(3) for weights that read the same rows. Saves rows and weights; packed weights are unpacked a second time."""

    @staticmethod
    def forward(ctx, x, groups, backend, packed, *weights):
        weights = packed or weights
        ctx.groups, ctx.triton, ctx.packed, ctx.pair = groups, backend == "triton", packed, len(weights)
        ctx.save_for_backward(x, *(() if packed else weights))
        return tuple((_rows if ctx.triton else _forward_reference)(x, weights, groups))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        (x, *weights), groups, dx = ctx.saved_tensors, ctx.groups, None
        if ctx.needs_input_grad[0]:
            for dy, weight in zip(dys, ctx.packed or weights, strict=True):
                part = (  # (N, in)
                    _rows(dy, (weight.transpose(1, 2),), groups)[0] if ctx.triton else _dx_reference(dy, weight, groups)
                )
                dx = part if dx is None else dx + part
        dws = [
            (_dw if ctx.triton else _dw_reference)(dy, x, weight, groups) if needed else None
            for dy, weight, needed in zip(dys, weights, ctx.needs_input_grad[4:], strict=False)
        ]
        return dx, None, None, None, *dws


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
        spread = dout[groups.token]  # (N, C)
        dw = (spread.float() * y.float()).sum(-1)[groups.place].to(w.dtype)  # (T, k)
        return spread * w.flatten()[groups.order, None], dw, None


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
    shapes = {_shape(w) for w in weights}
    wanted = (len(groups.start) - 1, x.shape[-1])
    if len(shapes) != 1 or len(weights) > 2 or any((E, K) != wanted for E, _, K in shapes):
        got = f"got weights {sorted(shapes)} for rows {tuple(x.shape)}"
        raise ValueError(f"{got}, want one or two of one shape ({wanted[0]}, out, {wanted[1]})")
    if x.ndim != 2 or len(x) != len(groups.order):
        raise ValueError(f"got rows {tuple(x.shape)}, want ({len(groups.order)}, in): spread(x, groups)")
    if not all(isinstance(w, Tensor) for w in weights):
        return _Grouped.apply(x, groups, "torch", tuple(weights))
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(f"got rows of {x.dtype} and weights of {weights[0].dtype}, want one dtype; cast with .to()")
    same_device(x=x, weight=weights[0], groups=groups.start)
    unfit = "" if x.dtype in FLOATS else f"{x.dtype} for Triton, want bf16, fp16 or fp32"
    return _Grouped.apply(x, groups, or_torch(choose(backend, x), backend, unfit), (), *weights)  # (N, out) each
