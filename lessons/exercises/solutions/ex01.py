"""Solution of exercise 1."""

from nanogspo.families import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    V, C, F, L = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    attention = C * H * D + 2 * C * K * D + H * D * C
    attention += (H * D + 2 * K * D) * config.qkv_bias + C * config.o_bias
    attention += 2 * D * config.qk_norm
    mlp = 3 * C * F + (2 * F + C) * config.mlp_bias
    norms = (4 if config.post_norms else 2) * C
    head = 0 if config.tied else V * C
    return V * C + L * (attention + mlp + norms) + C + head
