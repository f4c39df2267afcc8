"""nanogspo/checkpoint.py: the file format against the safetensors library, folders against transformers, adapters
against PEFT, and every way a download can be wrong.

Run: python -m pytest tests/test_checkpoint.py
"""

import contextlib
import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import peft
import pytest
import references
import safetensors.torch
import torch
from huggingface_hub import errors
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from test_inputs import corrupted, refused_or

from lessons.checkpoints import read_safetensors
from nanogspo import checkpoint
from nanogspo.checkpoint import load, load_adapter, save, save_adapter
from nanogspo.families import model_config
from nanogspo.inputs import parse_json
from nanogspo.lora import add_lora, lora_layers, merge_lora
from nanogspo.model import Transformer
from nanogspo.run.planner import outline
from nanogspo.storage import files, names
from nanogspo.storage import peft as adapters
from nanogspo.storage import safetensors as formats
from nanogspo.storage.safetensors import read_header, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def qwen3(tmp_path) -> Path:
    """A private copy of the Qwen3 reference's folder, to be damaged."""
    return Path(shutil.copytree(references.folder("qwen3"), tmp_path / "qwen3"))


def edit(folder: Path, change) -> None:
    """Rewrite model.safetensors after change(tensors)."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """(B, T, V) of ours or theirs on the same tokens."""
    tokens = references.tokens(2, 20)
    return model.logits(model(tokens)) if isinstance(model, Transformer) else model(input_ids=tokens).logits


@contextlib.contextmanager
def refused(says: str):
    with pytest.raises(ValueError, match=says) as caught:
        yield caught
    assert "\n" not in str(caught.value), "one line"


# ---------------------------------------------------------------------------------------------------------------------
# the file format


@st.composite
def tensor_dicts(draw) -> dict[str, torch.Tensor]:
    """Every dtype we hold; 0-d, empty and odd sizes; any bit pattern, NaNs too; any name JSON can carry."""
    names = draw(st.lists(st.text(min_size=1, max_size=6), max_size=5, unique=True))
    g = torch.Generator().manual_seed(draw(SEEDS))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(formats.DTYPE_CODES, key=str)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3))
        data = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=g, dtype=torch.uint8)
        tensors[name] = data.view(dtype).view(shape)
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Names, dtypes, shapes and bytes."""

    def record(t):
        return t.dtype, t.shape, t.flatten().view(torch.uint8).tolist() if t.numel() else []

    return {name: record(t) for name, t in a.items()} == {name: record(t) for name, t in b.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    write_safetensors(path, tensors, metadata or {"format": "pt"})


def read(path: Path) -> dict[str, torch.Tensor]:
    return {name: stored.read() for name, stored in read_header(path)[0].items()}


@given(tensors=tensor_dicts())
def test_safetensors_reads_what_we_write(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "a.safetensors"
    write(path, tensors, {"format": "pt", "note": "ünïcode"})
    assert same(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "note": "ünïcode"}
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0  # data can be mapped as any dtype
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]  # no temporary file is left


@given(tensors=tensor_dicts())
def test_we_read_what_safetensors_writes(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "a.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert same(read(path), tensors)
    assert read_header(path)[1] == {"format": "pt"}
    slow = {name: read_safetensors.read_tensor(path, e) for name, e in read_safetensors.read_header(path).items()}
    assert same(slow, tensors)


@pytest.mark.parametrize("length", [640, 19280, 640 + 65536])
def test_a_header_may_have_any_length(length, tmp_path):
    """640 is 80 02 in little-endian, how a pickle begins; 19,280 is "PK", how a zip file does."""
    path = tmp_path / "a.safetensors"
    padding = length - len('{"__metadata__":{"x":""}}')
    write(path, {}, {"x": "y" * padding})
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] == length
    assert read_header(path) == ({}, {"x": "y" * padding})


def test_rows_of_a_tensor_are_read_alone(tmp_path):
    write(tmp_path / "a", {"x": torch.arange(12).view(4, 3)})
    assert read_header(tmp_path / "a")[0]["x"].read(slice(1, 3)).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_a_disk_that_fills_up_with_the_last_bytes_is_said(tmp_path):
    """They are still in a buffer when the last tensor is written."""
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "a"
    write(path, {"x": torch.arange(10)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        with pytest.raises(OSError, match="a: cannot be written .*; want free space on its disk"):
            write(path, {"x": torch.arange(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_of_merged_weights_one_shard_exists_at_a_time(tmp_path, monkeypatch):
    """A merged copy of the whole model never exists."""
    alive, most = 0, 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def make():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return torch.ones(4, 4).as_subclass(Counted)

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 128)
    checkpoint._write_shards(tmp_path, {str(i): (64, make) for i in range(7)})
    assert len(list(tmp_path.glob("model-*"))) == 4 and 2 <= most <= 3


KILLED = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from nanogspo.storage.safetensors import write_safetensors
os.fsync = lambda file: os._exit(9)
write_safetensors(sys.argv[2], {"a": torch.ones(1_000_000)}, {})
"""


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"x": torch.arange(10)})
    before = path.read_bytes()
    child = subprocess.run([sys.executable, "-c", KILLED, str(ROOT), str(path)])
    assert child.returncode == 9
    assert path.read_bytes() == before


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"x": torch.arange(10)})
    before = path.read_bytes()
    bad = types.SimpleNamespace(dtype=torch.int64, shape=(1,), nbytes=8, detach=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_safetensors(path, {"x": bad}, {})
    with pytest.raises(TypeError):
        checkpoint.atomic_write(path, 5)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_files_are_written_as_the_package_writes_them(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"b.{d}": torch.randn(3, 5, generator=g).to(d)
        for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    tensors |= {"a": torch.arange(7, dtype=torch.uint8), "é": torch.ones(2, 3).T, "empty": torch.ones(0, 4)}
    tensors |= {"number": torch.tensor(5), "a.b": torch.ones(1, dtype=torch.int8)}
    metadata = {"state": json.dumps({"text": 'with "quotes" and é'})}
    write_safetensors(tmp_path / "ours", tensors, metadata)
    whole = {name: t.contiguous() for name, t in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "package", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "package").read_bytes()


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}: got a folder, want a safetensors file"):
        read_header(tmp_path)


def test_of_two_writers_at_a_time_one_fails_and_the_file_is_the_others(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    one, other = files.whole_file(path), files.whole_file(path)
    one.__enter__().write(b"one")
    monkeypatch.setattr(os, "getpid", lambda: 0)
    file = other.__enter__()
    file.write(b"the ")
    with pytest.raises(FileNotFoundError):
        one.__exit__(None, None, None)
    file.write(b"other")
    other.__exit__(None, None, None)
    assert path.read_bytes() == b"the other" and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# damaged files


def header_of(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "F32", shape: object = (1,), start: object = 0, end: object = 4) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD_FILES = {
    "empty": (b"", "got 0 bytes that are not safetensors .*; the download is incomplete"),
    "seven bytes": (b"\x08" + b"\0" * 6, "got 7 bytes that are not safetensors"),
    "no header": (struct.pack("<Q", 100) + b"{}", "got 10 bytes that are not safetensors"),
    "header of a zettabyte": (b"\xff" * 16, "header too large"),
    "no JSON": (header_of(b"garbage!"), "not safetensors"),
    "no UTF-8": (header_of(b"\xff\xfe\xfd\xfc"), "not safetensors"),
    "a list": (header_of([1, 2]), "not safetensors"),
    "an entry of its own kind": (header_of({"x": 5}), "not safetensors"),
    "no offsets": (header_of({"x": {"dtype": "F32", "shape": [1]}}), "not safetensors"),
    "three offsets": (header_of({"x": {**entry(), "data_offsets": [0, 4, 8]}}, b"1234"), "not safetensors"),
    "offsets in words": (header_of({"x": entry(start="0", end="4")}, b"1234"), "not safetensors"),
    "a shape in words": (header_of({"x": entry(shape=["1"])}, b"1234"), "not safetensors"),
    "a fractional shape": (header_of({"x": entry(shape=[1.0])}, b"1234"), "not safetensors"),
    "negative sizes": (header_of({"x": entry(shape=[-1, -1])}, b"1234"), "not safetensors"),
    "nothing, of 2**118 columns": (header_of({"x": entry(shape=[0, 2**59, 2**59], end=0)}), "fewer than 2.*60 numbers"),
    "a dtype that is a list": (header_of({"x": entry(["F32"])}, b"1234"), "not safetensors"),
    "a dtype of fp8": (header_of({"x": entry("F8_E4M3", [4])}, b"1234"), "x has dtype F8_E4M3, want one of I64, F64"),
    "overlap": (header_of({"x": entry(), "y": entry(start=2, end=6)}, b"123456"), "not safetensors .*y"),
    "a gap": (header_of({"x": entry(start=4, end=8)}, b"12345678"), "not safetensors .*x"),
    "bytes that are not the shape's": (header_of({"x": entry(shape=[2])}, b"1234"), "not safetensors"),
    "cut data": (header_of({"x": entry()}, b"123"), "not safetensors"),
    "bytes too many": (header_of({"x": entry()}, b"12345"), "not safetensors"),
    "a pickle": (pickle.dumps({"x": [1.0] * 20}), "got a pickle, which can run code when opened; want safetensors"),
    "a short pickle": (pickle.dumps(1), "got a pickle"),
    "an old pickle": (pickle.dumps({"x": [1.0] * 20}, protocol=2), "got a pickle"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_says_what_is_wrong_with_a_file(case, tmp_path):
    data, says = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with refused(says):
        read_header(path)


def test_torch_save_under_the_wrong_name_is_a_pickle(qwen3):
    torch.save({"x": torch.ones(2)}, qwen3 / "model.safetensors")
    with refused("got a pickle, which can run code"):
        load(qwen3)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_never_loads(share, tmp_path_factory):
    """Cut anywhere: in the length, in the header, in the data."""
    whole = (references.folder("qwen3") / "model.safetensors").read_bytes()
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(references.folder("qwen3") / "config.json", folder)
    (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with refused("delete the file and fetch it again"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read(qwen3):
    tensors = read_header(qwen3 / "model.safetensors")[0]
    os.truncate(qwen3 / "model.safetensors", 5000)
    with refused("model.safetensors: tensor .* cannot be read .*; fetch it again"):
        list(tensors.values())[-1].read()


# ---------------------------------------------------------------------------------------------------------------------
# folders in


@pytest.mark.parametrize("name", references.NAMES)
def test_hub_files_load_like_new_ones(name, tmp_path, capsys):
    """Old config.json, and the names older wrappers gave the towers; the towers are reported, the rest is equal."""
    shutil.copy(references.folder(name) / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(references.hub_config(name)))
    if name == "gemma3_multimodal":
        edit(tmp_path, lambda t: [t.__setitem__(n.replace("tower.", "tower.vision_model."), t.pop(n))
                                  for n in list(t) if n.startswith("vision_tower.")])  # fmt: skip
    model = load(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(model), logits(references.reference(name)))
    assert not model.training and model.folder == tmp_path
    assert ("left aside" in capsys.readouterr().err) == (references.CASES[name].wrapper is not None)


def shard(folder: Path, first: int) -> None:
    """Three shards, numbered from `first` (Qwen3.5 counts from 0), and an index."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    names = sorted(tensors)
    for i in range(3):
        part = names[i * len(names) // 3 : (i + 1) * len(names) // 3]
        file = f"model-{i + first:05d}-of-00003.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("first", [0, 1])
def test_shards_are_found_by_the_index(qwen3, first):
    shard(qwen3, first)
    (qwen3 / "consolidated.safetensors").write_bytes(b"not ours to open")
    assert torch.equal(logits(load(qwen3, dtype=torch.float32)), logits(references.reference("qwen3")))


def test_extra_tensors_that_may_be_left_aside_are_named(qwen3, capsys):
    """Qwen3-0.6B's file holds the tied head a second time; old Llama files hold RoPE's frequencies."""
    extra = {
        "lm_head.weight": safetensors.torch.load_file(qwen3 / "model.safetensors")["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "mtp.lm_head.weight": torch.zeros(97, 64),
    }
    edit(qwen3, lambda tensors: tensors.update(extra))
    assert torch.equal(logits(load(qwen3, dtype=torch.float32)), logits(references.reference("qwen3")))
    said = capsys.readouterr().err
    assert "left aside 3 tensors" in said and all(name in said for name in extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_converted_as_torch_does(qwen3, stored, dtype):
    edit(qwen3, lambda tensors: [tensors.__setitem__(n, t.to(stored)) for n, t in tensors.items()])
    want = safetensors.torch.load_file(qwen3 / "model.safetensors")
    for name, p in load(qwen3, dtype=dtype).named_parameters():
        assert p.dtype == dtype and torch.equal(p, want[f"model.{name}"].to(dtype)), name
    assert checkpoint.stored_dtype(qwen3) == stored


def rename(tensors):
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")


NORM = "model.layers.2.self_attn.q_norm.weight"
BAD_TENSORS = {
    "renamed": (rename, "2 tensors do not fit a qwen3 model: missing layers.1.mlp.up_proj.weight; unexpected model.la"),
    "wrong shape": (
        lambda t: t.update({NORM: torch.ones(31)}),
        r"layers.2.self_attn.q_norm.weight has shape \[31\], config.json wants \[32\]",
    ),
    "transposed": (
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(64, 97)}), r"has shape \[64, 97\], .* \[97, 64\]"
    ),
    "whole numbers": (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int64)}), "has dtype I64, want F32, F16 or"),
    "twice": (lambda t: t.update({"norm.weight": torch.ones(64)}), "unexpected (model.)?norm.weight"),
    "a bias too many": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}), "unexpected model.*q_proj.bias"
    ),
    "all missing": (lambda t: t.clear(), "35 tensors do .*: missing embed_tokens.weight; .* and 30 more$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case, qwen3):
    change, says = BAD_TENSORS[case]
    edit(qwen3, change)
    with refused(says):
        load(qwen3)


def test_an_untied_head_must_be_there(tmp_path):
    folder = Path(shutil.copytree(references.folder("llama"), tmp_path / "llama"))
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with refused("1 tensors do not fit a llama model: missing lm_head.weight"):
        load(folder)


def test_a_head_that_is_not_the_tied_embedding_is_used(qwen3, tmp_path, capsys):
    """A trainer merged modules_to_save = embed_tokens, lm_head. Saved, packed, with an adapter: the same head."""
    edit(
        qwen3, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.05 * torch.arange(97)[:, None]})
    )
    theirs = logits(references.open_reference(qwen3, "qwen3"))
    model = load(qwen3, dtype=torch.float32)
    assert torch.equal(logits(model), theirs) and not model.config.tied
    assert (theirs - logits(references.reference("qwen3"))).abs().max() > 0.1
    assert "lm_head.weight is not the embedding that tie_word_embeddings promises" in capsys.readouterr().err
    save(model, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    for opened in (load(tmp_path / "out", dtype=torch.float32), references.open_reference(tmp_path / "out", "qwen3")):
        assert torch.equal(logits(opened), theirs)
    packed = load(qwen3, dtype=torch.float32, quant="int8")
    assert torch.equal(packed.lm_head.weight, model.lm_head.weight)
    add_lora(packed, r=2, alpha=2, targets=["q_proj"])
    save(packed, tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed", dtype=torch.float32).lm_head.weight, model.lm_head.weight)
    edit(qwen3, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:, :63].contiguous()}))
    with refused(r"lm_head.weight has shape \[97, 63\], config.json wants \[97, 64\]"):
        load(qwen3)


