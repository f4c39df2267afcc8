"""Exercise 1. How many parameters does a model have? From its configuration alone, without building it.

Make this pass:  python -m pytest lessons/exercises/test_ex01.py        (about 12 lines)

Hints: equation (5) of the lesson is one case of what is asked. For each flag, decide which layers get a tensor because
of it, and how long that tensor is. Not sure? Build two models on the meta device that differ in this flag alone, and
compare the names and shapes of their named_parameters().
"""

from nanogspo.families import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """The fields you need: vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim,
    and the flags tied, qk_norm, post_norms, qkv_bias, o_bias, mlp_bias.
    """
    raise NotImplementedError("exercise 1: lessons/exercises/ex01.py")
