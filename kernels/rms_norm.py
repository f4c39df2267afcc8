"""RMSNorm, alone or together with the residual addition in front of it, in one pass over memory.

    h = x * rstd          rstd = 1 / sqrt(mean_w x[w]^2 + eps)                (1)
    y = weight * round(h)                    Llama, Qwen                      (2)
    y = round((1 + weight) * h)              Gemma: plus_one                  (3)

round() is to the dtype of x, all else is fp32. In bf16 the order matters: swapping (2) and (3) moves logits by 1e-2.

The work is moving bytes. A row of bf16 is read (2 W bytes) and written (2 W), for some 5 W FLOPs: about 1 FLOP a byte,
where an H100 could do 263. Written as torch operations, (2) moves 36 W bytes: every step is a trip to memory and back.
Bytes a row, bf16, which divided by the memory's bandwidth are the floor:

                      reads                        writes                 together       Qwen3-0.6B, W = 1024
    rms_norm          x                            y, rstd                4 W + 4        4.1 KB
      backward        dy, x, rstd                  dx                     6 W + 4        6.1 KB
    add_rms_norm      x, delta                     sum, y, rstd           8 W + 4        8.2 KB
      backward        dy, dsum, sum, rstd          dx (= ddelta)          8 W + 4        8.2 KB

The file reads top to bottom:

    1. reference    plain torch, bit for bit what the model has always computed. Also the CPU backend.
    2. kernels      Triton. A program holds whole rows in registers, so a row is read once.
    3. autograd     glues them together; saves x (or the sum) and one float a row.
    4. entry        rms_norm and add_rms_norm: the names other files import.

Left out: rows wider than 8192 (backward would spill its registers; torch takes them), biases, LayerNorm's mean,
gradients of gradients (the reference has them).

Lesson: lessons/07_counting_bytes.md       Tests: tests/test_rms_norm.py
Shapes: N rows (= all tokens, or all heads of all tokens), W width of a row.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import FLOATS, check_positive, choose, or_torch, rows, same_device, tl, triton

# Numbers a program holds of one tensor. 4096 on 256 threads are 16 each, two loads of 16 bytes in bf16; backward keeps
# four or five tensors in fp32, 64 to 80 registers a thread (about 120 with dweight). Narrow rows share a program (W =
# 128: 32 of them); the number of rows depends on W alone, so that a row is summed in one order whatever its batch.
TILE = 4096
MAX_WIDTH = 8192  # 512 threads at 16 numbers each; twice that has 64 registers a thread, and spills 120 bytes of them
# Programs that split the rows when dweight is wanted. Each writes a row of partial sums, 4 W bytes: at N = 8192 that
# is 8 % on top of the floor. 512 are about 4 for each of an H100's 132 multiprocessors, 64 KB of loads in flight where
# 3.3 TB/s and a latency of 0.8 us ask for 20 KB. A fixed number, because the order of summation follows from it.
MAX_PARTIALS = 512

# ----------------------------------------------------------------------------
# 1. reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Equations (1) to (3) in torch: (..., W), (W,) -> (..., W). float64 stays float64."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))  # (..., W)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)  # (..., W)
    return (h * (1.0 + weight.to(h.dtype))).to(x.dtype) if plus_one else weight * h.to(x.dtype)  # (..., W)


# ----------------------------------------------------------------------------
# 2. kernels


@triton.jit
def _forward_kernel(
    x_ptr, delta_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, stride_x, stride_delta, N, W, eps,
    ADD: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """(1) to (3) for ROWS rows; with ADD, x is first replaced by round(x + delta)."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64: n * W passes 2^31 at 2M rows of 1024
    w = tl.arange(0, BLOCK_W)  # (BLOCK_W,)
    inside = (n < N)[:, None] & (w < W)[None, :]  # (ROWS, BLOCK_W)
    out = n[:, None] * W + w[None, :]  # (ROWS, BLOCK_W) what is written is contiguous
    x = tl.load(x_ptr + n[:, None] * stride_x + w[None, :], mask=inside, other=0.0).to(tl.float32)  # (ROWS, BLOCK_W)
    if ADD:
        delta = tl.load(delta_ptr + n[:, None] * stride_delta + w[None, :], mask=inside, other=0.0).to(tl.float32)
        total = (x + delta).to(sum_ptr.dtype.element_ty)  # (ROWS, BLOCK_W) rounded as torch rounds x + delta
        tl.store(sum_ptr + out, total, mask=inside)
        x = total.to(tl.float32)  # (ROWS, BLOCK_W) what is normalised is what later layers will read
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)  # (ROWS,) columns beyond W hold 0 and add nothing
    h = x * rstd[:, None]  # (ROWS, BLOCK_W)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :]  # (1, BLOCK_W)
    if PLUS_ONE:
        y = h * (1.0 + weight)  # (ROWS, BLOCK_W)
    else:
        y = h.to(y_ptr.dtype.element_ty).to(tl.float32) * weight  # (ROWS, BLOCK_W)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + n, rstd, mask=n < N)