@pytest.mark.parametrize("row", [0, 50, 96])
def test_one_row_makes_another_head(row, qwen3, monkeypatch):
    """Compared ten rows at a time, whichever it is."""
    monkeypatch.setattr(checkpoint, "COMPARED", 640)
    edit(qwen3, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(qwen3).config.tied
    edit(qwen3, lambda t: t["lm_head.weight"][row].add_(1))
    assert not load(qwen3).config.tied


def test_a_tied_matrix_may_be_stored_as_the_head_alone_or_differ_in_rounding_alone(qwen3):
    """transformers ties the embedding to what there is. Two copies that dtype makes equal are one matrix."""
    edit(qwen3, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(load(qwen3, dtype=torch.float32)), logits(references.open_reference(qwen3, "qwen3")))
    edit(qwen3, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"].bfloat16()}))
    assert load(qwen3, dtype=torch.bfloat16).config.tied and not load(qwen3, dtype=torch.float32).config.tied


def test_of_two_sets_of_weights_the_single_file_is_read(qwen3, tmp_path, capsys):
    """As transformers does, also where the shards that an old index names are gone."""
    whole = (qwen3 / "model.safetensors").read_bytes()
    edit(qwen3, lambda t: [t.__setitem__(n, w * 1.5) for n, w in t.items()])
    shard(qwen3, 1)
    (qwen3 / "model.safetensors").write_bytes(whole)
    (qwen3 / "adapter_config.json").write_text("{}")
    for shards in ("there", "gone"):
        if shards == "gone":
            [file.unlink() for file in qwen3.glob("model-*")]
        assert torch.equal(logits(load(qwen3, dtype=torch.float32)), logits(references.reference("qwen3")))
        said = capsys.readouterr().err
        assert "got model.safetensors and model.safetensors.index.json, read the first, as transformers does" in said
        assert "got a model and an adapter, read the model alone: add --adapter" in said
    (qwen3 / "adapter_config.json").unlink()
    assert torch.equal(logits(references.open_reference(qwen3, "qwen3")), logits(references.reference("qwen3")))


def test_keys_that_are_not_read_are_counted_and_named(qwen3, capsys):
    config = json.loads((qwen3 / "config.json").read_text())
    load(qwen3)
    assert capsys.readouterr().err == ""
    (qwen3 / "config.json").write_text(json.dumps({**config, **{f"key_{i:02d}": i for i in range(20)}}))
    load(qwen3)
    assert "config.json: 20 keys are not read: key_00, key_01, " in (said := capsys.readouterr().err)
    assert said.endswith("key_07 and 12 more\n") and said.count("\n") == 1


def test_gemma_3s_final_cap_is_transformers(tmp_path):
    folder = Path(shutil.copytree(references.folder("gemma3"), tmp_path / "gemma3"))
    config = json.loads((folder / "config.json").read_text())
    capped = {**config, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}
    (folder / "config.json").write_text(json.dumps(capped))
    theirs = logits(references.open_reference(folder, "gemma3"))
    assert theirs.abs().max() <= 0.5 and (logits(load(folder, dtype=torch.float32)) - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "rename, says",
    [
        (
            lambda n: f"_orig_mod.{n}",
            r"got '_orig_mod.' of torch.compile in 35 names \(_orig_mod.model.* and 34 more\), ",
        ),
        (lambda n: f"module.{n}", "got 'module.' of DistributedDataParallel in 35 names"),
        (lambda n: f"base_model.model.{n}".replace("q_proj", "q_proj.base_layer"), "'base_model.model.' of PEFT in 35"),
        (lambda n: n.replace("layers.0.", "layers.0._orig_mod."), "'_orig_mod.' of torch.compile in 11 names"),
    ],
    ids=["compile", "ddp", "peft", "inside"],
)
def test_a_wrapped_models_names_are_one_line(rename, says, qwen3):
    edit(qwen3, lambda t: [t.__setitem__(rename(n), t.pop(n)) for n in list(t)])
    with refused(says + ".*want the model's own names: save the model inside the wrapper$") as caught:
        load(qwen3)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("prefix", ["module.", "a."])
def test_a_head_has_its_own_name_whole(prefix, qwen3):
    """transformers makes a random head beside a tensor that only ends like one."""
    edit(qwen3, lambda t: t.__setitem__(f"{prefix}lm_head.weight", t["model.embed_tokens.weight"].clone()))
    with refused(f"{prefix}lm_head.weight"):
        load(qwen3)


def test_an_adapter_or_a_run_given_as_a_model_is_told_the_flags(tmp_path):
    """And a model or a run given as an adapter."""
    run, model = tmp_path / "run", references.folder("qwen3")
    save_adapter(adapted("qwen3", targets=["q_proj"]), run / "adapter", base="Qwen/Qwen3-0.6B")
    flags = f"--model Qwen/Qwen3-0.6B --adapter {run / 'adapter'}$"
    for folder, says in [(run / "adapter", f"is an adapter: give {flags}"), (run, f"is a run's folder: give {flags}")]:
        with refused(says):
            load(folder)
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    with refused(f"is a run's folder: give --model {run / 'model'}$"):
        load(run)
    assert checkpoint.resolve(run) == checkpoint.resolve(run, want="tokenizer") == run
    for folder, says in [
        (run, f"is a run's folder: give --adapter {run / 'adapter'}$"),
        (model, "got no adapter_config.json, want an adapter's folder; this is a model: give --model$"),
        (tmp_path / "gone", "got adapter '.*, which is no folder here; want an adapter's folder or a hub id"),
        (model / "model.safetensors", "got the file .*, want an adapter's folder"),
    ]:
        with refused(says):
            load_adapter(load(model), folder)


def test_a_wrong_value_anywhere_is_refused(qwen3, tmp_path, monkeypatch):
    """In an index, a header and an adapter's config, whatever type and size it has: one line, nothing allocated."""
    shard(qwen3, 1)
    index = json.loads((qwen3 / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict(list(index["weight_map"].items())[::12])  # every shard is still named

    def stands_for_the_file(tree):  # a write for each would take most of the time
        for module in (files, adapters):
            monkeypatch.setattr(module, "read_json", lambda path: parse_json(json.dumps(tree).encode(), str(path)))

    def read_index(tree):
        stands_for_the_file(tree)
        files.weight_files(qwen3)

    def read(tree):
        text = json.dumps(tree).encode()
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        tensors = read_header(tmp_path / "a")[0]
        assert sum(stored.read().numel() for stored in tensors.values()) <= 8

    header = {"__metadata__": {"format": "pt"}, "a": entry(shape=[2, 0]), "b": entry(shape=[2], end=8)}
    header["a"]["data_offsets"] = [0, 0]
    model = adapted("qwen3", targets=["q_proj"], r=1)
    save_adapter(model, tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def read_adapter(tree):
        stands_for_the_file(tree)
        load_adapter(fresh, tmp_path / "adapter")

    fresh = load(references.folder("qwen3"), dtype=torch.float32)
    monkeypatch.setattr(adapters, "add_lora", lambda *_, **__: [])  # what comes after all checks
    for reader, tree in [(read_index, index), (read, header), (read_adapter, {**stated, "rank_pattern": {}})]:
        assert refused_or(reader, tree)
        accepted = [refused_or(reader, wrong) for _, wrong in corrupted(tree)]
        assert sum(accepted) < 0.6 * len(accepted)


def test_says_what_is_wrong_with_a_folder(qwen3, tmp_path):
    config, weights = (qwen3 / "config.json").read_text(), qwen3 / "model.safetensors"
    for text, says in [
        (config[:100], "config.json: got broken JSON .*fetch the file again"),
        ("[]", "config.json: got JSON that is no object"),
        ("{}", "got model_type None"),
        ("\0\xff", "config.json: got byte 0xff at column 2, want UTF-8"),
    ]:
        (qwen3 / "config.json").write_text(text, encoding="latin-1")
        with refused(says):
            load(qwen3)
    (qwen3 / "config.json").unlink()
    with refused("config.json: got no such file or directory, want a file of the checkpoint"):
        load(qwen3)
    (qwen3 / "config.json").write_text(config)
    with refused("got the file .*model.safetensors, want a checkpoint folder"):
        load(weights)
    weights.rename(qwen3 / "pytorch_model.bin")
    with refused("got pytorch_model.bin, pickles that can run code when opened; want safetensors"):
        load(qwen3)
    (qwen3 / "pytorch_model.bin").unlink()
    with refused("missing weight files model.safetensors; fetch them again"):
        load(qwen3)
    for name in ("no/such/folder", str(tmp_path / "gone"), "./gone", "gone", "~/gone/gone", "~nosuchuser/x"):
        with refused("is no folder here; want a checkpoint folder or a hub id owner/name"):
            load(name)


def test_says_what_is_wrong_with_an_index(qwen3):
    shard(qwen3, 1)
    index = qwen3 / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    (qwen3 / "model-00002-of-00003.safetensors").rename(qwen3 / "gone")
    with refused("missing weight files model-00002-of-00003.safetensors; fetch them again"):
        load(qwen3)
    for bad, says in [
        ({"metadata": {}}, "got no weight_map, want tensor name -> file name"),
        ({"weight_map": {}}, "got no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "got no weight_map"),
        ({"weight_map": {"x": 5}}, "got no weight_map"),
        ([], "got JSON that is no object"),
        ({"weight_map": {**good["weight_map"], "x": "../other/a.safetensors"}}, "a file name that leaves the folder"),
        ({"weight_map": {"x": "/etc/passwd"}}, "a file name that leaves the folder"),
        ({"weight_map": {"x": ".."}}, "a file name that leaves the folder"),
        ({"weight_map": {"x": "x" * 5000}}, "a file name that leaves the folder"),
        ({"weight_map": {str(i): f"{i:02d}" for i in range(20)}}, "missing weight files 00, .*, 07 and 12 more; fetch"),
    ]:
        index.write_text(json.dumps(bad))
        with refused(says):
            load(qwen3)


# ---------------------------------------------------------------------------------------------------------------------
# memory

MEASURED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from nanogspo.checkpoint import load, tensor_bytes

def peak():  # VmHWM, not ru_maxrss: the latter is inherited from the process that started this one
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

load(sys.argv[2] + "/small")  # what is imported or allocated once, whatever is loaded
before = peak()
model = load(sys.argv[2] + "/large")
print(peak() - before, tensor_bytes(model.parameters()))
"""


def sparse_checkpoint(folder: Path, C: int, L: int, V: int, dtype: torch.dtype) -> int:
    """A llama checkpoint of zeros that takes no disk: a header, then a hole. Returns the largest tensor's bytes."""
    config = {"model_type": "llama", "hidden_size": C, "intermediate_size": 4 * C, "num_hidden_layers": L,
              "num_attention_heads": 8, "vocab_size": V, "tie_word_embeddings": True}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Transformer(model_config(config))
    header, at, largest = {}, 0, 0
    for name, p in model.named_parameters():
        size = p.numel() * dtype.itemsize
        header[f"model.{name}"] = entry(formats.DTYPE_CODES[dtype], list(p.shape), at, at + size)
        at, largest = at + size, max(largest, size)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(header_of(header))
        f.truncate(f.tell() + at)
    return largest


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc, which is Linux's")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_peak_memory_is_the_model_and_one_tensor(stored, tmp_path):
    """117 MB of bf16 weights, from a bf16 file, which needs no copy at all, and from an fp32 one of 235 MB.

    Measured: 0.2 MB above the law. Fresh memory for every tensor that is converted was 13 MB above it.
    """
    sparse_checkpoint(tmp_path / "small", 64, 1, 128, stored)
    largest = sparse_checkpoint(tmp_path / "large", 1024, 3, 8192, stored)
    command = [sys.executable, "-c", MEASURED, str(ROOT), str(tmp_path)]
    growth, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size > 110e6
    assert growth <= size + (largest if stored != torch.bfloat16 else 0) + 0.05 * size
    assert growth > 0.9 * size, "the measurement misses the model itself"


# ---------------------------------------------------------------------------------------------------------------------
# folders out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", references.NAMES)
def test_transformers_opens_what_we_save(name, dtype, tmp_path):
    """Its own family, or the whole multimodal folder around it, with the same bits."""
    model = load(references.folder(name), dtype=dtype)
    save(model, tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    wrapped = references.CASES[name].wrapper is not None
    assert stated["architectures"] == [references.CASES[name].model.__name__]
    assert stated["dtype"] == str(dtype).removeprefix("torch.")
    if wrapped:
        want = json.loads(json.dumps(references.new_config(name)).replace('"float32"', f'"{stated["dtype"]}"'))
        assert stated == {**want, "vision_config": references.new_config(name)["vision_config"]}
        kept, base = (safetensors.torch.load_file(f / "model.safetensors") for f in (tmp_path, model.folder))
        towers = {n for n in base if names.SKIP.search(n)}
        assert towers and kept.keys() == base.keys()
        assert all(torch.equal(kept[n], base[n]) and kept[n].dtype == base[n].dtype for n in towers)
    if dtype == torch.float32:  # what bf16 does is test_model.py's; here it is enough that the bytes come back
        assert torch.equal(logits(references.open_reference(tmp_path, name)), logits(model))
    again = load(tmp_path, dtype=dtype)
    assert again.config == model.config
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    assert (tmp_path / "generation_config.json").read_bytes() == (model.folder / "generation_config.json").read_bytes()


def test_large_models_are_sharded_and_old_shards_do_not_stay(tmp_path, monkeypatch):
    model = load(references.folder("gemma3"), dtype=torch.float32)
    save(model, tmp_path)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)
    save(model, tmp_path)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / file).stat().st_size <= 200_000 + 10_000 for file in files)  # and its header
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.tensor_bytes(model.parameters())
    for opened in (load(tmp_path, dtype=torch.float32), references.open_reference(tmp_path, "gemma3")):
        assert torch.equal(logits(opened), logits(model))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10**9)
    save(model, tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_save_that_dies_keeps_the_folder_loadable(tmp_path, monkeypatch):
    """config.json is written last, and every file at once or not at all."""
    model = load(references.folder("qwen3"), dtype=torch.float32)
    monkeypatch.setattr(checkpoint, "export_config", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(model, tmp_path)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "config.json").exists()


def test_a_second_save_of_shards_that_dies_leaves_no_folder_that_looks_whole(qwen3, monkeypatch):
    """Of one file, the old folder stays whole until the new file replaces the old."""
    model, write = load(qwen3, dtype=torch.float32), write_safetensors

    def dies(file, *rest):
        write(file, *rest)
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint, "write_safetensors", dies)
    for size, whole in ((checkpoint.SHARD_BYTES, True), (200_000, False)):
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", size)
        with pytest.raises(OSError, match="the disk is full"):
            save(model, qwen3)
        assert (qwen3 / "config.json").exists() == whole
    monkeypatch.setattr(checkpoint, "write_safetensors", write)
    save(model, qwen3)
    assert torch.equal(logits(load(qwen3, dtype=torch.float32)), logits(model))


# ---------------------------------------------------------------------------------------------------------------------
# adapters


def adapted(name: str, *, targets=LINEAR, r: int = 4, alpha: float = 12) -> Transformer:
    """Our model with an adapter that does something: B is not zero any more."""
    model = load(references.folder(name), dtype=torch.float32)
    add_lora(model, r=r, alpha=alpha, targets=targets)
    g = torch.Generator().manual_seed(7)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.copy_(torch.randn(layer.lora_B.weight.shape, generator=g) * 0.1)
    return model


def test_a_multimodal_folder_of_packed_weights(tmp_path):
    """Written back byte for byte, and in 16 bits where an adapter is merged; not around a tower that is packed too."""
    base, folder, dtype = tmp_path / "base", references.folder("qwen3_vl"), torch.bfloat16
    base.mkdir()
    packed = load(folder, dtype=dtype, quant="nf4")
    parts = checkpoint._with_towers(folder, checkpoint._parameters(packed, False, True), True)
    write_safetensors(base / "model.safetensors", {name: get() for name, (_, get) in parts.items()}, {})
    stated = {**references.new_config("qwen3_vl"), "quantization_config": {"quant_method": "bitsandbytes"}}
    (base / "config.json").write_text(json.dumps(stated))
    model = load(base, dtype=dtype)
    assert torch.equal(logits(model), logits(packed))
    save(model, tmp_path / "again")
    again, first = (safetensors.torch.load_file(f / "model.safetensors") for f in (tmp_path / "again", base))
    assert same(again, first)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    add_lora(model, r=2, alpha=2, targets=["q_proj"])
    save(model, tmp_path / "wide")
    assert "quantization_config" not in json.loads((tmp_path / "wide" / "config.json").read_text())
    wide = safetensors.torch.load_file(tmp_path / "wide" / "model.safetensors")
    assert wide.keys() == safetensors.torch.load_file(folder / "model.safetensors").keys()
    theirs = references.open_reference(tmp_path / "wide", "qwen3_vl")
    assert torch.equal(logits(load(tmp_path / "wide", dtype=torch.float32)), logits(theirs))
    edit(base, lambda t: t.update({"model.visual.x.weight.absmax": torch.ones(1)}))
    with refused("got a tower with packed weights .model.visual.x.weight.absmax.*the adapter alone works"):
        save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", references.NAMES)
def test_saving_merges_the_adapter(name, tmp_path):
    """fp32: W + BA against Wx + BAx, a few eps of logits around 5. Unmerged weights are 0.5 away and more."""
    model = adapted(name)
    before = [p.clone() for p in model.parameters()]
    save(model, tmp_path)
    theirs = references.open_reference(tmp_path, name)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-4
    assert (logits(theirs) - logits(references.reference(name))).abs().max() > 0.1
    assert all(map(torch.equal, before, model.parameters()))  # the model itself is as it was


def test_the_base_can_be_saved_alone(tmp_path):
    model = adapted("llama_biases")
    for merged in (False, True):
        if merged:
            merge_lora(model)
        save(model, tmp_path, merge_lora=False)
        assert torch.equal(logits(load(tmp_path, dtype=torch.float32)), logits(references.reference("llama_biases")))
    save(model, tmp_path)  # merged already: not added a second time
    assert torch.equal(logits(load(tmp_path, dtype=torch.float32)), logits(model))


@pytest.mark.parametrize(
    "targets", [LINEAR, ["q_proj", "v_proj"], ["layers.1.mlp.up_proj", "layers.0.self_attn.o_proj"]], ids=len
)
@pytest.mark.parametrize("name", ["qwen3", "llama_biases", "gemma3", "gemma3_multimodal", "qwen2_5_vl", "qwen3_vl"])
def test_peft_opens_our_adapter(name, targets, tmp_path):
    """Of a multimodal base it has the text layers alone: Gemma 3's tower has layers of the same leaf names."""
    model = adapted(name, targets=targets)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(references.reference(name)), tmp_path).eval()
    # the same two products in the same order; 1e-5 as for the logits themselves
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    wrapped = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    prefix = "base_model.model.model." if name in references.PLAIN else "base_model.model.model.language_model."
    assert wrapped == {f"{prefix}{name}" for name in lora_layers(model)}
    again = load(references.folder(name), dtype=torch.float32)
    assert load_adapter(again, tmp_path) == list(lora_layers(model))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "down_proj"], r".*\.[02]\.mlp\.(gate|up)_proj"], ids=str)
