"""The one transformer. Llama, Qwen 2.5, Qwen 3, Gemma 1, 2 and 3 are settings of it (families.py), not copies of it.

    x = embed_tokens[tokens] (* sqrt(C))
                  +----------------------------------------+----------------------+
    for a layer:  x -> norm -> attention -> post norm? -> (+) -> norm -> MLP -> post norm? -> (+) -> x
    hidden = norm(x);   logits = cap(hidden @ head.T)

Reading order: RMSNorm, Attention, MLP, Block, Transformer. What norm, rotation and gate compute is in kernels/
(rms_norm.py, rope.py, glu.py): plain torch on a CPU, Triton on a GPU. Two things are arguments of every layer:

    layout    how tokens attend to each other: dense rows, a packed row, or a cache (layouts.py; forward chooses it)
    linear    how the linear layers that share an input are multiplied: here each by itself (`separate`); a rollout
              passes fused ones (fast/fused_linear.py)

Modules carry the checkpoint's names (self_attn.q_proj, mlp.gate_proj, input_layernorm), so loading is a loop
(checkpoint.py) and LoRA targets read like everybody else's.

`forward` stops at the hidden state. Training never asks for logits of a whole batch: at V = 151,936 they are 608 KB a
token in fp32. kernels/seq_logprob.py takes the hidden state and the head instead.

Instead of attention a layer may have gated DeltaNet (layers/delta_net.py), instead of an MLP a mixture of experts
(layers/moe.py).

Left out: dropout, encoder parts.

Lessons: lessons/01_one_transformer.md, 02_gqa_rope_softcap.md       Tests: tests/test_model.py
Letters: B rows, T positions, C width, H query heads, K key/value heads, D head width, F MLP width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Segments
from kernels.backend import bf16_products
from kernels.glu import glu
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope
from nanogspo.cache import KVCache
from nanogspo.families import ModelConfig
from nanogspo.layers.delta_net import DeltaNet
from nanogspo.layers.moe import MoE
from nanogspo.layers.rope import cos_sin
from nanogspo.layouts import choose

# (module, names of its linear layers that read x, x (..., in)) -> (..., out) of each
Linear = Callable[[nn.Module, tuple[str, ...], Tensor], Sequence[Tensor]]


def separate(module: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """Each linear layer on its own: training, scoring, and whatever needs gradients."""
    return [getattr(module, name)(x) for name in names]


class RMSNorm(nn.Module):
    """x / rms(x), then a learned scale. Two rounding orders, one flag.

    Llama and Qwen round to the model dtype and then multiply by w; Gemma multiplies by (1 + w) in fp32 and rounds last.
    In bf16 swapping them moves logits by about 1e-2, and 1 + 0.001 rounds to 1.
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


class Attention(nn.Module):
    INPUTS, OUTPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)  # linear layers that read the same x

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.layer, self.head_dim = layer, D
        window = config.sliding_window if config.layer_types[layer] == "sliding" else 0
        self.settings = {"scale": config.attn_scale, "softcap": config.attn_softcap or None, "window": window}
        self.gated = config.gated_attention  # q_proj makes two vectors a head: the query, and a gate for the output
        self.q_proj = nn.Linear(C, H * D * (2 if self.gated else 1), bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps, config.norm_plus_one)
            self.k_norm = RMSNorm(D, config.norm_eps, config.norm_plus_one)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout, linear: Linear) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in linear(self, self.INPUTS, x))  # (B, T, H or K, D)
        if self.gated:
            q, gate = q[:, :, 0::2], q[:, :, 1::2]  # (B, T, H, D) each
        q, k = rope(q, k, cos, sin, **self._head_norms())  # (B, T, H, D), (B, T, K, D)
        out = layout.attend(self.layer, q, k, v, **self.settings)  # (B, T, H, D)
        if self.gated:
            out = out * gate.sigmoid()
        [out] = linear(self, self.OUTPUT, out.flatten(2))
        return out  # (B, T, C)

    def _head_norms(self) -> dict:
        """Qwen 3 and Gemma 3 normalise every head before it is turned; rope does both at once."""
        if not self.qk_norm:
            return {}
        norm = self.q_norm
        return {"q_weight": norm.weight, "k_weight": self.k_norm.weight, "eps": norm.eps, "plus_one": norm.plus_one}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, or GeGLU with the tanh approximation of GELU for Gemma."""

    INPUTS, OUTPUT = ("gate_proj", "up_proj"), ("down_proj",)

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        C, F_, bias = config.hidden_size, width, config.mlp_bias
        self.gate_proj = nn.Linear(C, F_, bias=bias)
        self.up_proj = nn.Linear(C, F_, bias=bias)
        self.down_proj = nn.Linear(F_, C, bias=bias)
        self.activation = config.activation

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        gate, up = linear(self, self.INPUTS, x)  # (B, T, F) each
        [out] = linear(self, self.OUTPUT, glu(gate, up, activation=self.activation))
        return out  # (B, T, C)


MIXERS = {
    "full": ("self_attn", Attention),
    "sliding": ("self_attn", Attention),
    "linear": ("linear_attn", DeltaNet),  # layers/delta_net.py
}


class Block(nn.Module):
    """One layer: each half reads norm(x) and adds to x.

    The last sum could be fused with the next block's norm; blocks would then pass two tensors.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.norm_eps, config.norm_plus_one)  # noqa: E731
        self.post_norms = config.post_norms
        self.mixer, mixer = MIXERS[config.layer_types[layer]]  # under the name that the checkpoint has for it
        setattr(self, self.mixer, mixer(config, layer))
        mlp = functools.partial(MLP, config)
        self.mlp = MoE(config, mlp) if any(config.moe_layers[layer : layer + 1]) else mlp(config.intermediate_size)
        self.input_layernorm = norm()
        # the same name, two places: before the MLP in Llama and Qwen, after the attention in Gemma 2 and 3
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout, linear: Linear) -> Tensor:
        mixed = getattr(self, self.mixer)(self.input_layernorm(x), cos, sin, layout, linear)  # (B, T, C)
        if not self.post_norms:
            h, x = self.post_attention_layernorm.add(x, mixed)  # (B, T, C) twice
            return x + self.mlp(h, linear)
        h, x = self.pre_feedforward_layernorm.add(x, self.post_attention_layernorm(mixed))  # (B, T, C) twice
        return x + self.post_feedforward_layernorm(self.mlp(h, linear))


