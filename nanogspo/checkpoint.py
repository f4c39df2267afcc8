"""Checkpoints: a header and some bytes, in and out, in the Hugging Face layout.

A safetensors file is

    8 bytes      length n of the header, little-endian
    n bytes      JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [start, end]}, ..., "__metadata__": ..}
    the rest     the tensors' bytes, row-major, back to back

We read and write it ourselves for two reasons. Loading reads each tensor straight into the memory where it will live,
so the peak is the model plus one tensor (mapping the file instead shows up as the model twice). Saving can merge LoRA
one tensor at a time. Nothing is ever unpickled and no code comes from a checkpoint.

Reading order: resolve (where the files are) -> read_header, read_tensor -> load -> save -> adapters.
Everything is checked from the headers before the first byte of data is read; every missing, unexpected or misshapen
tensor is named.

Lesson: lessons/03_checkpoints.md       Tests: tests/test_checkpoint.py
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import torch
from torch import Tensor, nn

from nanogspo.families import ModelConfig, export_config, model_config, text_part
from nanogspo.inputs import need, parse_json, read_json, shown, some
from nanogspo.lora import LoRALinear, add_lora, lora_layers
from nanogspo.model import Transformer
from nanogspo.quant import (
    COMPANION,
    KINDS,
    LINEAR,
    RECORD,
    NF4Linear,
    bitsandbytes_config,
    nf4_from_file,
    nf4_tensors,
    pack,
    packed_layers,
    put,
)
from nanogspo.tokenizer import TOKENIZER_FILES, load_tokenizer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 1000**3  # the hub's habit; one file larger than this uploads badly

# Names on the way in: the first prefix that matches is stripped. Multimodal wrappers put the text part deeper.
PREFIXES = ("thinker.model.", "thinker.", "model.language_model.", "language_model.model.", "language_model.", "model.")
# Parts of multimodal checkpoints that a text model does not use, and buffers that old files carry
SKIP = re.compile(
    r"(^|\.)(visual|vision_tower|audio_tower|multi_modal_projector|embed_vision|embed_audio|mtp|talker|code2wav)\."
    r"|rotary_emb\.inv_freq$"
)
# What a name gains when a wrapped model is saved instead of the model -> who wraps
FOREIGN = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
}
FOREIGN_PART = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, FOREIGN))})")


# ---------------------------------------------------------------------------------------------------------------------
# where the files are


def resolve(path_or_repo: str | os.PathLike, *, want: str = "checkpoint") -> pathlib.Path:
    """The local folder of a checkpoint: itself, or the hub repository `owner/name` fetched into the hub's own cache.

    want  "model" or "adapter": a folder of the other kind, or of a run that holds one, is refused and the right flags
          are named. "config": a model, and no weights are fetched. "checkpoint": either. "tokenizer": either, and no
          weights are fetched

    Only what is needed is fetched: config and tokenizer files, and the safetensors that are read.
    Raises ValueError with one line to act on: no such folder, unknown or gated repository, no network, disk full.
    """
    path = pathlib.Path(os.path.expanduser(path_or_repo))  # which leaves the ~ of an unknown user as it is
    if path.is_dir():
        _refuse_other_folder(path, want)
        return path
    name = str(path_or_repo)
    if path.exists():
        raise ValueError(
            f"got the file {name}, want a checkpoint folder (config.json, *.safetensors) or a hub id owner/name"
            if want != "adapter"
            else f"got the file {name}, want an adapter's folder (adapter_config.json, adapter_model.safetensors)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        kind = "an adapter's" if want == "adapter" else "a checkpoint"
        got = want if want == "adapter" else "model"
        raise ValueError(f"got {got} {shown(name)}, which is no folder here; want {kind} folder or a hub id owner/name")
    folder = _fetch(name, want)
    _refuse_other_folder(folder, want)
    return folder


def _refuse_other_folder(folder: pathlib.Path, want: str) -> None:
    """Raises for an adapter or a run given as a model, and for a model or a run given as an adapter."""

    def flags(adapter: pathlib.Path) -> str:
        base = need(read_json(adapter / ADAPTER), "base_model_name_or_path", str, default="", where=ADAPTER)
        return f"--model {some([base or 'ITS_BASE'])} --adapter {adapter}"

    is_adapter, is_model = (folder / ADAPTER).exists(), (folder / "config.json").exists()
    if want in ("model", "config") and not is_model:
        if is_adapter:
            raise ValueError(f"{folder} is an adapter: give {flags(folder)}")
        if (folder / "model" / "config.json").exists():
            raise ValueError(f"{folder} is a run's folder: give --model {folder / 'model'}")
        if (folder / "adapter" / ADAPTER).exists():
            raise ValueError(f"{folder} is a run's folder: give {flags(folder / 'adapter')}")
    if want == "adapter" and not is_adapter:
        if (folder / "adapter" / ADAPTER).exists():
            raise ValueError(f"{folder} is a run's folder: give --adapter {folder / 'adapter'}")
        raise ValueError(
            f"{folder}: got no {ADAPTER}, want an adapter's folder"
            + ("; this is a model: give --model" if is_model else "")
        )


ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SMALL_FILES = ("config.json", "generation_config.json", ADAPTER, INDEX, *PROCESSOR_FILES, *TOKENIZER_FILES)


def _fetch(repo: str, want: str) -> pathlib.Path:
    import huggingface_hub as hub  # 0.3 s to import, and most runs do not need it
    from huggingface_hub import errors

    local = f"or give a local folder with {'--adapter' if want == 'adapter' else '--model'} DIR"
    weights = {"model": [SINGLE], "adapter": [ADAPTER_WEIGHTS], "checkpoint": [SINGLE, ADAPTER_WEIGHTS]}.get(want, [])
    try:
        folder = pathlib.Path(hub.snapshot_download(repo, allow_patterns=[*SMALL_FILES, *weights]))
        if SINGLE in weights and not (folder / SINGLE).exists() and (folder / INDEX).exists():
            shards = sorted(file.name for file in _shards(folder))
            folder = pathlib.Path(hub.snapshot_download(repo, allow_patterns=[*SMALL_FILES, *shards]))
        return folder
    except errors.GatedRepoError as e:
        raise ValueError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run `hf auth login`, {local}"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ValueError(
            f"the hub has no repository {repo} (or it is private): check the name, run `hf auth login`, {local}"
        ) from e
    # a full disk, connection errors and LocalEntryNotFoundError are OSErrors; a time-out within a file is an HTTPError
    except (OSError, errors.HTTPError) as e:
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
            raise ValueError(
                f"the disk is full while fetching {repo}: free some space or set HF_HOME to another disk, {local}"
            ) from e
        if getattr(e, "filename", None):  # a file of the cache, and nothing of the network
            raise ValueError(
                f"cannot write {e.filename} ({e.strerror}) to fetch {repo}: set HF_HOME to a folder of yours, {local}"
            ) from e
        status = _status(e)
        why = HUB_STATUS.get(status) or ("the hub has a fault of its own: try again later" if status >= 500 else "")
        if why:
            raise ValueError(f"the hub answers {status} for {repo}: {why}, {local}") from e
        raise ValueError(
            f"cannot reach the hub for {repo} and it is not in the cache: check the network, {local}"
        ) from e
    except ImportError as e:  # of the HTTP client, when a proxy needs a package that is not there
        proxies = sorted(k for k in os.environ if k.upper().endswith("_PROXY") and "socks" in os.environ[k].lower())
        raise ValueError(
            f"cannot reach the hub through the SOCKS proxy of {some(proxies) or 'this system'}, which needs a package "
            f"that is missing: pip install socksio, or unset {' '.join(proxies) or 'it'}, {local}"
        ) from e


HUB_STATUS = {
    401: "it wants a token, or another one: run `hf auth login`",
    403: "this token may not read it: ask for access on its page, or run `hf auth login` with another token",
    404: "there is no such repository or file: check the name",
    429: "too many requests: wait some minutes, or run `hf auth login` for a higher limit",
}


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error or behind what it was raised from; 0: none."""
    while error is not None:
        if status := getattr(getattr(error, "response", None), "status_code", 0):
            return status
        error = error.__cause__ or error.__context__
    return 0


