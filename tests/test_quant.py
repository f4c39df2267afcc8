"""nanogspo/quant.py and what stands on it: packed layers against dense ones that hold the unpacked weights, to the bit;
4-bit folders against transformers and bitsandbytes, to the byte; QLoRA runs from the command line.

Run: python -m pytest tests/test_quant.py
"""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import bitsandbytes
import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from test_inputs import DEEP
from torch import nn

from kernels import lora as frozen
from kernels.backend import INTERPRETED
from kernels.packed import Packed
from nanogspo import quant
from nanogspo.checkpoint import load, load_adapter, save, save_adapter, stored_dtype
from nanogspo.config import TrainConfig, check
from nanogspo.families import model_config
from nanogspo.lora import add_lora, describe, lora_layers, merge_lora
from nanogspo.model import Transformer
from nanogspo.optimizer import Optimizer
from nanogspo.quant import Int8Linear, NF4Linear, packed_layers, quantize_linear, quantize_model
from nanogspo.run.planner import memory_parts
from nanogspo.storage import bitsandbytes as formats
from tests.test_checkpoint import refused, sparse_checkpoint
from tests.test_train import (  # noqa: F401 (quick and base are fixtures)
    CHECKPOINT,
    TINY,
    base,
    interrupted_at,
    quick,
    resume,
    script,
    steps_of,
    train,
    weights_of,
)

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Widths are whole blocks of 64: bitsandbytes 0.50.2 on a CPU unpacks rows of 96 wrongly, each row as if a block began
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15, "eos_token_id": 1,
         "bos_token_id": 2, "pad_token_id": 0}  # fmt: skip
TOKENS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))  # (B, T)
LAST = "model.layers.1.mlp.down_proj"


def normal(*shape, seed=0, dtype=torch.float32, std=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(DEVICE, dtype)


def tiny(seed=0, dtype=torch.float32, **changes):
    """Ours: odd widths, biases on q, k and v."""
    config = {"model_type": "qwen2", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 44,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}  # fmt: skip
    model = Transformer(model_config(config)).init_weights(seed, std=0.2)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data += 0.1 * normal(*p.shape, seed=len(name)).cpu()
    return model.to(DEVICE, dtype).eval()


def dense_twin(model):
    """The same model with plain layers that hold the unpacked weights."""
    twin = copy.deepcopy(model)
    for name, layer in packed_layers(twin).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.unpack(twin.norm.weight.dtype), requires_grad=False)
        plain.bias = layer.bias
        quant.put(twin, name, plain)
    return twin


def trained_adapter(model, seed=0):
    """As after some training: with B = 0 an adapter could be anywhere."""
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_B.weight.data = 0.1 * normal(*layer.lora_B.weight.shape, seed=seed + i)


@torch.no_grad()
def logits(model):
    """(B, T, V) of ours or theirs."""
    if isinstance(model, Transformer):
        return model.logits(model(TOKENS.to(DEVICE)))
    return model(input_ids=TOKENS).logits.float()


def packed_bits(model):
    return {f"{n}.{field}": t.clone() for n, m in packed_layers(model).items() for field, t in tensors_of(m.q).items()}


def tensors_of(q):
    return {name: t for name, t in vars(q).items() if isinstance(t, torch.Tensor)}


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------------------------------------------------------------
# one layer


@KINDS
@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@given(
    seed=SEEDS,
    sizes=st.sampled_from([(1, 1), (5, 3), (64, 2), (63, 65), (96, 40), (130, 33)]),
    batch=st.sampled_from([(), (1,), (frozen.SMALL,), (frozen.SMALL + 1,), (2, 3), (0,), (2, 1, 4)]),
)
def test_a_layer_is_a_dense_one_with_the_unpacked_weight(kind, dtype, bias, seed, sizes, batch):
    """Value and gradients, to the bit: whatever a dense layer would have trained, this one trains."""
    (K, N), b = sizes, nn.Parameter(normal(sizes[1], seed=seed + 1, dtype=dtype)) if bias else None
    layer = quantize_linear(normal(N, K, seed=seed, dtype=dtype), b, kind)
    W = layer.unpack(dtype)  # (N, K)
    assert (layer.in_features, layer.out_features, W.dtype, W.shape) == (K, N, dtype, (N, K))
    x, dy = (
        normal(*batch, K, seed=seed + 2, dtype=dtype).requires_grad_(),
        normal(*batch, N, seed=seed + 3, dtype=dtype),
    )
    inputs = (x, b) if bias else (x,)
    y, want = layer(x), F.linear(x, W, b)
    assert y.dtype == dtype and y.shape == want.shape
    ours, theirs = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(want, inputs, dy)
    if DEVICE == "cuda" and x.shape[:-1].numel() <= frozen.SMALL:  # another kernel: another order of fp32 sums
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, want, rtol=2 * eps, atol=2 * eps * K**0.5)
    else:
        assert torch.equal(y, want)
    assert all(map(torch.equal, ours, theirs))
    with torch.no_grad():  # the choice of kernel must not see it, or the first ratio would not be 1
        assert torch.equal(layer(x), y)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="wants a GPU or Triton's interpreter")
