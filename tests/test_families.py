"""nanogspo/families.py: real config.json files of the hub, both generations of them, and what is refused.

The real files are quoted below (all keys that matter), and their parameter counts are the published ones. Where a model
has billions of parameters, both sides are built on the meta device: names and shapes, no memory.
"""

import copy
import dataclasses
import json

import pytest
import references
import torch
import transformers
from test_inputs import corrupted, refused_or
from transformers import AutoConfig

from nanogspo.checkpoint import our_name
from nanogspo.families import FAMILIES, MODEL_TYPES, WRAPPERS, export_config, model_config, text_part
from nanogspo.layers.rope import inverse_frequencies
from nanogspo.model import Transformer

# ---------------------------------------------------------------------------------------------------------------------
# real files


def qwen2_5(C: int, F: int, L: int, H: int, K: int, V: int, tied: bool) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": C,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "max_position_embeddings": 32768 if tied else 131072,
        "max_window_layers": L,
        "model_type": "qwen2",
        "num_attention_heads": H,
        "num_hidden_layers": L,
        "num_key_value_heads": K,
        "rms_norm_eps": 1e-06 if L < 48 else 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": 32768 if tied else 131072,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": V,
    }


def qwen3(C: int, F: int, L: int, H: int, tied: bool) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": C,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "max_position_embeddings": 40960,
        "max_window_layers": L,
        "model_type": "qwen3",
        "num_attention_heads": H,
        "num_hidden_layers": L,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def gemma2(C: int, F: int, L: int, H: int, K: int, D: int, scalar: int) -> dict:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": D,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": C,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": H,
        "num_hidden_layers": L,
        "num_key_value_heads": K,
        "pad_token_id": 0,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 256000,
    }


def gemma3_small(C: int, F: int, L: int) -> dict:
    """270M and 1B: text only, a full file."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": C,
        "initializer_range": 0.02,
        "intermediate_size": F,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": L,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262144,
    }


def gemma3_multimodal(**text) -> dict:
    """4B and more: text_config holds only what differs from the class defaults. No vocabulary size, no RoPE bases."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            **text,
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
    }


def gemma3_text_share(published: int, C: int) -> int:
    """Published counts of the multimodal sizes include SigLIP (416,866,032) and the projector's matrix and norm."""
    return published - 416_866_032 - (1152 * C + 1152)


REAL = {
    "Qwen2.5-0.5B": (qwen2_5(896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "Qwen2.5-1.5B": (qwen2_5(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "Qwen2.5-3B": (qwen2_5(2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688),
    "Qwen2.5-7B": (qwen2_5(3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "Qwen2.5-14B": (qwen2_5(5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664),
    "Qwen2.5-32B": (qwen2_5(5120, 27648, 64, 40, 8, 152064, False), 32_763_876_352),
    "Qwen2.5-72B": (qwen2_5(8192, 29568, 80, 64, 8, 152064, False), 72_706_203_648),
    # the hub's page counts the tied head of 0.6B and 1.7B twice (751,632,384 and 2,031,739,904): their files hold it
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, True), 751_632_384 - 151936 * 1024),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, True), 2_031_739_904 - 151936 * 2048),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, False), 8_190_735_360),
    "Qwen3-14B": (qwen3(5120, 17408, 40, 40, False), 14_768_307_200),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64, False), 32_762_123_264),
    "gemma-2-2b": (gemma2(2304, 9216, 26, 8, 4, 256, 256), 2_614_341_888),
    "gemma-2-9b": (gemma2(3584, 14336, 42, 16, 8, 256, 256), 9_241_705_984),
    "gemma-2-27b": (gemma2(4608, 36864, 46, 32, 16, 128, 144), 27_227_128_320),
    "gemma-3-270m": (gemma3_small(640, 2048, 18), 268_098_176),
    "gemma-3-1b": (gemma3_small(1152, 6912, 26), 999_885_952),
    "gemma-3-4b": (
        gemma3_multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
        gemma3_text_share(4_300_079_472, 2560),
    ),
    "gemma-3-12b": (
        gemma3_multimodal(
            hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
            num_key_value_heads=8,
        ),
        gemma3_text_share(12_187_325_040, 3840),
    ),
    "gemma-3-27b": (
        gemma3_multimodal(
            hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
            num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168,
        ),
        gemma3_text_share(27_432_406_640, 5376),
    ),
}  # fmt: skip