def read_config(folder: pathlib.Path) -> dict:
    return read_json(folder / "config.json")


@contextlib.contextmanager
def _whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write a whole file or nothing: a temporary neighbour, then a rename. A kill in between leaves the old file.

    What a kill left is removed by the next writer of the file. Of two writers at a time, which only a folder that no
    run holds can have, the first fails at its rename, since the name has its process's number: no file is of both.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    with _whole_file(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


HEADER_BYTES = 100_000_000  # what the safetensors library reads at most


def read_header(path: str | os.PathLike, most: int = 0) -> tuple[dict[str, dict], dict[str, str]]:
    """Tensors of a safetensors file: name -> {"dtype", "shape", "start", "end"} from the file's first byte.

    most     bytes of the header; 0: HEADER_BYTES
    returns  the tensors, in file order, and the free-form metadata
    Raises ValueError for anything the format does not allow, before any tensor is read: a truncated file, offsets that
    overlap or disagree with shape and dtype, a pickle with the wrong name.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    again = "the download is incomplete or damaged: delete the file and fetch it again"
    with open(path, "rb") as f:
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(size - 8, most or HEADER_BYTES):
            # asked only now: a sound header of 640 bytes begins like a pickle, one of 19,280 like a zip file
            if first[:2] == b"PK" or first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
                raise ValueError(f"{path}: got a pickle, which can run code when opened; want safetensors")
            raise ValueError(f"{path}: got a header of {length} bytes in a file of {size}; {again}")
        try:
            header = parse_json(f.read(length), "it")
            metadata = need(header, "__metadata__", dict, default={}, where="it")
            for key in metadata:
                need(metadata, key, str, where="__metadata__")
            tensors = {name: _entry(header, name) for name in header if name != "__metadata__"}
        except ValueError as e:
            raise ValueError(f"{path}: got a header that is not safetensors JSON ({e}); {again}") from e
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1]["start"], item[1]["end"])))
    expected = 0
    for name, t in tensors.items():
        if t["dtype"] not in DTYPES:
            got = f"tensor {some([name])} has dtype {some([t['dtype']])}"
            raise ValueError(f"{path}: {got}, want one of {', '.join(DTYPES)}")
        bytes_ = math.prod(t["shape"]) * DTYPES[t["dtype"]].itemsize
        if t["start"] != expected or t["end"] - t["start"] != bytes_:
            raise ValueError(
                f"{path}: tensor {some([name])} claims bytes {t['start']}..{t['end']}, "
                f"want {expected}..{expected + bytes_}; {again}"
            )
        expected, end = t["end"], 8 + length + t["end"]
        if end > size:
            raise ValueError(f"{path}: tensor {some([name])} ends at byte {end} of a file of {size}; {again}")
        t["start"], t["end"] = t["start"] + 8 + length, t["end"] + 8 + length
    if 8 + length + expected != size:
        raise ValueError(f"{path}: got {size} bytes, the header accounts for {8 + length + expected}; {again}")
    return tensors, metadata


def _entry(header: dict, name: str) -> dict:
    """One tensor's line of the header, with offsets from the first byte of data."""
    entry = need(header, name, dict, where="it")
    shape, offsets = (need(entry, key, list, where=f"tensor {some([name])}") for key in ("shape", "data_offsets"))
    if not all(type(n) is int and 0 <= n < 2**60 for n in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError(f"got shape {shown(shape)} and data_offsets {shown(offsets)}, want natural numbers")
    if math.prod(max(n, 1) for n in shape) >= 2**60:  # a 0 among them does not make the others sensible
        raise ValueError(f"got shape {shown(shape)}, want one of fewer than 2**60 numbers")
    dtype = need(entry, "dtype", str, where=f"tensor {some([name])}")
    return {"dtype": dtype, "shape": tuple(shape), "start": offsets[0], "end": offsets[1]}


def read_tensor(file, entry: dict, into: Tensor | None = None) -> Tensor:
    """One tensor, read from an open binary file into fresh memory, or into a given contiguous tensor of its dtype."""
    out = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]]) if into is None else into
    if out.numel():
        file.seek(entry["start"])
        rest = memoryview(out.view(-1).view(torch.uint8).numpy())
        while rest:  # Linux reads at most 2 GiB a call; the embedding of Gemma 2 27B has 2.4 GB
            count = file.readinto(rest)
            if not count:
                raise ValueError(f"{file.name}: the file ended in the middle of a tensor; fetch it again")
            rest = rest[count:]
    return out