@KINDS
@DTYPES
@given(
    seed=SEEDS,
    rows=st.sampled_from([(1,), (5,), (16,), (17,), (33,), (64,), (4, 16)]),
    sizes=st.sampled_from([(96, 40), (128, 33), (64, 1)]),
    bias=st.booleans(),
)
def test_up_to_64_rows_multiply_straight_from_the_packed_weights(kind, dtype, seed, rows, sizes, bias):
    """What a GPU decodes with: the same W, unpacked inside the matmul and never into memory."""
    (K, N), b = sizes, normal(sizes[1], seed=seed + 1, dtype=dtype) if bias else None
    layer, x = quantize_linear(normal(N, K, seed=seed), None, kind), normal(*rows, K, seed=seed + 2, dtype=dtype)
    W = layer.unpack(dtype)
    with patch.object(Packed, "dequantize", None):
        y = frozen.frozen_linear(x, layer.q, b, backend="triton")
    size = F.linear(x.double().abs(), W.double().abs(), b.double().abs() if bias else None)
    # K fp32 additions in any order; rounded to dtype before the bias and after it
    bound = (K * torch.finfo(torch.float32).eps + 1.01 * torch.finfo(dtype).eps) * size
    assert (
        y.dtype == dtype
        and ((y.double() - F.linear(x.double(), W.double(), b.double() if bias else None)).abs() <= bound).all()
    )
    with pytest.raises(TypeError), patch.object(Packed, "dequantize", None):
        frozen.frozen_linear(normal(65, K, dtype=dtype), layer.q, backend="triton")


@KINDS
def test_nothing_wide_is_kept_for_the_backward_pass(kind):
    """Not the unpacked weight (it would be the memory of a model in 16 bits) and not x (the weight has no gradient)."""
    layer, saved = quantize_linear(normal(96, 64), None, kind), []
    x = normal(3, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert saved == [] and x.grad.abs().max() > 0
    with patch.object(Packed, "dequantize", autospec=True, side_effect=Packed.dequantize) as unpacked:
        layer(x.detach().requires_grad_()).sum().backward()
        assert unpacked.call_count == 2  # once forward, once backward
        layer(x.detach())
        assert unpacked.call_count == 3


@KINDS
@pytest.mark.parametrize("convert", ["bfloat16", "half", "double", "to", "deepcopy", "cpu"])
def test_packed_bits_are_moved_and_never_converted(kind, convert):
    """A scale rounded to bf16 is another weight: off by 0.2 %, in silence."""
    layer = quantize_linear(normal(33, 70), nn.Parameter(normal(33, seed=1)), kind)
    before = {name: t.clone() for name, t in tensors_of(layer.q).items()}
    W = layer.unpack(torch.float32)
    model = nn.ModuleDict({"layer": layer})
    if convert == "deepcopy":
        model = copy.deepcopy(model)
    else:
        getattr(model, convert)(*([torch.bfloat16] if convert == "to" else []))
    after = model["layer"]
    assert {name: t.dtype for name, t in tensors_of(after.q).items()} == {name: t.dtype for name, t in before.items()}
    assert equal({n: t.to(DEVICE) for n, t in tensors_of(after.q).items()}, before)
    buffers = [t.data_ptr() for t in after.buffers()]
    assert [tensors_of(after.q)[field].data_ptr() for field in before] == buffers  # one copy, not two
    assert torch.equal(after.unpack(torch.float32).to(DEVICE), W)
    wanted = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64, "to": torch.bfloat16}
    assert after.bias.dtype == wanted.get(convert, torch.float32)
    assert {t.device.type for t in tensors_of(after.to("meta").q).values()} == {"meta"}  # q goes where the buffers go


@KINDS
def test_a_state_dict_is_whole(kind):
    a, b = quantize_linear(normal(33, 70), None, kind), quantize_linear(normal(33, 70, seed=1), None, kind)
    b.load_state_dict(a.state_dict())
    assert equal(tensors_of(a.q), tensors_of(b.q)) and torch.equal(a.unpack(torch.bfloat16), b.unpack(torch.bfloat16))
    assert not list(a.parameters())  # nothing an optimiser could move
    text = str(a)
    assert f"{type(a).__name__}(in_features=70, out_features=33, bias=False)" == text