def transformers_config(config: dict):
    return AutoConfig.for_model(**text_part(config))


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_published_tensors(name):
    config, published = REAL[name]
    ours = model_config(config)
    with torch.device("meta"):
        model = Transformer(ours)
        theirs = getattr(transformers, FAMILIES[ours.family].architecture)._from_config(transformers_config(config))
    got = {name: tuple(p.shape) for name, p in model.named_parameters()}
    want = {our_name(name): tuple(p.shape) for name, p in theirs.named_parameters()}
    assert got == want
    assert sum(p.numel() for p in model.parameters()) == published


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_settings_transformers_reads(name):
    """What shapes cannot show: windows, scales, caps, bases. Gemma's 27B sizes have head_dim 128 but another scale."""
    config, _ = REAL[name]
    ours, theirs = model_config(config), transformers_config(config)
    assert ours.norm_eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.num_layers
    assert [f"{kind}_attention" for kind in ours.layer_types] == kinds
    if "sliding" in ours.layer_types:
        assert ours.sliding_window == theirs.sliding_window
    assert ours.attn_scale == getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5
    assert ours.attn_softcap == (getattr(theirs, "attn_logit_softcapping", None) or 0)
    assert ours.final_softcap == (getattr(theirs, "final_logit_softcapping", None) or 0)
    for kind, rope in ours.rope.items():
        assert rope == theirs.rope_parameters.get(f"{kind}_attention", theirs.rope_parameters)
    assert ours.rotary_dim == ours.head_dim
    stated = config.get("eos_token_id")
    assert ours.eos_ids == tuple(stated if isinstance(stated, list) else [stated])


