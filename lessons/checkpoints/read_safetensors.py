"""Reading a safetensors file with the standard library: what the safetensors package does in nanogspo/storage.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [start, end]}, ..., "__metadata__": ..}
    the rest     the tensors' bytes, row-major, back to back

Tests: tests/test_checkpoint.py
"""

import json
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from nanogspo.storage.safetensors import DTYPES


def read_header(path: str | Path) -> dict[str, dict]:
    """Name -> dtype, shape, start and end, counted from the file's first byte. ValueError for a damaged file."""
    size, expected = Path(path).stat().st_size, 0
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        want = expected + math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if (start, end) != (expected, want):
            raise ValueError(f"{path}: tensor {name} claims bytes {start}..{end}, want {expected}..{want}")
        entry["start"], entry["end"], expected = start + 8 + length, end + 8 + length, end
    if 8 + length + expected != size:
        raise ValueError(f"{path}: got {size} bytes, the header accounts for {8 + length + expected}")
    return tensors


def read_tensor(path: str | Path, entry: dict) -> Tensor:
    """One tensor, read straight into the memory where it stays."""
    out = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    if out.numel():
        with open(path, "rb", buffering=0) as file:
            file.seek(entry["start"])
            rest = memoryview(out.view(-1).view(torch.uint8).numpy())
            while count := file.readinto(rest):  # Linux reads at most 2 GiB a call
                rest = rest[count:]
    return out
