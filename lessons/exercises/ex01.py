"""Exercise 1. How many parameters does a model have? From its configuration alone, without building it.

Make this pass:  python -m pytest lessons/exercises/test_ex01.py        (about 12 lines)

Hints: start from equation (5) of the lesson and add what its flags add. qkv_bias and o_bias are biases of the attention's
matrices (a bias has as many numbers as its matrix has rows of output); mlp_bias belongs to gate, up and down. post_norms
adds two norms to each layer. Not tied: the head is a matrix of its own. RoPE has no parameters.
"""

from nanogspo.families import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    V, C, F, L = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers
    H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
    raise NotImplementedError("exercise 1: lessons/exercises/ex01.py")
