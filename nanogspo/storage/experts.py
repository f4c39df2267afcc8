"""How files hold the experts of a layer: three layouts of the same matrices.

    each     mlp.experts.7.gate_proj.weight (F, C), up_proj, down_proj (C, F)    qwen2_moe, qwen3_moe, omni, qwen3_next
    fused    mlp.experts.gate_up_proj (E, 2 F, C), mlp.experts.down_proj (E, C, F)      qwen3_5_moe
    turned   mlp.experts.gate_up_proj (E, C, 2 F), mlp.experts.down_proj (E, F, C)      qwen3_vl_moe

`each` is the common language: what files hold and what a model wants are both put into its names, matrix by matrix, so
that what is missing, unexpected or misshapen is named alike. Shapes tell fused from turned; where both fit it is fused,
as transformers has it.

Tests: tests/test_moe_storage.py
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanogspo import sharding
from nanogspo.lora import LoRAExperts
from nanogspo.model import Transformer
from nanogspo.quant import STACKED, PackedExperts, dense_weight, linear_layers, put, quantize_linear
from nanogspo.storage.safetensors import Stored

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.((?:gate|up|down)_proj)(?:\.weight)?")  # stack, number, projection
FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj")
STACK = re.compile(r"(.+\.experts)\.((?:gate|up|down)_proj)(?:\.weight)?")  # a parameter or layer of the model
Writable = dict[str, tuple[int, Callable[[], Tensor]]]  # name -> bytes, and a function that makes or returns the tensor


@dataclasses.dataclass(frozen=True)
class ExpertPart(Stored):
    """One expert's matrix within a stored stack: `rows` of expert `expert`, of its transpose if `turned`."""

    expert: int
    rows: slice
    turned: bool

    def read(self, rows: slice | None = None) -> Tensor:
        matrix = super().read(slice(self.expert, self.expert + 1))[0]
        return (matrix.mT if self.turned else matrix)[self.rows].contiguous()


def each(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A parameter of the model -> names and shapes of the matrices that files hold for it."""
    if len(shape) == 3 and (match := STACK.fullmatch(name)):
        return {f"{match[1]}.{e}.{match[2]}.weight": tuple(shape[1:]) for e in range(shape[0])}
    return {name: tuple(shape)}


def parts(name: str, stored: Stored, wanted: dict[str, tuple]) -> dict[str, Stored]:
    """A stored tensor, of our name -> the matrices in it, by their own names."""
    match = FUSED.fullmatch(name)
    if not match or len(stored.shape) != 3:
        return {name: stored}
    projections = ("gate_proj", "up_proj") if match[2] == "gate_up" else ("down_proj",)
    rows = len(projections) * wanted.get(f"{match[1]}.0.{projections[-1]}.weight", (0,))[0]
    turned = stored.shape[1] != rows == stored.shape[2]
    (E, whole, width), found = (stored.shape[0], *stored.shape[1:][:: -1 if turned else 1]), {}
    size = whole // len(projections)
    facts = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)} | {"shape": (size, width)}
    for i, projection in enumerate(projections):
        for e in range(E):
            part = ExpertPart(**facts, expert=e, rows=slice(i * size, (i + 1) * size), turned=turned)
            found[f"{match[1]}.{e}.{projection}.weight"] = part
    return found


def put_expert(model: Transformer, match: re.Match, read: Callable[[], Tensor], quant: str | None) -> None:
    """One matrix, whose name EXPERT matched, into its stacked layer, which is allocated, or packed, when its first
    matrix comes. Of a sharded stack each process reads the experts that it holds."""
    name, e = f"{match[1]}.{match[3]}", int(match[2])
    layer = model.get_submodule(name)
    if quant:
        if not isinstance(layer, PackedExperts):
            layer = PackedExperts(layer.weight, quant)  # still on the meta device
            put(model, name, layer)
        layer[e] = quantize_linear(read(), None, quant)
        return
    own = sharding.rows(layer.weight)
    if not own.start <= e < own.stop:
        return
    weight = read()
    if layer.weight.is_meta:
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=weight.dtype, device=weight.device))
    sharding.local(layer.weight)[e - own.start] = weight


def stacks(model: Transformer) -> dict[str, STACKED]:
    """Name -> stacked layer, adapters aside; a layer inside an adapter goes by the adapter's name."""
    found = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer, STACKED)}
    return {name.removesuffix(".base"): layer for name, layer in found.items() if ".lora_" not in name}


def matrices(name: str, layer: STACKED, adapter: LoRAExperts | None, merge: bool, dtype: torch.dtype) -> Writable:
    """The matrices of a stacked layer, one by one. Packed ones are unpacked: no common format has them otherwise."""
    get = functools.partial(dense_weight, layer, dtype)
    if adapter and (merge or adapter.merged):
        get = functools.partial(adapter.merged_weight, dtype) if merge else adapter.original.__getitem__
    size, (stack, projection) = layer.out_features * layer.in_features * dtype.itemsize, name.rsplit(".", 1)
    return {f"{stack}.{e}.{projection}.weight": (size, functools.partial(get, e)) for e in range(len(layer.stack))}


def fused(tensors: Writable, turned: bool) -> Writable:
    """Tensors in `each` -> the same with stacks of experts, made expert by expert when they are asked for."""
    out, stacks = {}, {}
    for name, made in tensors.items():
        if match := EXPERT.fullmatch(name):
            stack = f"{match[1]}.{'down' if match[3] == 'down_proj' else 'gate_up'}_proj"
            stacks.setdefault(stack, {})[int(match[2]), match[3]] = made  # sorted: gate before up
        else:
            out[name] = made
    for name, matrices in stacks.items():
        inside, E = [matrices[key] for key in sorted(matrices)], len({e for e, _ in matrices})
        make = functools.partial(_stack, [get for _, get in inside], E, turned)
        out[name] = (sum(nbytes for nbytes, _ in inside), make)
    return out


def _stack(gets: list[Callable[[], Tensor]], E: int, turned: bool) -> Tensor:
    stack = torch.cat([get() for get in gets]).unflatten(0, (E, -1))  # (E, rows, columns)
    return stack.mT.contiguous() if turned else stack
