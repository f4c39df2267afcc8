"""Tiny random Hugging Face models: what the transformer, its configs and its checkpoints are compared with.

`reference(name)` is the model, `folder(name)` the checkpoint that transformers wrote of it, `ours(name)` what we load
of that, `hub_config(name)` the config.json the hub would hold for it: written by transformers 4, with RoPE's keys at
the top level. test_moe.py and test_delta_net.py have cases of their own, made by the same `draw` and `families`.

A fresh Hugging Face model has biases of 0 and norm weights of 0 or 1, so it cannot see a missing bias, a (1 + w)
mistake or a norm in the wrong place; every 1-D tensor is therefore moved. Matrices are drawn with a standard deviation
of 0.15, so that attention is far from uniform: then a wrong soft-cap moves logits by 1, a wrong eps by 1e-3.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from nanogspo import checkpoint
from nanogspo.model import Transformer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, WINDOW = 97, 8
SIZES = {
    "vocab_size": VOCABULARY,  # a prime: no kernel's tile fits
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
# stretched from 64 positions, so that sequences of 70 meet slow and fast channels
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
# head_dim 32 is not hidden_size / heads; 24 is neither; 7 layers hold six sliding ones and a full one
GEMMA3 = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}
LOCAL = {"rope_type": "default", "rope_theta": 1e3}
SIGLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16,
          "patch_size": 8}  # fmt: skip
QWEN_TOWER = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 64,
              "patch_size": 4}  # fmt: skip
QWEN_TOKENS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 93, "vision_end_token_id": 94}


class Case(NamedTuple):
    config: type
    model: type  # named, because the Auto classes pick another one for some wrappers
    options: dict  # of the text part
    wrapper: dict | None = None  # of a multimodal model around it


CASES = {
    "llama": Case(LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_biases": Case(
        LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "llama_llama3": Case(LlamaConfig, LlamaForCausalLM, {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama_linear": Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "llama_yarn": Case(LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "qwen2": Case(
        Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    "qwen2_tied": Case(Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_sliding": Case(
        Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Case(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_yarn": Case(
        Qwen3Config,
        Qwen3ForCausalLM,
        {"head_dim": 32, "attention_bias": True, "rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0}},
    ),
    "gemma": Case(GemmaConfig, GemmaForCausalLM, {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": Case(
        Gemma2Config, Gemma2ForCausalLM, {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
    ),
    "gemma3": Case(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "gemma3_linear": Case(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**GEMMA3, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
    ),
    "gemma3_multimodal": Case(
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        GEMMA3,
        {"vision_config": SIGLIP, "mm_tokens_per_image": 4, "boi_token_index": 94, "eoi_token_index": 95,
         "image_token_index": 96},
    ),
    "qwen2_5_vl": Case(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        {"vision_config": {**QWEN_TOWER, "fullatt_block_indexes": [0]}, "tie_word_embeddings": False, **QWEN_TOKENS},
    ),
    "qwen3_vl": Case(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        {
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5],
                                "mrope_interleaved": True},
        },
        {"vision_config": {**QWEN_TOWER, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
         "tie_word_embeddings": True, **QWEN_TOKENS},
    ),
}  # fmt: skip
NAMES = list(CASES)
PLAIN = [name for name, case in CASES.items() if case.wrapper is None]


def attention(name: str) -> str:
    """The implementation our arithmetic equals: Gemma 2's soft-cap exists in transformers' eager path alone."""
    return "eager" if name == "gemma2" else "sdpa"


def draw(case: Case, seed: int, sizes: dict = SIZES, **loading) -> nn.Module:
    """The Hugging Face model of a case, fp32, in eval mode. An option that is None is not given."""
    text = {key: value for key, value in {**sizes, **case.options}.items() if value is not None}
    config = case.config(text_config=text, **case.wrapper) if case.wrapper else case.config(**text)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = case.model._from_config(config, **loading).eval()
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return model


def families(make: Callable[[str], nn.Module]) -> tuple[Callable, Callable, Callable]:
    """Three functions of a name, each of which does its work once: the Hugging Face model, from `make`; the checkpoint
    folder that save_pretrained wrote, read only (copy it to change it); what this project loads of it, in fp32."""
    home = tempfile.TemporaryDirectory(prefix="references-")  # removed when the tests end
    reference = functools.cache(make)

    @functools.cache
    def folder(name: str) -> Path:
        reference(name).save_pretrained(path := Path(home.name, name))
        return path

    @functools.cache
    def ours(name: str) -> Transformer:
        return checkpoint.load(folder(name), dtype=torch.float32)

    return reference, folder, ours


reference, folder, ours = families(
    lambda name: draw(CASES[name], NAMES.index(name), attn_implementation=attention(name))
)


def open_reference(path: Path, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint folder, as transformers opens it with the class that it names.

    The dtype is given on opening: .to(bf16) later would round RoPE's frequencies.
    """
    kind = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(path, dtype=dtype, attn_implementation=attention(name)).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """(rows, length) int64, below the image tokens of the wrappers."""
    return torch.randint(3, 93, (rows, length), generator=torch.Generator().manual_seed(seed))


def new_config(name: str) -> dict:
    return json.loads((folder(name) / "config.json").read_text())


def hub_config(name: str) -> dict:
    """The same config in the style of transformers 4, which nearly all files on the hub have."""
    new, family = new_config(name), name.split("_")[0]
    if name == "gemma3_multimodal":
        text = _old_style(new["text_config"], family)
        # the text part of Gemma 3 4B and more leaves out what its class has as a default
        sparse = {k: v for k, v in text.items() if k not in SPARSE and v is not None}
        return {**_renamed(new), "text_config": sparse, "eos_token_id": 1}
    if name == "qwen3_vl":  # tied inside and outside
        return {**_renamed(new), "text_config": {**_old_style(new["text_config"], family), "tie_word_embeddings": True}}
    if name == "qwen2_5_vl":  # flat: the text part's keys stand beside vision_config
        text = _old_style(new["text_config"], family)
        outer = {k: v for k, v in _renamed(new).items() if k != "text_config"}
        return {**text, **outer, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return _old_style(new, family)


SPARSE = {"rope_theta", "rope_local_base_freq", "sliding_window_pattern", "rms_norm_eps", "tie_word_embeddings",
          "eos_token_id", "bos_token_id", "pad_token_id", "attention_bias", "use_cache"}  # fmt: skip


def _renamed(new: dict) -> dict:
    """torch_dtype became dtype, in every part of a config."""
    return {"torch_dtype" if key == "dtype" else key: value for key, value in new.items()}


def _old_style(new: dict, family: str) -> dict:
    newer = ("rope_parameters", "layer_types", "_sliding_window_pattern")
    old = {key: value for key, value in _renamed(new).items() if key not in newer}
    rope = new["rope_parameters"]
    if family == "gemma3":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 6
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    if family == "llama" and old["rope_scaling"]:
        scaling["type"] = scaling.pop("rope_type")  # the key's name before Llama 3.1
    if family == "qwen2" and not new["use_sliding_window"]:
        old["sliding_window"] = 131072  # Qwen2.5-Instruct: a size, and a flag that says it is not used
    if family == "gemma":
        old.update(hidden_act="gelu", hidden_activation=None)  # and means the tanh approximation
    return old
