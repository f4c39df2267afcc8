"""How the tokens of one forward pass attend to each other. The model asks its layout and knows nothing else about it.

    Dense     B rows of T tokens, each row causal by itself            plain torch; what lessons and tests compare with
    Packed    one row of many sequences, each for itself               training and scoring (kernels/attention.py)
    Prefill   Packed, and keys and values go into the cache            the prompts of a rollout
    Decode    one new token for each row of a cache                    sampling (kernels/decode_attention.py)

Each has `positions` (B or 1, T), the RoPE position of every token, and

    attend(layer, q, k, v, *, scale, softcap, window) -> (B, T, H, D)
        layer    number of the layer that asks
        q        (B, T, H, D);  k, v (B, T, K, D), all turned by RoPE already
        softcap  None for none;  window  keys a query sees, itself included; 0 for all

and for gated DeltaNet layers (layers/delta_net.py), which pass a token's predecessors by in a convolution and a memory,

    convolve(layer, x, weight) -> (B, T, channels)        x of the same shape; weight (channels, 1, W)
    recur(layer, q, k, v, g, beta) -> (B, T, V, dv) fp32  kernels/delta_rule.py, with B, T for its S

Lessons: lessons/02_gqa_rope_softcap.md, 13_packing.md       Tests: tests/test_layouts.py
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Segments, attention
from kernels.delta_rule import delta_rule, delta_rule_step
from nanogspo.cache import KVCache
from nanogspo.layers.delta_net import causal_conv, causal_conv_step, last_inputs


class _Rows:
    """Layouts that have the tokens of all sequences at once, as segments."""

    segments: Segments

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        return causal_conv(x.flatten(0, 1), weight, self.segments).view_as(x)  # (B, T, channels)

    def recur(self, layer: int, *inputs: Tensor) -> Tensor:
        out, state = delta_rule(*(x.flatten(0, 1) for x in inputs), self.segments)  # (B * T, V, dv), (n, V, dk, dv)
        self._keep(layer, state)
        return out.unflatten(0, inputs[0].shape[:2])  # (B, T, V, dv)

    def _keep(self, layer: int, state: Tensor) -> None:
        """Nothing reads a memory after the last token, unless a cache does."""


class Dense(_Rows):
    def __init__(self, tokens: Tensor):
        self._shape = tokens.shape
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        self._masks: dict[int, Tensor | None] = {}  # by window: layers share them

    @functools.cached_property
    def segments(self) -> Segments:
        B, T = self._shape
        return Segments.build([T] * B, device=self.positions.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, window: int
    ) -> Tensor:
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return attend(q, k, v, self._masks[window], scale, softcap)  # (B, T, H, D)

    def _mask(self, window: int) -> Tensor | None:
        """(1, 1, T, T) bool: keys at or before the query, at most window - 1 back. None where that is plain causal
        attention, so that the fused kernel needs no mask."""
        query, key = self.positions[..., None], self.positions[:, None]  # (1, T, 1), (1, 1, T)
        if not window or query.shape[1] <= window:
            return None
        return ((key <= query) & (key > query - window))[:, None]


class Packed(_Rows):
    def __init__(self, segments: Segments):
        self.segments, self.positions = segments, segments.positions[None]  # (1, T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
        q, k, v = (x.squeeze(0) for x in (q, k, v))  # (T, heads, D); x[0] would copy its whole gradient in backward
        return attention(q, k, v, self.segments, **settings)[None]  # (1, T, H, D)


class Prefill(Packed):
    def __init__(self, segments: Segments, cache: KVCache):
        super().__init__(segments)
        self.cache = cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
        self.cache.prefill(layer, k[0], v[0])
        return super().attend(layer, q, k, v, **settings)  # (1, T, H, D)

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        tail = last_inputs(x[0], weight.shape[2] - 1, self.segments)  # (P, channels, W - 1)
        self.cache.layers[layer].tail = tail[self.cache.prompt]  # (N, channels, W - 1)
        return super().convolve(layer, x, weight)

    def _keep(self, layer: int, state: Tensor) -> None:
        self.cache.layers[layer].state = state[self.cache.prompt]  # (N, V, dk, dv)


class Decode:
    def __init__(self, cache: KVCache):
        self.cache, self.positions = cache, cache.advance()[None]  # (1, N)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
        return self.cache.attend(layer, q[0], k[0], v[0], **settings)[None]  # (1, N, H, D)

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        return causal_conv_step(x[0], weight, self.cache.layers[layer].tail)[None]  # (1, N, channels)

    def recur(self, layer: int, *inputs: Tensor) -> Tensor:
        return delta_rule_step(*(x[0] for x in inputs), self.cache.layers[layer].state)[None]  # (1, N, V, dv)


def choose(tokens: Tensor, segments: Segments | None, cache: KVCache | None) -> Dense | Packed | Prefill | Decode:
    """The layout that the arguments of Transformer.forward ask for.

    Raises ValueError for segments or a cache with several rows, and for a cache that is full or meets gradients.
    """
    if segments is None and cache is None:
        return Dense(tokens)
    if len(tokens) != 1:
        raise ValueError(f"got {len(tokens)} rows with segments or a cache, want one packed row")
    if cache is None:
        return Packed(segments)
    if torch.is_grad_enabled():
        raise ValueError("got a cache and gradients, want one of them: it keeps no graph; use torch.no_grad()")
    return Decode(cache) if segments is None else Prefill(segments, cache)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Softmax attention, grouped queries: query head h reads key/value head h // (H // K).

        scores = cap(q . k * scale), masked;   out = softmax(scores) v

    q     (B, T, H, D);  k, v  (B, S, K, D)
    mask  (B or 1, 1, T, S) bool, True where a query may look; None means causal with T == S
    returns (B, T, H, D)

    With a soft-cap (Gemma 2) the scores have to be written out, because no fused attention applies tanh to them:
    order scale, / cap, tanh, * cap, mask, softmax in fp32, round to q's dtype, times v.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T or S, D)
    if not softcap:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)  # (B, T, H, D)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(2, 3) * scale  # (B, H, T, S)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite, so that a row of nothing is not NaN
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)