def test_we_open_an_adapter_of_peft(rslora, targets, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=rslora, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(copy.deepcopy(references.reference("qwen2_tied")), config).eval()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())  # this version writes the names that "all-linear" came to
    file.write_text(json.dumps({**saved, "target_modules": targets}))
    model = load(references.folder("qwen2_tied"), dtype=torch.float32)
    load_adapter(model, tmp_path)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert (logits(theirs) - logits(references.reference("qwen2_tied"))).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma3_multimodal", "qwen2_5_vl", "qwen3_vl"])
def test_we_open_an_adapter_of_peft_over_a_multimodal_base(name, tmp_path, capsys):
    """By leaf names PEFT wraps Gemma 3's tower too, which a text does not pass. Older versions had other names."""
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(copy.deepcopy(references.reference(name)), config).eval()
    theirs.save_pretrained(tmp_path)
    want = logits(theirs)
    assert (want - logits(references.reference(name))).abs().max() > 0.1
    file = tmp_path / "adapter_model.safetensors"
    for older in ("model.language_model.", "language_model.model.", "model."):
        tensors = safetensors.torch.load_file(file)
        renamed = {n.replace("model.language_model.", older): t for n, t in tensors.items()}
        safetensors.torch.save_file(renamed, file)
        model = load(references.folder(name), dtype=torch.float32)
        touched = load_adapter(model, tmp_path)
        assert len(touched) == 7 * model.config.num_layers and (want - logits(model)).abs().max() <= 1e-5
        safetensors.torch.save_file(tensors, file)
    said = capsys.readouterr().err
    assert ("tensors, of no use for text: base_model.model.model.vision_tower" in said) == (name == "gemma3_multimodal")
    shape = outline(checkpoint.read_config(Path(references.folder(name))), torch.float32, None)
    assert load_adapter(shape, tmp_path) == touched and not capsys.readouterr().err  # and nothing is said twice


