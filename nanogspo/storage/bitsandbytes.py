"""The names and the JSON that bitsandbytes gives to packed weights in a file.

Beside P.weight (packed bytes) are P.weight.absmax, .quant_map, with double quantisation .nested_absmax and
.nested_quant_map, and .quant_state.bitsandbytes__nf4, the quant state: JSON as uint8.

Tests: tests/test_quant.py
"""

import json
import re

import torch
from torch import Tensor, nn

from kernels.nf4 import NESTED, NF4Tensor
from nanogspo.inputs import named, parse_json
from nanogspo.quant import NF4Linear, linear_layers, packed_layers

COMPANION = re.compile(r"(.+\.weight)\.((?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.bitsandbytes__\w+)")
QUANT_STATE = "quant_state.bitsandbytes__nf4"
DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quant_state(q: NF4Tensor) -> bytes:
    """The quant state of a packed weight, JSON, byte for byte as bitsandbytes writes it."""
    facts = {"quant_type": "nf4", "blocksize": q.block_size, "dtype": str(q.dtype).removeprefix("torch.")}
    facts["shape"] = list(q.shape)
    if q.nested:
        facts |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    return json.dumps(facts).encode()


def nf4_tensors(layer: NF4Linear) -> dict[str, Tensor]:
    """What a file holds for this layer: "weight", "weight.absmax", ... -> tensor."""
    parts = {f"weight.{name}": t for name, t in layer._buffers.items() if name not in ("weight", "nested_offset")}
    state = quant_state(layer.q) if layer.quant_state is None else layer.quant_state  # a file's own, unchanged
    state = torch.tensor(list(state), dtype=torch.uint8)  # (bytes,) the offset is one of its facts
    return {"weight": layer.weight, **parts, f"weight.{QUANT_STATE}": state}


def nf4_from_file(name: str, tensors: dict[str, Tensor]) -> NF4Tensor:
    """A packed weight from the tensors of a file, maps and shape as they are stored: none is made anew.

    name     of the weight, for messages
    tensors  "weight", "absmax", "quant_map", QUANT_STATE and so on; all but the last may be on the meta device:
             a file is checked from its header

    Raises ValueError when a companion is missing (named), or the parts do not fit each other or the quant state.
    """
    state = f"{name}.{QUANT_STATE}"
    if QUANT_STATE not in tensors:
        other = next((part for part in tensors if part.startswith("quant_state.")), None)
        raise ValueError(f"{name} is {other.rsplit('__')[-1]}, want nf4" if other else f"missing {state}")
    try:
        facts = parse_json(bytes(tensors[QUANT_STATE].flatten().tolist()), "it")
        shape, dtype, block_size = tuple(facts["shape"]), DTYPE_NAMES[facts["dtype"]], facts["blocksize"]
        offset = torch.tensor(float(facts["nested_offset"])) if "nested_offset" in facts else None  # () fp32
        kind, nested = facts["quant_type"], facts.get("nested_blocksize", NESTED)
        if not all(type(n) is int and n > 0 for n in (*shape, block_size, nested)):
            raise TypeError("sizes are positive integers")
        if offset is not None and not offset.isfinite():
            raise TypeError("nested_offset is a finite number")
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise ValueError(f"{state} is no quant state of a packed weight ({e!r}); fetch the file again") from e
    if kind != "nf4" or nested != NESTED:
        raise ValueError(f"{name} is {kind} with scales in blocks of {nested}, want nf4 with {NESTED}")
    parts = ["absmax", "quant_map"] + ([] if offset is None else ["nested_absmax", "nested_quant_map"])
    missing = [f"{name}.{part}" if part != "weight" else name for part in ["weight", *parts] if part not in tensors]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    absmax, codebook, *scales = (tensors[part] for part in parts)
    if offset is not None and absmax.dtype != torch.uint8:
        raise ValueError(f"{name}.absmax has dtype {absmax.dtype}, want uint8: the quant state says so")
    # bnb_4bit_quant_storage may have called these bytes bf16 or float32
    codes = tensors["weight"].view(-1).view(torch.uint8).view(-1, 1)  # (ceil(n / 2), 1)
    offset = None if offset is None else offset.to(codes.device)
    with named(name):
        return NF4Tensor(codes, absmax, shape, dtype, block_size, codebook, *scales, offset=offset)


def bitsandbytes_config(model: nn.Module, dtype: torch.dtype) -> dict:
    """The quantization_config of config.json by which transformers opens a folder of NF4 weights."""
    packed = packed_layers(model)
    plain = [n for n, m in linear_layers(model).items() if isinstance(m, nn.Linear) and ".lora_" not in n]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(layer.q.nested for layer in packed.values()),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        # a list, even of one: transformers looks for layers that have no packed weight in the file here
        "llm_int8_skip_modules": ["lm_head", *(f"model.{name.removesuffix('.base')}" for name in plain)],
    }
