"""The tiny models: Qwen3's architecture at 1/1300 of its size for the default run, and others by --architecture.

Random weights, a token per character. Small enough to train from nothing in a minute or two on a laptop, and the same
code path as a real checkpoint: GQA (4 query heads on 2 key/value heads), qk-norm, RoPE, SwiGLU, tied embeddings. They
save and load like any other checkpoint.
"""

from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.tokenizer import Tokenizer, character_tokenizer

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,  # measured: wider learns no faster here
    "num_hidden_layers": 3,  # two digits and a carry need at least two; the third makes every seed get there
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
# model_type -> config.json without what depends on the task
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
             "linear_value_head_dim": 32}  # fmt: skip
CONFIGS = {
    "qwen3": CONFIG,
    "qwen3_moe": CONFIG | {"model_type": "qwen3_moe"} | EXPERTS,  # two experts: the MLP's width
    "qwen3_5": CONFIG
    | {"model_type": "qwen3_5_text", "full_attention_interval": 3}
    | DELTA_NET,  # attention comes last
}


def describe(characters: str, architecture: str = "qwen3") -> tuple[Tokenizer, dict]:
    """A character tokenizer for this alphabet, and the config.json of the model for it."""
    tokenizer = character_tokenizer(characters)
    own = {"vocab_size": tokenizer.vocab_size, "eos_token_id": list(tokenizer.eos_ids)}
    return tokenizer, CONFIGS[architecture] | own


def build(characters: str, *, seed: int, architecture: str = "qwen3") -> tuple[Tokenizer, Transformer]:
    """The tokenizer, and a fresh fp32 model; equal seeds give equal weights."""
    tokenizer, config = describe(characters, architecture)
    return tokenizer, Transformer(model_config(config)).init_weights(seed)
