"""What differs between model families, as data: a Hugging Face config.json -> ModelConfig.

One transformer (model.py) serves every family below; a family is one row of FAMILIES. The columns are named for the
mechanism, not for the vendor, and model.py reads nothing else:

    norm_plus_one   RMSNorm multiplies by (1 + w) in fp32 and rounds last (Gemma); else rounds first, then * w (Llama)
    post_norms      a second norm after attention and after the MLP, before the residual is added ("sandwich")
    qk_norm         RMSNorm over head_dim on every query and key head, before RoPE
    qkv_bias        biases on q, k, v; o_bias the same for o
    scale_embedding the embedding is multiplied by sqrt(hidden_size), rounded to the weight dtype
    layer_pattern   which layers see only a sliding window

Reading order: FAMILIES, ModelConfig, model_config, the four small readers under it, export_config.
Two generations of files are read: what the hub holds (rope_theta, rope_scaling, sliding_window_pattern at the top)
and what transformers 5 writes (rope_parameters, layer_types). Both must give the same model.
Left out here: MoE and gated DeltaNet families (their rows come with their layers).

Lesson: lessons/01_one_transformer.md       Tests: tests/test_families.py
"""

from dataclasses import dataclass, field

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
    scale_embedding: bool = False
    layer_pattern: str = "full"  # "full" | "window_flag" (Qwen) | "alternate" (Gemma 2) | "every_nth_full" (Gemma 3)
    softcaps: bool = False  # whether attn_logit_softcapping / final_logit_softcapping mean anything
    attn_scalar: bool = False  # whether query_pre_attn_scalar replaces head_dim in the attention scale
    head_dim: int | None = None  # class default when the file is silent; None: hidden_size / heads
    tied: bool = False  # class default of tie_word_embeddings
    defaults: dict = field(default_factory=dict)  # class defaults a sparse hub file leans on


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, o_bias=False, layer_pattern="window_flag"),
    # every size from 0.6B to 32B has head_dim 128, whatever hidden_size / heads says
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, layer_pattern="window_flag", head_dim=128),
    "gemma": Family(
        "GemmaForCausalLM", norm_plus_one=True, activation=GELU_TANH, scale_embedding=True, head_dim=256, tied=True
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norm_plus_one=True,
        post_norms=True,
        activation=GELU_TANH,
        scale_embedding=True,
        layer_pattern="alternate",
        softcaps=True,
        attn_scalar=True,
        head_dim=256,
        tied=True,
        defaults={
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    # Gemma 3 dropped the soft-caps for qk_norm. The 4B+ files are sparse, so the class defaults are part of the format.
    "gemma3": Family(
        "Gemma3ForCausalLM",
        norm_plus_one=True,
        post_norms=True,
        qk_norm=True,
        activation=GELU_TANH,
        scale_embedding=True,
        layer_pattern="every_nth_full",
        attn_scalar=True,
        head_dim=256,
        tied=True,
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "max_position_embeddings": 131072,
        },
    ),
}

# model_type of a file -> row of FAMILIES. Multimodal wrappers are read for their text part only: with text positions
# their three-axis RoPE (M-RoPE) is exactly plain RoPE.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
# what export_config writes: the text-only type that transformers opens without its wrapper
TEXT_TYPES = {"gemma3": "gemma3_text"}


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
    layer_types: tuple[str, ...]  # "full" | "sliding", one per layer
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
    attn_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0
    max_positions: int = 32768
    eos_ids: tuple[int, ...] = ()
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
    text = text_part(config)
    model_type = text.get("model_type") or config.get("model_type")
    name = MODEL_TYPES.get(model_type)
    if name is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"got model_type {model_type!r} in config.json, want one of: {known}")
    if text.get("use_bidirectional_attention"):
        raise ValueError("config.json: got use_bidirectional_attention, want a decoder: this is an embedding model")
    row = FAMILIES[name]
    text = {**row.defaults, **{key: value for key, value in text.items() if value is not None or key in NULL_MEANS}}

    def need(key: str) -> int:
        value = text.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: got {key}={value!r}, want a positive integer (family {name})")
        return value

    C, H, L = need("hidden_size"), need("num_attention_heads"), need("num_hidden_layers")
    K = text.get("num_key_value_heads") or H
    D = text.get("head_dim") or row.head_dim or C // H
    if H % K:
        raise ValueError(f"config.json: got {H} attention heads for {K} key/value heads, want a multiple")
    layer_types = _layer_types(row, text, L)
    rope = _rope(text, layer_types)
    partial = next(iter(rope.values())).get("partial_rotary_factor", 1.0)
    attention_bias = bool(text.get("attention_bias", False))
    caps = (text.get("attn_logit_softcapping"), text.get("final_logit_softcapping")) if row.softcaps else (None, None)
    # a wrapper and its text_config may disagree about tying; the outer one is what transformers obeys
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", row.tied))
    return ModelConfig(
        family=name,
        vocab_size=need("vocab_size"),
        hidden_size=C,
        intermediate_size=need("intermediate_size"),
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        layer_types=layer_types,
        rope=rope,
        rotary_dim=int(D * partial),
        # read the scalar, never derive it: Gemma 2 27B says 144 and Gemma 3 27B says 168, both with head_dim 128
        attn_scale=float(text["query_pre_attn_scalar"] if row.attn_scalar else D) ** -0.5,
        sliding_window=int(text.get("sliding_window") or 0) if "sliding" in layer_types else 0,
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        activation=_activation(row, text),
        tied=bool(tied),
        norm_plus_one=row.norm_plus_one,
        post_norms=row.post_norms,
        qk_norm=row.qk_norm,
        qkv_bias=attention_bias if row.qkv_bias is None else row.qkv_bias,
        o_bias=attention_bias if row.o_bias is None else row.o_bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        scale_embedding=row.scale_embedding,
        attn_softcap=float(caps[0] or 0.0),
        final_softcap=float(caps[1] or 0.0),
        max_positions=int(text.get("max_position_embeddings", 32768)),
        eos_ids=eos_ids(config, text),
        source={**text_part(config), "model_type": model_type},
    )