def test_a_multimodal_folder_may_have_other_names_a_tied_head_and_16_bits(tmp_path):
    """What an older transformers wrote, whatever class names it had: the merged folder has these names again, both
    copies of a tied matrix are the trained one, and the processor's files come along."""
    base, out = Path(shutil.copytree(references.folder("qwen3_vl"), tmp_path / "base")), tmp_path / "out"

    def older(tensors):
        for name in list(tensors):
            new = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "visual.")
            tensors[new] = tensors.pop(name).bfloat16()
        tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()

    edit(base, older)
    (base / "preprocessor_config.json").write_text("{}")
    shutil.copy(base / "config.json", tmp_path / "config.json")
    (base / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"')
    )
    model = load(base, dtype=torch.float32)
    model.embed_tokens.weight.data.mul_(1.5)
    save(model, out)
    stored, kept = (safetensors.torch.load_file(f / "model.safetensors") for f in (base, out))
    assert kept.keys() == stored.keys() and (out / "preprocessor_config.json").exists()
    assert torch.equal(kept["lm_head.weight"], kept["language_model.model.embed_tokens.weight"])
    assert kept["visual.pos_embed.weight"].dtype == torch.bfloat16  # as it was; the text part is as it was trained
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert torch.equal(logits(load(out, dtype=torch.float32)), logits(model))
    with refused("which is what the model was loaded from; want another folder"):
        save(model, base)


