"""Rotary position embedding: how far each pair of channels is turned at a position, and the rules that stretch it.

    angle[t, i] = position[t] * f[i];   cos and sin of it go to kernels/rope.py, which turns q and k

Reading order: cos_sin, inverse_frequencies.

Lesson: lessons/02_gqa_rope_softcap.md       Tests: tests/test_rope_frequencies.py
Source: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071.
"""

import math

import torch
from torch import Tensor


def cos_sin(rope: dict, rotary_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, for kernels/rope.py.

    rope       one entry of ModelConfig.rope
    positions  (B or 1, T) int64
    returns    (B or 1, T, 1, rotary_dim) each in dtype; the angle is fp32, only its cos and sin are rounded
    """
    f, magnitude = inverse_frequencies(rope, rotary_dim, positions.device)
    angle = positions[..., None].float() * f  # (B, T, rotary_dim / 2)
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (B, T, 1, rotary_dim)
    return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)


def inverse_frequencies(rope: dict, rotary_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """How fast each pair of channels turns, and the factor that multiplies cos and sin.

        f[i] = theta ** (-2 i / rotary_dim)                                     default
        f[i] / factor                                                           linear
        slow pairs / factor, fast ones kept, a ramp between                     llama3 (by wavelength), yarn (by index)

    rope     one entry of ModelConfig.rope
    returns  (rotary_dim / 2,) fp32, never lower: in bf16 the frequencies are off by 0.4 % and long contexts drift
             1.0, or yarn's 0.1 ln(factor) + 1, which sharpens the attention over a stretched context

    Source: RoPE arXiv 2104.09864; YaRN arXiv 2309.00071 section 3; Llama 3.1's rule as transformers states it.
    """
    theta, kind = rope["rope_theta"], rope["rope_type"]
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float() / rotary_dim
    f = 1.0 / (theta**exponent)  # (rotary_dim / 2,)
    if kind == "default":
        return f, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return f / factor, 1.0
    if kind == "llama3":
        low, high, old = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        turns = old * f / (2 * math.pi)  # whole turns within the context it was trained on
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, untouched; 0: slow, stretched
        return f / factor * (1 - keep) + f * keep, 1.0
    # yarn: the pair that makes `turns` turns in the old context has this (fractional) index
    old = rope["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return rotary_dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32, device=device) - first) / max(last - first, 0.001)
    keep = 1 - ramp.clamp(0, 1)  # (rotary_dim / 2,)
    return f / factor * (1 - keep) + f * keep, _yarn_magnitude(rope, factor)


def _yarn_magnitude(rope: dict, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def magnitude(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)
