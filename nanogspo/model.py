"""The one transformer. Llama, Qwen 2.5, Qwen 3, Gemma 1, 2 and 3 are settings of it (families.py), not copies of it.

    x = embed_tokens[tokens] (* sqrt(C))
    x = x + post?(attention(norm(x)))          for every layer
    x = x + post?(mlp(norm(x)))
    hidden = norm(x);   logits = cap(hidden @ head.T)

Reading order: RMSNorm, inverse_frequencies, attend, Attention, MLP, Block, Transformer. What norm, rotation and gate
compute stands in kernels/ (rms_norm.py, rope.py, glu.py): plain torch on a CPU, Triton on a GPU.
Modules carry the checkpoint's names (self_attn.q_proj, mlp.gate_proj, input_layernorm), so loading is a loop
(checkpoint.py) and LoRA targets read like everybody else's.

`forward` stops at the hidden state. Training never asks for logits of a whole batch: at V = 151,936 they are 608 KB a
token in fp32. kernels/seq_logprob.py takes the hidden state and the head instead.

Left out: dropout, mixture of experts and gated DeltaNet (Block chooses its mixer and its MLP in one line each, where
they will go), encoder parts.

Lessons: lessons/01_one_transformer.md, 02_gqa_rope_softcap.md       Tests: tests/test_model.py
Letters: B rows, T positions, S keys, C width, H query heads, K key/value heads, D head width, F MLP width,
V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Segments, attention
from kernels.backend import bf16_products
from kernels.blocked import Blocked, Layer, can_block, can_block_head
from kernels.glu import glu
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from nanogspo.cache import KVCache
from nanogspo.families import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x), then a learned scale. Two rounding orders, one flag.

    Llama and Qwen round to the model dtype and then multiply by w; Gemma multiplies by (1 + w) in fp32 and rounds last.
    In bf16 swapping them moves logits by about 1e-2, and (1 + w) itself is not representable near w = 0.001.
    """

    def __init__(self, width: int, eps: float, plus_one: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, plus_one=self.plus_one)  # (..., width)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its norm: (norm, sum). On a GPU one pass over memory instead of two."""
        return add_rms_norm(x, delta, self.weight, eps=self.eps, plus_one=self.plus_one)  # (..., width) twice


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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
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


class Projections(nn.Module):
    """A module with linear layers, some of which read the same x: PRODUCTS names them, those of one x together.

    While answers are sampled they work together, and so do their adapters: on a CPU with bf16 weights as one product
    (kernels/blocked.py), else with one product for the first half of all adapters (lora.py). Otherwise they are what
    they are: a layer each.
    """

    PRODUCTS: tuple[tuple[str, ...], ...] = ()

    def __init__(self):
        super().__init__()
        self._together: dict[tuple[str, ...], Any] = {}  # Blocked or lora.Adapters: something with .linear(x)

    def project(self, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
        """What the layers of these names make of x (..., in): (..., out) each."""
        if names in self._together and not torch.is_grad_enabled():
            return self._together[names].linear(x)
        return [getattr(self, name)(x) for name in names]

    def blockable(self) -> Iterator[tuple[tuple[str, ...], list[Layer]]]:
        """The layers of one x that can be one product here, and their names."""
        for names in self.PRODUCTS:
            layers = [dense_layer(getattr(self, name)) for name in names]
            if all(layer is not None and can_block(layer.weight) for layer in layers):
                yield names, layers

    def join(self, dtype: torch.dtype) -> None:
        """Lay out weights and adapters for few rows of the model's dtype. Updates do not reach these copies, which
        `part` drops."""
        self._together = {names: Blocked(layers) for names, layers in self.blockable()}
        for names in set(self.PRODUCTS) - set(self._together):
            layers = [getattr(self, name) for name in names]
            adapted = [layer for layer in layers if hasattr(layer, "together")]  # lora.py stands above this file
            if adapted and (together := adapted[0].together(layers, dtype)):
                self._together[names] = together

    def part(self) -> None:
        self._together = {}


def dense_layer(layer: nn.Module) -> Layer | None:
    """The matrices of a linear layer and of its adapter; None where they are packed in 4 or 8 bits."""
    if type(layer) is nn.Linear:
        return Layer(layer.weight, layer.bias)
    return layer.dense() if hasattr(layer, "dense") else None


class Attention(Projections):
    INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
    PRODUCTS = (INPUTS, OUTPUT)

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.config, self.layer = config, layer
        self.window = config.sliding_window if config.layer_types[layer] == "sliding" else 0
        self.q_proj = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps, config.norm_plus_one)
            self.k_norm = RMSNorm(D, config.norm_eps, config.norm_plus_one)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask, cache: KVCache | None, segments: Segments | None):
        config, (B, T, _) = self.config, x.shape
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)) for y in self.project(self.INPUTS, x))  # (B, T, H or K, D)
        q, k = rope(q, k, cos, sin, **self._head_norms())  # (B, T, H, D), (B, T, K, D)
        settings = {"scale": config.attn_scale, "softcap": config.attn_softcap or None, "window": self.window}
        if segments is not None:
            if cache is not None:
                cache.prefill(self.layer, k[0], v[0])
            out = attention(q[0], k[0], v[0], segments, **settings)[None]  # (1, T, H, D)
        elif cache is not None:
            out = cache.attend(self.layer, q[0], k[0], v[0], **settings)[None]  # (1, T, H, D)
        else:
            out = attend(q, k, v, mask, config.attn_scale, config.attn_softcap)  # (B, T, H, D)
        [out] = self.project(self.OUTPUT, out.reshape(B, T, -1))
        return out  # (B, T, C)

    def _head_norms(self) -> dict:
        """Qwen 3 and Gemma 3 normalise every head before it is turned; rope does both at once."""
        if not self.config.qk_norm:
            return {}
        norm = self.q_norm
        return {"q_weight": norm.weight, "k_weight": self.k_norm.weight, "eps": norm.eps, "plus_one": norm.plus_one}


