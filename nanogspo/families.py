"""What differs between model families, as data: a Hugging Face config.json -> ModelConfig.

One transformer (model.py) serves every family; a family is one row of FAMILIES, a block of families.yaml, which holds
all tables of this file. The columns are named for the mechanism, not for the vendor, and model.py reads nothing else:

    norm_plus_one   RMSNorm multiplies by (1 + w) in fp32 and rounds last (Gemma); else rounds first, then * w (Llama)
    post_norms      a second norm after attention and after the MLP, before the residual is added ("sandwich")
    qk_norm         RMSNorm over head_dim on every query and key head, before RoPE
    qkv_bias        biases on q, k, v; o_bias the same for o
    scale_embedding the embedding is multiplied by sqrt(hidden_size), rounded to the weight dtype
    layer_pattern   which layers see only a sliding window
    gated_attention, layer_pattern "linear"    gated DeltaNet in most layers (layers/delta_net.py), the others gated
    moe             the MLP of most layers is a mixture of experts (layers/moe.py)

Reading order: families.yaml, Family, ModelConfig, model_config, the small readers under it, export_config.
Two generations of files are read: what the hub holds (rope_theta, rope_scaling, sliding_window_pattern at the top)
and what transformers 5 writes (rope_parameters, layer_types). Both must give the same model.
A key of the file is read, or known to have no effect on what a text model computes (NO_EFFECT), or known to change it
(CHANGES: refused when set). Any other is named in `ModelConfig.unread`, which checkpoint.load prints.

Lesson: lessons/01_one_transformer.md       Tests: tests/test_families.py
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nanogspo.inputs import REQUIRED, need, shown, some

GELU_TANH, SILU = "gelu_tanh", "silu"


@dataclass(frozen=True)
class Family:
    """One row: how a family differs from plain Llama."""

    architecture: str  # the class name that transformers and vLLM look up in "architectures"
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: the file's attention_bias decides
    o_bias: bool | None = None
    activation: str = SILU
    activation_key: str = "hidden_act"
    scale_embedding: bool = False
    # "full" | "alternate" (Gemma 2) | "every_nth_full" (Gemma 3) | "linear" (Qwen 3.5: and every nth full); with
    # use_sliding_window: "window_flag" (Qwen: from max_window_layers on), "even_below" (Qwen 2 MoE: the even ones below
    # it), "all_or_none" (Qwen 3 MoE)
    layer_pattern: str = "full"
    softcaps: list[str] = field(default_factory=list)  # which of SOFTCAPS act
    attn_scalar: bool = False  # whether query_pre_attn_scalar replaces head_dim in the attention scale
    head_dim: int | None = None  # class default when the file is silent; None: hidden_size / heads
    tied: bool = False  # class default of tie_word_embeddings
    gated_attention: bool = False  # a gate a head, from the query's projection, multiplies what attention gives
    moe: bool = False
    shared_expert: bool = False  # one more expert, which sees every token
    norm_topk: bool | None = None  # None: the file's norm_topk_prob decides
    defaults: dict = field(default_factory=dict)  # class defaults a sparse hub file leans on


SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# The tables are data: families.yaml has them, and says what is in each
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FAMILIES = {name: Family(**row) for name, row in TABLES["families"].items()}
MODEL_TYPES = {model_type: name for name, types in TABLES["model_types"].items() for model_type in types}
WRAPPERS, DEFAULT_THETA = TABLES["wrappers"], TABLES["default_theta"]
# what export_config writes: the text-only type that transformers opens without its wrapper
PREFIXES = {"qwen3_omni_moe": "thinker.model."}  # of wrappers; all others: model.language_model.
TEXT_TYPES = {"gemma3": "gemma3_text", "qwen3_vl_moe": "qwen3_moe", "qwen3_omni_moe": "qwen3_moe",
              "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Everything model.py needs to know, in one flat record. Letters as in STYLE: V, C, F, L, H, K, D."""

    family: str
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    layer_types: tuple[str, ...]  # "full" | "sliding" | "linear" (gated DeltaNet), one per layer
    rope: dict[str, dict]  # layer type -> {"rope_type", "rope_theta", ...}
    rotary_dim: int  # channels of a head that RoPE turns; head_dim unless partial_rotary_factor < 1
    attn_scale: float  # scores are q.k * attn_scale
    sliding_window: int = 0  # keys a "sliding" layer keeps, the query's own included
    norm_eps: float = 1e-6
    activation: str = SILU
    tied: bool = False  # logits use the embedding matrix
    norm_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    scale_embedding: bool = False
    gated_attention: bool = False
    conv_width: int = 0  # tokens that the convolution of a "linear" layer sees; its heads, and their widths:
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    attn_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0
    moe_layers: tuple[bool, ...] = ()  # one per layer: experts instead of one MLP; () means none
    num_experts: int = 0  # E
    experts_per_token: int = 0  # k
    expert_size: int = 0  # F of an expert
    shared_expert_size: int = 0  # 0: no shared expert
    norm_topk: bool = False  # the weights of a token's experts sum to 1
    max_positions: int = 32768
    eos_ids: tuple[int, ...] = ()
    module_prefix: str = field(default="model.", compare=False)  # where transformers' class keeps the text layers
    unread: tuple[str, ...] = field(default=(), repr=False, compare=False)  # keys that nobody here knows
    source: dict = field(
        default_factory=dict, repr=False, compare=False
    )  # the text part of config.json, as it was read


