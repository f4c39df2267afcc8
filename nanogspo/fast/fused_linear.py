"""Linear layers for sampling: those that read the same x become one matmul, and their adapters with them.

    hidden = model(tokens, cache=cache, linear=fused)          fused = FusedLinears(model)
    logits = fused.logits(hidden)

A decode step has few rows, so its cost is reading weights and launching matmuls. What helps depends on the weights:

    PrepackedLinear      on a CPU, bf16 or wide fp32     one matmul, on copies in oneDNN's order (kernels/prepacked.py)
    ConcatenatedLinear   on a GPU, bf16 or fp32          one matmul, no copy: the weights become parts of one tensor
                         (not of a sharded model)
    FusedAdapters        else, where adapters are        a matmul for each layer, one for the A of all adapters

The head becomes fp32 on a CPU, because its scores are. Training multiplies each layer on its own (model.separate).
For Qwen3-0.6B in bf16 a CPU's copies are 0.9 GB and the head's 0.6, a GPU's copies are those of the adapter, 20 MB.
Later updates of the weights do not reach the copies: make a FusedLinears for each rollout.

Lesson: lessons/05_a_decode_step.md       Tests: tests/test_fused_linear.py
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora import frozen_linear
from kernels.prepacked import (
    Layer,
    PrepackedLinear,
    can_prepack,
    can_prepack_head,
    concatenated_adapters,
    concatenated_bias,
)
from nanogspo.layers.delta_net import DeltaNet
from nanogspo.layers.moe import MoE
from nanogspo.lora import LoRALinear
from nanogspo.model import MLP, Attention, Transformer, separate
from nanogspo.quant import PackedLinear
from nanogspo.sharding import is_sharded


class FusedLinears:
    """The `linear` argument of Transformer.forward while answers are sampled. Carries no gradient."""

    @torch.no_grad()
    def __init__(self, model: Transformer):
        self.model, self._fused = model, {}
        for module, names in groups(model):
            layers = [getattr(module, name) for name in names]
            self._fused[module, names] = fuse(layers, model.norm.weight.dtype, model.prepack, not is_sharded(model))
        head = model.head_weight
        self._head = PrepackedLinear([Layer(head.float())]) if model.prepack and can_prepack_head(head) else None

    def __call__(self, module: nn.Module, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
        """What the layers of these names make of x (..., in): (..., out) each."""
        fused = self._fused[module, names]
        return separate(module, names, x) if fused is None else fused.linear(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """As Transformer.logits: (..., C) -> (..., V) float32, final soft-cap applied."""
        if self._head is None:
            return self.model.logits(hidden)
        [z] = self._head.linear(hidden.float())  # (..., V)
        return self.model.cap(z)


def groups(model: Transformer) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """(module, names) of the linear layers that read the same x."""
    for module in model.layers.modules():
        if isinstance(module, Attention | DeltaNet | MLP):
            yield module, module.INPUTS
            yield module, module.OUTPUT
        elif isinstance(module, MoE):
            yield module, module.INPUTS


def prepacked_groups(model: Transformer) -> Iterator[list[Layer]]:
    """What becomes a PrepackedLinear, the head aside. Also of a model on the meta device."""
    for module, names in groups(model):
        layers = [weights_of(getattr(module, name)) for name in names]
        if all(layer is not None and can_prepack(layer.weight) for layer in layers):
            yield layers


def fuse(layers: list[nn.Module], dtype: torch.dtype, prepack: bool = True, move: bool = True):
    """These layers of one x as something with .linear(x); None where each is best on its own.

    dtype    the model's, in which copies of adapters are kept
    prepack  False: no copies of weights
    move     False: weights stay where they are. FSDP2 gathers into the memory that it allocated for them, so one that
             was moved would keep the numbers of this rollout for the rest of the run
    """
    plain = [weights_of(layer) for layer in layers]
    if prepack and all(layer is not None and can_prepack(layer.weight) for layer in plain):
        return PrepackedLinear(plain)
    if move and all(layer is not None and can_concatenate(layer.weight) for layer in plain):
        return ConcatenatedLinear(plain)
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear) and not layer.merged]
    return FusedAdapters(layers, dtype) if adapted else None


def weights_of(layer: nn.Module) -> Layer | None:
    """The matrices of a linear layer and of its adapter; None over weights packed in 4 or 8 bits."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    if isinstance(base, PackedLinear):
        return None
    if base is layer or layer.merged:
        return Layer(base.weight, base.bias)
    return Layer(base.weight, base.bias, layer.lora_A.weight, layer.lora_B.weight, layer.scale)


