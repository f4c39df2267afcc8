"""nanogspo/layers/rope.py: frequencies against transformers and against their formula, angles against float64.

Run: python -m pytest tests/test_rope_frequencies.py
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanogspo.layers.rope import cos_sin, inverse_frequencies

EPS = torch.finfo(torch.float32).eps


class RopeConfig:
    """What transformers' RoPE functions read of a config."""

    def __init__(self, rope: dict, D: int):
        self.rope_parameters, self.head_dim, self.max_position_embeddings = rope, D, 4096
        self.hidden_size, self.num_attention_heads = D, 1

    def standardize_rope_params(self):
        pass


@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    D=st.sampled_from([4, 6, 64, 128]),
    theta=st.sampled_from([1e3, 1e4, 5e5, 1e6]),
    factor=st.sampled_from([1.0, 2.0, 4.0, 32.0]),
    old=st.sampled_from([64, 2048, 32768]),
    extra=st.sampled_from(
        [{}, {"attention_factor": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"beta_fast": 16.0, "truncate": False}]
    ),
)
def test_stretched_frequencies_are_those_of_transformers(kind, D, theta, factor, old, extra):
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": old,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, **(extra if kind == "yarn" else {})}  # fmt: skip
    want, want_magnitude = ROPE_INIT_FUNCTIONS[kind](RopeConfig(rope, D), "cpu")
    got, magnitude = inverse_frequencies(rope, D)
    # a quotient, a ramp and a blend: a few roundings each, in another order
    torch.testing.assert_close(got, want, rtol=16 * EPS, atol=0)
    assert got.dtype == torch.float32 and magnitude == pytest.approx(want_magnitude, rel=1e-12)


@given(D=st.sampled_from([2, 6, 128]), theta=st.sampled_from([1e2, 1e4, 1e6]))
def test_plain_frequencies(D, theta):
    f, magnitude = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, D)
    want = torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    # the exponent is rounded to fp32, and theta ** x turns eps into ln(theta) eps
    torch.testing.assert_close(f.double(), want, rtol=(2 + math.log(theta)) * EPS, atol=0)
    assert f[0] == 1.0 and magnitude == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_fp32_until_their_cosine(dtype):
    """At position 40,000 an angle in bf16 would be off by up to 128 rad."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
    positions = torch.tensor([[0, 1, 40_000]])
    cos, sin = cos_sin(rope, 6, positions, dtype)  # (1, 3, 1, 6)
    f, magnitude = inverse_frequencies(rope, 6)
    angle = positions[..., None].double() * f.double()  # (1, 3, 3)
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (1, 3, 1, 6)
    bound = torch.finfo(dtype).eps + 40_000 * EPS  # of the result, and of the angle
    assert cos.dtype == sin.dtype == dtype and magnitude > 1.1
    for got, want in ((cos, angle.cos()), (sin, angle.sin())):
        assert (got.double() - want * magnitude).abs().max() <= bound