class Transformer(nn.Module):
    """A decoder: token ids in, final hidden states out; `logits` turns hidden states into scores.

    gradient_checkpointing  keep only each block's input for the backward pass and recompute the rest
    prepack                 sampling on a CPU may copy weights into the order it reads fastest (fast/fused_linear.py)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.prepack = True
        # filled by `load` or `init_weights`: nn.Embedding's own start imports 800 modules, for a second
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

        The matrices that write into the residual stream are scaled by 1/sqrt(2 L), so that its variance does not
        grow with depth (GPT-2's rule).
        """
        generator = torch.Generator().manual_seed(seed)
        residual = std / math.sqrt(2 * self.config.num_layers)
        for name, p in self.named_parameters():
            if name.endswith("conv1d.weight"):  # (channels, 1, W), torch's own start
                p.data.uniform_(-(p.shape[2] ** -0.5), p.shape[2] ** -0.5, generator=generator)
            elif p.ndim >= 2:
                p.data.normal_(0.0, residual if name.endswith(RESIDUAL) else std, generator=generator)
            elif name.endswith(".bias"):
                p.data.zero_()
        return self

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        linear: Linear = separate,
    ) -> Tensor:
        """Final hidden states, normalised, ready for `logits` or for kernels/seq_logprob.py.

        tokens     (B, T) int64. Rows may be padded on the right with any id: attention is causal, so real tokens
                   never see the padding behind them
        positions  (B, T) int64, RoPE position of each token; default 0 .. T - 1, or what segments or the cache say
        segments   Segments of T tokens: the one row (B = 1) is packed, and these say who sees whom and where they stand
        cache      KVCache. With segments: the prompts it was made for, to be stored. Without: (1, n), one new
                   token for each of its n rows; they are stored and see all that came before them
        linear     how the linear layers that share an input are multiplied
        returns    (B, T, C) in the model's dtype

        Raises ValueError for segments or a cache with B > 1, and for a cache that is full or meets gradients.
        """
        config, layout = self.config, choose(tokens, segments, cache)
        positions = layout.positions if positions is None else positions  # (B or 1, T)
        x = self.embed_tokens(tokens)  # (B, T, C)
        if config.scale_embedding:  # sqrt(C) rounded to the weights' dtype first: 50.5, not 50.596, at C = 2560 in bf16
            x = x * x.new_full((), config.hidden_size**0.5)
        turns = {kind: cos_sin(config.rope[kind], config.rotary_dim, positions, x.dtype) for kind in config.rope}
        for kind, block in zip(config.layer_types, self.layers, strict=True):
            arguments = (x, *turns.get(kind, (None, None)), layout, linear)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) float32, final soft-cap applied.

        A CPU widens 16-bit weights a slice of rows at a time: products of two bf16 numbers are exact in fp32, so only
        the order of summation rounds, and no fp32 copy of the whole head is ever held. Rounding the scores to bf16
        instead would move a log-prob by 1e-2, thirty times GSPO's clip range.
        """
        weight = self.head_weight
        if weight.dtype == torch.float32:
            z = F.linear(hidden.float(), weight)  # (..., V)
        elif hidden.is_cuda:
            flat = hidden.reshape(-1, hidden.shape[-1])
            z = torch.mm(flat, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
        else:
            with bf16_products(weight.dtype == hidden.dtype == torch.bfloat16):
                z = torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(HEAD_ROWS)], dim=-1)
        return self.cap(z)

    def cap(self, z: Tensor) -> Tensor:
        """The final soft-cap of Gemma 2 on logits (..., V)."""
        cap = self.config.final_softcap
        return cap * torch.tanh(z / cap) if cap else z


RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight")  # what writes into the residual stream
# Rows of the head widened to fp32 at a time: 4096 x 1024 x 4 bytes = 16 MB, small beside the model, large beside a call
HEAD_ROWS = 4096