def write_safetensors(
    path: str | os.PathLike,
    tensors: dict[str, tuple[torch.dtype, tuple, Callable[[], Tensor]]],
    metadata: dict[str, str],
) -> None:
    """Write tensors one after the other, atomically. Each is asked for only when its turn comes, so a merged or moved
    copy exists for one tensor at a time.

    tensors  name -> (dtype, shape, function that returns the tensor)
    """
    header, start = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, _) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8, so that it can be mapped as any dtype
    with _whole_file(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape, get) in tensors.items():
            t = get().detach().to("cpu", dtype).contiguous()
            assert t.shape == shape, f"{name}: announced {shape}, got {tuple(t.shape)}"
            if t.numel():
                f.write(memoryview(t.view(-1).view(torch.uint8).numpy()))


# ---------------------------------------------------------------------------------------------------------------------
# in


def load(
    path_or_repo: str | os.PathLike,
    *,
    device="cpu",
    dtype: torch.dtype = torch.bfloat16,
    quant: str | None = None,
) -> Transformer:
    """A Transformer with the weights of a Hugging Face checkpoint.

    path_or_repo  a folder, or a hub id owner/name
    dtype         torch.bfloat16, float16 or float32; converted tensor by tensor when the file holds another
    quant         "nf4" or "int8": pack the linear layers inside the blocks, each as soon as it is read
                  None: as the checkpoint is. bitsandbytes' 4-bit folders keep their packed weights, bit for bit, and
                  whatever layers they left in 16 bits; with "nf4" they do the same
    returns       the model, in eval mode, frozen if weights are packed; `model.folder` is where its files are

    Peak memory: the model's bytes, packed where it is packed, plus the largest tensor that is converted or packed, plus
    some 30 MB while it is. Raises ValueError for an unknown family, for missing, unexpected or misshapen tensors (all
    of them named), a damaged file, packed weights with a part missing, or weights that exist only as a pickle.
    Tensors that a text model rightly leaves aside (vision towers, a tied lm_head) are reported on stderr.
    """
    if quant not in (None, *KINDS):
        raise ValueError(f"got quant {quant!r}, want 'nf4', 'int8' or None")
    folder = resolve(path_or_repo, want="model")
    config = model_config(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if config.tied:  # a file may hold the head all the same
        wanted[HEAD] = wanted[EMBEDDING]
    linear = {f"{n}.weight" for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, LINEAR)}
    found: dict[str, tuple[pathlib.Path, dict]] = {}
    companions: dict[str, dict[str, tuple]] = collections.defaultdict(dict)  # of packed weights: name -> part -> where
    skipped, unexpected = [], []
    for file in weight_files(folder):
        for name, entry in read_header(file)[0].items():
            ours = our_name(name)
            if SKIP.search(name):
                skipped.append(name)
            elif (match := COMPANION.fullmatch(ours)) and match[1] in linear and match[2] not in companions[match[1]]:
                companions[match[1]][match[2]] = (file, entry)
            elif ours in wanted and ours not in found:
                found[ours] = (file, entry)
            else:  # a second tensor for the same place counts too
                unexpected.append(name)
    if config.tied and EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    problems = [f"missing {name}" for name in wanted if name not in found and not (name == HEAD and config.tied)]
    problems += [f"unexpected {name}" for name in unexpected]
    _refuse_foreign_names(folder, unexpected, wanted)
    if any(name.endswith(".SCB") for name in unexpected):
        raise ValueError(
            f"{folder} holds bitsandbytes' 8-bit weights, want its 4-bit ones, or plain ones with quant 'int8'"
        )
    if companions and quant == "int8":
        raise ValueError(f"got quant 'int8' for {folder}, whose weights are packed as NF4 already; want 'nf4' or None")
    for name, (_, entry) in found.items():
        if name in companions:
            problems += _packed_problems(name, wanted[name], entry, companions[name])
            continue
        if entry["shape"] != wanted[name]:
            problems.append(f"{name} has shape {list(entry['shape'])}, config.json wants {list(wanted[name])}")
        if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} has dtype {entry['dtype']}, want F32, F16 or BF16")
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} tensors do not fit a {config.family} model: {some(problems, 5, '; ')}"
        )
    if config.tied and HEAD in found:
        if _same_values(found[HEAD], found[EMBEDDING], dtype):
            skipped.append(HEAD)
            del found[HEAD]
        else:  # merged by a trainer that trained both; transformers does not tie them either
            model.config = config = dataclasses.replace(config, tied=False)
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
            _say(f"{folder}: {HEAD} is not the embedding that tie_word_embeddings promises; both are used as stored")
    _say_what_else_is_there(folder, config, skipped)
    # What changes its dtype or device passes through one buffer: fresh memory for each tensor would cost page faults,
    # and malloc keeps up to 64 MB of what is freed between tensors that stay.
    on_cpu = torch.device(device).type == "cpu"
    packs = {name for name in linear & found.keys() if quant and not companions}  # each rounded to dtype, then packed
    as_stored = {
        name
        for name, (_, entry) in found.items()
        if name in companions or on_cpu and DTYPES[entry["dtype"]] == dtype and name not in packs
    }
    sizes = [entry["end"] - entry["start"] for name, (_, entry) in found.items() if name not in as_stored]
    buffer = torch.empty(max(sizes, default=0), dtype=torch.uint8)  # (bytes of the largest such tensor,)
    rounded = torch.empty(max((math.prod(wanted[name]) for name in packs), default=0), dtype=dtype)  # (the largest,)
    with contextlib.ExitStack() as stack:
        places = [*found.values(), *(place for parts in companions.values() for place in parts.values())]
        files = {
            file: stack.enter_context(open(file, "rb", buffering=0)) for file in dict.fromkeys(f for f, _ in places)
        }
        for name, (file, entry) in sorted(found.items(), key=lambda item: (str(item[1][0]), item[1][1]["start"])):
            parent, leaf = name.rsplit(".", 1)
            module, into = model.get_submodule(parent), None
            if name in companions:
                tensors = {part: read_tensor(files[f], e) for part, (f, e) in companions[name].items()}
                q = nf4_from_file(name, {"weight": read_tensor(files[file], entry), **tensors}).to(device)
                put(model, parent, NF4Linear(q, module.bias, record=bytes(tensors[RECORD].tolist())))
                continue
            if name not in as_stored:
                into = buffer[: entry["end"] - entry["start"]].view(DTYPES[entry["dtype"]]).view(entry["shape"])
            tensor = read_tensor(files[file], entry, into)
            if name in packs:
                if tensor.dtype != dtype:
                    tensor = rounded[: tensor.numel()].view(tensor.shape).copy_(tensor)
                try:
                    put(model, parent, pack(tensor.to(device), module.bias, quant))
                except ValueError as e:
                    raise ValueError(f"{file}: {name}: {e}") from e
            else:
                module.register_parameter(leaf, nn.Parameter(tensor.to(device=device, dtype=dtype)))
    if packed_layers(model):
        model.requires_grad_(False)  # packed weights cannot be trained; an adapter over them can
    model.folder = folder
    return model.eval()


EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
COMPARED = 2**20  # numbers of two matrices at a time


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _say_what_else_is_there(folder: pathlib.Path, config: ModelConfig, skipped: list[str]) -> None:
    """Notices: what the folder holds and a text model does not use, or what could be meant instead."""
    if config.unread:
        _say(f"{folder}/config.json: {len(config.unread)} keys are not read: {some(config.unread)}")
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        _say(f"{folder}: got {SINGLE} and {INDEX}, read the first, as transformers does")
    if (folder / ADAPTER).exists():
        _say(f"{folder}: got a model and an adapter, read the model alone: add --adapter {folder} for both")
    if skipped:
        _say(f"{folder}: left aside {len(skipped)} tensors: {some(skipped)}")


def _refuse_foreign_names(folder: pathlib.Path, unexpected: list[str], wanted: dict[str, tuple]) -> None:
    """Raises for a wrapped model's names, grouped by who wrapped it."""
    groups: dict[str, list[str]] = {}
    for name in unexpected:
        if (match := FOREIGN_PART.search(name)) and our_name(FOREIGN_PART.sub("", name)) in wanted:
            groups.setdefault(match[0], []).append(name)
    if groups:
        found = "; ".join(f"{part!r} of {FOREIGN[part]} in {len(n)} names ({some(n, 1)})" for part, n in groups.items())
        raise ValueError(f"{folder}: got {found}, want the model's own names: save the model inside the wrapper")


