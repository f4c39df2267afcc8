"""Exercise 1. How many parameters does a model have? From its configuration alone, without building it.

Make this pass:  python -m pytest lessons/exercises/test_ex01.py        (about 12 lines)

Hints: start from equation (5) of the lesson and add what the flags add. qkv_bias and o_bias are biases of the
attention's matrices (a bias has as many numbers as its layer has outputs); mlp_bias belongs to gate, up and down.
post_norms adds two norms to each layer. Not tied: the head is a matrix of its own. RoPE has no parameters.
"""

from nanogspo.families import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """The fields you need: vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim,
    and the flags tied, qk_norm, post_norms, qkv_bias, o_bias, mlp_bias.
    """
    raise NotImplementedError("exercise 1: lessons/exercises/ex01.py")