# ---------------------------------------------------------------------------------------------------------------------
# a model


@KINDS
def test_only_the_linear_layers_of_blocks_are_packed(kind):
    model, plain = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=False)
    quantize_model(model, kind)
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    leaves += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert list(packed_layers(model)) == [f"layers.{i}.{leaf}" for i in range(2) for leaf in leaves]
    kept, was = dict(model.named_parameters()), dict(plain.named_parameters())
    assert {n for n in was if n not in kept} == {f"{name}.weight" for name in packed_layers(model)}
    assert all(torch.equal(p, was[n]) for n, p in kept.items()) and "lm_head.weight" in kept
    assert not any(p.requires_grad for p in model.parameters())
    with refused("without trainable parameters; add a LoRA adapter"):
        Optimizer(model)
    assert quant.weight_count(model) == quant.weight_count(plain) == sum(p.numel() for p in plain.parameters())
    with refused("packed layers or a LoRA adapter"):
        quantize_model(model, kind)
    add_lora(plain, r=2, alpha=2)
    with refused("packed layers or a LoRA adapter"):
        quantize_model(plain, kind)
    with refused("got quant 'nf5', want 'nf4', 'int8' or None"):
        quantize_model(tiny(), "nf5")


def test_bytes_a_weight():
    """A layer of Qwen3-0.6B: half a byte, 1/64 for scales, 4/16384 for their scales, 1.1 kB of tables."""
    layer = quantize_linear(normal(1024, 3072, dtype=torch.bfloat16), None, "nf4")
    each = layer.nbytes / (1024 * 3072)
    assert layer.nbytes == sum(t.nbytes for t in layer.buffers())
    assert 0.5159 <= each <= 0.5165 and each < 0.56
    eight = quantize_linear(normal(1024, 3072, dtype=torch.bfloat16), None, "int8")
    assert eight.nbytes == 1024 * 3072 + 4 * 1024


@pytest.mark.isa
@KINDS
@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_over_packed_weights_gets_the_gradients_of_lora_over_unpacked_ones(kind, dtype, checkpointing):
    model = tiny(dtype=dtype)
    quantize_model(model, kind)
    twin = dense_twin(model)
    for m in (model, twin):
        touched = add_lora(m, r=3, alpha=6)
        trained_adapter(m)
        m.gradient_checkpointing = checkpointing
    assert touched == list(packed_layers(model))
    results = []
    for m in (model, twin):
        z = m.logits(m(TOKENS.to(DEVICE)))  # (B, T, V)
        z.square().mean().backward()
        results.append({"logits": z.detach(), **{n: p.grad for n, p in m.named_parameters() if p.grad is not None}})
    assert len(results[0]) == 1 + 2 * 14 and all(t.abs().max() > 0 for t in results[0].values())
    assert equal(*results)
    assert describe(model) == describe(twin)  # the same shapes, ranks and counts


