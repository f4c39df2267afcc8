"""The KV cache: keys and values of every token so far, so that a new token costs one row of work, not all.

    prefix   (K, P, Sp, D)   the prompts, each once, however many answers are sampled to it
    suffix   (K, N, Ss, D)   what each row (each answer) has added; all rows that have not finished are equally long

Sp and Ss are fixed at the start: nothing is concatenated or moved while decoding. A row that has finished leaves.
A step's numbers (which slot is written, how long rows are) lie on the device and change in place, so that a CUDA graph
of one step is a graph of every step.

Bytes: 2 * L * K * D * element size a slot; 112 KiB for Qwen3-0.6B in bf16. A CPU keeps 16-bit numbers as fp32, which
changes none of them: widening them at every step would take it longer than reading twice the bytes.

Lesson: lessons/04_sampling_and_cache.md       Tests: tests/test_cache.py
"""

import torch
from torch import Tensor

from kernels.attention import Segments
from kernels.decode_attention import Plan, choose_backend, decode_attention
from nanogspo.families import ModelConfig


class KVCache:
    """Keys and values of P prompts and of group_size rows to each, prompt-major.

    prompts   the packed row of prompts that `Transformer.forward` will prefill: a segment each
    capacity  tokens that a row can add
    dtype     the model's

    Raises ValueError for segments that have a prefix themselves.
    """

    def __init__(self, config: ModelConfig, prompts: Segments, group_size: int, capacity: int, *, dtype: torch.dtype):
        if any(parent >= 0 for parent in prompts.parents):
            raise ValueError(f"got segments with prefixes {prompts.parents}, want prompts, which have none")
        device, P = prompts.positions.device, len(prompts.lengths)
        dtype = torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype
        self.prefix_lengths = torch.tensor(prompts.lengths, device=device)  # (P,)
        self.prompt = torch.arange(P, device=device).repeat_interleave(group_size)  # (N,) never falls
        self.lengths = torch.zeros_like(self.prompt)  # (N,) slots that each row reads
        self.running = torch.ones_like(self.prompt)  # (N,) 1, or 0 where a row has finished and reads nothing any more
        self.slot = torch.full((1,), -1, device=device)  # the newest token's
        self.extent, self.capacity = 0, capacity  # slots in use as a Python number: reading it never waits for a GPU
        segment = torch.arange(P, device=device).repeat_interleave(self.prefix_lengths)  # (S,)
        self._prefill_at = (segment, prompts.positions)  # where each token of the packed row belongs

        def storage(rows: int, slots: int) -> list[Tensor]:
            shape = (config.num_kv_heads, rows, slots, config.head_dim)
            return [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

        longest = max(prompts.lengths)
        self.prefix_k, self.prefix_v = storage(P, longest), storage(P, longest)  # (K, P, Sp, D) a layer
        self.k, self.v = storage(P * group_size, capacity), storage(P * group_size, capacity)  # (K, N, Ss, D) a layer
        self._plans: dict[int, Plan] = {}

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v (S, K, D) of the packed row of prompts, in the order it was made for."""
        prompt, slot = self._prefill_at  # (S,), (S,)
        for storage, x in ((self.prefix_k[layer], k), (self.prefix_v[layer], v)):
            storage[:, prompt, slot] = x.transpose(0, 1).to(storage.dtype)  # (K, S, D)

    def step(self) -> Tensor:
        """Announce one more token a row: the position (N,) of each. ValueError when there is no slot left."""
        self.count()
        positions = self.prefix_lengths[self.prompt] + self.lengths  # (N,)
        self.lengths += self.running
        self.slot += 1
        return positions

    def finish(self, ends: Tensor) -> None:
        """Rows (N,) bool that are done read nothing any more, until `keep` drops them. For the Triton kernel: the plans
        of the other one have no rows without a slot."""
        self.running.masked_fill_(ends, 0)
        self.lengths *= self.running

    def count(self) -> None:
        """What a step does in Python. A CUDA graph repeats all the rest."""
        if self.extent == self.capacity:
            raise ValueError(
                f"got token {self.extent + 1} for a cache of {self.capacity} a row, want a larger capacity"
            )
        self.extent, self._plans = self.extent + 1, {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, window: int
    ) -> Tensor:
        """Store the newest token's k, v (N, K, D); what its q (N, H, D) finds among all tokens of its row. (N, H, D)"""
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # (K, N, D)
        if choose_backend(q, self.k[layer]) == "torch":  # it needs a Plan built on the host
            self.k[layer][:, :, self.extent - 1] = k  # (K, N, D)
            self.v[layer][:, :, self.extent - 1] = v  # (K, N, D)
            if window not in self._plans:
                self._plans[window] = Plan.build(self.prompt, self.prefix_lengths, self.lengths, window=window)
        else:  # a CUDA graph cannot count; on a CPU this takes two to three times as long
            self.k[layer].index_copy_(2, self.slot, k.unsqueeze(2))  # (K, N, 1, D)
            self.v[layer].index_copy_(2, self.slot, v.unsqueeze(2))  # (K, N, 1, D)
        return decode_attention(
            q,
            self.prefix_k[layer],
            self.prefix_v[layer],
            self.prefix_lengths,
            self.k[layer],
            self.v[layer],
            self.lengths,
            self.prompt,
            scale=scale,
            softcap=softcap,
            window=window,
            plan=self._plans.get(window),
        )

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (n,) int64, in rising order. The prompts stay."""

        def kept(x: Tensor) -> Tensor:
            new = x.new_empty((x.shape[0], len(rows), *x.shape[2:]))  # (K, n, Ss, D)
            new[:, :, : self.extent] = x[:, :, : self.extent].index_select(1, rows)
            return new

        for layer in range(len(self.k)):  # one at a time: never twice the cache
            self.k[layer] = kept(self.k[layer])
            self.v[layer] = kept(self.v[layer])
        self.prompt, self.lengths, self.running = self.prompt[rows], self.lengths[rows], self.running[rows]
        self._plans = {}