def test_gemma_3_keeps_its_long_context_scaling_out_of_the_sliding_layers():
    config = model_config(REAL["gemma-3-4b"][0])
    assert config.layer_types[:7] == ("sliding",) * 5 + ("full", "sliding")
    assert config.rope["full"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    assert config.rope["sliding"] == {"rope_theta": 1e4, "rope_type": "default"}


# ---------------------------------------------------------------------------------------------------------------------
# two generations, and back


@pytest.mark.parametrize("name", references.NAMES)
def test_old_and_new_files_say_the_same(name):
    old, new = references.hub_config(name), references.new_config(name)
    assert "rope_parameters" not in text_part(old)  # so that the test compares two things
    assert model_config(old) == model_config(new)


@pytest.mark.parametrize("style", ["hub", "new"])
@pytest.mark.parametrize("name", references.NAMES)
def test_an_exported_config_is_the_same_model(name, style):
    """A file of our own, read by us and by transformers: the same ModelConfig, and a text-only model type."""
    config = model_config(getattr(references, f"{style}_config")(name))
    out = export_config(config, dtype="bfloat16")
    assert model_config(out) == config
    opened = AutoConfig.for_model(**out)
    assert model_config(opened.to_dict()) == config
    assert out["architectures"] == [FAMILIES[config.family].architecture] and out["dtype"] == "bfloat16"
    assert not {"vision_config", "text_config", "torch_dtype", "quantization_config"} & set(out)


@pytest.mark.parametrize("name", REAL)
def test_real_configs_survive_the_export(name):
    config = model_config(REAL[name][0])
    out = export_config(config, dtype="bfloat16")
    assert model_config(out) == config
    assert model_config(AutoConfig.for_model(**out).to_dict()) == config


def test_the_outer_tie_flag_wins():
    """transformers obeys the wrapper's flag where the text part contradicts it, and its default where it is silent."""
    config = references.new_config("qwen3_vl")
    assert config["tie_word_embeddings"] is True
    config["text_config"]["tie_word_embeddings"] = False
    assert model_config(config).tied
    config["tie_word_embeddings"] = False
    assert not model_config(config).tied
    config["text_config"]["tie_word_embeddings"] = True
    assert not model_config(config).tied
    del config["tie_word_embeddings"]
    assert not model_config(config).tied and not AutoConfig.for_model(**config).tie_word_embeddings
    older = {**copy.deepcopy(references.new_config("qwen2_5_vl")), "tie_word_embeddings": False}
    assert not model_config(older).tied
    older["text_config"]["tie_word_embeddings"] = True  # where Qwen 2 VL's files had it
    assert model_config(older).tied and AutoConfig.for_model(**older).tie_word_embeddings


@pytest.mark.parametrize("model_type", sorted(WRAPPERS.keys() - {"qwen3_omni_moe"}))  # its class wants a whole thinker
def test_a_wrapper_keeps_its_text_layers_where_we_say(model_type):
    """transformers' class for each, two layers of it: names, and the RoPE base of a file that states none."""
    text = {**references.SIZES, "num_hidden_layers": 2, "full_attention_interval": 1}  # of those that would have none
    with torch.device("meta"):
        theirs = getattr(transformers, WRAPPERS[model_type])._from_config(
            AutoConfig.for_model(model_type, text_config=text, vision_config={"depth": 1, "num_hidden_layers": 1})
        )
    ours = model_config({"model_type": model_type, "text_config": {**text, "model_type": f"{model_type}_text"}})
    names = {n for n, _ in theirs.named_modules() if n.endswith("q_proj") and not n.startswith("model.vision_tower.")}
    assert names == {f"{ours.module_prefix}layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    rope = theirs.config.text_config.rope_parameters
    assert (
        ours.rope["full" if "full" in ours.rope else "sliding"]["rope_theta"]
        == rope.get("sliding_attention", rope)["rope_theta"]
    )


def test_a_window_counts_only_where_the_flag_says_so():
    config = {**REAL["Qwen2.5-7B"][0], "max_window_layers": 20}
    assert model_config(config).layer_types == ("full",) * 28 and model_config(config).sliding_window == 0
    config["use_sliding_window"] = True
    sliding = model_config(config)
    assert sliding.layer_types == ("full",) * 20 + ("sliding",) * 8 and sliding.sliding_window == 131072


def test_null_switches_a_soft_cap_off_and_silence_keeps_it():
    config = dict(REAL["gemma-2-2b"][0])
    assert model_config({**config, "attn_logit_softcapping": None}).attn_softcap == 0
    assert model_config({**config, "final_logit_softcapping": None}).final_softcap == 0
    silent = {k: v for k, v in config.items() if "softcapping" not in k}
    assert (model_config(silent).attn_softcap, model_config(silent).final_softcap) == (50, 30)


def test_of_gemma_3_the_final_cap_acts_alone():
    """Logits beside transformers' are test_checkpoint.py's. Around a tower transformers ignores it; vLLM does not."""
    capped = model_config({**GEMMA3, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0})
    assert (capped.attn_softcap, capped.final_softcap) == (0, 30) and capped.unread == ("attn_logit_softcapping",)
    config = copy.deepcopy(references.new_config("gemma3_multimodal"))
    config["text_config"]["final_logit_softcapping"] = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping=30.0 in gemma3, want null"):
        model_config(config)


def test_keys_are_read_or_without_effect_or_named():
    """No real file and no file of transformers has a key that we would have to name; a key of somebody's own is."""
    configs = [config for config, _ in REAL.values()]
    configs += [read(name) for name in references.NAMES for read in (references.hub_config, references.new_config)]
    for config in configs:
        assert model_config(config).unread == ()
    old = {
        "model_type": "llama",
        **references.SIZES,
        "rope_interleaved": False,
        "is_llama_config": True,
        "clip_qkv": None,
    }
    assert model_config(old).unread == ()
    rope = {"rope_type": "linear", "factor": 2.0, "alpha": 4}
    own = {**QWEN3, "logit_scale": 0.5, "rope_scaling": rope, "final_logit_softcapping": 30.0, "image_token_id": 5}
    assert model_config(own).unread == ("final_logit_softcapping", "logit_scale", "rope_parameters.alpha")
    assert model_config(own).final_softcap == 0  # Qwen's class has none, whatever the file says


def test_own_code_is_refused_where_the_class_is_not_the_familys():
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    assert model_config({**QWEN3, **own}) == model_config(QWEN3)
    assert model_config({**references.new_config("qwen3_vl"), **own}).family == "qwen3"
    for architectures in (["CappedQwen3"], ["LlamaForCausalLM"], [], None, ["Qwen3ForCausalLM", 5]):
        with pytest.raises(
            ValueError, match="got auto_map with architectures .*want one of Qwen3ForCausalLM, Qwen3Mod"
        ):
            model_config({**QWEN3, **own, "architectures": architectures})


def test_partial_rotary_factor_is_read_from_either_place():
    base = REAL["Qwen3-0.6B"][0]
    old = model_config({**base, "partial_rotary_factor": 0.25})
    rope = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.25}
    new = model_config({**base, "rope_parameters": rope})
    assert old.rotary_dim == new.rotary_dim == 32


def test_mrope_with_text_positions_is_plain_rope():
    config = {**REAL["Qwen2.5-7B"][0], "model_type": "qwen2_5_vl"}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    assert model_config(config).rope["full"]["rope_type"] == "default"


def test_model_types_and_rows_belong_together():
    assert set(MODEL_TYPES.values()) == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_silent_file_has_its_class_context(name):
    kind = f"{name}_text" if name in ("gemma3", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_5", "qwen3_5_moe") else name
    config = {"model_type": kind, "hidden_size": 64, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "query_pre_attn_scalar": 16}
    theirs = AutoConfig.for_model(**config)
    assert model_config(config).max_positions == theirs.max_position_embeddings


def test_model_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config(REAL["Qwen3-0.6B"][0]).head_dim = 64


# ---------------------------------------------------------------------------------------------------------------------
# what is refused, in one line

QWEN3, GEMMA3 = REAL["Qwen3-0.6B"][0], REAL["gemma-3-1b"][0]


@pytest.mark.parametrize(
    "config, says",
    [
        ({**QWEN3, "model_type": "mamba"}, "got model_type 'mamba'.*want one of: gemma, gemma2, .*qwen3_vl_text"),
        ({}, "got model_type None"),
        ({k: v for k, v in QWEN3.items() if k != "hidden_size"}, "hidden_size=None, want a positive integer.*qwen3"),
        ({**QWEN3, "num_hidden_layers": 0}, "num_hidden_layers=0, want a positive integer"),
        ({**QWEN3, "intermediate_size": 3072.0}, "intermediate_size=3072.0, want a positive integer"),
        ({**QWEN3, "vocab_size": True}, "vocab_size=True, want a positive integer"),
        ({**QWEN3, "num_attention_heads": "16"}, "num_attention_heads='16', want a positive integer"),
        ({**QWEN3, "num_key_value_heads": 3}, "16 attention heads for 3 key/value heads, want a multiple"),
        ({**QWEN3, "hidden_act": "relu"}, "hidden_act 'relu', want 'silu' for Qwen3ForCausalLM"),
        ({**QWEN3, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic', want one of: default, linear, l"),
        ({**QWEN3, "rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
        ({**QWEN3, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_fac"),
        ({**QWEN3, "layer_types": ["full_attention"] * 27}, "layer_types with 27 entries .*want 28 of full_attention"),
        ({**QWEN3, "layer_types": ["linear_attention"] * 28}, r"28 entries \['linear_attention'\]"),
        ({**QWEN3, "use_sliding_window": True, "max_window_layers": 20}, "layers without sliding_window"),
        ({**QWEN3, "model_type": "llama", "layer_types": ["sliding_attention"] * 28}, "want 28 of full_attention$"),
        ({**QWEN3, "rope_interleaved": True}, "got rope_interleaved, want rotated halves"),
        ({**QWEN3, "transformers_weights": "other.safetensors"}, "got transformers_weights, want weights in model.saf"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "hidden_activation 'gelu', want 'gelu_pytorch_tanh' for Gemma3For"),
        ({**QWEN3, "hidden_size": 10**12}, "hidden_size=1000000000000, want a positive integer up to 1,048,576"),
        ({**QWEN3, "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, want a positive integer up to 1,024"),
        ({**QWEN3, "head_dim": 7}, "got 7 channels of a head of 7 to rotate, want an even number"),
        ({**QWEN3, "model_type": "llama", "head_dim": None, "hidden_size": 1023}, "hidden_size 1023 for 16 .*no head_"),
        ({**QWEN3, "rope_theta": 0}, "rope_theta=0, want a number from 1.01 up to 1e"),
        ({**QWEN3, "rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor=-2.0, want a number from 0.001"),
        ({**QWEN3, "rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor=0, want a number from 0.001 up to 1"),
        ({**QWEN3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
         "got rope_parameters and another rope_scaling, want one of them"),
        ({**QWEN3, "rope_scaling": {**references.LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor <= low_freq"),
        ({**QWEN3, "eos_token_id": [-1]}, r"eos_token_id=\[-1\], want a token id or a list"),
        ({**QWEN3, "layer_types": ["sliding_attention"] * 28}, "sliding_attention layers without sliding_window"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention, want a decoder"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(config, says):
    with pytest.raises(ValueError, match=says) as caught:
        model_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma3_multimodal", "llama_llama3", "qwen3_yarn"])
def test_a_wrong_value_anywhere_is_refused_or_harmless(name):
    """Every value of the file replaced by values of every other type and size: one line, or a model with finite RoPE
    that can be exported."""

    def read(config):
        ours = model_config(config)
        for rope in ours.rope.values():
            f, magnitude = inverse_frequencies(rope, ours.rotary_dim)
            assert f.isfinite().all() and 0 < magnitude < 1e4
        json.dumps(export_config(ours, dtype="float32"))

    text = {k: v for k, v in references.new_config(name).items() if k != "vision_config"}
    config = {**text, "architectures": ["X"], "eos_token_id": [1, 2], "auto_map": {}}
    accepted = [refused_or(read, tree) for _, tree in corrupted(config)]
    assert 0.2 < sum(accepted) / len(accepted) < 0.8  # the test refuses some and accepts some