def _same_values(a: tuple[pathlib.Path, dict], b: tuple[pathlib.Path, dict], dtype: torch.dtype) -> bool:
    """Whether two stored matrices of one shape are equal once they are in dtype; a few MB of each at a time."""
    V, C = a[1]["shape"]
    rows = max(1, COMPARED // C)
    with open(a[0], "rb", buffering=0) as one, open(b[0], "rb", buffering=0) as other:
        for first in range(0, V, rows):
            parts = []
            for file, entry in ((one, a[1]), (other, b[1])):
                start = entry["start"] + first * C * DTYPES[entry["dtype"]].itemsize
                parts.append(read_tensor(file, {**entry, "shape": (min(rows, V - first), C), "start": start}).to(dtype))
            if not torch.equal(*parts):
                return False
    return True


def _packed_problems(name: str, shape: tuple, entry: dict, parts: dict[str, tuple[pathlib.Path, dict]]) -> list[str]:
    """What does not fit about a packed weight, by its record (150 bytes) and the headers of its other parts."""
    entries = {"weight": entry, **{part: e for part, (_, e) in parts.items()}}
    tensors = {n: torch.empty(e["shape"], dtype=DTYPES[e["dtype"]], device="meta") for n, e in entries.items()}
    if RECORD in parts:
        with open(parts[RECORD][0], "rb", buffering=0) as f:
            tensors[RECORD] = read_tensor(f, entries[RECORD])
    try:
        q = nf4_from_file(name, tensors)
    except ValueError as e:
        return [str(e)]
    return [] if q.shape == shape else [f"{name} has shape {list(q.shape)}, config.json wants {list(shape)}"]


def stored_dtype(folder: pathlib.Path) -> torch.dtype:
    """The dtype of a checkpoint's largest tensor: what it was saved in."""
    entries = [entry for file in weight_files(folder) for entry in read_header(file)[0].values()]
    entries = [entry for entry in entries if DTYPES[entry["dtype"]].is_floating_point] or entries  # no packed bytes
    if not entries:
        raise ValueError(f"{folder}: got weight files without tensors; fetch them again")
    return DTYPES[max(entries, key=lambda entry: math.prod(entry["shape"]))["dtype"]]


def our_name(name: str) -> str:
    """Checkpoint tensor name -> parameter name of Transformer."""
    return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a checkpoint folder: model.safetensors, else those that the index names."""
    files = _shards(folder) if (folder / INDEX).exists() and not (folder / SINGLE).exists() else [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{folder}: got {some(pickles)}, pickles that can run code when opened; want safetensors "
                f"(convert with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR))"
            )
        raise ValueError(
            f"{folder}: missing weight files {some(missing)}; fetch them again (a repository of pickles has none)"
        )
    return files


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that a folder's index names."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: got no weight_map, want tensor name -> file name")
    names = sorted(set(weight_map.values()))
    if any(re.search(r"[/\\\0]|^\.*$|.{256}", name) for name in names):
        raise ValueError(f"{folder / INDEX}: got a file name that leaves the folder, want plain names")
    return [folder / name for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# out


def save(model: Transformer, path: str | os.PathLike, *, merge_lora: bool = True, tokenizer=None) -> None:
    """Write a folder that transformers and vLLM open: config, generation config, tokenizer files, safetensors.

    The text part of a multimodal checkpoint goes back into it: what is written is the whole folder, with its class, its
    names and the bytes of its towers. They are copied from the folder that the model was loaded from.

    merge_lora  True: adapters are added into the weights as they are written (the model itself is not changed);
                False: the base weights alone, to go with an adapter saved by save_adapter
                Packed weights: merged with adapters they are written unpacked, in the model's dtype. Without, NF4 is
                written as bitsandbytes writes it (byte for byte what was loaded), and int8, for which there is no
                common format, unpacked: the very weights that products see
    tokenizer   where the tokenizer files come from; default: copied from the folder the model was loaded from

    Shards at 5 GB. Each file is written atomically and config.json comes last, so a folder with one is complete: an
    older one is removed before the first of several shards is replaced.
    """
    path, source = pathlib.Path(path), getattr(model, "folder", None)
    layers, packed, dtype = lora_layers(model), packed_layers(model), model.norm.weight.dtype
    whole = read_json(source / "config.json") if source and model.config.module_prefix != "model." else None
    as_nf4 = not (merge_lora and layers) and any(isinstance(layer, NF4Linear) for layer in packed.values())
    as_nf4 = as_nf4 and (whole is None or "quantization_config" in whole)
    tensors = _parameters(model, merge_lora, as_nf4)
    if whole is None:
        tensors = {name if name == HEAD else f"model.{name}": t for name, t in tensors.items()}
    else:
        if path.resolve() == source.resolve():
            raise ValueError(f"got {path} to save to, which is what the model was loaded from; want another folder")
        tensors = _with_towers(source, tensors, as_nf4)
    if tokenizer is None and source is not None and (source / "tokenizer.json").exists():
        tokenizer = load_tokenizer(source)
    path.mkdir(parents=True, exist_ok=True)
    if as_nf4:  # records have odd lengths; behind them no wider number would be aligned
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))
    shards, size = [{}], 0
    for name, (kind, shape, get) in tensors.items():
        bytes_ = math.prod(shape) * kind.itemsize
        if size and size + bytes_ > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (kind, shape, get)
        size += bytes_
    weight_map = {}
    if len(shards) > 1:
        (path / "config.json").unlink(missing_ok=True)
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path / file, shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(math.prod(shape) * kind.itemsize for kind, shape, _ in tensors.values())
        atomic_write(
            path / "model.safetensors.index.json",
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2),
        )
    _drop_stale_weights(path, set(weight_map.values()))
    if source is None:
        atomic_write(path / "generation_config.json", json.dumps({"eos_token_id": list(model.config.eos_ids)}))
    elif (source / "generation_config.json").exists():
        atomic_write(path / "generation_config.json", (source / "generation_config.json").read_bytes())
    for name in PROCESSOR_FILES if whole else ():
        if (source / name).exists():
            atomic_write(path / name, (source / name).read_bytes())
    if tokenizer is not None:
        tokenizer.save(path)
    dtype_name = str(dtype).removeprefix("torch.")
    config = _with_dtype(whole, dtype_name) if whole else export_config(model.config, dtype=dtype_name)
    if whole and not as_nf4:
        config.pop("quantization_config", None)
    elif as_nf4 and not whole:
        config["quantization_config"] = bitsandbytes_config(model, dtype)
    atomic_write(path / "config.json", json.dumps(config, indent=2))


Writable = dict[str, tuple[torch.dtype, tuple, Callable[[], Tensor]]]  # what write_safetensors takes


def _parameters(model: Transformer, merge_lora: bool, as_nf4: bool) -> Writable:
    """What a folder of this model holds, under our names."""
    layers, dtype, tensors = lora_layers(model), model.norm.weight.dtype, {}
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith((".lora_A", ".lora_B")):
            continue
        get = lambda p=p: p  # noqa: E731
        if owner.endswith(".base"):
            owner = owner.removesuffix(".base")
            layer = layers[owner]
            if leaf == "weight":
                get = layer.merged_weight if merge_lora else lambda layer=layer: base_weight(layer)
        tensors[f"{owner}.{leaf}"] = (p.dtype, tuple(p.shape), get)
    for name, layer in packed_layers(model).items():
        if as_nf4:
            for part, t in nf4_tensors(layer).items():
                tensors[f"{name}.{part}"] = (t.dtype, tuple(t.shape), lambda t=t: t)
            continue
        merged = layers[name].merged_weight if merge_lora and name in layers else None
        get = lambda layer=layer, merged=merged: merged(dtype) if merged else layer.unpack(dtype)  # noqa: E731
        tensors[f"{name}.weight"] = (dtype, (layer.out_features, layer.in_features), get)
    return tensors


def _with_towers(folder: pathlib.Path, ours: Writable, as_nf4: bool) -> Writable:
    """Our tensors under the names that they have in a multimodal folder, and everything else of it as it is."""
    out, rest, prefix = {}, dict(ours), PREFIXES[-1]
    for file in weight_files(folder):
        for stored, entry in read_header(file)[0].items():
            name = our_name(stored)
            if SKIP.search(stored):
                if COMPANION.fullmatch(stored) and not as_nf4:
                    raise ValueError(
                        f"{folder}: got a tower with packed weights ({some([stored])}), want one in 16 bits to write a "
                        "merged folder around it; the adapter alone works with this one"
                    )
                out[stored] = (DTYPES[entry["dtype"]], entry["shape"], functools.partial(_stored, file, entry))
            elif name in rest:
                out[stored], prefix = rest.pop(name), prefix if name == HEAD else stored.removesuffix(name)
            elif name == HEAD:  # tied, and in the file all the same
                out[stored] = ours[EMBEDDING]
    return out | {f"{prefix}{name}": tensor for name, tensor in rest.items()}


def _stored(file: pathlib.Path, entry: dict) -> Tensor:
    with open(file, "rb", buffering=0) as f:
        return read_tensor(f, entry)


def _with_dtype(config: dict, dtype: str) -> dict:
    """A multimodal config.json for weights of this dtype, else unchanged: transformers opens a folder in the dtype that
    it states."""
    out = {**config, **({"text_config": {**config["text_config"]}} if "text_config" in config else {})}
    parts = [(part, key) for part in (out, text_part(out)) for key in ("dtype", "torch_dtype") if key in part]
    for part, key in parts or [(out, "dtype")]:
        part[key] = dtype
    return out


def base_weight(layer: LoRALinear) -> Tensor:
    """The weight without its adapter, also while the adapter is merged in."""
    return layer.original if layer.merged else layer.base.weight


def _drop_stale_weights(path: pathlib.Path, written: set[str]) -> None:
    """An older save in the same folder may have had other shards; left behind, they would win over the new ones."""
    for old in path.glob("model*.safetensors"):
        if old.name not in written:
            old.unlink()
    if len(written) == 1:
        (path / "model.safetensors.index.json").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# adapters, in PEFT's format

PEFT_PREFIX = "base_model.model."


def save_adapter(model: Transformer, path: str | os.PathLike, *, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does (base_model.model.model.layers...).

    Names and targets are those of transformers' class for the base: of a multimodal one the text layers alone.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter to save; save the model itself instead")
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            w = getattr(layer, part).weight
            out = f"{PEFT_PREFIX}{model.config.module_prefix}{name}.{part}.weight"
            tensors[out] = (w.dtype, tuple(w.shape), lambda w=w: w)
    write_safetensors(path / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or str(getattr(model, "folder", "")),
        "r": first.r,
        "lora_alpha": first.scale * first.r,
        "lora_dropout": first.dropout,
        "target_modules": _short_targets(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    atomic_write(path / ADAPTER, json.dumps(config, indent=2))


def _short_targets(model: Transformer, names: list[str]) -> list[str] | str:
    """Leaf names where every layer of that leaf is wrapped, full names where only some are. PEFT compares the ends of
    names, and a tower has layers of the same leaf names: then a regular expression, which it matches as a whole."""
    leaves, prefix = sorted({name.rsplit(".", 1)[-1] for name in names}), model.config.module_prefix
    every = [n for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, LINEAR) and not _inside_lora(n)]
    plain = prefix == "model."
    if any(name.rsplit(".", 1)[-1] in leaves for name in every):
        return sorted(name if plain else f"{prefix}{name}" for name in names)
    return leaves if plain else rf"{re.escape(prefix)}.*\.({'|'.join(leaves)})"


def _inside_lora(name: str) -> bool:
    return name.endswith((".base", ".lora_A", ".lora_B"))


# Keys of adapter_config.json that are read, or that say how PEFT found and trained the layers. Any other changes the
# result when it is set: use_dora, modules_to_save, rank_pattern, alpha_pattern, lora_bias, what is yet to come.
NEUTRAL = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "bias": ("none",)}  # PiSSA subtracts from W
ADAPTER_NO_EFFECT = {
    "peft_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "auto_mapping", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip


def load_adapter(model: Transformer, path_or_repo: str | os.PathLike, *, dropout: float = 0.0) -> list[str]:
    """Put a PEFT LoRA adapter onto a model: ours, or one that PEFT, Unsloth or TRL saved. Returns the layers touched.

    Raises ValueError for what would silently change the result: DoRA, trained biases, extra saved modules, ranks that
    differ between layers, a tensor that fits no layer or that PEFT would leave aside, a layer with only one of its two
    matrices. Layers of a vision tower and another base than this model are reported on stderr.
    """
    folder = resolve(path_or_repo, want="adapter")
    config, file = read_json(folder / ADAPTER), folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ValueError(
            f"{folder}: got no adapter_model.safetensors, want one beside adapter_config.json (a pickle is not read)"
        )
    where = f"{folder / ADAPTER}"
    kind = need(config, "peft_type", str, default="LORA", where=where)
    if kind.upper() != "LORA":
        raise ValueError(f"{folder}: got peft_type {shown(kind)}, want LORA")
    extras = {k: v for k, v in config.items() if v and k not in ADAPTER_NO_EFFECT and v not in NEUTRAL.get(k, ())}
    if extras:
        raise ValueError(f"{folder}: got {shown(extras)}, want a plain LoRA adapter without these")
    r = need(config, "r", int, low=1, high=2**16, where=where)
    alpha = need(config, "lora_alpha", float, low=0, high=1e6, where=where)
    scale = alpha / (math.sqrt(r) if need(config, "use_rslora", bool, default=False, where=where) else r)
    base = need(config, "base_model_name_or_path", str, default="", where=where)
    if base and hasattr(model, "folder") and not _same_model(base, model.folder):
        _say(f"{folder}: this adapter was trained over {some([base])}, the model here is {model.folder}")
    pairs = _adapter_pairs(file, model, r)
    linear = [name for name, m in model.layers.named_modules(prefix="layers") if isinstance(m, LINEAR)]
    prefixes = ["model."] if model.config.module_prefix == "model." else PREFIXES  # a wrapper's has changed
    given = [name for name in linear if name in pairs]  # add_lora names those that are none of the model's
    if aside := [name for name in given if not any(_peft_wraps(config, f"{p}{name}", where) for p in prefixes)]:
        raise ValueError(
            f"{file}: got {some(aside, 4)}, which {ADAPTER} does not name: PEFT leaves them aside; mend it"
        )
    touched = add_lora(model, r=r, alpha=alpha, targets=list(pairs), dropout=dropout, scale=scale)
    with open(file, "rb", buffering=0) as f:
        for name, layer in lora_layers(model).items():
            for part, entry in pairs[name].items():
                if not getattr(layer, part).weight.is_meta:  # an outline, of which the plan is made
                    getattr(layer, part).weight.data.copy_(read_tensor(f, entry))
    return touched


def _adapter_pairs(file: pathlib.Path, model: Transformer, r: int) -> dict[str, dict[str, dict]]:
    """Layer -> lora_A, lora_B -> where it is in the file. All of it fits this model."""
    pairs: dict[str, dict[str, dict]] = {}
    towers = []
    for name, entry in read_header(file)[0].items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        if not match:
            raise ValueError(
                f"{file}: got tensor {some([name])}, want names that end in lora_A.weight or lora_B.weight"
            )
        if SKIP.search(name):
            towers.append(name)
        elif pairs.setdefault(our_name(match[1].removeprefix(PEFT_PREFIX)), {}).setdefault(match[2], entry) != entry:
            raise ValueError(f"{file}: got {some([name])} beside another tensor for the same layer, want one")
    if towers and not model.norm.weight.is_meta:  # said when the model is loaded, not of its outline
        _say(f"{file}: left aside {len(towers)} tensors, of no use for text: {some(towers)}")
    linear = {n: m for n, m in model.layers.named_modules(prefix="layers") if isinstance(m, LINEAR)}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{file}: layer {some([name])} has only {', '.join(pair)}, want lora_A and lora_B")
        if layer := linear.get(name):  # add_lora names those that are none of the model's
            for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
                if pair[part]["shape"] != shape:
                    found = shown(list(pair[part]["shape"]))
                    raise ValueError(
                        f"{file}: {name}.{part} has shape {found}, want {list(shape)}: another base or rank"
                    )
                if not DTYPES[pair[part]["dtype"]].is_floating_point:
                    raise ValueError(f"{file}: {name}.{part} has dtype {pair[part]['dtype']}, want F32, F16 or BF16")
    return pairs


def _peft_wraps(config: dict, layer: str, where: str) -> bool:
    """Whether PEFT puts an adapter on this layer of its model. One that it does not gets none of the file's tensors."""

    def named(key: str, default: list[str]) -> bool:
        value = default if config.get(key) is None else config[key]
        if isinstance(value, list) and all(isinstance(end, str) for end in value):
            return any(f".{layer}".endswith(f".{end}") for end in value)
        with contextlib.suppress(TypeError, re.error, OverflowError, RecursionError):
            if len(value) <= 10_000 and _ways(value) < MOST_WAYS:
                return value == "all-linear" or bool(re.fullmatch(value, layer))
        raise ValueError(f"got {key}={shown(value)}, want a list of names or a simple regular expression in {where}")

    only = config.get("layers_to_transform")
    only = only if isinstance(only, list) else [only]
    chosen = only in ([], [None]) or int(re.search(r"\.(\d+)\.", layer)[1]) in only
    return chosen and named("target_modules", ["q_proj", "v_proj"]) and not named("exclude_modules", [])


MOST_WAYS = 10**8  # a second of matching; a regular expression is a stranger's, and "(.+)+Z" would take years


@functools.cache
def _ways(pattern: str) -> int:
    """How many ways a regular expression can try on a layer's name, about; MOST_WAYS for more. Choices multiply, and
    what is repeated chooses each time anew."""

    def ways(tree) -> int:
        product = 1
        for op, args in tree:
            lists = [arg if isinstance(arg, list) else [arg] for arg in (args if isinstance(args, tuple) else [args])]
            parts = [part for args in lists for part in args if isinstance(part, re._parser.SubPattern)]
            choices = sum(map(ways, parts)) or 1
            if op.name.endswith("_REPEAT"):
                choices = 1 + choices if args[1] <= 1 else 30 * choices ** min(args[1], 30)
            product = min(product * choices, MOST_WAYS)
        return product

    return ways(re._parser.parse(pattern))


def _same_model(name: str, folder: pathlib.Path) -> bool:
    """Whether a base's name, a path or a hub id, can mean this folder: itself, the hub's cache of it, a copy of it."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    same = os.path.realpath(os.path.expanduser(name)) == os.path.realpath(folder)
    return same or bool(
        hub and (folder.name == name.split("/")[1] or f"models--{name.replace('/', '--')}" in folder.parts)
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
