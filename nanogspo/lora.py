"""LoRA by hand: a frozen linear layer plus a trainable product of two thin matrices.

    y = W x + b + (alpha / r) * B (A dropout(x))          A (r, in), B (out, r), B = 0 at the start

so a wrapped model starts out exactly equal to its base. Only A and B get gradients and optimiser state: 10.1 M numbers
instead of 596 M for Qwen3-0.6B at r = 16 on every linear layer.

A and B stay in fp32 under a bf16 base and are multiplied in fp32. In bf16 a change under 6e-5 to an entry of
1/32 is rounded away, and AdamW steps of 1e-5 are usual in RL.

Reading order: LoRALinear, add_lora, merge_lora, unmerge_lora, describe.
Lesson: lessons/11_lora_and_sft.md       Tests: tests/test_lora.py
Source: LoRA, arXiv 2106.09685, equation 3. Names and initialisation as in PEFT, so that adapters can be exchanged.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora import frozen_linear
from kernels.moe import Groups, grouped_linear
from nanogspo.inputs import some
from nanogspo.layers.moe import ExpertLinear
from nanogspo.quant import STACKED, PackedExperts, PackedLinear, dense_weight, linear_layers, put, weight_count

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A linear layer (the base, frozen, perhaps packed in four or eight bits) with a low-rank update beside it.

    merged  True while the update has been added into the base weight; forward then costs what the base costs
    """

    def __init__(self, base: nn.Linear | PackedLinear, r: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.r, self.scale, self.dropout = base, r, scale, dropout
        options = {"device": base.weight.device, "dtype": torch.float32}
        make = functools.partial(ExpertLinear, len(base.stack), **options) if isinstance(base, STACKED) else None
        make = make or functools.partial(nn.Linear, bias=False, **options)
        self.lora_A, self.lora_B = make(base.in_features, r), make(r, base.out_features)
        nn.init.zeros_(self.lora_B.weight)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)  # (..., out)
        if self.dropout and self.training:  # SFT alone; W and A read different x, so the two products stay apart
            update = self.lora_B(self.lora_A(F.dropout(x, self.dropout).float()))  # (..., out) fp32
            return (self.base(x) + update * self.scale).to(x.dtype)  # (..., out)
        # a packed weight is unpacked inside the matmul, forward and backward, and is never trained
        weight = self.base.q if isinstance(self.base, PackedLinear) else self.base.weight
        return frozen_linear(x, weight, self.base.bias, self.lora_A.weight, self.lora_B.weight, scale=self.scale)

    def merged_weight(self, dtype: torch.dtype | None = None, expert: int | None = None) -> Tensor:
        """W + scale * B A, computed in fp32, rounded once to W's dtype. (out, in)

        dtype   into which a packed W is unpacked, the model's: it is then the W that products see
        expert  of a stacked layer, whose W of all experts is (E, out, in)
        """
        weight = dense_weight(self.base, dtype, expert)  # (out, in)
        if self.merged:
            return weight
        B, A = (m.weight.detach() if expert is None else m.weight.detach()[expert] for m in (self.lora_B, self.lora_A))
        update = B @ A  # (out, in) fp32
        return (weight.float() + update * self.scale).to(weight.dtype)