def can_concatenate(weight: Tensor) -> bool:
    """On a GPU launches are what costs. A CPU's matmul is not faster for being wider."""
    return weight.is_cuda


class ConcatenatedLinear:
    """Layers of one x as one matmul, and their adapters as two more.

        u = x [A_1; A_2].T          [y_1, y_2] = x [W_1; W_2].T + u diag(s B_1, s B_2).T

    The layers' weights are moved into one tensor (out_1 + out_2, in), of which each stays a view: nothing is stored
    twice, an update of a weight is an update of the whole, and a second FusedLinears finds them as they are.
    """

    def __init__(self, layers: list[Layer]):
        self._weight = adjacent([layer.weight for layer in layers])  # (sum of out, in)
        self._outs = [len(layer.weight) for layer in layers]
        self._bias = concatenated_bias(layers)
        self._A = self._B = None
        if any(layer.A is not None for layer in layers):
            self._A, B = concatenated_adapters(layers)  # (sum of r, in)
            self._B = B.T  # (sum of r, sum of out)

    def linear(self, x: Tensor) -> Sequence[Tensor]:
        """x (..., in) -> (..., out) of each layer, views of one tensor."""
        y = F.linear(x, self._weight, self._bias)  # (..., sum of out)
        if self._A is not None:
            y.flatten(0, -2).addmm_(F.linear(x, self._A).flatten(0, -2), self._B)
        return y.split(self._outs, dim=-1)  # (..., out) each


def adjacent(weights: list[Tensor]) -> Tensor:
    """One tensor (sum of out, in) of which the weights (out, in) are made views, in their order, unless they are."""
    first, stops, rows = weights[0].detach(), 0, sum(map(len, weights))
    same = {w.untyped_storage().data_ptr() for w in weights} == {first.untyped_storage().data_ptr()}
    for w in weights:
        same &= w.is_contiguous() and w.storage_offset() == first.storage_offset() + stops
        stops += w.numel()
    if same:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
    whole = torch.cat([w.detach() for w in weights])  # (sum of out, in)
    for w, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
        w.data = part
    return whole


class FusedAdapters:
    """Layers of one x, each with its own base matmul, and the first half of all adapters as one.

        u = x [A_1; A_2].T          y_i = base_i(x) + u_i (s B_i).T

    An adapter on its own is five launches in bf16, casts included; here it is one, and one more for the group. A and
    s B are copies in the model's dtype. In bf16 that rounds A, s B and u, each by 2^-9 of the update, and y a second
    time. Sampled log-probs are a measurement (nanogspo/rollout.py); training multiplies in fp32.
    """

    @torch.no_grad()
    def __init__(self, layers: list[nn.Module], dtype: torch.dtype):
        adapted = [m for m in layers if isinstance(m, LoRALinear) and not m.merged]
        self._A = torch.cat([m.lora_A.weight for m in adapted]).to(dtype)  # (sum of r, in)
        self._ranks = [m.r for m in adapted]
        bases = [m.base if isinstance(m, LoRALinear) else m for m in layers]
        self._bases = [(base.q if isinstance(base, PackedLinear) else base.weight, base.bias) for base in bases]
        self._B = [(m.lora_B.weight * m.scale).to(dtype).T if m in adapted else None for m in layers]  # (r, out) each

    def linear(self, x: Tensor) -> list[Tensor]:
        """x (..., in) -> (..., out) of each layer."""
        u = iter(F.linear(x, self._A).flatten(0, -2).split(self._ranks, dim=-1))  # (n, r) each
        out = []
        for (weight, bias), B in zip(self._bases, self._B, strict=True):
            y = frozen_linear(x, weight, bias)  # (..., out)
            if B is not None:
                y.flatten(0, -2).addmm_(next(u), B)
            out.append(y)
        return out