def model_config(config: dict) -> ModelConfig:
    """Read a Hugging Face config.json, old or new, text-only or a multimodal wrapper of a text model.

    config   the parsed file
    returns  ModelConfig

    Raises ValueError for a family that is not in FAMILIES, a RoPE variant that is not built, an activation the family
    does not have, or a size that is missing or does not divide.

    Source: the configuration_*.py files of transformers 5.23; hub files of Qwen2.5, Qwen3, Gemma 2, Gemma 3.
    """
    text = stated = text_part(config)
    model_type = text.get("model_type") or config.get("model_type")
    name = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if name is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"got model_type {shown(model_type)} in config.json, want one of: {known}")
    row, where = FAMILIES[name], f"config.json of a {name} model"
    _refuse_other_functions(row, config, stated)
    theta = {"rope_theta": DEFAULT_THETA.get(model_type.removesuffix("_text"), 10_000.0)}
    text = theta | row.defaults | {k: v for k, v in text.items() if v is not None or k in SOFTCAPS}

    def size(key: str, high: int, default: Any = REQUIRED) -> int:
        return need(text, key, int, low=1, high=high, default=default, where=where)

    def flag(key: str) -> bool:
        return need(text, key, bool, default=False, where=where)

    C, H, L = (size("hidden_size", 2**20), size("num_attention_heads", 2**16), size("num_hidden_layers", MOST_LAYERS))
    K = size("num_key_value_heads", 2**16, H)
    D = size("head_dim", 2**16, row.head_dim or C // H)
    if not row.head_dim and text.get("head_dim") is None and C % H:
        raise ValueError(f"config.json: got hidden_size {C} for {H} attention heads and no head_dim, want a multiple")
    if H % K:
        raise ValueError(f"config.json: got {H} attention heads for {K} key/value heads, want a multiple")
    layer_types = _layer_types(row, text, L, where)
    rope = _rope(text, layer_types, where)
    rotary_dim = int(D * next(iter(rope.values())).get("partial_rotary_factor", 1.0))
    if rotary_dim % 2 or not rotary_dim:
        raise ValueError(f"config.json: got {rotary_dim} channels of a head of {D} to rotate, want an even number")
    attention_bias = flag("attention_bias") or (row.moe and flag("qkv_bias"))
    caps = [need(text, key, float, low=1e-3, high=1e6, default=0.0, where=where) for key in SOFTCAPS]
    caps = [cap if key in row.softcaps else 0.0 for key, cap in zip(SOFTCAPS, caps, strict=True)]
    outer = need(config, "model_type", str, default="", where=where)
    wrapped = outer in WRAPPERS
    if wrapped and caps[1]:
        raise ValueError(
            f"config.json: got final_logit_softcapping={caps[1]} in {outer}, want null: transformers' "
            f"{WRAPPERS[outer]} ignores it and others obey it"
        )
    # a wrapper and its text_config may disagree about tying; the outer one is what transformers obeys, save that of
    # Qwen 2 VL an inner true counts, where older versions wrote it
    tied = need(config, "tie_word_embeddings", bool, default=row.tied, where=where)
    tied = tied or (outer in ("qwen2_vl", "qwen2_5_vl") and flag("tie_word_embeddings"))
    return ModelConfig(
        family=name,
        vocab_size=size("vocab_size", 2**27),
        hidden_size=C,
        intermediate_size=size("intermediate_size", 2**24),
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        layer_types=layer_types,
        rope=rope,
        rotary_dim=rotary_dim,
        # read the scalar, never derive it: Gemma 2 27B says 144 and Gemma 3 27B says 168, both with head_dim 128
        attn_scale=float(
            need(text, "query_pre_attn_scalar", float, low=1e-3, high=1e6, where=where) if row.attn_scalar else D
        )
        ** -0.5,
        sliding_window=size("sliding_window", LONGEST_CONTEXT) if "sliding" in layer_types else 0,
        norm_eps=float(need(text, "rms_norm_eps", float, low=0, high=1, default=1e-6, where=where)),
        activation=_activation(row, text, where),
        tied=tied,
        norm_plus_one=row.norm_plus_one,
        post_norms=row.post_norms,
        qk_norm=row.qk_norm,
        qkv_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
        o_bias=attention_bias if row.o_bias is None else row.o_bias,
        mlp_bias=flag("mlp_bias"),
        scale_embedding=row.scale_embedding,
        gated_attention=row.gated_attention,
        **(_delta_net(text, where) if row.layer_pattern == "linear" else {}),
        attn_softcap=float(caps[0]),
        final_softcap=float(caps[1]),
        **(_experts(row, text, L, where) if row.moe else {}),
        max_positions=size("max_position_embeddings", LONGEST_CONTEXT, 32768),
        eos_ids=eos_ids(config, text),
        module_prefix=PREFIXES.get(outer, "model.language_model.") if wrapped else "model.",
        unread=_unread(row, config, stated, rope),
        source={**stated, "model_type": model_type},
    )


MOST_LAYERS, LONGEST_CONTEXT = 1024, 2**40  # beyond every model there is, and small enough to be counted with

CHANGES = TABLES["changes"]  # keys that are refused when set
READ, NO_EFFECT = (frozenset(TABLES[table].split()) for table in ("read", "no_effect"))
MEDIA = re.compile(r"(image|video|vision|audio|boi|eoi|boa|eoa|mm)_")  # pictures and sound, which a text has not


def _refuse_other_functions(row: Family, *parts: dict) -> None:
    """Raises for what says that this family's code is not this model's: CHANGES, code of its own."""
    for key in sorted({key for part in parts for key in CHANGES if part.get(key)}):
        raise ValueError(f"config.json: got {key}, want {CHANGES[key]}")
    classes = {
        row.architecture,
        WRAPPERS.get(need(parts[0], "model_type", str, default="", where="config.json"), row.architecture),
    }
    classes |= {re.sub("For(CausalLM|ConditionalGeneration)$", "Model", name) for name in classes}
    named = need(parts[0], "architectures", list, default=[], where="config.json")
    if parts[0].get("auto_map") and not (named and all(isinstance(n, str) and n in classes for n in named)):
        raise ValueError(
            f"config.json: got auto_map with architectures {shown(named)}, want one of {some(sorted(classes))}: "
            "code of its own is not run"
        )


def _unread(row: Family, config: dict, text: dict, rope: dict[str, dict]) -> tuple[str, ...]:
    """Keys that are set and of no kind known here: it may be that the model's authors mean something by them."""
    known = READ | NO_EFFECT | CHANGES.keys() | {*row.softcaps}
    keys = {k for part in (config, text) for k, v in part.items() if v is not None and k not in known}
    keys = {key for key in keys if not MEDIA.match(key)}
    return tuple(sorted(keys | {f"rope_parameters.{k}" for p in rope.values() for k in p.keys() - ROPE_RANGES.keys()}))


def text_part(config: dict) -> dict:
    """The text decoder's own keys: thinker_config, then text_config, are wrappers around it."""
    for wrapper in ("thinker_config", "text_config"):
        config = need(config, wrapper, dict, default=config, where="config.json")
    return config


def eos_ids(*configs: dict) -> tuple[int, ...]:
    """Union of eos_token_id (an int or a list) over config files; sorted."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError(f"got eos_token_id={shown(value)}, want a token id or a list of them")
        found.update(ids)
    return tuple(sorted(found))


def _delta_net(text: dict, where: str) -> dict:
    """The fields of ModelConfig about gated DeltaNet layers."""
    names = {"conv_width": "conv_kernel_dim", "linear_key_heads": "num_key_heads", "linear_key_dim": "key_head_dim",
             "linear_value_heads": "num_value_heads", "linear_value_dim": "value_head_dim"}  # fmt: skip
    sizes = {ours: need(text, f"linear_{key}", int, low=1, high=2**16, where=where) for ours, key in names.items()}
    H, V = sizes["linear_key_heads"], sizes["linear_value_heads"]
    if V % H or sizes["conv_width"] < 2:
        got = f"linear_num_value_heads {V} for linear_num_key_heads {H}, linear_conv_kernel_dim {sizes['conv_width']}"
        raise ValueError(f"config.json: got {got}; want a multiple, and at least 2")
    return sizes


def _experts(row: Family, text: dict, L: int, where: str) -> dict:
    """The fields of ModelConfig about experts. transformers 5 writes num_local_experts for num_experts."""

    def size(key: str, low: int = 1, high: int = 2**24, **options) -> int:
        return need(text, key, int, low=low, high=high, where=where, **options)

    E = size("num_local_experts" if "num_local_experts" in text else "num_experts", high=2**15)  # Routing: int16
    step, dense = size("decoder_sparse_step", default=1), need(text, "mlp_only_layers", list, default=[], where=where)
    norm_topk = need(text, "norm_topk_prob", bool, default=False, where=where)
    return {
        "moe_layers": tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(L)),
        "num_experts": E,
        "experts_per_token": size("num_experts_per_tok", high=E),
        "expert_size": size("moe_intermediate_size"),
        "shared_expert_size": size("shared_expert_intermediate_size") if row.shared_expert else 0,
        "norm_topk": norm_topk if row.norm_topk is None else row.norm_topk,
    }


def _activation(row: Family, text: dict, where: str) -> str:
    """Gemma 1 files say "gelu" and mean the tanh approximation; everyone else says what they mean."""
    tanh = row.activation == GELU_TANH
    wanted = (
        ("gelu_pytorch_tanh", "gelu")[: 2 if row.activation_key == "hidden_act" else 1] if tanh else ("silu", "swish")
    )
    name = need(text, row.activation_key, str, default=wanted[0], where=where)
    if name not in wanted:
        raise ValueError(
            f"config.json: got {row.activation_key} {shown(name)}, want {wanted[0]!r} for {row.architecture}"
        )
    return row.activation


def _layer_types(row: Family, text: dict, L: int, where: str) -> tuple[str, ...]:
    """One "full" or "sliding" per layer, from layer_types if the file has it, else from the family's older keys."""
    stated = need(text, "layer_types", list, default=[], where=where)
    window = need(text, "sliding_window", int, low=0, high=LONGEST_CONTEXT, default=0, where=where)
    if stated and row.layer_pattern != "all_or_none":
        names = {"full_attention": "full", "sliding_attention": "sliding"}
        if row.layer_pattern == "full":  # transformers does not look at layer_types here
            del names["sliding_attention"]
        if row.layer_pattern == "linear":
            names = {"full_attention": "full", "linear_attention": "linear"}
        unknown = sorted({str(name) for name in stated if not isinstance(name, str) or name not in names})
        if unknown or len(stated) != L:
            raise ValueError(
                f"config.json: got layer_types with {len(stated)} entries {shown(unknown[:3]) if unknown else ''}, "
                f"want {L} of {' or '.join(names)}"
            )
        types = tuple(names[name] for name in stated)
    elif row.layer_pattern == "alternate":
        types = tuple("full" if layer % 2 else "sliding" for layer in range(L))
    elif row.layer_pattern == "every_nth_full":
        n = need(text, "sliding_window_pattern", int, low=1, high=LONGEST_CONTEXT, where=where)
        types = tuple("sliding" if (layer + 1) % n else "full" for layer in range(L))
    elif row.layer_pattern in WINDOWED and need(text, "use_sliding_window", bool, default=False, where=where):
        first = need(text, "max_window_layers", int, low=0, high=LONGEST_CONTEXT, default=28, where=where)
        slides = WINDOWED[row.layer_pattern]
        types = tuple("sliding" if slides(layer, first) else "full" for layer in range(L))
    elif row.layer_pattern == "linear":
        n = need(text, "full_attention_interval", int, low=1, high=LONGEST_CONTEXT, where=where)
        types = tuple("linear" if (layer + 1) % n else "full" for layer in range(L))
    else:
        types = ("full",) * L
    if "sliding" in types and not window:
        raise ValueError("config.json: got sliding_attention layers without sliding_window, want a window size")
    return types


# (layer, max_window_layers) -> whether the layer sees only a window, where use_sliding_window says that some do
WINDOWED = {
    "window_flag": lambda layer, first: layer >= first,
    "even_below": lambda layer, first: layer < first and layer % 2 == 0,
    "all_or_none": lambda layer, first: True,
}
ROPE_KEYS, ROPE_RANGES = TABLES["rope_keys"], TABLES["rope_ranges"]


def _rope(text: dict, layer_types: tuple[str, ...], where: str) -> dict[str, dict]:
    """RoPE parameters per layer type. Gemma 3 turns its sliding layers at another base and scales only the full."""
    new, old = (need(text, key, dict, default={}, where=where) for key in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError("config.json: got rope_parameters and another rope_scaling, want one of them")
    base = {"rope_theta": text["rope_theta"], "partial_rotary_factor": text.get("partial_rotary_factor")}
    local = need(text, "rope_local_base_freq", float, low=1.01, high=1e15, default=None, where=where)
    scaling = _stated(new or old)
    full, sliding = (
        _stated(need(scaling, f"{kind}_attention", dict, default={}, where=where)) for kind in ("full", "sliding")
    )
    if "full_attention" in scaling or "sliding_attention" in scaling:  # transformers 5, one entry per layer type
        rope = {"full": base | full, "sliding": base | ({"rope_theta": local} if local else {}) | sliding}
    elif local:  # hub files of Gemma 3
        rope = {"full": base | scaling, "sliding": base | {"rope_theta": local}}
    else:
        rope = {"full": base | scaling, "sliding": base | scaling}
    kinds = rope.keys() & set(layer_types) or {"full"}  # linear layers turn nothing; a file has its parameters anyway
    return {kind: _checked_rope(p, text, where) for kind, p in rope.items() if kind in kinds}


def _stated(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _checked_rope(parameters: dict, text: dict, where: str) -> dict:
    # the sections of a three-axis RoPE say which channels turn by time, height or width: the same angle for text
    sections = ("type", "mrope_section", "mrope_interleaved")
    p = {k: v for k, v in _stated(parameters).items() if k not in sections}
    older = need(parameters, "type", str, default="default", where=where)
    p["rope_type"] = need(parameters, "rope_type", str, default=older, where=where)
    if p["rope_type"] == "mrope":
        p["rope_type"] = "default"
    if p["rope_type"] not in ROPE_KEYS:
        raise ValueError(f"config.json: got rope_type {shown(p['rope_type'])}, want one of: {', '.join(ROPE_KEYS)}")
    missing = [key for key in ROPE_KEYS[p["rope_type"]] if p.get(key) is None]
    if missing:
        raise ValueError(f"config.json: rope_type {p['rope_type']!r} needs {', '.join(missing)}")
    for key, range_ in ROPE_RANGES.items():
        if range_ and key in p:
            need(p, key, float, low=range_[0], high=range_[1], where=where)
    need(p, "truncate", bool, default=True, where=where)
    if p["rope_type"] == "llama3" and p["high_freq_factor"] <= p["low_freq_factor"]:
        raise ValueError("config.json: got high_freq_factor <= low_freq_factor, want a ramp between them")
    if p["rope_type"] == "yarn" and p.get("original_max_position_embeddings") is None:
        p["original_max_position_embeddings"] = text.get("max_position_embeddings", 32768)
    return p


# keys that describe another file than the one we write
DROPPED_KEYS = ("torch_dtype", "quantization_config", "auto_map", "vision_config", "audio_config")


def export_config(config: ModelConfig, *, dtype: str) -> dict:
    """The config.json of this model as a text-only checkpoint that transformers and vLLM open.

    The source file's own keys are kept; a multimodal wrapper's text part is renamed to the family it is.
    """
    out = {k: v for k, v in config.source.items() if k not in DROPPED_KEYS}
    out["model_type"] = TEXT_TYPES.get(config.family, config.family)
    out["architectures"] = [FAMILIES[config.family].architecture]
    out["tie_word_embeddings"] = config.tied
    out["dtype"] = dtype
    out["vocab_size"] = config.vocab_size
    if config.num_experts:  # what the class of a wrapper's text part would have filled in
        out |= {"num_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
        out |= {"moe_intermediate_size": config.expert_size, "norm_topk_prob": config.norm_topk}
    if config.eos_ids:  # a wrapper states them outside its text part
        out["eos_token_id"] = list(config.eos_ids)
    if config.source["model_type"] not in (out["model_type"], config.family) or "mrope_section" in str(
        out.get("rope_scaling")
    ):
        # a wrapper's text part: state what its class would have filled in, and drop the three-axis RoPE
        out.update(
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim
        )
        p = next(iter(config.rope.values()))  # Qwen: one base for every layer
        out["rope_theta"] = p["rope_theta"]
        rest = {k: v for k, v in p.items() if k != "rope_theta"}
        out["rope_scaling"] = None if rest["rope_type"] == "default" else rest
        out.pop("rope_parameters", None)
    return out