@triton.jit
def _backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, stride_dy, stride_dsum, stride_x, N, W, tiles,
    DSUM: tl.constexpr, DWEIGHT: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """With s the scale, weight or 1 + weight:

        dh = dy s
        dx = rstd (dh - h mean_w(dh h))       x scaled up leaves y as it is, so dx has no part along h
        dweight = sum_n dy[n] h[n]            here: of the rows of this program

    and dsum, the gradient that reaches x + delta from everywhere else, is added to dx. The roundings of (2) and (3)
    count as 1; everything is fp32 and dx is rounded once.
    """
    p = tl.program_id(0).to(tl.int64)
    w = tl.arange(0, BLOCK_W)  # (BLOCK_W,)
    scale = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :]  # (1, BLOCK_W)
    if PLUS_ONE:
        scale = 1.0 + scale  # (1, BLOCK_W)
    dweight = tl.zeros((ROWS, BLOCK_W), dtype=tl.float32)  # (ROWS, BLOCK_W) summed over ROWS once, at the end
    for i in range(tiles):
        n = (p * tiles + i) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
        inside = (n < N)[:, None] & (w < W)[None, :]  # (ROWS, BLOCK_W)
        x = tl.load(x_ptr + n[:, None] * stride_x + w[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + n[:, None] * stride_dy + w[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + n, mask=n < N, other=0.0)[:, None]  # (ROWS, 1)
        h = x * rstd  # (ROWS, BLOCK_W)
        dh = dy * scale  # (ROWS, BLOCK_W)
        along = tl.sum(dh * h, axis=1)[:, None] / W  # (ROWS, 1)
        dx = rstd * (dh - h * along)  # (ROWS, BLOCK_W)
        if DSUM:
            dx += tl.load(dsum_ptr + n[:, None] * stride_dsum + w[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n[:, None] * W + w[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if DWEIGHT:
            dweight += dy * h  # (ROWS, BLOCK_W)
    if DWEIGHT:
        tl.store(partial_ptr + p * W + w, tl.sum(dweight, axis=0), mask=w < W)


# ----------------------------------------------------------------------------
# 3. autograd


def _launch(W: int) -> dict[str, int | bool]:
    """Tile and threads for rows of width W. FMAs are off: their default changes between versions of Triton."""
    block = 1 << (W - 1).bit_length()  # the power of two Triton wants
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK_W": block, "num_warps": max(8, block // 512), "enable_fp_fusion": False}


class _RMSNorm(torch.autograd.Function):
    """Saves x, or x + delta where there is one (2 W bytes a row, alive anyway: it is the residual stream), weight, and
    rstd (4 bytes a row)."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps, plus_one):
        ctx.plus_one, ctx.shape = plus_one, x.shape
        y = x.new_empty(x.shape)  # (..., W) contiguous, whatever x is
        x = rows(x)  # (N, W)
        N, W = x.shape
        launch = _launch(W)
        total = None if delta is None else torch.empty_like(y)  # (..., W)
        rstd = x.new_empty(N, dtype=torch.float32)  # (N,)
        added = x if delta is None else rows(delta)  # (N, W) not read without a delta
        weight = weight.contiguous()  # (W,)
        if N:  # a grid of 0 programs is an error
            _forward_kernel[(triton.cdiv(N, launch["ROWS"]),)](
                x, added, weight, y, y if total is None else total, rstd, x.stride(0), added.stride(0), N, W, eps,
                ADD=delta is not None, PLUS_ONE=plus_one, **launch,
            )  # fmt: skip
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.set_materialize_grads(False)  # a sum that nothing else reads has no gradient to load
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        x, weight, rstd = ctx.saved_tensors
        _, want_ddelta, want_dweight, *_ = ctx.needs_input_grad
        if dy is None:  # only the sum was used
            return dsum, dsum if want_ddelta else None, None, None, None
        x, dy = rows(x), rows(dy)  # (N, W), (N, W)
        others = dy if dsum is None else rows(dsum)  # (N, W) not read without a dsum
        N, W = x.shape
        launch = _launch(W)
        tiles = triton.cdiv(N, launch["ROWS"])
        each = max(1, triton.cdiv(tiles, MAX_PARTIALS)) if want_dweight else 1  # under LoRA the norms are frozen
        programs = triton.cdiv(tiles, each)
        dx = torch.empty(ctx.shape, dtype=x.dtype, device=x.device)  # (..., W)
        partial = rstd.new_empty((programs, W)) if want_dweight else rstd  # (programs, W)
        if programs:
            _backward_kernel[(programs,)](
                dy, others, x, weight, rstd, dx, partial, dy.stride(0), others.stride(0), x.stride(0), N, W, each,
                DSUM=dsum is not None, DWEIGHT=want_dweight, PLUS_ONE=ctx.plus_one, **launch,
            )  # fmt: skip
        # programs write their own row and one torch.sum adds them: no atomics, the same bits every run
        dweight = partial.sum(0).to(weight.dtype) if want_dweight else None  # (W,)
        return dx, dx if want_ddelta else None, dweight, None, None


# ----------------------------------------------------------------------------
# 4. entry


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, plus_one: bool = False, backend: str | None = None) -> Tensor:
    """Each row divided by its root mean square, then scaled channel by channel.

        y = weight * round(x / sqrt(mean(x^2) + eps))            or, plus_one, round((1 + weight) * x / sqrt(...))

    x         (..., W) bf16, fp16 or fp32 (torch: fp64 too), any strides; carries a gradient
    weight    (W,) dtype of x; carries a gradient if it wants one. Frozen (LoRA) it costs nothing in backward
    eps       > 0, the checkpoint's rms_norm_eps
    plus_one  Gemma's form: weight is stored minus 1, and rounding comes last
    backend   "torch" | "triton" | None, which is Triton on a GPU and torch elsewhere
    returns   (..., W) dtype of x, contiguous from Triton; differentiable in x and weight

    A row's bits, and those of its dx, do not depend on the rows around it (Triton). dweight is a sum over rows, of the
    same bits every run.

    Raises ValueError when shapes or dtypes do not fit.

    Source: RMSNorm, arXiv:1910.07467; dweight by partial sums instead of atomics: Triton's layer norm tutorial, Liger.
    Elsewhere: Liger rms_norm.py (casting modes llama and gemma); vLLM rms_norm and fused_add_rms_norm (in place).
    """
    if _check(x, None, weight, eps, backend) == "torch":
        return rms_norm_reference(x, weight, eps, plus_one)  # (..., W)
    return _RMSNorm.apply(x, None, weight, eps, plus_one)  # (..., W)


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, *, eps: float, plus_one: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's output added to the residual stream, and the norm that the next layer reads, in one pass.

        sum = x + delta          y = rms_norm(sum)

    x, delta  (..., W) one shape and dtype, any strides; carry gradients
    weight, eps, plus_one, backend   as in rms_norm
    returns   y, sum, both (..., W); differentiable in x, delta and weight. Apart it is 5 + 2 trips of W numbers through
              memory (x, delta, sum; sum, y), here 4: the sum is not read again

    Raises ValueError when shapes or dtypes do not fit.
    """
    if _check(x, delta, weight, eps, backend) == "torch":
        total = x + delta  # (..., W)
        return rms_norm_reference(total, weight, eps, plus_one), total  # (..., W), (..., W)
    return _RMSNorm.apply(x, delta, weight, eps, plus_one)  # (..., W), (..., W)


def _check(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, backend: str | None) -> str:
    """The backend, once everything fits."""
    if weight.ndim != 1 or not len(weight) or x.shape[-1:] != weight.shape:
        shapes = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"got {shapes}, want (..., W) and (W,); the norm is over the last dimension")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"got x {tuple(x.shape)} and delta {tuple(delta.shape)}, want one shape; expand it first")
    dtypes = {t.dtype for t in (x, delta, weight) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"got x, delta or weight of dtypes {words}, want one float dtype; cast with .to(x.dtype)")
    check_positive("eps", eps, ", as in the checkpoint's config.json (1e-6)")
    same_device(x=x, delta=delta, weight=weight)
    got = f"{len(weight)} channels of {x.dtype} for Triton, want at most {MAX_WIDTH} of bf16, fp16 or fp32"
    return or_torch(choose(backend, x), backend, "" if x.dtype in FLOATS and len(weight) <= MAX_WIDTH else got)
