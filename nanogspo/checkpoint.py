"""A model out of a checkpoint folder, and a folder out of a model, in the Hugging Face layout.

    load   match   which stored tensor goes where, by name, from the headers of the files
           check   shapes, dtypes and packed parts, before a weight is read; every problem is named
           fill    read, convert, move and pack, one tensor at a time: the peak is the model plus one tensor
    save   shards of at most 2 GB, each built and written before the next

Files and the hub: storage/files.py. The format: storage/safetensors.py. Adapters: storage/peft.py.

Lesson: lessons/03_checkpoints.md       Tests: tests/test_checkpoint.py
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from nanogspo import sharding
from nanogspo.families import ModelConfig, export_config, model_config, text_part
from nanogspo.inputs import named, read_json, some, tell
from nanogspo.lora import lora_layers
from nanogspo.model import Transformer
from nanogspo.quant import KINDS, NF4Linear, linear_layers, packable, packed_layers, put, quantize_linear
from nanogspo.storage import experts, interleaved
from nanogspo.storage.bitsandbytes import COMPANION, QUANT_STATE, bitsandbytes_config, nf4_from_file, nf4_tensors
from nanogspo.storage.experts import Writable
from nanogspo.storage.files import ADAPTER, INDEX, PROCESSOR_FILES, SINGLE, atomic_write, resolve, weight_files
from nanogspo.storage.files import read_config as read_config
from nanogspo.storage.names import EMBEDDING, HEAD, PREFIXES, SKIP, our_name, refuse_foreign_names
from nanogspo.storage.peft import load_adapter as load_adapter
from nanogspo.storage.peft import save_adapter as save_adapter
from nanogspo.storage.safetensors import Stored, read_header, write_safetensors
from nanogspo.tokenizer import load_tokenizer

SHARD_BYTES = 2 * 1000**3  # what saving holds in memory besides the model, where weights are merged or unpacked
COMPARED = 2**20  # numbers of two matrices at a time

# ---------------------------------------------------------------------------------------------------------------------
# in


def load(
    path_or_repo: str | os.PathLike,
    *,
    device="cpu",
    dtype: torch.dtype = torch.bfloat16,
    quant: str | None = None,
    shard: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """A Transformer with the weights of a Hugging Face checkpoint.

    path_or_repo  a folder, or a hub id owner/name
    dtype         torch.bfloat16, float16 or float32; converted tensor by tensor when the file holds another
    quant         "nf4" or "int8": pack the linear layers inside the blocks, each as soon as it is read
                  None: as the checkpoint is. bitsandbytes' 4-bit folders keep their packed weights, bit for bit, and
                  whatever layers they left in 16 bits; with "nf4" they do the same
    shard         spreads the empty model over the processes (sharding.shard): each then reads its own rows only
    returns       the model, in eval mode, frozen if weights are packed; `model.folder` is where its files are

    Peak memory: the model's bytes, packed where it is packed, plus the largest tensor that is converted or packed, plus
    some 30 MB while it is. Raises ValueError for an unknown family, for missing, unexpected or misshapen tensors (all
    of them named), a damaged file, packed weights with a part missing, or weights that exist only as a pickle.
    Tensors that a text model rightly leaves aside (vision towers, a tied lm_head) are reported on stderr.
    """
    if quant not in (None, *KINDS):
        raise ValueError(f"got quant {quant!r}, want 'nf4', 'int8' or None")
    folder = resolve(path_or_repo, want="model")
    with torch.device("meta"):
        model = Transformer(model_config(read_json(folder / "config.json")))
    found = _match(folder, model)
    _check(folder, model, found, quant)
    _tie(folder, model, found, dtype)
    _say_what_else_is_there(folder, model.config, found.skipped)
    if shard:
        shard(model)
    _fill(model, found, device, dtype, quant)
    if packed_layers(model):
        model.requires_grad_(False)  # packed weights cannot be trained; an adapter over them can
    model.folder, model.expert_layout = folder, found.layout
    return model.eval()


@dataclasses.dataclass
class Found:
    """What a folder's files hold, under our names; `skipped` and `unexpected` under theirs."""

    weights: dict[str, Stored]
    companions: dict[str, dict[str, Stored]]  # of packed weights: name -> part -> tensor
    skipped: list[str]
    unexpected: list[str]  # a second tensor for the same place counts too
    layout: str = "each"  # of experts: storage/experts.py


