"""Linear layers whose weights are packed in four bits (NF4) or eight (int8): what QLoRA freezes under its adapters.

    y  = x W^T + b         W = unpack(packed) in x's dtype, made for this one product and dropped after it
    dx = dy W              W is unpacked a second time: nothing wide is kept between the two passes

Unpacking reads and writes each weight once, the product uses it once a token: at 8192 tokens it is 4 % of the time of a
4096 x 12288 layer on an H100 (counted, not measured). On a CPU, where a step of decoding has few tokens, it is most of
it: there packing saves memory and costs time.

One set of weights: rollouts, scoring and training multiply with the very same bits, W rounded once to x's dtype.

Only linear layers inside blocks are packed: 85 % of Qwen3-8B, 79 % of SmolLM2-135M. Embeddings and head stay as they
are, because an error there moves every logit directly; norms, because there is nothing to save.

A packed weight cannot be trained (a step of AdamW is far below the distance of two codes), so it is a buffer and no
parameter, and a model with packed layers trains its LoRA adapter alone.

Reading order: PackedLinear, NF4Linear, Int8Linear, quantize_model. Files: storage/bitsandbytes.py.
Left out: fp4, 8-bit bitsandbytes files (outlier columns), packed embeddings and heads.

Lessons: lessons/10_four_bits.md, 11_lora_and_sft.md       Tests: tests/test_quant.py
Source: QLoRA, arXiv 2305.14314. Elsewhere: bitsandbytes nn.Linear4bit; peft tuners/lora/bnb.py
"""

import dataclasses

import torch
from torch import Tensor, nn

from kernels.int8 import Int8Tensor, quantize_int8
from kernels.lora import frozen_linear
from kernels.nf4 import NESTED, NF4Tensor, quantize_nf4
from nanogspo.layers.moe import ROUTER, ExpertLinear


class PackedLinear(nn.Module):
    """A frozen linear layer without a wide weight. Subclasses say what its buffers are called.

    q     the packed weight, whose tensors are also the buffers of this module
    bias  (out,) parameter in the model's dtype, or None
    """

    def __init__(self, q: NF4Tensor | Int8Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.q, self.bias = q, bias
        for field, t in q.tensors.items():
            self.register_buffer(self.BUFFERS[field], t)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """W, (out, in) in dtype, in fresh memory."""
        return self.q.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.q, self.bias)  # (..., out)

    @property
    def nbytes(self) -> int:
        """Of the packed weight."""
        return self.q.nbytes

    def _apply(self, fn, recurse=True):
        """What .to() and .half() call. They may move packed tensors and never convert them: scales rounded to bf16
        would be other weights. fp32 buffers pass as the integers of their bits, which no conversion touches."""

        def move(t: Tensor) -> Tensor:
            bits = t.dtype == torch.float32 and not isinstance(t, nn.Parameter)
            return fn(t.view(torch.int32)).view(torch.float32) if bits else fn(t)

        super()._apply(move, recurse)
        moved = {field: getattr(self, name) for field, name in self.BUFFERS.items() if name in self._buffers}
        self.q = dataclasses.replace(self.q, **moved)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NF4Linear(PackedLinear):
    """Four bits a weight and a scale for every 64: 0.52 byte a weight with double quantisation (kernels/nf4.py).

    Buffers have the names bitsandbytes uses, and `weight` holds its packed bytes.
    """

    BUFFERS = {
        "codes": "weight",
        "absmax": "absmax",
        "codebook": "quant_map",
        "absmax2": "nested_absmax",
        "code2": "nested_quant_map",
        "offset": "nested_offset",
    }

    def __init__(self, q: NF4Tensor, bias: nn.Parameter | None = None, quant_state: bytes | None = None):
        super().__init__(q, bias)
        self.quant_state = quant_state  # a file's own, which is written back unchanged: storage/bitsandbytes.py


class Int8Linear(PackedLinear):
    """One byte a weight and a scale for every row (kernels/int8.py)."""

    BUFFERS = {"codes": "weight", "scale": "scale"}


class PackedExperts(nn.ModuleList):
    """A stacked layer of a mixture of experts (layers/moe.py), a packed layer for each expert: they are packed one at a
    time, and unpacked one at a time when they are used."""

    bias, with_update = None, ExpertLinear.with_update

    def __init__(self, weight: Tensor, kind: str):
        super().__init__(quantize_linear(w, None, kind) for w in weight)
        self.out_features, self.in_features = weight.shape[1:]

    @property
    def weight(self) -> Tensor:
        """The codes of the first expert: where all are."""
        return self[0].weight

    @property
    def stack(self) -> list[NF4Tensor | Int8Tensor]:
        return [layer.q for layer in self]


