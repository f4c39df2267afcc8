import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load
from nanogspo.families import model_config
from nanogspo.model import Transformer

ex01 = load("ex01")

BASE = model_config(
    {
        "model_type": "llama",
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
)


@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 4),  # V, C, F, L: small and mostly odd, so that no two terms agree by chance
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5)]),
    half=st.integers(1, 3),  # half of the head dimension: RoPE turns pairs
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("tied", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "post_norms")}
    ),
)
def test_counts_what_a_model_has(sizes, heads, half, flags):
    V, C, F, L = sizes
    config = dataclasses.replace(
        BASE, vocab_size=V, hidden_size=C, intermediate_size=F, num_layers=L, num_heads=heads[0], num_kv_heads=heads[1],
        head_dim=2 * half, layer_types=("full",) * L, **flags,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(config)
    assert ex01.parameter_count(config) == sum(p.numel() for p in model.parameters())


# model type, V, C, F, L, H, K, D, tied, parameters, a tied head counted once
KNOWN = {
    "Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, 494_032_768),
    "Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, 596_049_920),
    "Qwen3-1.7B": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True, 1_720_574_976),
    "Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, 8_190_735_360),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True, 1_235_814_400),
    "gemma-2-2b": ("gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True, 2_614_341_888),
    "gemma-3-1b-it": ("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, True, 999_885_952),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_checkpoints(name):
    kind, V, C, F, L, H, K, D, tied, want = KNOWN[name]
    file = {"model_type": kind, "vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L}
    file |= {"num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "tie_word_embeddings": tied}
    assert ex01.parameter_count(model_config(file)) == want
