"""The KV cache: keys and values of every token so far, so that a new token costs one row of work, not all.

Storage is static, (B, S, K, D) per layer with S fixed at the start: nothing is concatenated or moved while decoding.
**A token's slot is its position.** Rows of different lengths therefore need no left padding: row b simply continues at
slot lengths[b], overwriting whatever padding the prefill left there, and a query sees slots <= its own position.

Bytes: 2 * L * K * D * element size a token; 112 KiB for Qwen3-0.6B in bf16.

Lesson: lessons/04_sampling_and_cache.md       Tests: tests/test_rollout.py
"""

import torch
from torch import Tensor

from nanogspo.families import ModelConfig


class KVCache:
    """Keys and values per layer, how long each row is, and how far any row may reach."""

    def __init__(self, config: ModelConfig, rows: int, capacity: int, *, device, dtype: torch.dtype):
        shape = (rows, capacity, config.num_kv_heads, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]  # (B, S, K, D)
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]  # (B, S, K, D)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,) valid slots of each row
        self.extent = 0  # slots in use by the longest row; a Python int, so that reading it never waits for a GPU

    @property
    def capacity(self) -> int:
        return self.k[0].shape[1]

    def reserve(self, T: int) -> None:
        """Announce T more tokens a row. ValueError when the longest row would not fit."""
        if self.extent + T > self.capacity:
            raise ValueError(f"got {self.extent} + {T} tokens for a cache of {self.capacity}, want a larger capacity")
        self.extent += T

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) at their positions (B, T); return all (B, extent, K, D) of that layer."""
        row = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1)
        self.k[layer][row, positions] = k
        self.v[layer][row, positions] = v
        return self.k[layer][:, : self.extent], self.v[layer][:, : self.extent]

    def rows(self, index: Tensor) -> "KVCache":
        """A cache with row index[i] as its row i. Repeats spread a prefilled prompt over its group; gaps drop rows."""
        new = object.__new__(KVCache)
        new.k = [k[index] for k in self.k]
        new.v = [v[index] for v in self.v]
        new.lengths, new.extent = self.lengths[index], self.extent
        return new
