import torch
from torch import Tensor

from lessons.exercises.ex13 import piece


def group_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    P = lengths[0]
    cuts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    own = [piece(*segment, causal=True) for segment in cuts]
    out = torch.cat([out for out, _ in own])  # (S, H, D)
    lse = torch.cat([lse for _, lse in own])  # (S, H)
    if len(lengths) == 1:
        return out
    prompt_out, prompt_lse = piece(q[P:], k[:P], v[:P], causal=False)  # (S - P, H, D), (S - P, H)
    joined = torch.logaddexp(lse[P:], prompt_lse)  # (S - P, H)
    answers = (lse[P:] - joined).exp()[..., None] * out[P:] + (prompt_lse - joined).exp()[..., None] * prompt_out
    return torch.cat([out[:P], answers])