STACKED = ExpertLinear | PackedExperts


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | PackedLinear | STACKED]:
    """Name -> linear layer inside the blocks: what LoRA can be put beside, and, routers aside, be packed. All experts'
    gate_proj are one layer, and so are their up_proj and down_proj."""
    found = model.layers.named_modules(prefix="layers")
    layers = {name: m for name, m in found if isinstance(m, nn.Linear | PackedLinear | STACKED)}
    return {name: m for name, m in layers.items() if not isinstance(layers.get(name.rpartition(".")[0]), PackedExperts)}


def packable(model: nn.Module) -> dict[str, nn.Linear | PackedLinear | STACKED]:
    """linear_layers without routers."""
    return {name: layer for name, layer in linear_layers(model).items() if not name.endswith(ROUTER)}


KINDS = ("nf4", "int8")


def quantize_linear(weight: Tensor, bias: nn.Parameter | None, kind: str) -> PackedLinear:
    """A linear layer, packed. weight (out, in) in any float dtype; it is read once and not kept. On the meta device it
    has no numbers, and the result has none either."""
    if kind not in KINDS:
        raise ValueError(f"got quant {kind!r}, want 'nf4', 'int8' or None")
    if weight.is_meta:
        return _pack_shape(weight, bias, kind)
    return NF4Linear(quantize_nf4(weight), bias) if kind == "nf4" else Int8Linear(quantize_int8(weight), bias)


def _pack_shape(weight: Tensor, bias: nn.Parameter | None, kind: str, *, double_quant: bool = True) -> PackedLinear:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if kind == "int8":
        return Int8Linear(Int8Tensor(empty(*weight.shape, dtype=torch.int8), empty(len(weight))), bias)
    n, size = weight.numel(), 64  # weights that share a scale: config.json cannot say otherwise
    blocks = -(-n // size)
    nested = {"absmax2": empty(-(-blocks // NESTED)), "code2": empty(256), "offset": empty()} if double_quant else {}
    q = NF4Tensor(
        empty((n + 1) // 2, 1, dtype=torch.uint8),
        empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        tuple(weight.shape),
        weight.dtype,
        size,
        empty(16),
        **nested,
    )
    return NF4Linear(q, bias)


def quantize_model(model: nn.Module, kind: str) -> None:
    """Pack every linear layer inside the blocks, one at a time, and freeze the model.

    Raises ValueError for another kind than nf4 and int8, and for a model that has an adapter or is packed already.
    """
    modules = dict(model.layers.named_modules(prefix="layers"))
    if any(isinstance(m, PackedLinear) or hasattr(m, "lora_A") for m in modules.values()):
        raise ValueError("got a model with packed layers or a LoRA adapter, want a plain one; pack before add_lora")
    for name, linear in packable(model).items():
        if isinstance(linear, ExpertLinear):
            put(model, name, PackedExperts(linear.weight, kind))
        else:
            put(model, name, quantize_linear(linear.weight, linear.bias, kind))
    model.requires_grad_(False)


def quantize_as_stored(model: nn.Module, stored: dict | None) -> bool:
    """Pack a model on the meta device as a quantization_config says that its checkpoint is; whether it says so. The
    other way round: storage/bitsandbytes.py."""
    if not isinstance(stored, dict) or not stored.get("load_in_4bit"):
        return False
    skip = stored.get("llm_int8_skip_modules")
    skip = [f".{name}." for name in skip] if isinstance(skip, list) else []
    double_quant = bool(stored.get("bnb_4bit_use_double_quant"))
    for name, linear in packable(model).items():
        if isinstance(linear, nn.Linear) and not any(part in f".model.{name}." for part in skip):
            put(model, name, _pack_shape(linear.weight, linear.bias, "nf4", double_quant=double_quant))
    model.requires_grad_(False)
    return True


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """model.NAME = module, for a dotted name."""
    parent, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(parent), leaf, module)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Name -> packed layer, in model order; a layer inside an adapter goes by the adapter's name, as in a file."""
    return {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def weight_count(model: nn.Module) -> int:
    """How many numbers the model has, packed ones included. Not how many bytes or codes."""
    packed = sum(layer.in_features * layer.out_features for layer in packed_layers(model).values())
    return packed + sum(p.numel() for p in model.parameters())


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None, expert: int | None = None) -> Tensor:
    """The weight a linear layer, or this expert of a stacked one, multiplies with, (out, in): unpacked into dtype, or
    the parameter as it is. All experts of a plain stacked one: (E, out, in)."""
    layer = layer[expert] if isinstance(layer, PackedExperts) else layer
    weight = layer.unpack(dtype) if isinstance(layer, PackedLinear) else layer.weight.detach()
    return weight[expert] if expert is not None and isinstance(layer, ExpertLinear) else weight