def test_says_what_is_wrong_with_an_adapter(tmp_path):
    good = tmp_path / "good"
    save_adapter(adapted("qwen3", targets=["q_proj"]), good)
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(good / "adapter_model.safetensors")
    some = next(iter(tensors))

    def attempt(says, changes=None, tensors=tensors):
        with_changes = {**config, **(changes or {})}
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in with_changes.items() if v != "gone"}))
        if tensors is not None:
            safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        with refused(says):
            load_adapter(load(references.folder("qwen3"), dtype=torch.float32), folder)

    attempt("got peft_type 'IA3', want LORA", {"peft_type": "IA3"})
    for key, value in [
        ("use_dora", True), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]), ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}), ("fan_in_fan_out", True), ("layer_replication", [[0, 3]]),
        ("init_lora_weights", "pissa"),
    ]:  # fmt: skip
        attempt(f"got {{'{key}': .*want a plain LoRA adapter", {key: value})
    for key, value in [("lora_bias", True), ("trainable_token_indices", [1]), ("of_next_year", {"a": 1})]:
        attempt(f"got {{'{key}': .*want a plain LoRA adapter", {key: value})
    attempt("got r=None, .*want", {"r": "gone"})
    attempt("got r=1000000000, want a positive integer up to 65,536", {"r": 10**9})
    attempt(r"has dtype I64, want F32", tensors={n: t.long() for n, t in tensors.items()})
    twice = {**tensors, some.replace(".weight", ".default.weight"): tensors[some] + 1}
    attempt("beside another tensor for the same layer, want one", tensors=twice)
    attempt("lora_alpha='x'.*want", {"lora_alpha": "x"})
    attempt("got no adapter_model.safetensors", tensors=None)
    attempt("only lora_., want lora_A and lora_B", tensors={k: v for k, v in tensors.items() if k != some})
    attempt("names that end in lora_A.weight", tensors={**tensors, "x.lora_magnitude_vector": torch.ones(2)})
    attempt("match no layer", tensors={n.replace("q_proj", "qkv"): t for n, t in tensors.items()})
    attempt(r"has shape \[.*want \[", {"r": 5})
    for changes in [
        {"target_modules": ["proj", "Q_PROJ"]}, {"target_modules": "q_proj"}, {"target_modules": []},
        {"exclude_modules": ["x", "q_proj"]}, {"exclude_modules": r".*\.[02]\..*"}, {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
    ]:  # fmt: skip
        attempt("got layers.0.self_attn.q_proj, (.*1.*, )?.*2.*, which adapter_config.json does not name", changes)
    endless = ["(.+)+Z", "(?:.|m)" * 40 + "Z", ".*" * 8 + "Z", "(?x)(.+) +Z", "((?:.?)?){40}Z", "x" * 10_001]
    for key, value in [
        ("target_modules", "("), ("target_modules", 5), ("exclude_modules", ["x", 1]), ("exclude_modules", endless[0]),
        *(("target_modules", value) for value in endless),
    ]:  # fmt: skip
        says = f"got {key}=.*, want a list of names or a simple regular expression in .*adapter_config.json"
        attempt(says, {key: value})
    unsloth = (  # what it writes for language layers
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|"
        r"o_proj|gate_proj|up_proj|down_proj))|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|"
        r"ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    )
    for value in (
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)",
        unsloth,
        "all-linear",
    ):
        (good / "adapter_config.json").write_text(json.dumps({**config, "target_modules": value}))
        load_adapter(load(references.folder("qwen3")), good)
    plain = {
        key: value for key, value in peft.LoraConfig(r=4, lora_alpha=3).to_dict().items() if key != "runtime_config"
    }
    for file in ("good", "bad"):  # what peft 0.21 writes of every adapter is no reason to refuse one
        stated = {**config, "use_dora": False, "target_modules": None, "layers_to_transform": [2, 1, 0]}
        stated = {**plain, **config, "target_modules": ["q_proj"]} if file == "good" else stated
        (good / "adapter_config.json").write_text(json.dumps(stated))
        load_adapter(load(references.folder("qwen3")), good)
    with refused("no LoRA adapter to save"):
        save_adapter(load(references.folder("qwen3")), tmp_path / "none")


@pytest.mark.parametrize(
    "base, silent",
    [("", True), (".", False), ("{folder}", True), ("{folder}/../qwen3", True), ("Qwen/qwen3", True),
     ("Qwen/Qwen3-8B", False), ("other/qwen3", False), ("/old/place/qwen3", False),
     ("~nosuchuser/qwen3", False)],
)  # fmt: skip
def test_another_base_is_said(base, silent, tmp_path, capsys):
    """By name, where the shapes fit. A hub id is the folder of its name, or its place in the hub's cache."""
    folder = tmp_path / ("models--Qwen--qwen3/snapshots/0" if base.startswith(("Q", "o")) else "qwen3")
    shutil.copytree(references.folder("qwen3"), folder)
    model = load(folder, dtype=torch.float32)
    add_lora(model, r=2, alpha=2, targets=["q_proj"])
    save_adapter(model, tmp_path / "adapter", base=base.format(folder=folder) or str(folder))
    load_adapter(load(folder, dtype=torch.float32), tmp_path / "adapter")
    assert ("this adapter was trained over" not in capsys.readouterr().err) == silent


# ---------------------------------------------------------------------------------------------------------------------
# the hub


@pytest.fixture
def hub(qwen3, tmp_path, monkeypatch):
    """A hub of one repository, owner/qwen3, that serves what it is asked for; `asked` records it."""
    shard(qwen3, 1)
    for clutter in ("pytorch_model.bin", "consolidated.safetensors", "original/a.safetensors", "onnx/a.onnx", "a.md"):
        (qwen3 / clutter).parent.mkdir(exist_ok=True)
        (qwen3 / clutter).write_bytes(b"clutter")
    served, asked = tmp_path / "served", []

    def snapshot_download(repo, *, allow_patterns, **_):
        assert repo == "owner/qwen3"
        files = [str(p.relative_to(qwen3)) for p in qwen3.rglob("*") if p.is_file()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            asked.append(file)
            (served / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(qwen3 / file, served / file)
        return str(served)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_only_the_files_that_are_needed_are_fetched(hub):
    model = load("owner/qwen3", dtype=torch.float32)
    assert torch.equal(logits(model), logits(references.reference("qwen3")))
    shards = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert set(hub) == shards | {"config.json", "generation_config.json", "model.safetensors.index.json"}


def test_of_an_adapter_or_a_tokenizer_no_model_is_fetched(hub, qwen3):
    """And a single file, where there is one, wins over the shards."""
    checkpoint.resolve("owner/qwen3", want="tokenizer")
    small = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(hub) == small
    with refused("got no adapter_config.json, want an adapter's folder; this is a model: give --model"):
        checkpoint.resolve("owner/qwen3", want="adapter")
    assert set(hub) == small
    (qwen3 / "model.safetensors").write_bytes(b"")
    checkpoint.resolve("owner/qwen3")
    assert set(hub) == small | {"model.safetensors"}


def hub_errors():
    def http(kind, status):
        error = kind.__new__(kind)  # the constructor wants a whole HTTP response; only the type is looked at
        Exception.__init__(error, f"{status} Client Error.\nSome lines of help")
        return error

    def answered(status):  # as snapshot_download raises it: a file that is not here, because of an answer
        error, cause = errors.LocalEntryNotFoundError("not here"), http(errors.HfHubHTTPError, status)
        cause.response = types.SimpleNamespace(status_code=status)
        error.__cause__ = cause
        return error

    return [
        (http(errors.GatedRepoError, 403), "owner/x is gated: accept its licence at https://huggingface.co/owner/x, t"),
        (http(errors.RepositoryNotFoundError, 404), r"no repository owner/x \(or it is private\): .*hf auth login"),
        (errors.LocalEntryNotFoundError("offline\nand not here"), "cannot reach the hub for owner/x and it is not in"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE"), "cannot reach the hub"),
        (ConnectionError("reset"), "cannot reach the hub"),
        (TimeoutError("slow"), "cannot reach the hub"),
        (errors.HTTPError("time-out in the middle of a file"), "cannot reach the hub"),
        (http(errors.HfHubHTTPError, 500), "cannot reach the hub"),
        (answered(401), "the hub answers 401 for owner/x: it wants a token.*hf auth login"),
        (answered(403), "the hub answers 403 for owner/x: this token may not read it"),
        (answered(404), "the hub answers 404 for owner/x: there is no such repository or file"),
        (answered(429), "the hub answers 429 for owner/x: too many requests: wait"),
        (answered(503), "the hub answers 503 for owner/x: the hub has a fault of its own: try again later"),
        (answered(418), "cannot reach the hub"),
        (
            ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
            "through the SOCKS proxy of ALL_PROXY, which needs .*: pip install socksio, or unset ALL_PROXY",
        ),
        (
            PermissionError(13, "Permission denied", "/c/x"),
            r"cannot write /c/x \(Perm.*owner/x: set HF_HOME to a folder",
        ),
        (OSError(30, "Read-only file system", "/c/x"), r"cannot write /c/x \(Read-only file system\) .*: set HF_HOME"),
        (OSError(28, "No space left on device"), "the disk is full while fetching owner/x: free some space or set HF_"),
    ]


@pytest.mark.parametrize("error, says", hub_errors(), ids=lambda x: type(x).__name__)
def test_says_what_is_wrong_with_the_hub(error, says, monkeypatch):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    with refused(says + ".*or give a local folder with --model DIR$"):
        load("owner/x")
