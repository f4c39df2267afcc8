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

Reading order: PackedLinear, NF4Linear, Int8Linear, pack_model, then the names bitsandbytes gives to files.
Left out: fp4, 8-bit bitsandbytes files (outlier columns), packed embeddings and heads.

Lessons: lessons/08_four_bits.md, 09_lora_and_sft.md       Tests: tests/test_quant.py
Source: QLoRA, arXiv 2305.14314. Elsewhere: bitsandbytes nn.Linear4bit; peft tuners/lora/bnb.py
"""

import dataclasses
import json
import re

import torch
from torch import Tensor, nn

from kernels.int8 import Int8Tensor, dequantize_int8, quantize_int8
from kernels.lora import frozen_linear
from kernels.nf4 import NESTED, NF4Tensor, dequantize_nf4, quantize_nf4
from nanogspo.inputs import parse_json


class PackedLinear(nn.Module):
    """A frozen linear layer without a wide weight. Subclasses say how to unpack.

    q     the packed weight, whose tensors are also the buffers of this module
    bias  (out,) parameter in the model's dtype, or None
    """

    def __init__(self, q: NF4Tensor | Int8Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.q, self.bias = q, bias
        for field, name in self.BUFFERS.items():
            if (t := getattr(q, field)) is not None:
                self.register_buffer(name, t)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """W, (out, in) in dtype, in fresh memory."""
        raise NotImplementedError

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

    def __init__(self, q: NF4Tensor, bias: nn.Parameter | None = None, record: bytes | None = None):
        super().__init__(q, bias)
        self.record = nf4_record(q) if record is None else record  # a file's own, so that it is written back unchanged

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(self.q, dtype)  # (out, in)


class Int8Linear(PackedLinear):
    """One byte a weight and a scale for every row (kernels/int8.py)."""

    BUFFERS = {"codes": "weight", "scale": "scale"}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        return dequantize_int8(self.q, dtype)  # (out, in)


LINEAR = (nn.Linear, PackedLinear)  # what LoRA can be put beside
KINDS = ("nf4", "int8")


def pack(weight: Tensor, bias: nn.Parameter | None, kind: str) -> PackedLinear:
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
    return NF4Linear(q, bias, record=b"")


def pack_model(model: nn.Module, kind: str) -> None:
    """Pack every linear layer inside the blocks, one at a time, and freeze the model.

    Raises ValueError for another kind than nf4 and int8, and for a model that has an adapter or is packed already.
    """
    modules = dict(model.layers.named_modules(prefix="layers"))
    if any(isinstance(m, PackedLinear) or hasattr(m, "lora_A") for m in modules.values()):
        raise ValueError("got a model with packed layers or a LoRA adapter, want a plain one; pack before add_lora")
    for name, linear in modules.items():
        if isinstance(linear, nn.Linear):
            put(model, name, pack(linear.weight, linear.bias, kind))
    model.requires_grad_(False)


def pack_as_stored(model: nn.Module, stored: dict | None) -> bool:
    """Pack a model on the meta device as a quantization_config says that its checkpoint is; whether it says so. The
    other way round: bitsandbytes_config."""
    if not isinstance(stored, dict) or not stored.get("load_in_4bit"):
        return False
    skip = stored.get("llm_int8_skip_modules")
    skip = [f".{name}." for name in skip] if isinstance(skip, list) else []
    double_quant = bool(stored.get("bnb_4bit_use_double_quant"))
    for name, linear in dict(model.layers.named_modules(prefix="layers")).items():
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


def dense_weight(layer: nn.Linear | PackedLinear, dtype: torch.dtype | None = None) -> Tensor:
    """The weight a layer multiplies with, (out, in): unpacked into dtype, or the parameter as it is."""
    return layer.unpack(dtype) if isinstance(layer, PackedLinear) else layer.weight.detach()


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes' files: beside P.weight (packed bytes) stand P.weight.absmax, .quant_map, with double quantisation
# .nested_absmax and .nested_quant_map, and .quant_state.bitsandbytes__nf4, a JSON record as uint8

COMPANION = re.compile(r"(.+\.weight)\.((?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+)")
RECORD = "quant_state.bitsandbytes__nf4"
DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def nf4_record(q: NF4Tensor) -> bytes:
    """The JSON record of a packed weight, byte for byte as bitsandbytes writes it."""
    facts = {"quant_type": "nf4", "blocksize": q.block_size, "dtype": str(q.dtype).removeprefix("torch.")}
    facts["shape"] = list(q.shape)
    if q.nested:
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    return json.dumps(facts).encode()


def nf4_tensors(layer: NF4Linear) -> dict[str, Tensor]:
    """What a file holds for this layer: "weight", "weight.absmax", ... -> tensor."""
    parts = {f"weight.{name}": t for name, t in layer._buffers.items() if name not in ("weight", "nested_offset")}
    record = torch.tensor(list(layer.record), dtype=torch.uint8)  # (bytes,) the offset is one of its facts
    return {"weight": layer.weight, **parts, f"weight.{RECORD}": record}


def nf4_from_file(name: str, tensors: dict[str, Tensor]) -> NF4Tensor:
    """A packed weight from the tensors of a file, maps and shape as they are stored: none is made anew.

    name     of the weight, for messages
    tensors  "weight", "absmax", "quant_map", RECORD and so on; all but the record may be on the meta device, which is
             how a file is checked from its header

    Raises ValueError when a companion is missing (named), or the parts do not fit each other or the record.
    """
    if RECORD not in tensors:
        other = next((part for part in tensors if part.startswith("quant_state.")), None)
        raise ValueError(f"{name} is {other.rsplit('__')[-1]}, want nf4" if other else f"missing {name}.{RECORD}")
    try:
        facts = parse_json(bytes(tensors[RECORD].flatten().tolist()), "it")
        shape, dtype, block_size = tuple(facts["shape"]), DTYPE_NAMES[facts["dtype"]], facts["blocksize"]
        offset = torch.tensor(float(facts["nested_offset"])) if "nested_offset" in facts else None  # () fp32
        kind, nested = facts["quant_type"], facts.get("nested_blocksize", NESTED)
        if not all(type(n) is int and n > 0 for n in (*shape, block_size, nested)):
            raise TypeError("sizes are positive integers")
        if offset is not None and not offset.isfinite():
            raise TypeError("nested_offset is a finite number")
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise ValueError(f"{name}.{RECORD} is no record of a packed weight ({e!r}); fetch the file again") from e
    if kind != "nf4" or nested != NESTED:
        raise ValueError(f"{name} is {kind} with scales in blocks of {nested}, want nf4 with {NESTED}")
    parts = ["absmax", "quant_map"] + ([] if offset is None else ["nested_absmax", "nested_quant_map"])
    missing = [f"{name}.{part}" if part != "weight" else name for part in ["weight", *parts] if part not in tensors]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    absmax, codebook, *scales = (tensors[part] for part in parts)
    if offset is not None and absmax.dtype != torch.uint8:
        raise ValueError(
            f"{name}.absmax has dtype {absmax.dtype}, want uint8: the record says that scales are quantised"
        )
    # bnb_4bit_quant_storage may have called these bytes bf16 or float32
    codes = tensors["weight"].view(-1).view(torch.uint8).view(-1, 1)  # (ceil(n / 2), 1)
    try:
        offset = None if offset is None else offset.to(codes.device)
        return NF4Tensor(codes, absmax, shape, dtype, block_size, codebook, *scales, offset=offset)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from e


def bitsandbytes_config(model: nn.Module, dtype: torch.dtype) -> dict:
    """The quantization_config of config.json by which transformers opens a folder of NF4 weights."""
    packed = packed_layers(model)
    linear = {n: m for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, nn.Linear)}
    plain = [n.removesuffix(".base") for n in linear if ".lora_" not in n]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(layer.q.nested for layer in packed.values()),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        # a list, even of one: transformers looks for layers that have no packed weight in the file here
        "llm_int8_skip_modules": ["lm_head", *(f"model.{name}" for name in plain)],
    }