class MLP(Projections):
    """down(act(gate(x)) * up(x)): SwiGLU, or GeGLU with the tanh approximation of GELU for Gemma."""

    INPUTS, OUTPUT = ("gate_proj", "up_proj"), ("down_proj",)
    PRODUCTS = (INPUTS, OUTPUT)

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(C, F_, bias=bias)
        self.up_proj = nn.Linear(C, F_, bias=bias)
        self.down_proj = nn.Linear(F_, C, bias=bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(self.INPUTS, x)  # (B, T, F) each
        [out] = self.project(self.OUTPUT, glu(gate, up, activation=self.activation))
        return out  # (B, T, C)


class Block(nn.Module):
    """One layer. Its last sum could be fused with the next block's norm, for a second tensor kept between the two."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.norm_eps, config.norm_plus_one)  # noqa: E731
        self.post_norms = config.post_norms
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        # the same name, two places: before the MLP in Llama and Qwen, after the attention in Gemma 2 and 3
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(x), *attention_arguments)  # (B, T, C)
        if not self.post_norms:
            h, x = self.post_attention_layernorm.add(x, mixed)  # (B, T, C) twice
            return x + self.mlp(h)
        h, x = self.pre_feedforward_layernorm.add(x, self.post_attention_layernorm(mixed))  # (B, T, C) twice
        return x + self.post_feedforward_layernorm(self.mlp(h))


class Transformer(nn.Module):
    """A decoder: token ids in, final hidden states out; `logits` turns hidden states into scores.

    gradient_checkpointing  keep only each block's input for the backward pass and recompute the rest
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._blocked_head: Blocked | None = None
        # filled by `load` or `init_weights`: the usual normal_ on the meta device imports 800 modules, a second long
        rows = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=rows)  # (V, C)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_plus_one)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): what hidden states are multiplied with to give logits."""
        return self.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def init_weights(self, seed: int, std: float = 0.02) -> "Transformer":
        """Random weights for a model that is trained from nothing: matrices N(0, std^2), biases 0, norms left as built.

        The two matrices that write into the residual stream are scaled by 1/sqrt(2 L), so that its variance does not
        grow with depth (GPT-2's rule).
        """
        generator = torch.Generator().manual_seed(seed)
        residual = std / math.sqrt(2 * self.config.num_layers)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                p.data.normal_(
                    0.0, residual if name.endswith(("o_proj.weight", "down_proj.weight")) else std, generator=generator
                )
            elif name.endswith(".bias"):
                p.data.zero_()
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Final hidden states, normalised, ready for `logits` or for kernels/seq_logprob.py.

        tokens     (B, T) int64. Rows may be padded on the right with any id: attention is causal, so what stands
                   behind a row's end cannot reach what stands before it
        positions  (B, T) int64, RoPE position of each token; default 0 .. T - 1, or what segments or the cache say
        segments   Segments of T tokens: the one row (B = 1) is packed, and these say who sees whom and where they stand
        cache      KVCache. With segments: the prompts it was made for, to be stored. Without: T tokens (B = 1), the
                   next one of each of its rows; they are stored and see all that came before them
        returns    (B, T, C) in the model's dtype

        Raises ValueError for segments or a cache with several rows, and for a cache that is full or meets gradients.
        """
        config, T = self.config, tokens.shape[1]
        if (segments or cache) and len(tokens) != 1:
            raise ValueError(f"got {len(tokens)} rows with segments or a cache, want one packed row")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("got a cache and gradients, want one of them: it keeps no graph; use torch.no_grad()")
        if segments is not None:
            order = segments.positions[None]  # (1, T)
        elif cache is not None:
            order = cache.step()[None]  # (1, T)
        else:
            order = torch.arange(T, device=tokens.device)[None]  # (1, T)
        positions = order if positions is None else positions  # (B or 1, T)
        x = self.embed_tokens(tokens)  # (B, T, C)
        if (
            config.scale_embedding
        ):  # sqrt(C) is rounded to the weight dtype first: 50.5, not 50.596, for C = 2560 in bf16
            x = x * x.new_full((), config.hidden_size**0.5)
        turns = {kind: self._cos_sin(kind, positions, x.dtype) for kind in config.rope}
        masks = {kind: None if segments or cache else self._mask(kind, order) for kind in config.rope}
        for kind, block in zip(config.layer_types, self.layers, strict=True):
            arguments = (x, *turns[kind], masks[kind], cache, segments)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32, final soft-cap applied.

        16-bit weights are widened a slice of rows at a time: products of two bf16 numbers are exact in fp32, so only
        the order of summation rounds, and no fp32 copy of the whole head is ever held. Rounding the scores to bf16
        instead would move a log-prob by 1e-2, thirty times GSPO's clip range.
        """
        weight = self.head_weight
        if self._blocked_head is not None and not torch.is_grad_enabled():
            [z] = self._blocked_head.linear(hidden.float())  # (..., V)
        elif weight.dtype == torch.float32:
            z = F.linear(hidden.float(), weight)  # (..., V)
        elif hidden.is_cuda:
            flat = hidden.reshape(-1, hidden.shape[-1])
            z = torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
        else:
            with bf16_products(weight.dtype == hidden.dtype == torch.bfloat16):
                z = torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(HEAD_ROWS)], dim=-1)
        cap = self.config.final_softcap
        return cap * torch.tanh(z / cap) if cap else z

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it, and without gradients, layers that read the same x work together (Projections), and products read
        weights in blocks where that is faster: bf16 weights on a CPU with bf16 units. The head becomes fp32, because
        its scores are; also where it is fp16, or units are missing.

        For Qwen3-0.6B in bf16 a CPU's copies are 0.9 and 0.6 GB, a GPU's those of the adapter, 20 MB. Updates of the
        weights do not reach them.
        """
        modules = [m for m in self.layers.modules() if isinstance(m, Projections)]
        try:
            for module in modules:
                module.join(self.norm.weight.dtype)
            if can_block_head(self.head_weight):
                self._blocked_head = Blocked([Layer(self.head_weight.float())])
            yield
        finally:
            for module in modules:
                module.part()
            self._blocked_head = None

    def _cos_sin(self, kind: str, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B or 1, T, 1, rotary_dim) each; the angle is fp32, only its cos and sin are rounded to the model dtype."""
        f, magnitude = inverse_frequencies(self.config.rope[kind], self.config.rotary_dim, positions.device)
        angle = positions[..., None].float() * f  # (B, T, rotary_dim / 2)
        angle = torch.cat((angle, angle), dim=-1)[:, :, None]  # (B, T, 1, rotary_dim)
        return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)

    def _mask(self, kind: str, order: Tensor) -> Tensor | None:
        """(1, 1, T, T) bool from 0 .. T - 1 (1, T): keys at or before the query, and for sliding layers at most
        window - 1 back. None where plain causal attention says the same, which lets the fused kernel skip the mask."""
        window = self.config.sliding_window if kind == "sliding" else 0
        if not window or order.shape[1] <= window:
            return None
        query, key = order[..., None], order[:, None]  # (1, T, 1), (1, 1, T)
        return ((key <= query) & (key > query - window))[:, None]


# Rows of the head widened to fp32 at a time: 4096 x 1024 x 4 bytes = 16 MB, small beside the model, large beside a call
HEAD_ROWS = 4096