def _wanted(model: Transformer) -> dict[str, tuple]:
    """Name -> shape of every tensor that a file may hold for this model; of experts each by itself."""
    wanted = {n: shape for name, p in model.named_parameters() for n, shape in experts.each(name, p.shape).items()}
    if model.config.tied:  # a file may hold the head all the same
        wanted[HEAD] = wanted[EMBEDDING]
    return wanted


def _match(folder: pathlib.Path, model: Transformer) -> Found:
    """Which stored tensor goes where, from the headers alone."""
    wanted, linear = _wanted(model), {f"{name}.weight" for name in linear_layers(model)}
    found = Found({}, collections.defaultdict(dict), [], [])
    companions = found.companions
    for file in weight_files(folder):
        stored_parts = (
            (name, ours, part)
            for name, whole in read_header(file)[0].items()
            for half, stored in interleaved.split(our_name(name), whole, model.config).items()
            for ours, part in experts.parts(half, stored, wanted).items()
        )
        for name, ours, stored in stored_parts:
            if isinstance(stored, experts.ExpertPart):
                found.layout = "turned" if stored.turned else "fused"
            if SKIP.search(name):
                found.skipped.append(name)
            elif (match := COMPANION.fullmatch(ours)) and match[1] in linear and match[2] not in companions[match[1]]:
                companions[match[1]][match[2]] = stored
            elif ours in wanted and ours not in found.weights:
                found.weights[ours] = stored
            else:
                found.unexpected.append(name)
    if model.config.tied and EMBEDDING not in found.weights and HEAD in found.weights:
        found.weights[EMBEDDING] = found.weights.pop(HEAD)
    return found


def _check(folder: pathlib.Path, model: Transformer, found: Found, quant: str | None) -> None:
    """Raises ValueError for whatever does not fit, with all problems in one line."""
    wanted, tied = _wanted(model), model.config.tied
    companions = ((name, COMPANION.fullmatch(our_name(name))) for name in found.unexpected)
    if packed := [name for name, match in companions if match and experts.EXPERT.fullmatch(match[1])]:
        want = "want experts in 16 bits: --quant nf4 packs them as they are read"
        raise ValueError(f"{folder}: got packed experts ({some(packed, 1)}), {want}")
    problems = [f"missing {name}" for name in wanted if name not in found.weights and not (name == HEAD and tied)]
    problems += [f"unexpected {name}" for name in found.unexpected]
    refuse_foreign_names(folder, found.unexpected, wanted)
    if any(name.endswith(".SCB") for name in found.unexpected):
        want = "want its 4-bit ones, or plain ones with quant 'int8'"
        raise ValueError(f"{folder} holds bitsandbytes' 8-bit weights, {want}")
    if found.companions and quant == "int8":
        raise ValueError(f"got quant 'int8' for {folder}, whose weights are packed as NF4 already; want 'nf4' or None")
    for name, stored in found.weights.items():
        if name in found.companions:
            problems += _packed_problems(name, wanted[name], stored, found.companions[name])
            continue
        if stored.shape != wanted[name]:
            problems.append(f"{name} has shape {list(stored.shape)}, config.json wants {list(wanted[name])}")
        if not stored.dtype.is_floating_point:
            problems.append(f"{name} has dtype {stored.code}, want F32, F16 or BF16")
    if problems:
        family, listed = model.config.family, some(problems, 5, "; ")
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit a {family} model: {listed}")


def _packed_problems(name: str, shape: tuple, weight: Stored, parts: dict[str, Stored]) -> list[str]:
    """What does not fit about a packed weight, by its quant state (150 bytes) and the headers of its other parts."""
    headers = {"weight": weight, **parts}
    tensors = {part: torch.empty(s.shape, dtype=s.dtype, device="meta") for part, s in headers.items()}
    if QUANT_STATE in parts:
        tensors[QUANT_STATE] = parts[QUANT_STATE].read()
    try:
        q = nf4_from_file(name, tensors)
    except ValueError as e:
        return [str(e)]
    return [] if q.shape == shape else [f"{name} has shape {list(q.shape)}, config.json wants {list(shape)}"]


def _tie(folder: pathlib.Path, model: Transformer, found: Found, dtype: torch.dtype) -> None:
    """Of a tied head that is stored all the same: skip it if it equals the embedding, else untie the model."""
    if not model.config.tied or HEAD not in found.weights:
        return
    if _same_values(found.weights[HEAD], found.weights[EMBEDDING], dtype):
        found.skipped.append(HEAD)
        del found.weights[HEAD]
    else:  # merged by a trainer that trained both; transformers does not tie them either
        model.config = config = dataclasses.replace(model.config, tied=False)
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        tell(f"{folder}: {HEAD} is not the embedding that tie_word_embeddings promises; both are used as stored")