@KINDS
def test_merging_is_for_files(kind):
    model = tiny()
    quantize_model(model, kind)
    add_lora(model, r=3, alpha=6, targets=["up_proj"])
    trained_adapter(model)
    bits = packed_bits(model)
    with refused("got layers.0.mlp.up_proj with packed weights.*checkpoint.save"):
        merge_lora(model)
    assert equal(packed_bits(model), bits)
    layer = lora_layers(model)["layers.0.mlp.up_proj"]
    exact = layer.base.unpack(torch.bfloat16).double() + 2 * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    merged = layer.merged_weight(torch.bfloat16)
    # half a unit of an 8-bit mantissa, and the few fp32 roundings in front of it
    assert merged.dtype == torch.bfloat16 and ((merged - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@KINDS
@DTYPES
def test_the_plan_counts_packed_bytes(kind, dtype):
    model = tiny(dtype=dtype)
    plain = memory_parts(TrainConfig(lora_r=4), tiny(dtype=dtype), 7)
    quantize_model(model, kind)
    add_lora(model, r=4, alpha=8)
    parts = memory_parts(TrainConfig(lora_r=4), model, 7)
    assert parts[f"{kind} weights"] == sum(t.nbytes for m in packed_layers(model).values() for t in m.buffers())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert parts["weights"] == sum(p.nbytes for p in frozen) < plain["weights"]
    assert parts["one layer unpacked"] == 24 * 44 * dtype.itemsize
    assert "one layer unpacked" not in plain and not any("nf4" in name or "int8" in name for name in plain)


# ---------------------------------------------------------------------------------------------------------------------
# folders in


@pytest.fixture(scope="module", autouse=True)
def folders():
    """Where the cached ones stand, until the last test of this file has ended."""
    global FOLDERS
    with tempfile.TemporaryDirectory() as FOLDERS:
        yield


@functools.cache
def plain_folder(family="llama", dtype=torch.float32):
    """A random model that transformers wrote; norms and biases moved, as in references.py."""
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    torch.manual_seed(0)
    config = classes[family](**SIZES, tie_word_embeddings=family == "qwen2")
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, p.data.mean(), 0.2)
    folder = Path(tempfile.mkdtemp(dir=FOLDERS))
    theirs.to(dtype).save_pretrained(folder)
    return folder


def opened(folder, dtype=torch.float32, **options):
    """transformers' model, with bitsandbytes' layers. Its AVX-512 kernel, which rounds to bf16, is switched off."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **options).eval()
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return theirs


@functools.cache
def bnb_folder(family="llama", dtype=torch.float32, nested=True, storage="uint8", skip=None):
    """plain_folder, as transformers and bitsandbytes quantise and save it."""
    options = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": storage, "bnb_4bit_compute_dtype": dtype}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(skip) if skip else None, **options
    )
    folder = Path(tempfile.mkdtemp(dir=FOLDERS))
    opened(plain_folder(family, dtype), dtype, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(tmp_path):
    """damaged(change): a copy of bnb_folder whose tensors went through change(tensors)."""

    def make(change, source=None):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(source or bnb_folder(), folder)
        tensors = file_of(folder)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def file_of(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def as_bytes(tensors):
    return {name: (t.dtype, tuple(t.shape), t.view(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


@KINDS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32 file", "bf16 file"])
@DTYPES
def test_packed_while_loading_is_packed_after_loading(kind, stored, dtype):
    """And again with the same bits: a resumed run trains its adapter over the very same weights."""
    folder = plain_folder("qwen2", stored)
    want = load(folder, dtype=dtype)
    quantize_model(want, kind)
    for model in (load(folder, dtype=dtype, quant=kind), load(folder, dtype=dtype, quant=kind)):
        assert equal(packed_bits(model), packed_bits(want)) and not model.training
        assert equal(dict(model.named_parameters()), dict(want.named_parameters()))
        assert not any(p.requires_grad for p in model.parameters())
        assert all(type(m) is (NF4Linear if kind == "nf4" else Int8Linear) for m in packed_layers(model).values())


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain scales"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@DTYPES
def test_a_bitsandbytes_folder_is_read_and_written_back_byte_for_byte(family, dtype, nested, tmp_path):
    folder = bnb_folder(family, dtype, nested)
    model = load(folder, dtype=dtype)
    assert len(packed_layers(model)) == 14 and stored_dtype(folder) == dtype
    save(model, tmp_path)
    assert as_bytes(file_of(tmp_path)) == as_bytes(file_of(folder))
    stated = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    theirs = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {**theirs, "llm_int8_skip_modules": ["lm_head"]} == {**theirs, **stated}
    # the same weights to the bit, and the same torch calls over them
    for other in (folder, tmp_path):
        assert torch.equal(logits(opened(other, dtype)), logits(model)) or dtype == torch.bfloat16
    # bf16: RoPE and norms are not in the same order; some 30 roundings of 2^-9, of random sign: 1.1 %, and some room
    gap = (logits(opened(tmp_path, dtype)) - logits(model)).abs().max()
    assert gap <= 2**-6 * logits(model).abs().max()


@DTYPES
def test_our_nf4_folder_is_the_one_bitsandbytes_writes(dtype, tmp_path):
    """Quantised by us while loading, saved: every byte of every tensor as transformers + bitsandbytes make it."""
    save(load(plain_folder("llama", dtype), dtype=dtype, quant="nf4"), tmp_path)
    assert as_bytes(file_of(tmp_path)) == as_bytes(file_of(bnb_folder("llama", dtype)))
    assert isinstance(opened(tmp_path, dtype).model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    again = load(tmp_path, dtype=dtype, quant="nf4")  # of what is packed already: as it is
    assert equal(packed_bits(again), packed_bits(load(tmp_path, dtype=dtype)))


def test_layers_a_folder_left_in_16_bits_stay_so(tmp_path):
    """Unsloth's dynamic quantisation keeps some; they are told by their companions and not by config.json."""
    folder = bnb_folder("llama", torch.bfloat16, skip=("lm_head", LAST))
    for asked in (None, "nf4"):
        model = load(folder, quant=asked)
        assert len(packed_layers(model)) == 13 and isinstance(model.layers[1].mlp.down_proj, nn.Linear)
    save(model, tmp_path / "a")
    assert as_bytes(file_of(tmp_path / "a")) == as_bytes(file_of(folder))
    theirs = opened(tmp_path / "a", torch.bfloat16)
    assert type(theirs.model.layers[1].mlp.down_proj) is nn.Linear
    shutil.copytree(folder, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # some repositories forget it
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    assert equal(packed_bits(load(tmp_path / "b")), packed_bits(model))
    # an adapter over both kinds of layer, saved without merging: the adapter's names do not leak into the folder
    add_lora(model, r=2, alpha=2)
    save(model, tmp_path / "c", merge_lora=False)
    assert as_bytes(file_of(tmp_path / "c")) == as_bytes(file_of(folder))
    stated = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert stated["llm_int8_skip_modules"] == ["lm_head", LAST]


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_that_are_called_floats(storage):
    """bnb_4bit_quant_storage, for FSDP: the same bytes under another dtype."""
    got, want = load(bnb_folder("llama", storage=storage)), load(bnb_folder())
    assert file_of(bnb_folder("llama", storage=storage))[f"{LAST}.weight"].dtype == getattr(torch, storage)
    assert equal(packed_bits(got), packed_bits(want))


def test_parts_of_a_weight_may_lie_in_different_shards(tmp_path):
    tensors, files = file_of(bnb_folder()), {}
    shutil.copytree(bnb_folder(), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    for i, name in enumerate(sorted(tensors)):
        files.setdefault(f"model-{i % 3}.safetensors", {})[name] = tensors[name]
    for file, part in files.items():
        safetensors.torch.save_file(part, tmp_path / "a" / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(packed_bits(load(tmp_path / "a")), packed_bits(load(bnb_folder())))


def test_stored_maps_and_records_are_used_as_they_are(damaged, tmp_path):
    """A file's tables and its JSON, spaces and all, are data: they are read, used and written, never made anew."""

    def change(tensors):
        tensors[f"{LAST}.weight.quant_map"] += 0.01
        tensors[f"{LAST}.weight.nested_quant_map"] *= 1.5
        record = tensors[f"{LAST}.weight.{formats.QUANT_STATE}"]
        facts = json.loads(bytes(record.tolist()))
        spaced = json.dumps({"note": "ü", **dict(reversed(facts.items()))}, indent=1).encode()
        tensors[f"{LAST}.weight.{formats.QUANT_STATE}"] = torch.tensor(list(spaced), dtype=torch.uint8)

    folder = damaged(change)
    model, other = load(folder, dtype=torch.float32), load(bnb_folder(), dtype=torch.float32)
    ours, theirs = (m.layers[1].mlp.down_proj.unpack(torch.float32) for m in (model, other))
    assert not torch.allclose(ours, theirs, rtol=0.1)
    save(model, tmp_path / "saved")
    assert as_bytes(file_of(tmp_path / "saved")) == as_bytes(file_of(folder))


MEASURED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from nanogspo.checkpoint import load, tensor_bytes
from nanogspo.quant import packed_layers
from kernels import int8, nf4

torch.set_num_threads(1)
int8.CHUNK = nf4.CHUNK = 2**18  # what the quantiser holds is a constant; a small one shows the law

def peak():  # VmHWM, not ru_maxrss: the latter is inherited from the process that started this one
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

load(sys.argv[2] + "/small", quant=sys.argv[3])  # what is imported or allocated once, whatever is loaded
before = peak()
model = load(sys.argv[2] + "/large", quant=sys.argv[3])
packed = sum(layer.nbytes for layer in packed_layers(model).values())
print(peak() - before, tensor_bytes(model.parameters()) + packed)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc, which is Linux's")
@pytest.mark.parametrize(("kind", "stored"), [("nf4", torch.bfloat16), ("int8", torch.float32)], ids=str)
def test_peak_memory_is_the_packed_model_one_tensor_and_a_chunk(kind, stored, tmp_path):
    """50 M weights that are 100 MB in bf16 and 200 MB in the fp32 file never exist side by side."""
    sparse_checkpoint(tmp_path / "small", 64, 1, 128, stored)
    largest = sparse_checkpoint(tmp_path / "large", 1024, 3, 1024, stored)
    command = [sys.executable, "-c", MEASURED, str(ROOT), str(tmp_path), kind]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc keeps 0 to 40 MB of what is freed
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    growth, size = map(int, done.stdout.split())
    assert (26e6 if kind == "nf4" else 50e6) < size < (30e6 if kind == "nf4" else 55e6)
    converted = 0 if stored == torch.bfloat16 else largest // 2
    chunk = 8 * 4 * 2**18  # w in fp32, its absolute values, scaled, int32 codes, ...
    assert growth <= 1.1 * size + largest + converted + chunk
    assert growth > 0.9 * size, "the measurement misses the model itself"


# ---------------------------------------------------------------------------------------------------------------------
# folders out


@DTYPES
def test_int8_is_saved_as_the_weights_that_products_see(dtype, tmp_path):
    model = load(plain_folder("qwen2", dtype), dtype=dtype, quant="int8")
    save(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path, dtype=dtype)
    assert not packed_layers(again) and torch.equal(logits(again), logits(model))
    assert torch.equal(again.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.unpack(dtype))


@KINDS
@DTYPES
def test_merged_is_saved_unpacked(kind, dtype, tmp_path):
    """Layers without an adapter too: a folder is packed or it is not."""
    model = load(bnb_folder("qwen2", dtype) if kind == "nf4" else plain_folder("qwen2", dtype), dtype=dtype, quant=kind)
    add_lora(model, r=2, alpha=2, targets=["q_proj", "down_proj"])
    trained_adapter(model)
    save(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    tensors = file_of(tmp_path)
    assert {t.dtype for t in tensors.values()} == {dtype} and not [name for name in tensors if "absmax" in name]
    for name, layer in packed_layers(model).items():
        wrapped = lora_layers(model).get(name)
        want = wrapped.merged_weight(dtype) if wrapped else layer.unpack(dtype)
        assert torch.equal(tensors[f"model.{name}.weight"], want)
    again = load(tmp_path, dtype=dtype)
    assert torch.equal(again.layers[0].self_attn.q_proj.bias, model.layers[0].self_attn.q_proj.base.bias)
    if dtype == torch.float32:  # merged or beside it, to fp32 rounding: sums of 128 products of size 10, a few layers
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@KINDS
def test_an_adapter_over_packed_weights_opens_in_peft(kind, tmp_path):
    """Over the 4-bit base it was trained on; over the unpacked weights for int8."""
    model = load(bnb_folder() if kind == "nf4" else plain_folder(), dtype=torch.float32, quant=kind)
    save(model, tmp_path / "base")
    add_lora(model, r=3, alpha=6)
    trained_adapter(model)
    save_adapter(model, tmp_path / "adapter")
    assert len(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == 7
    theirs = peft.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    # the base's bits are the same; PEFT adds scale * B A x in another order, 1e-7 of logits of size 10, some layers
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-4)
    fresh = load(tmp_path / "base", dtype=torch.float32)
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))
    some = load(plain_folder(), quant=kind)
    add_lora(some, r=2, alpha=2, targets=["layers.0.mlp.up_proj"])  # not every up_proj, and the file must say so
    save_adapter(some, tmp_path / "some")
    stated = json.loads((tmp_path / "some" / "adapter_config.json").read_text())
    assert stated["target_modules"] == ["layers.0.mlp.up_proj"]


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def changed_record(**changes):
    def change(tensors):
        facts = json.loads(bytes(tensors[f"{LAST}.weight.{formats.QUANT_STATE}"].tolist()))
        facts = {name: value for name, value in {**facts, **changes}.items() if value is not None}
        tensors[f"{LAST}.weight.{formats.QUANT_STATE}"] = torch.tensor(
            list(json.dumps(facts).encode()), dtype=torch.uint8
        )

    return change


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", formats.QUANT_STATE])
def test_a_missing_companion_is_named(part, damaged):
    folder = damaged(lambda tensors: tensors.pop(f"{LAST}.weight.{part}"))
    with refused(f"1 tensors do not fit a llama model: missing layers.1.mlp.down_proj.weight.{part}$"):
        load(folder)


def test_a_quant_state_of_another_shape_is_read(damaged):
    """As its check reads it: flat."""
    name = f"{LAST}.weight.{formats.QUANT_STATE}"
    load(damaged(lambda tensors: tensors.update({name: tensors[name][None]})))


def test_weights_without_any_companion_are_named(damaged):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(f"{LAST}.weight.")]:
            del tensors[name]

    with refused(r"layers.1.mlp.down_proj.weight has dtype U8, want F32, F16 or BF16"):
        load(damaged(change))
    with refused("missing layers.1.mlp.down_proj.weight"):
        load(damaged(lambda tensors: tensors.pop(f"{LAST}.weight")))


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def resize(part, to):
    def change(tensors):
        tensors[f"{LAST}.weight{part}"] = to(tensors[f"{LAST}.weight{part}"]).contiguous()

    return change


W = "layers.1.mlp.down_proj.weight"
DAMAGE = [
    (changed_record(shape=[256, 64]), rf"{W} has shape \[256, 64\], config.json wants \[64, 256\]"),
    (changed_record(shape=[64, 64]), rf"{W}: .*\(64, 64\) weights"),
    (changed_record(blocksize=128), rf"{W}: .*blocks of 128"),
    (changed_record(blocksize=48), rf"{W}: got block size 48"),
    (changed_record(blocksize=-64), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state"),
    (changed_record(shape="64"), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state"),
    (changed_record(nested_offset=10**400), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state .*Overflow"),
    (changed_record(shape=DEEP), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state .*nested deeper than 50"),
    (changed_record(dtype="int8"), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state"),
    (changed_record(quant_type="fp4"), f"{W} is fp4 with scales in blocks of 256, want nf4"),
    (changed_record(nested_blocksize=128), f"{W} is nf4 with scales in blocks of 128, want nf4 with 256"),
    (changed_record(nested_offset=None), rf"{W}: got nothing for absmax2"),
    (resize("", lambda t: t[:-1]), rf"{W}: got \(8191, 1\).*for codes"),
    (resize(".absmax", lambda t: t[:-1]), rf"{W}: got \(255,\).*for absmax"),
    (resize(".absmax", lambda t: t.float()), rf"{W}.absmax has dtype torch.float32, want uint8"),
    (resize(".quant_map", lambda t: t.bfloat16()), rf"{W}: .*torch.bfloat16.*for codebook"),
    (resize(".nested_absmax", lambda t: t.repeat(2)), rf"{W}: got \(2,\).*for absmax2"),
    (resize(".nested_quant_map", lambda t: t[:16]), rf"{W}: got \(16,\).*for code2"),
    (resize(f".{formats.QUANT_STATE}", lambda t: t[:-1]), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state"),
    (resize(f".{formats.QUANT_STATE}", lambda t: t * 0 + 255), rf"{W}.quant_state.bitsandbytes__nf4 is no quant state"),
    (
        rename(f"{LAST}.weight.{formats.QUANT_STATE}", f"{LAST}.weight.quant_state.bitsandbytes__fp4"),
        f"{W} is fp4, want nf4",
    ),
    (
        rename("model.norm.weight", "model.norm.weight.absmax"),
        "missing norm.weight; unexpected model.norm.weight.absmax",
    ),
    (
        lambda t: t.update({f"{W}.absmax": t[f"{LAST}.weight.absmax"].clone()}),
        f"unexpected {W}.absmax|unexpected model",
    ),
    (lambda t: t.update({f"{LAST}.SCB": torch.zeros(64)}), "bitsandbytes' 8-bit weights, want its 4-bit ones"),
]


@pytest.mark.parametrize(("change", "says"), DAMAGE)
def test_a_damaged_folder_is_refused_before_its_weights_are_read(change, says, damaged, monkeypatch):
    folder = damaged(change)
    monkeypatch.setattr("nanogspo.checkpoint.NF4Linear", lambda *_: pytest.fail("read"))
    with refused(says):
        load(folder)


def test_what_cannot_be_asked_of_a_folder():
    with refused("got quant 'int8' for .*packed as NF4 already; want 'nf4' or None"):
        load(bnb_folder(), quant="int8")
    with refused("got quant 'int4', want 'nf4', 'int8' or None"):
        load(plain_folder(), quant="int4")


@KINDS
def test_weights_that_are_not_finite_are_named(kind, damaged):
    def change(tensors):
        tensors[f"{LAST}.weight"][3, 5] = float("nan")

    with refused(f"{W}: got nan at .*want finite"):
        load(damaged(change, plain_folder()), quant=kind)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"quant": "nf4", "lora_r": 0, "model": "x"},
            r"--quant nf4 with --lora-r 0 \(full fine-tuning\): .*--lora-r 16",
        ),
        ({"quant": "int8", "lora_r": 0}, "--quant int8 with --lora-r 0 .*as configs/tiny.yaml says"),
    ],
)
def test_full_fine_tuning_of_packed_weights_is_refused(changes, says):
    with refused(says):
        check(TrainConfig(**changes))


# ---------------------------------------------------------------------------------------------------------------------
# runs


QLORA = [*CHECKPOINT, *"--lora-r 4 --steps 8 --lr 1e-2".split()]
SFT = [*TINY, *"--algo sft --lora-r 16 --steps 25 --lr 1e-2 --batch-size 32".split()]
RUNS = {
    "nf4": [*QLORA, "--quant", "nf4"],
    "int8": [*QLORA, "--quant", "int8", "--dtype", "bf16"],
    "nf4-sft": [*SFT, *"--quant nf4 --save-merged".split()],
    "int8-sft": [*SFT, *"--quant int8".split()],
    "tiny": [*TINY, *"--quant nf4 --lora-r 16 --warm-steps 4 --warm-until 2 --steps 4 --lr 1e-3 --save-merged".split()],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):  # noqa: F811
    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        done = train(folder, *flags_of(name, base))
        (folder / "stdout").write_text(done.out)
        return folder

    return make


def flags_of(name, base):  # noqa: F811
    return RUNS[name] + ([] if RUNS[name][: len(TINY)] == TINY else ["--model", base])


@pytest.mark.parametrize("name", RUNS)
def test_runs_train(whole, name):
    """Gradients flow, the first ratio of every rollout is exactly 1 and the later ones are not, SFT's loss falls."""
    rows, kind = steps_of(whole(name)), "int8" if "int8" in name else "nf4"
    assert sum(row["grad_norm"] > 0 for row in rows) > len(rows) / 2  # 0 where the answers of each group are alike
    rl = [row for row in rows if row["algo"] == "gspo"]
    for i, row in enumerate(rl):
        assert i % 4 or row["ratio_min"] == row["ratio_max"] == 1.0
        assert row["sampler_gap_max"] < (0.05 if "--dtype bf16" in " ".join(RUNS[name]) else 1e-4)
    assert not rl or any(row["ratio_min"] < 1.0 for row in rl)
    if name.endswith("sft"):  # a random base: the letters' frequencies alone take it from 2.9 to 2.1
        losses = [row["loss"] for row in rows]
        assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    said = (whole(name) / "stdout").read_text()
    assert f"{kind} weights" in said and f"--quant {kind}" in said.splitlines()[-1]
    if "--save-merged" in RUNS[name]:
        assert "the sum of unpacked weights and adapter, saved as fp32" in said
        assert not packed_layers(load(whole(name) / "model"))


@pytest.mark.parametrize(("name", "stops"), [("nf4", [3]), ("int8", [6]), ("nf4-sft", [7]), ("tiny", [2, 6])])
def test_stopped_and_resumed_equals_the_whole_run_to_the_last_byte(tmp_path, whole, base, name, stops):  # noqa: F811
    """The state holds the adapter alone; the base is quantised again, to the same bits."""
    flags, folder = flags_of(name, base), tmp_path / "run"
    for i, stop in enumerate(stops):
        with interrupted_at(stop):
            resume(folder) if i else train(folder, *flags)
    resume(folder)
    adapter, state = "adapter/adapter_model.safetensors", "state/state.safetensors"
    assert (folder / adapter).read_bytes() == (whole(name) / adapter).read_bytes()
    assert (folder / state).read_bytes() == (whole(name) / state).read_bytes()
    assert steps_of(folder) == steps_of(whole(name))
    trained = {name for name in file_names(folder / state) if name.startswith("model.")}
    assert trained and all(".lora_" in name for name in trained)


def file_names(path):
    with safetensors.safe_open(path, "pt") as f:
        return set(f.keys())


def test_the_quantisation_of_a_run_is_its_own(tmp_path, whole, base):  # noqa: F811
    with interrupted_at(2):
        train(tmp_path / "run", *flags_of("nf4", base))
    done = script("train.py", "--resume", tmp_path / "run", "--quant", "none")
    assert done.code == 2 and "--quant (was nf4)" in done.err
    # nf4, int8 and plain are three policies
    train(tmp_path / "plain", *QLORA, "--model", base)
    runs = [whole("nf4"), tmp_path / "plain"]
    assert len({(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs}) == 2


def test_a_bitsandbytes_folder_is_trained_as_it_is(tmp_path, whole, base):  # noqa: F811
    """--model FOLDER alone: 4 bits because the folder says so, and equal to --quant nf4 of the plain one."""
    packed = tmp_path / "packed"
    save(load(base, dtype=torch.float32, quant="nf4"), packed)
    train(tmp_path / "run", *QLORA, "--model", packed)
    ours, want = (
        (folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (tmp_path / "run", whole("nf4"))
    )
    assert ours == want
    done = script("train.py", "--model", packed, "--lora-r", "0", *CHECKPOINT, "--out", tmp_path / "full")
    assert done.code == 2 and "--lora-r 0 with" in done.err and done.err.count("\n") == 1
    done = script("train.py", "--model", packed, "--quant", "int8", *CHECKPOINT, "--out", tmp_path / "eight")
    assert done.code == 2 and "packed as NF4 already" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_sample_takes_the_adapter_over_the_packed_base(whole, base, name):  # noqa: F811
    flags = ["--model", base, "--adapter", whole(name) / "adapter", "--temperature", 0, "--max-new-tokens", 3, "1+2="]
    with patch("nanogspo.checkpoint.load", wraps=load) as loads:
        done = script("sample.py", *flags, "--quant", name)
    assert (done.code, done.err) == (0, "") and done.out.strip()
    assert loads.call_args.kwargs["quant"] == name
