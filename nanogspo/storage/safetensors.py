"""safetensors files: headers and one tensor at a time, through the package of that name; and whole files out.

The package checks a header when it opens a file: its length, its JSON, and that the tensors fill the file without a
gap or an overlap. Here its errors become one line that says what to do, and what it accepts is narrowed to the dtypes
and sizes that this program can hold.

backend="pread" reads a tensor into memory of its own. The package's default maps the file instead: its pages count as
the process's memory until the file is closed (loading would peak at twice the model), and a file that is cut short
meanwhile kills the process.

Slow version, standard library alone: lessons/checkpoints/read_safetensors.py       Tests: tests/test_checkpoint.py
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogspo import distributed
from nanogspo.inputs import some
from nanogspo.sharding import whole
from nanogspo.storage.files import whole_file

DTYPES = {  # in the order in which the package lays tensors out: wide ones first, so that all are aligned
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file. Only its header has been read; the file stays open as long as one of its tensors is held."""

    path: Path
    file: safe_open
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def code(self) -> str:
        return DTYPE_CODES[self.dtype]

    def read(self, rows: slice | None = None) -> Tensor:
        """The tensor, or some of its rows, in fresh memory of the CPU."""
        try:
            return self.file.get_tensor(self.name) if rows is None else self.file.get_slice(self.name)[rows]
        except SafetensorError as e:  # it was whole when it was opened
            raise ValueError(f"{self.path}: tensor {some([self.name])} cannot be read ({e}); fetch it again") from e


FETCH = "the download is incomplete or damaged: delete the file and fetch it again"
BACKEND = "pread" if hasattr(os, "pread") else "mmap"  # Windows has none


def read_header(path: str | os.PathLike, *, want: str = FETCH) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file, in file order, and its free-form metadata. want: what to do about a bad file.

    Raises ValueError for anything the format does not allow, before any tensor is read: a truncated file, offsets that
    overlap or disagree with shape and dtype, a pickle with the wrong name.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: got a folder, want a safetensors file")
    try:
        file = safe_open(path, "pt", backend=BACKEND)
        found = [(name, file.get_slice(name)) for name in file.offset_keys()]
        tensors = {name: (t.get_dtype(), tuple(t.get_shape())) for name, t in found}
    except SafetensorError as e:
        with open(path, "rb") as f:
            first = f.read(2)
        # asked only now: a sound header of 640 bytes begins like a pickle, one of 19,280 like a zip file
        if first == b"PK" or first[:1] == b"\x80" and first[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            raise ValueError(f"{path}: got a pickle, which can run code when opened; want safetensors") from e
        size = path.stat().st_size
        raise ValueError(f"{path}: got {size} bytes that are not safetensors ({some([e])}); {want}") from e
    for name, (code, shape) in tensors.items():
        if code not in DTYPES:
            raise ValueError(f"{path}: tensor {some([name])} has dtype {code}, want one of {', '.join(DTYPES)}")
        if math.prod(max(n, 1) for n in shape) >= 2**60:  # a 0 among them does not make the others sensible
            raise ValueError(f"{path}: tensor {some([name])} has shape {shape}, want fewer than 2**60 numbers")
    stored = {n: Stored(path, file, n, DTYPES[code], shape) for n, (code, shape) in tensors.items()}
    return stored, file.metadata() or {}


def raw_bytes(t: Tensor) -> memoryview:
    """A tensor's bytes, from any device and of any layout; not copied if it is on the CPU and contiguous. Of a sharded
    one all, and all processes have to ask."""
    flat = whole(t).detach().cpu().contiguous().view(-1).view(torch.uint8)  # (bytes,)
    return memoryview(np.from_dlpack(flat))  # after .numpy() a storage cannot be freed, which FSDP2 does


def write_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole file or nothing, with the very bytes of the package: a header padded to 8, then tensors by dtype
    and name. What has to be copied is copied one at a time (a full fine-tune's state is 14 bytes a parameter).

    Sharded tensors are gathered one at a time, too: then all processes call this, and process 0 writes."""
    ranks = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (ranks.index(tensors[name].dtype), name))
    header, end = {"__metadata__": metadata}, 0
    for name in names:
        t, start = tensors[name], end
        end += t.nbytes
        header[name] = {"dtype": DTYPE_CODES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) if distributed.rank() == 0 else open(os.devnull, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(raw_bytes(tensors[name]))