def _same_values(a: Stored, b: Stored, dtype: torch.dtype) -> bool:
    """Whether two stored matrices of one shape are equal once they are in dtype; a few MB of each at a time."""
    V, C = a.shape
    rows = max(1, COMPARED // C)
    blocks = (slice(first, min(first + rows, V)) for first in range(0, V, rows))
    return all(torch.equal(a.read(block).to(dtype), b.read(block).to(dtype)) for block in blocks)


def _fill(model: Transformer, found: Found, device, dtype: torch.dtype, quant: str | None) -> None:
    """Read each tensor, in file order, and put it in place. What needs no change is read where it stays."""
    packs = packable(model) if quant and not found.companions else ()
    for name, stored in found.weights.items():
        if match := experts.EXPERT.fullmatch(name):
            with named(f"{stored.path}: {name}"):
                experts.put_expert(model, match, lambda stored=stored: stored.read().to(dtype).to(device), quant)
            continue
        parent, leaf = name.rsplit(".", 1)
        module = model.get_submodule(parent)
        if name in found.companions:
            parts = {part: s.read() for part, s in found.companions[name].items()}
            q = nf4_from_file(name, {"weight": stored.read(), **parts}).to(device)
            put(model, parent, NF4Linear(q, module.bias, bytes(parts[QUANT_STATE].flatten().tolist())))
        elif parent in packs and leaf == "weight":  # rounded to dtype first: the weights that everybody else packs
            with named(f"{stored.path}: {name}"):
                put(model, parent, quantize_linear(stored.read().to(dtype).to(device), module.bias, quant))
        elif sharding.is_sharded(into := getattr(module, leaf)):
            sharding.fill(into, lambda rows, stored=stored: stored.read(rows).to(dtype))
        else:
            module.register_parameter(leaf, nn.Parameter(stored.read().to(dtype).to(device)))


def _say_what_else_is_there(folder: pathlib.Path, config: ModelConfig, skipped: list[str]) -> None:
    """Notices: what the folder holds and a text model does not use, or what could be meant instead."""
    if config.unread:
        tell(f"{folder}/config.json: {len(config.unread)} keys are not read: {some(config.unread)}")
    if (folder / SINGLE).exists() and (folder / INDEX).exists():
        tell(f"{folder}: got {SINGLE} and {INDEX}, read the first, as transformers does")
    if (folder / ADAPTER).exists():
        tell(f"{folder}: got a model and an adapter, read the model alone: add --adapter {folder} for both")
    if skipped:
        tell(f"{folder}: left aside {len(skipped)} tensors: {some(skipped)}")


def stored_dtype(folder: pathlib.Path) -> torch.dtype:
    """The dtype of a checkpoint's largest tensor: what it was saved in."""
    tensors = [stored for file in weight_files(folder) for stored in read_header(file)[0].values()]
    tensors = [stored for stored in tensors if stored.dtype.is_floating_point] or tensors  # no packed bytes
    if not tensors:
        raise ValueError(f"{folder}: got weight files without tensors; fetch them again")
    return max(tensors, key=lambda stored: math.prod(stored.shape)).dtype


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

    Each file is written atomically and config.json comes last, so a folder with one is complete.
    """
    path, source = pathlib.Path(path), getattr(model, "folder", None)
    layers, packed, dtype = lora_layers(model), packed_layers(model), model.norm.weight.dtype
    whole = read_json(source / "config.json") if source and model.config.module_prefix != "model." else None
    as_nf4 = not (merge_lora and layers) and any(isinstance(layer, NF4Linear) for layer in packed.values())
    as_nf4 = as_nf4 and (whole is None or "quantization_config" in whole) and not interleaved.orders(model.config)
    tensors = interleaved.joined(_parameters(model, merge_lora, as_nf4), model.config)
    if whole is None:
        tensors = {name if name == HEAD else f"model.{name}": t for name, t in tensors.items()}
    else:
        if path.resolve() == source.resolve():
            raise ValueError(f"got {path} to save to, which is what the model was loaded from; want another folder")
        tensors = _with_towers(source, tensors, as_nf4)
    if tokenizer is None and source is not None and (source / "tokenizer.json").exists():
        tokenizer = load_tokenizer(source)
    path.mkdir(parents=True, exist_ok=True)
    _write_shards(path, tensors)
    if source is None:
        atomic_write(path / "generation_config.json", json.dumps({"eos_token_id": list(model.config.eos_ids)}))
    copied = ("generation_config.json", *(PROCESSOR_FILES if whole else ())) if source else ()
    for name in copied:
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


def _write_shards(path: pathlib.Path, tensors: Writable) -> None:
    """Weights in files of at most SHARD_BYTES. Tensors of a shard are made when its turn comes, so merged copies of one
    shard exist at a time. The index comes last; before, config.json goes: a folder with one is complete."""
    shards, size = [[]], 0
    for name, (nbytes, _) in tensors.items():
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) > 1:
        (path / "config.json").unlink(missing_ok=True)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(path / file, {name: tensors[name][1]() for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(nbytes for nbytes, _ in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(path / INDEX, json.dumps(index, indent=2))
    else:
        (path / INDEX).unlink(missing_ok=True)
    for old in path.glob("model*.safetensors"):  # shards of an older save: beside new ones they could be read instead
        if old.name not in weight_map.values():
            old.unlink()


def _parameters(model: Transformer, merge_lora: bool, as_nf4: bool) -> Writable:
    """What a folder of this model holds, under our names."""
    layers, dtype, tensors = lora_layers(model), model.norm.weight.dtype, {}
    stacks = experts.stacks(model)
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith((".lora_A", ".lora_B")) or owner.removesuffix(".base") in stacks:
            continue
        get = lambda p=p: p  # noqa: E731
        if owner.endswith(".base"):
            owner = owner.removesuffix(".base")
            layer = layers[owner]
            if leaf == "weight":
                base = layer.original if layer.merged else p  # without its adapter, also while that is merged in
                get = layer.merged_weight if merge_lora else lambda base=base: base
        tensors[f"{owner}.{leaf}"] = (p.nbytes, get)
    for name, layer in stacks.items():
        tensors |= experts.matrices(name, layer, layers.get(name), merge_lora, dtype)
    if getattr(model, "expert_layout", "each") != "each":
        tensors = experts.fused(tensors, model.expert_layout == "turned")
    for name, layer in packed_layers(model).items():
        if name.rpartition(".")[0].removesuffix(".base") in stacks:
            continue
        if as_nf4:
            for part, t in nf4_tensors(layer).items():
                tensors[f"{name}.{part}"] = (t.nbytes, lambda t=t: t)
            continue
        merged = layers[name].merged_weight if merge_lora and name in layers else None
        get = lambda layer=layer, merged=merged: merged(dtype) if merged else layer.unpack(dtype)  # noqa: E731
        tensors[f"{name}.weight"] = (layer.out_features * layer.in_features * dtype.itemsize, get)
    return tensors


def _with_towers(folder: pathlib.Path, ours: Writable, as_nf4: bool) -> Writable:
    """Our tensors under the names that they have in a multimodal folder, and everything else of it as it is."""
    out, rest, prefix = {}, dict(ours), PREFIXES[-1]
    for file in weight_files(folder):
        for name_there, stored in read_header(file)[0].items():
            name = our_name(name_there)
            if SKIP.search(name_there):
                if COMPANION.fullmatch(name_there) and not as_nf4:
                    got = f"{folder}: got a tower with packed weights ({some([name_there])})"
                    want = "want one in 16 bits to write a merged folder around it"
                    raise ValueError(f"{got}, {want}; the adapter alone works with this one")
                out[name_there] = (stored.nbytes, stored.read)
            elif name in rest:
                out[name_there] = rest.pop(name)
                prefix = prefix if name == HEAD else name_there.removesuffix(name)
            elif name == HEAD:  # tied, and in the file all the same
                out[name_there] = ours[EMBEDDING]
    return out | {f"{prefix}{name}": tensor for name, tensor in rest.items()}


def _with_dtype(config: dict, dtype: str) -> dict:
    """A multimodal config.json for weights of this dtype, else unchanged: transformers opens a folder in the dtype that
    it states."""
    out = {**config, **({"text_config": {**config["text_config"]}} if "text_config" in config else {})}
    parts = [(part, key) for part in (out, text_part(out)) for key in ("dtype", "torch_dtype") if key in part]
    for part, key in parts or [(out, "dtype")]:
        part[key] = dtype
    return out


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