class LoRAExperts(LoRALinear):
    """The same for a stacked layer of a mixture of experts: A (E, r, in) and B (E, out, r), a pair for every expert."""

    @property
    def stack(self):
        return self.base.stack

    def with_update(self, y: Tensor, x: Tensor, groups: Groups) -> Tensor:
        if self.merged:
            return y
        [h] = grouped_linear(F.dropout(x, self.dropout, self.training).float(), [self.lora_A.weight], groups)  # (N, r)
        [update] = grouped_linear(h, [self.lora_B.weight], groups)  # (N, out) fp32
        return (y + update * self.scale).to(y.dtype)  # (N, out)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> wrapped layer, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    targets: tuple[str, ...] | list[str] = ALL_LINEAR,
    dropout: float = 0.0,
    seed: int = 0,
    scale: float | None = None,
) -> list[str]:
    """Freeze the model and put an adapter beside every linear layer whose leaf name is in `targets`.

    r        rank, >= 1
    alpha    the update is scaled by alpha / r (or by `scale`, when an adapter file says otherwise)
    targets  leaf names as in the checkpoint: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; or full
             names such as layers.3.mlp.up_proj
    returns  full names of the layers touched, in model order

    Raises ValueError when a target matches nothing (the layers that exist are named), when r < 1, or when the model
    already has an adapter. A is drawn as in PEFT (uniform, bound 1/sqrt(in)) from `seed`.
    """
    if r < 1:
        raise ValueError(f"got LoRA rank {r}, want at least 1; use --lora-r 0 on the command line for full fine-tuning")
    if lora_layers(model):
        raise ValueError("the model already has a LoRA adapter; merge it or load the base again before adding another")
    linear = linear_layers(model)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    found = {t: {name for name in linear if name == t or name.endswith("." + t)} for t in targets}
    unmatched = [t for t, names in found.items() if not names]
    if unmatched or not targets:
        named = some(map(repr, unmatched)) or "none"
        raise ValueError(f"got LoRA targets {named}, which match no layer; want some of: {', '.join(leaves)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    touched = {name: base for name, base in linear.items() if any(name in names for names in found.values())}
    for name, base in touched.items():
        kind = LoRAExperts if isinstance(base, STACKED) else LoRALinear
        layer = kind(base, r, alpha / r if scale is None else scale, dropout)
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform(a = sqrt 5), PEFT's choice
        if not base.weight.is_meta:
            draw = torch.rand(layer.lora_A.weight.shape, generator=generator) * (2 * bound) - bound  # (r, in)
            layer.lora_A.weight.data.copy_(draw)
        put(model, name, layer)
    return list(touched)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter into its base weight, in place; the original weights are kept so that unmerge is exact.

    In bf16 the sum is rounded: updates under 2^-9 of a weight vanish. Sample from the unmerged model while training.
    Raises ValueError for packed weights, whose sum with an adapter is not packed: save(merge_lora=True) writes it.
    """
    layers = lora_layers(model)
    packed = next((name for name, m in layers.items() if isinstance(m.base, PackedLinear | PackedExperts)), None)
    if packed:
        advice = "checkpoint.save(model, path, merge_lora=True) writes them unpacked and merged"
        raise ValueError(f"got {packed} with packed weights, want plain ones to merge in place; {advice}")
    for layer in layers.values():
        if not layer.merged:
            layer.original = layer.base.weight.data
            layer.base.weight.data = layer.merged_weight()
            layer.merged = True
    return list(layers)


def unmerge_lora(model: nn.Module) -> list[str]:
    """Put the very bits back that merge_lora replaced."""
    layers = lora_layers(model)
    for layer in layers.values():
        if layer.merged:
            layer.base.weight.data = layer.original
            del layer.original
            layer.merged = False
    return list(layers)


def describe(model: nn.Module) -> str:
    """The table a run prints: what was touched, how often, and what share of the model is trained."""
    layers, lines = lora_layers(model), []
    by_leaf: dict[str, list[LoRALinear]] = {}
    for name, layer in layers.items():
        by_leaf.setdefault(name.rsplit(".", 1)[-1], []).append(layer)
    for leaf, group in by_leaf.items():
        size = sum(p.numel() for layer in group for p in (layer.lora_A.weight, layer.lora_B.weight))
        base = group[0].base
        shape = f"{base.in_features:>6} -> {base.out_features:<6}"
        lines.append(f"  {leaf:<10} x {len(group):<3} {shape} r {group[0].r:<3} {size:>12,} trained")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = weight_count(model)
    lines.append(f"  trained {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")
    return "\n".join(lines)