NULL_MEANS = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
}  # null switches these off; elsewhere it means "unset"


def text_part(config: dict) -> dict:
    """The text decoder's own keys: thinker_config, then text_config, are wrappers around it."""
    for wrapper in ("thinker_config", "text_config"):
        if isinstance(config.get(wrapper), dict):
            config = config[wrapper]
    return config


def eos_ids(*configs: dict) -> tuple[int, ...]:
    """Union of eos_token_id (an int or a list) over config files; sorted."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def _activation(row: Family, text: dict) -> str:
    """Gemma files say "gelu" and mean the tanh approximation; everyone else says what they mean."""
    if row.activation == GELU_TANH:
        return GELU_TANH
    name = text.get("hidden_act", "silu")
    if name not in ("silu", "swish"):
        raise ValueError(f"config.json: got hidden_act {name!r}, want 'silu' for {row.architecture}")
    return SILU


def _layer_types(row: Family, text: dict, L: int) -> tuple[str, ...]:
    """One "full" or "sliding" per layer, from layer_types if the file has it, else from the family's older keys."""
    stated = text.get("layer_types")
    if stated:
        names = {"full_attention": "full", "sliding_attention": "sliding"}
        unknown = sorted({str(name) for name in stated if name not in names})
        if unknown or len(stated) != L:
            raise ValueError(
                f"config.json: got layer_types with {len(stated)} entries {unknown or ''}, "
                f"want {L} of full_attention or sliding_attention"
            )
        types = tuple(names[name] for name in stated)
    elif row.layer_pattern == "alternate":
        types = tuple("full" if layer % 2 else "sliding" for layer in range(L))
    elif row.layer_pattern == "every_nth_full":
        n = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
        types = tuple("sliding" if (layer + 1) % n else "full" for layer in range(L))
    elif row.layer_pattern == "window_flag" and text.get("use_sliding_window") and text.get("sliding_window"):
        first = text.get("max_window_layers", 28)  # layers below this one stay full
        types = tuple("sliding" if layer >= first else "full" for layer in range(L))
    else:
        types = ("full",) * L
    if "sliding" in types and not text.get("sliding_window"):
        raise ValueError("config.json: got sliding_attention layers without sliding_window, want a window size")
    return types


# rope_type -> the keys it cannot do without. "mrope" with text positions is "default".
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def _rope(text: dict, layer_types: tuple[str, ...]) -> dict[str, dict]:
    """RoPE parameters per layer type. Gemma 3 turns its sliding layers at another base and scales only the full."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    base = {"rope_theta": text.get("rope_theta", 10_000.0)}
    if "partial_rotary_factor" in text:
        base["partial_rotary_factor"] = text["partial_rotary_factor"]
    local = text.get("rope_local_base_freq")
    if "full_attention" in scaling or "sliding_attention" in scaling:  # transformers 5, one entry per layer type
        rope = {
            "full": {**base, **scaling.get("full_attention", {})},
            "sliding": {**base, **({"rope_theta": local} if local else {}), **scaling.get("sliding_attention", {})},
        }
    elif local:  # hub files of Gemma 3
        rope = {"full": {**base, **scaling}, "sliding": {"rope_theta": local}}
    else:
        rope = {"full": {**base, **scaling}, "sliding": {**base, **scaling}}
    rope = {kind: _checked_rope(p, text) for kind, p in rope.items() if kind in layer_types}
    return rope


def _checked_rope(parameters: dict, text: dict) -> dict:
    # the sections of a three-axis RoPE say which channels turn by time, height or width: the same angle for text
    p = {k: v for k, v in parameters.items() if k not in ("type", "mrope_section", "mrope_interleaved")}
    p["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    if p["rope_type"] == "mrope":
        p["rope_type"] = "default"
    if p["rope_type"] not in ROPE_KEYS:
        raise ValueError(f"config.json: got rope_type {p['rope_type']!r}, want one of: {', '.join(ROPE_KEYS)}")
    missing = [key for key in ROPE_KEYS[p["rope_type"]] if p.get(key) is None]
    if missing:
        raise ValueError(f"config.json: rope_type {p['rope_type']!r} needs {', '.join(missing)}")
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
