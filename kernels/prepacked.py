"""Prepacked weights: the order in which a CPU wants to read a matrix that few rows are multiplied with.

    y = x W.T + b          x (n, in), W (out, in)

With n = 8 the time goes into reading W once, and reading it row by row is slow: the 30 layers of a 135M model (106 M
weights, bf16) take 24 ms, of which memory needs 5 (2 cores of an EPYC, 42 GB/s). Prepacked in blocks of whole cache
lines, in the order in which the inner loop reads them, they take 13 ms; at n = 32, 25 instead of 37. In fp32 with AVX2:
44 to 27 ms at 8 rows, 92 to 59 at 32, 736 to 683 at 512. Sampling makes the copy (50 ms, the weights' bytes once more)
and drops it when it ends; training does without.

Layers that read the same x become one matmul: q, k and v; gate and up. So do their adapters (LoRA), which would be five
small calls a layer, half as expensive as all the rest:

    u = x [A_1; A_2].T          [y_1, y_2] = [x, u] [W, s B].T          s B block by block beside W

In bf16 that rounds A, s B and u, where training multiplies in fp32: an error of 2^-9 of the update, less than the 2^-9
of y that rounding y costs anyway. Sampled log-probs are a measurement (nanogspo/rollout.py); training never reads one.

The layout is oneDNN's ("blocked format"), through the calls that torch.compile uses for frozen weights. Sums are fp32,
rounded once to x's dtype, as in F.linear; only their order differs.

Left out: a GPU (cuBLAS reads rows at full speed), weights that are packed in 4 or 8 bits, gradients.

Tests: tests/test_prepacked.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN fits the layout to the number of rows it is told; 1, 16 and 32 give the same speed at 1 to 128 rows
ROWS = 16
# Narrower fp32 layers are faster in MKL, which reads rows as they are: one of 256 x 256 takes 0.4 to 0.8 of the time at
# 5 to 128 rows (AVX2, one thread, other work beside it). The widths of SmolLM2-135M, 576 and 1536, are wide enough
FP32_FROM = 512


@dataclass(frozen=True)
class Layer:
    """y = x weight.T + bias + scale (x A.T) B.T, all but the weight optional."""

    weight: Tensor  # (out, in) bf16 or fp32
    bias: Tensor | None = None  # (out,)
    A: Tensor | None = None  # (r, in)
    B: Tensor | None = None  # (out, r)
    scale: float = 1.0


class PrepackedLinear:
    """Layers that read the same x as one prepacked matmul. A copy: later updates do not reach it."""

    @torch.no_grad()
    def __init__(self, layers: list[Layer]):
        first, ranks = layers[0].weight, sum(len(layer.A) for layer in layers if layer.A is not None)
        self.outs = [len(layer.weight) for layer in layers]
        self._bias, self._A = concatenated_bias(layers), None
        whole = first.new_empty((sum(self.outs), first.shape[1] + ranks))  # (out, in + sum of r) copied once, not twice
        torch.cat([layer.weight for layer in layers], out=whole[:, : first.shape[1]])
        if ranks:
            A, whole[:, first.shape[1] :] = concatenated_adapters(layers)  # (sum of r, in), (out, sum of r)
            self._A = _prepack(A)
        self._weight = _prepack(whole)

    def linear(self, x: Tensor) -> Sequence[Tensor]:
        """x (..., in) of the weights' dtype -> (..., out) of each layer. Carries no gradient."""
        if self._A is not None:
            x = torch.cat((x, _linear(x, self._A, None)), dim=-1)  # (..., in + sum of r)
        return _linear(x, self._weight, self._bias).split(self.outs, dim=-1)  # (..., out) each


def concatenated_bias(layers: list[Layer]) -> Tensor | None:
    """(sum of out,), 0 for a layer without one; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in layers])


def concatenated_adapters(layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """(sum of r, in) and (sum of out, sum of r) in the weights' dtype: all A, and s B block by block."""
    A = torch.cat([layer.A for layer in layers if layer.A is not None])  # (sum of r, in)
    B = [A.new_zeros(len(m.weight), 0) if m.A is None else m.B * m.scale for m in layers]
    dtype = layers[0].weight.dtype
    return A.to(dtype), torch.block_diag(*B).to(dtype)


def nbytes(layers: list[Layer]) -> int:
    """Bytes of PrepackedLinear(layers)."""
    first, outs = layers[0].weight, sum(len(layer.weight) for layer in layers)
    ranks = sum(len(layer.A) for layer in layers if layer.A is not None)
    return first.element_size() * (outs * (first.shape[1] + ranks) + ranks * first.shape[1])


def _prepack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def _linear(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    n = x.shape[:-1].numel()
    if more := padded_rows(n) - n:
        padded = F.pad(x.flatten(0, -2), (0, 0, 0, more))  # (n + more, in)
        return _linear(padded, blocks, bias)[:n].unflatten(0, x.shape[:-1])  # (..., out)
    return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")  # (..., out)


def padded_rows(n: int) -> int:
    """The number of rows that n rows are padded to: 1 to 16, then eight numbers an octave (18, 20, ... 32, 36, ...).

    oneDNN compiles every matmul for its number of rows, in 6 to 12 ms, and keeps 0.6 MB for each number and layer shape
    (up to 1024 of them; measured at 256 to 1536 channels, AVX2). Rows finish one by one, so a long run meets all
    numbers. Four an octave would keep half as much, but 33 rows would take 1.4 times as long.
    """
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def _has_layout(weight: Tensor) -> bool:  # the planner asks about shapes on the meta device
    return weight.device.type in ("cpu", "meta") and torch.backends.mkldnn.is_available()


def can_prepack(weight: Tensor) -> bool:
    """Whether matmuls with this weight (out, in) gain here: on a CPU, in bf16 where its units multiply bf16, in fp32
    from FP32_FROM channels on."""
    if weight.dtype == torch.bfloat16:
        return _has_layout(weight) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _has_layout(weight) and weight.dtype == torch.float32 and weight.shape[1] >= FP32_FROM


def can_prepack_head(weight: Tensor) -> bool:
    """The same of a head, whose matmul is fp32: always in 16 bits, because widening takes longer than multiplying."""
    return can_prepack(weight) or (_has_layout(weight) and weight.dtype in (torch.bfloat16, torch.float16))
