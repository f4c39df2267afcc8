"""RoPE for queries and keys, with the norm that Qwen 3 and Gemma 3 put in front of it, in one launch.

    h = x * rsqrt(mean_d x[d]^2 + eps) * weight                 of each head; without a norm h = x                (1)
    y[i]         = h[i]         cos[i]         - h[i + R / 2] sin[i]             0 <= i < R / 2                   (2)
    y[i + R / 2] = h[i + R / 2] cos[i + R / 2] + h[i]         sin[i + R / 2]
    y[j]         = h[j]                                                          R <= j < D                       (3)

cos[i + R / 2] = cos[i] in every model, which makes (2) a rotation of the pair (i, i + R / 2); nothing here needs it to.

The work is moving bytes. As torch operations a token of Qwen3-0.6B moves 174 KB forward and 321 KB backward, half of it
in fp32. Bytes a token, bf16, which divided by the memory's bandwidth are the floor:

                          reads                        writes       together              Qwen3-0.6B, H = 16, K = 8
    forward               q, k, cos, sin               y of both    4 (H + K) D + 4 R     12.8 KB
    backward, no norm     dy of both, cos, sin         dq, dk       4 (H + K) D + 4 R
    backward              dy and x of both, cos, sin   dq, dk       6 (H + K) D + 4 R     18.9 KB

Everything between the first read and the last write is fp32, rounded once, with a norm and without. The reference
rounds after the norm (twice), after each product and after the sum. In 16 bits the two therefore differ by an ulp or
two, and the kernel is the one closer to the exact number (tests/test_rope.py holds it to that).

The file reads top to bottom:

    1. reference    plain torch, bit for bit what the model has always computed. Also the CPU backend.
    2. kernels      Triton. Heads are rows: a program takes a tile of them, from queries or from keys.
    3. autograd     glues them together; with a norm it saves q and k, without one nothing but cos and sin.
    4. entry        rope: the name other files import.

Left out: gradients of cos and sin, neighbouring pairs (2 i, 2 i + 1), writing over q and k (as many bytes, and an input
that others may still read), gradients of gradients (the reference has them).

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_rope.py
Shapes: B rows, T positions, H query heads, K key heads, D head width, R = rotary_dim, the channels that turn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import FLOATS, check_positive, choose, inner, or_torch, same_device, tl, triton
from kernels.rms_norm import rms_norm_reference

# Numbers a program holds of one tensor: 16 heads of 128, or 8 of 256. 2048 on 128 threads are 16 each; backward keeps
# x, dy, cos, sin and their products, about 100 registers. A tile of heads, not of tokens: 14 query and 2 key heads
# (Qwen2.5-0.5B) fill it as well as 16 and 8. The number of rows depends on D alone, so a head's bits never depend on
# how many others there are.
TILE = 2048
# Programs for each of q and k when dweight is wanted. Each writes a row of partial sums, 4 D bytes: 256 KB for all.
# A fixed number, because the order of summation follows from it.
MAX_PARTIALS = 256

# ----------------------------------------------------------------------------
# 1. reference


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Equations (2) and (3) in torch: (B, T, heads, D), (B or 1, T, 1, R) twice -> (B, T, heads, D)."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]  # (B, T, heads, R), (B, T, heads, D - R)
    first, second = turned.chunk(2, dim=-1)  # (B, T, heads, R / 2) each
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin  # (B, T, heads, R)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned  # (B, T, heads, D)


def rope_reference(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, plus_one: bool
) -> Tensor:  # fmt: skip
    """Equations (1) to (3) for the queries or for the keys: (B, T, heads, D) -> (B, T, heads, D)."""
    return rotate(x if weight is None else rms_norm_reference(x, weight, eps, plus_one), cos, sin)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _places(tile, heads, T, rows, ROWS: tl.constexpr):
    """Of the ROWS heads of a tile: number, batch row, position, head, and whether they exist.

    They are counted in int32 (a q of 2^31 heads is 0.5 TB) and multiplied by strides in int64.
    """
    row = tile * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    token = row // heads
    return row.to(tl.int64), (token // T).to(tl.int64), (token % T).to(tl.int64), (row % heads).to(tl.int64), row < rows


@triton.jit
def _forward_rows(
    tile, x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, stride_b, stride_t, stride_h, stride_cos, heads, T, rows, eps,
    NORM: tl.constexpr, PLUS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """(1) to (3) for one tile: first and second halves of the pairs, and the rest, are three arrays. PLUS is 1.0 where
    the weight is stored minus 1, else 0.0."""
    row, b, t, h, live = _places(tile, heads, T, rows, ROWS)
    i, j = tl.arange(0, BLOCK_HALF), R + tl.arange(0, BLOCK_REST)  # (BLOCK_HALF,), (BLOCK_REST,)
    pairs, rest = live[:, None] & (i < R // 2)[None, :], live[:, None] & (j < D)[None, :]
    x = x_ptr + (b * stride_b + t * stride_t + h * stride_h)[:, None]  # (ROWS, 1) where each head starts
    first = tl.load(x + i[None, :], mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    second = tl.load(x + i[None, :] + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    if R < D:
        tail = tl.load(x + j[None, :], mask=rest, other=0.0).to(tl.float32)  # (ROWS, BLOCK_REST)
    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)  # (ROWS,)
        if R < D:
            square += tl.sum(tail * tail, axis=1)
        rstd = tl.rsqrt(square / D + eps)[:, None]  # (ROWS, 1)
        w_first = PLUS + tl.load(weight_ptr + i, mask=i < R // 2, other=0.0).to(tl.float32)  # (BLOCK_HALF,)
        w_second = PLUS + tl.load(weight_ptr + i + R // 2, mask=i < R // 2, other=0.0).to(tl.float32)
        first, second = first * rstd * w_first[None, :], second * rstd * w_second[None, :]
        if R < D:
            w_tail = PLUS + tl.load(weight_ptr + j, mask=j < D, other=0.0).to(tl.float32)  # (BLOCK_REST,)
            tail = tail * rstd * w_tail[None, :]
    angle = ((b * stride_cos + t) * R)[:, None] + i[None, :]  # (ROWS, BLOCK_HALF)
    cos = tl.load(cos_ptr + angle, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    sin = tl.load(sin_ptr + angle, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    y_first = first * cos - second * sin
    cos = tl.load(cos_ptr + angle + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    sin = tl.load(sin_ptr + angle + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
    y_second = second * cos + first * sin
    y = y_ptr + (row * D)[:, None]  # (ROWS, 1) what is written is contiguous
    tl.store(y + i[None, :], y_first.to(y_ptr.dtype.element_ty), mask=pairs)
    tl.store(y + i[None, :] + R // 2, y_second.to(y_ptr.dtype.element_ty), mask=pairs)
    if R < D:
        tl.store(y + j[None, :], tail.to(y_ptr.dtype.element_ty), mask=rest)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, stride_cos, H, K, T, tokens, q_tiles, eps,
    NORM: tl.constexpr, PLUS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The first q_tiles programs turn queries, the others keys."""
    p = tl.program_id(0)
    if p < q_tiles:
        _forward_rows(
            p, q_ptr, yq_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_stride_b, q_stride_t, q_stride_h, stride_cos,
            H, T, tokens * H, eps, NORM, PLUS, D, R, ROWS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _forward_rows(
            p - q_tiles, k_ptr, yk_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_stride_b, k_stride_t, k_stride_h, stride_cos,
            K, T, tokens * K, eps, NORM, PLUS, D, R, ROWS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    p, tiles, dy_ptr, x_ptr, dx_ptr, weight_ptr, partial_ptr, cos_ptr, sin_ptr,
    stride_dy_b, stride_dy_t, stride_dy_h, stride_b, stride_t, stride_h, stride_cos, heads, T, rows, eps,
    NORM: tl.constexpr, PLUS: tl.constexpr, DWEIGHT: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The rotation backwards, which is a rotation by -angle:

        dh[i]         = dy[i]         cos[i]         + dy[i + R / 2] sin[i + R / 2]
        dh[i + R / 2] = dy[i + R / 2] cos[i + R / 2] - dy[i]         sin[i]

    and then, with n = x rstd, s = weight or 1 + weight, the norm's (kernels/rms_norm.py):

        dx = rstd (dh s - n mean_d(dh s n))          dweight = sum of dh n over the heads of this program

    rstd is computed again from x, which is here anyway: nothing has to be saved for it.
    """
    i, j = tl.arange(0, BLOCK_HALF), R + tl.arange(0, BLOCK_REST)  # (BLOCK_HALF,), (BLOCK_REST,)
    if DWEIGHT:
        dw_first = tl.zeros((ROWS, BLOCK_HALF), dtype=tl.float32)  # (ROWS, BLOCK_HALF) summed over ROWS at the end
        dw_second = tl.zeros((ROWS, BLOCK_HALF), dtype=tl.float32)  # (ROWS, BLOCK_HALF)
        dw_tail = tl.zeros((ROWS, BLOCK_REST), dtype=tl.float32)  # (ROWS, BLOCK_REST)
    for step in range(tiles):
        row, b, t, h, live = _places(p * tiles + step, heads, T, rows, ROWS)
        pairs, rest = live[:, None] & (i < R // 2)[None, :], live[:, None] & (j < D)[None, :]
        dy = dy_ptr + (b * stride_dy_b + t * stride_dy_t + h * stride_dy_h)[:, None]  # (ROWS, 1)
        dy_first = tl.load(dy + i[None, :], mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        dy_second = tl.load(dy + i[None, :] + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        angle = ((b * stride_cos + t) * R)[:, None] + i[None, :]  # (ROWS, BLOCK_HALF)
        cos = tl.load(cos_ptr + angle, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        sin = tl.load(sin_ptr + angle + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        d_first = dy_first * cos + dy_second * sin
        cos = tl.load(cos_ptr + angle + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        sin = tl.load(sin_ptr + angle, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
        d_second = dy_second * cos - dy_first * sin
        if R < D:
            d_tail = tl.load(dy + j[None, :], mask=rest, other=0.0).to(tl.float32)  # (ROWS, BLOCK_REST)
        if NORM:
            x = x_ptr + (b * stride_b + t * stride_t + h * stride_h)[:, None]  # (ROWS, 1)
            first = tl.load(x + i[None, :], mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
            second = tl.load(x + i[None, :] + R // 2, mask=pairs, other=0.0).to(tl.float32)  # (ROWS, BLOCK_HALF)
            square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)  # (ROWS,)
            if R < D:
                tail = tl.load(x + j[None, :], mask=rest, other=0.0).to(tl.float32)  # (ROWS, BLOCK_REST)
                square += tl.sum(tail * tail, axis=1)
            rstd = tl.rsqrt(square / D + eps)[:, None]  # (ROWS, 1)
            first, second = first * rstd, second * rstd  # (ROWS, BLOCK_HALF) twice: n
            if DWEIGHT:
                dw_first += d_first * first
                dw_second += d_second * second
            w_first = PLUS + tl.load(weight_ptr + i, mask=i < R // 2, other=0.0).to(tl.float32)  # (BLOCK_HALF,)
            w_second = PLUS + tl.load(weight_ptr + i + R // 2, mask=i < R // 2, other=0.0).to(tl.float32)
            d_first, d_second = d_first * w_first[None, :], d_second * w_second[None, :]
            along = tl.sum(d_first * first, axis=1) + tl.sum(d_second * second, axis=1)  # (ROWS,)
            if R < D:
                tail = tail * rstd
                if DWEIGHT:
                    dw_tail += d_tail * tail
                w_tail = PLUS + tl.load(weight_ptr + j, mask=j < D, other=0.0).to(tl.float32)  # (BLOCK_REST,)
                d_tail = d_tail * w_tail[None, :]
                along += tl.sum(d_tail * tail, axis=1)
            along = (along / D)[:, None]  # (ROWS, 1)
            d_first = rstd * (d_first - first * along)
            d_second = rstd * (d_second - second * along)
            if R < D:
                d_tail = rstd * (d_tail - tail * along)
        dx = dx_ptr + (row * D)[:, None]  # (ROWS, 1) what is written is contiguous
        tl.store(dx + i[None, :], d_first.to(dx_ptr.dtype.element_ty), mask=pairs)
        tl.store(dx + i[None, :] + R // 2, d_second.to(dx_ptr.dtype.element_ty), mask=pairs)
        if R < D:
            tl.store(dx + j[None, :], d_tail.to(dx_ptr.dtype.element_ty), mask=rest)
    if DWEIGHT:
        partial = partial_ptr + p * D
        tl.store(partial + i, tl.sum(dw_first, axis=0), mask=i < R // 2)
        tl.store(partial + i + R // 2, tl.sum(dw_second, axis=0), mask=i < R // 2)
        if R < D:
            tl.store(partial + j, tl.sum(dw_tail, axis=0), mask=j < D)


@triton.jit
def _backward_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, q_weight_ptr, k_weight_ptr, q_partial_ptr, k_partial_ptr,
    cos_ptr, sin_ptr, dyq_stride_b, dyq_stride_t, dyq_stride_h, dyk_stride_b, dyk_stride_t, dyk_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, stride_cos, H, K, T, tokens,
    q_programs, q_each, k_each, eps,
    NORM: tl.constexpr, PLUS: tl.constexpr, DWEIGHT: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The first q_programs programs take q_each tiles of queries, the others k_each tiles of keys."""
    p = tl.program_id(0)
    if p < q_programs:
        _backward_rows(
            p, q_each, dyq_ptr, q_ptr, dq_ptr, q_weight_ptr, q_partial_ptr, cos_ptr, sin_ptr,
            dyq_stride_b, dyq_stride_t, dyq_stride_h, q_stride_b, q_stride_t, q_stride_h, stride_cos,
            H, T, tokens * H, eps, NORM, PLUS, DWEIGHT, D, R, ROWS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _backward_rows(
            p - q_programs, k_each, dyk_ptr, k_ptr, dk_ptr, k_weight_ptr, k_partial_ptr, cos_ptr, sin_ptr,
            dyk_stride_b, dyk_stride_t, dyk_stride_h, k_stride_b, k_stride_t, k_stride_h, stride_cos,
            K, T, tokens * K, eps, NORM, PLUS, DWEIGHT, D, R, ROWS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


# ----------------------------------------------------------------------------
# 3. autograd


@dataclass(frozen=True)
class _Turn:
    """What steers a call and carries no gradient. FMAs are off: their default changes between versions of Triton."""

    cos: Tensor  # (B or 1, T, 1, R) contiguous
    sin: Tensor  # (B or 1, T, 1, R) contiguous
    eps: float
    plus_one: bool

    def launch(self, D: int, norm: bool) -> dict[str, int | bool]:
        R, power = self.cos.shape[-1], lambda n: 1 << (n - 1).bit_length()
        rows = max(1, TILE // power(D))
        blocks = {"BLOCK_HALF": power(R // 2), "BLOCK_REST": power(max(1, D - R))}
        flags = {"NORM": norm, "PLUS": float(self.plus_one), "num_warps": 4, "enable_fp_fusion": False}
        return {"D": D, "R": R, "ROWS": rows, **blocks, **flags}

    @property
    def stride(self) -> int:
        """From one row of the batch to the next, in rows of R; 0 where all share their positions."""
        return self.cos.shape[1] if self.cos.shape[0] > 1 else 0


class _Rope(torch.autograd.Function):
    """Saves cos and sin (shared by all layers), and with a norm q and k, 2 (H + K) D bytes a token in bf16, which are
    the projections' outputs anyway. No rstd: it is computed again."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, turn):
        norm = q_weight is not None
        q, k = inner(q), inner(k)  # (B, T, H, D), (B, T, K, D): a transposed (B, heads, T, D) stays a view
        weights = [w.contiguous() for w in (q_weight, k_weight)] if norm else [q, k]  # (D,) twice; not read without
        (B, T, H, D), K = q.shape, k.shape[2]
        yq = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, T, H, D) contiguous, whatever q is
        yk = torch.empty(k.shape, dtype=k.dtype, device=k.device)  # (B, T, K, D)
        launch = turn.launch(D, norm)
        q_tiles, k_tiles = (triton.cdiv(B * T * heads, launch["ROWS"]) for heads in (H, K))
        if q_tiles + k_tiles:  # a grid of 0 programs is an error
            _forward_kernel[(q_tiles + k_tiles,)](
                q, k, yq, yk, *weights, turn.cos, turn.sin, *q.stride()[:3], *k.stride()[:3], turn.stride,
                H, K, T, B * T, q_tiles, turn.eps, **launch,
            )  # fmt: skip
        ctx.save_for_backward(turn.cos, turn.sin, *((q, k, *weights) if norm else ()))
        ctx.shapes, ctx.eps, ctx.plus_one = (q.shape, k.shape), turn.eps, turn.plus_one
        return yq, yk

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq, dyk):
        cos, sin, *saved = ctx.saved_tensors
        turn, norm = _Turn(cos, sin, ctx.eps, ctx.plus_one), bool(saved)
        dyq, dyk = inner(dyq), inner(dyk)  # (B, T, H, D), (B, T, K, D)
        q, k, *weights = saved if norm else (dyq, dyk, dyq, dyk)  # not read without a norm
        (B, T, H, D), K = ctx.shapes[0], ctx.shapes[1][2]
        want_dweight = norm and any(ctx.needs_input_grad[2:4])  # under LoRA the norms are frozen: no partial sums
        dq = torch.empty(ctx.shapes[0], dtype=dyq.dtype, device=dyq.device)  # (B, T, H, D)
        dk = torch.empty(ctx.shapes[1], dtype=dyk.dtype, device=dyk.device)  # (B, T, K, D)
        launch = turn.launch(D, norm)
        tiles = [triton.cdiv(B * T * heads, launch["ROWS"]) for heads in (H, K)]
        each = [max(1, triton.cdiv(n, MAX_PARTIALS)) if want_dweight else 1 for n in tiles]
        programs = [triton.cdiv(n, e) for n, e in zip(tiles, each, strict=True)]
        partials = [dq, dk]  # not written
        if want_dweight:
            partials = [torch.empty((n, D), dtype=torch.float32, device=dq.device) for n in programs]  # (programs, D)
        if sum(programs):
            _backward_kernel[(sum(programs),)](
                dyq, dyk, q, k, dq, dk, *weights, *partials, cos, sin, *dyq.stride()[:3], *dyk.stride()[:3],
                *q.stride()[:3], *k.stride()[:3], turn.stride, H, K, T, B * T, programs[0], *each, turn.eps,
                DWEIGHT=want_dweight, **launch,
            )  # fmt: skip
        if not want_dweight:
            return dq, dk, None, None, None
        # programs write their own row and one torch.sum adds them: no atomics, the same bits every run
        return dq, dk, *(p.sum(0).to(w.dtype) for p, w in zip(partials, weights, strict=True)), None


# ----------------------------------------------------------------------------
# 4. entry


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised per head where the model does that, turned by the angles of their positions.

        h = rms_norm(x, weight)          y = h cos + (-h[second half], h[first half]) sin

    q, k      (B, T, H, D), (B, T, K, D) bf16, fp16 or fp32 (torch: fp64 too), any strides; carry gradients
    cos, sin  (B, T, 1, R), or (1, T, 1, R) where all rows share their positions; R even and at most D: the channels
              from R on are not turned. dtype of q; no gradient
    q_weight, k_weight  (D,) dtype of q, both or neither; carry gradients if they want them. Frozen (LoRA) they cost
              nothing in backward
    eps, plus_one       as in kernels/rms_norm.py
    backend   "torch" | "triton" | None, which is Triton on a GPU and torch elsewhere
    returns   q and k, shapes and dtypes as they came, contiguous from Triton; differentiable in q, k and the weights

    A head's bits do not depend on the other rows of the batch (Triton).

    Raises ValueError when shapes or dtypes do not fit.

    Source: RoPE, arXiv:2104.09864, in the half-split layout of Hugging Face checkpoints.
    Elsewhere: Liger rope.py (rotation alone, in place); Unsloth qk_norm_rope.py; vLLM fused_qk_norm_rope.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    like = q.ndim == k.ndim == cos.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not like or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1:3] != (q.shape[1], 1):
        raise ValueError(f"got {shapes}, want (B, T, H, D), (B, T, K, D) and twice (B or 1, T, 1, rotary_dim)")
    D, R = q.shape[3], cos.shape[3]
    if not 0 < R <= D or R % 2:
        raise ValueError(f"got cos of width {R} for heads of width {D}, want an even number up to {D}; see rotary_dim")
    weights = [w for w in (q_weight, k_weight) if w is not None]
    if len(weights) == 1 or any(w.shape != (D,) for w in weights):
        got = ", ".join("None" if w is None else str(tuple(w.shape)) for w in (q_weight, k_weight))
        raise ValueError(f"got q_weight, k_weight {got}, want ({D},) twice, or None twice for heads without a norm")
    dtypes = {t.dtype for t in (q, k, cos, sin, *weights)}
    if len(dtypes) > 1 or not q.is_floating_point():
        words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"got dtypes {words} among q, k, cos, sin and weights, want one float dtype; use .to(q.dtype)")
    check_positive("eps", eps if weights else None, ", as in the checkpoint's config.json (1e-6)")
    same_device(q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    unfit = "" if q.dtype in FLOATS else f"{q.dtype} for Triton, want bf16, fp16 or fp32"
    if or_torch(choose(backend, q), backend, unfit) == "torch":
        return (
            rope_reference(q, cos, sin, q_weight, eps, plus_one),  # (B, T, H, D)
            rope_reference(k, cos, sin, k_weight, eps, plus_one),  # (B, T, K, D)
        )
    return _Rope.apply(q, k, q_weight, k_weight, _Turn(cos.contiguous(), sin.contiguous(), eps, plus_one))
