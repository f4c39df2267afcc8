"""Solution of exercise 2."""

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, *, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    (T, H, _), K = q.shape, k.shape[1]
    angle = torch.arange(T)[:, None, None] * f  # (T, 1, D / 2)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)  # (T, heads, D / 2) twice
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)

    q, k, out = turn(q), turn(k), torch.empty_like(q)  # (T, H, D), (T, K, D), (T, H, D)
    for t in range(T):
        first = max(0, t - window + 1) if window else 0
        for h in range(H):
            shared = h // (H // K)
            scores = k[first : t + 1, shared] @ q[t, h] * scale  # (keys,)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[t, h] = scores.softmax(0) @ v[first : t + 1, shared]  # (D,)
    return out
