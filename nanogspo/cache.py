"""The KV cache: keys and values of every token so far, so that a new token costs one row of work, not all.

    layers   a KeysValues for each attention layer of the model, a Recurrent for each gated DeltaNet layer
        prefix_k, prefix_v   (K, P, Sp, D)   the prompts, each once, however many answers are sampled to it
        k, v                 (K, N, Ss, D)   what each row (each answer) has added

Sp and Ss are fixed at the start: nothing is concatenated or moved while decoding. `advance` comes once a step, then
each layer's `attend`; `compact` drops finished rows. All rows that have not finished are equally long.
A step's numbers (which slot is written, how long rows are) are on the device and change in place, so that a CUDA graph
of one step is a graph of every step.

Bytes: 2 * L * K * D * element size a slot; 112 KiB for Qwen3-0.6B in bf16. A CPU keeps 16-bit numbers as fp32, which
changes none of them: widening them at every step would take it longer than reading twice the bytes.

Lesson: lessons/04_sampling_and_cache.md       Tests: tests/test_cache.py
"""

import functools

import torch
from torch import Tensor

from kernels.attention import Segments
from kernels.decode_attention import DecodePlan, decode_attention
from nanogspo.families import ModelConfig


class KeysValues:
    """What one attention layer remembers.

    prompts, longest   prompts and slots of the longest
    rows, capacity     answers and slots that each can fill
    """

    def __init__(self, shape: tuple[int, int], prompts: int, longest: int, rows: int, capacity: int, **kind):
        K, D = shape
        self.prefix_k, self.prefix_v = (torch.empty(K, prompts, longest, D, **kind) for _ in range(2))  # (K, P, Sp, D)
        self.k, self.v = (torch.empty(K, rows, capacity, D, **kind) for _ in range(2))  # (K, N, Ss, D)

    def prefill(self, prompt: Tensor, slot: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (S, K, D) of a packed row of prompts; prompt, slot (S,): where each token belongs."""
        for storage, x in ((self.prefix_k, k), (self.prefix_v, v)):
            storage[:, prompt, slot] = x.transpose(0, 1).to(storage.dtype)  # (K, S, D)

    def append(self, slot: int | Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (N, K, D) of a new token a row. slot: a tensor (1,) where a CUDA graph has to find it; an int
        takes a CPU a half to a third of the time."""
        for storage, x in ((self.k, k.transpose(0, 1)), (self.v, v.transpose(0, 1))):  # (K, N, D)
            if isinstance(slot, int):
                storage[:, :, slot] = x
            else:
                storage.index_copy_(2, slot, x.unsqueeze(2))

    def compact(self, rows: Tensor, used: int) -> None:
        """Keep these rows (n,) and their first `used` slots. A tensor at a time: never twice the cache."""

        def kept(x: Tensor) -> Tensor:
            new = x.new_empty((x.shape[0], len(rows), *x.shape[2:]))  # (K, n, Ss, D)
            new[:, :, :used] = x[:, :, :used].index_select(1, rows)
            return new

        self.k = kept(self.k)
        self.v = kept(self.v)


class Recurrent:
    """What one gated DeltaNet layer remembers of each row, whatever its length. Prefill puts it there, a copy of its
    prompt's for each row; steps change it in place.

    tail   (N, channels, W - 1)   what the convolution has seen last, model dtype
    state  (N, V, dk, dv) fp32    the memory of kernels/delta_rule.py
    """

    tail: Tensor
    state: Tensor

    def compact(self, rows: Tensor, used: int) -> None:
        """Keep these rows (n,)."""
        self.tail, self.state = self.tail[rows], self.state[rows]


class KVCache:
    """Keys and values of P prompts and of group_size rows to each, prompt-major.

    prompts     the packed row of prompts that `Transformer.forward` will prefill: a segment each
    capacity    tokens that a row can add
    dtype       the model's
    capturable  attribute: the step's slot is read on the device alone, as a CUDA graph needs it

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
        self.active = torch.ones_like(self.prompt)  # (N,) 1, or 0 where a row has finished and reads nothing any more
        self.slot = torch.full((1,), -1, device=device)  # the newest token's
        self.extent, self.capacity = 0, capacity  # slots in use as a Python number: reading it never waits for a GPU
        self.capturable = False  # the rollout asks the cache that is made (fast/cuda_graph.py)
        segment = torch.arange(P, device=device).repeat_interleave(self.prefix_lengths)  # (S,)
        self._prefill_at = (segment, prompts.positions)  # where each token of the packed row belongs
        shape, longest, room = (config.num_kv_heads, config.head_dim), max(prompts.lengths), (P * group_size, capacity)
        self.layers = [
            Recurrent() if kind == "linear" else KeysValues(shape, P, longest, *room, device=device, dtype=dtype)
            for kind in config.layer_types
        ]
        self._plans: dict[int, DecodePlan] = {}

    def prefill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v (S, K, D) of the packed row of prompts, in the order it was made for."""
        self.layers[layer].prefill(*self._prefill_at, k, v)

    def advance(self) -> Tensor:
        """Announce one more token a row: the position (N,) of each. ValueError when there is no slot left."""
        self.advance_host()
        positions = self.prefix_lengths[self.prompt] + self.lengths  # (N,)
        self.lengths += self.active
        self.slot += 1
        return positions

    def advance_host(self) -> None:
        """The part of `advance` that happens in Python; a CUDA graph repeats the rest."""
        if self.extent == self.capacity:
            raise ValueError(f"got token {self.extent + 1} for a cache of {self.capacity} a row, want more capacity")
        self.extent, self._plans = self.extent + 1, {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, window: int
    ) -> Tensor:
        """Store the newest token's k, v (N, K, D); what its q (N, H, D) finds among all tokens of its row. (N, H, D)"""
        kept = self.layers[layer]
        kept.append(self.slot if self.capturable else self.extent - 1, k, v)
        return decode_attention(
            q,
            kept.prefix_k,
            kept.prefix_v,
            self.prefix_lengths,
            kept.k,
            kept.v,
            self.lengths,
            self.prompt,
            scale=scale,
            softcap=softcap,
            window=window,
            plan=functools.partial(self._plan, window),
        )

    def _plan(self, window: int) -> DecodePlan:
        """What the layers of a step have in common, for the backend that needs it."""
        if window not in self._plans:
            self._plans[window] = DecodePlan.build(self.prompt, self.prefix_lengths, self.lengths, window=window)
        return self._plans[window]

    def mark_finished(self, ends: Tensor) -> None:
        """Rows (N,) bool that are done read nothing any more, until `compact` drops them. For the Triton kernel: the
        plans of the other one have no rows without a slot."""
        self.active.masked_fill_(ends, 0)
        self.lengths *= self.active

    def compact(self, rows: Tensor) -> None:
        """Drop all rows but these (n,) int64, in rising order. The prompts stay."""
        for layer in self.layers:
            layer.compact(rows, self.extent)
        self.prompt, self.lengths, self.active = self.prompt[rows], self.lengths[rows], self.active[rows]
        self._plans = {}
