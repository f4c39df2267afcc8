"""Gated DeltaNet: three of four layers of Qwen 3.5 and Qwen3-Next, in the place of attention.

    q, k, v = silu(conv(in_proj_qkv x))       beta = sigmoid(in_proj_b x)      z = in_proj_z x
    g = -exp(A_log) softplus(in_proj_a x + dt_bias)
    out = delta_rule(q / |q| / sqrt(dk), k / |k|, v, g, beta)                  kernels/delta_rule.py
    out_proj(rms_norm(out) * silu(z))

A layer remembers a matrix for each head and the last W - 1 inputs of its convolution, however long the sequence is.
Which tokens stand before which is for the layout to know (layouts.py): it convolves and it recurs. There is no RoPE
and no mask: order is in the fading of the memory, and in the convolution.

The order of roundings is transformers': the convolution, beta and the gate's product in the model's dtype, g, lengths
and the rule in fp32, the norm as in Llama.

Reading order: DeltaNet, causal_conv, causal_conv_step.
Lesson: lessons/17_delta_rule.md       Tests: tests/test_delta_net.py
Source: Gated Delta Networks, arXiv:2412.06464; transformers 5.23 modeling_qwen3_5.py.
Letters: B rows, T positions, S tokens of a packed row, C width, H key heads, V value heads, dk and dv their widths, W
taps of the convolution; channels = 2 H dk + V dv.
"""

from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Segments
from kernels.rms_norm import rms_norm
from nanogspo.families import ModelConfig


class DeltaNet(nn.Module):
    INPUTS, OUTPUT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), ("out_proj",)

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, H, V = config.hidden_size, config.linear_key_heads, config.linear_value_heads
        self.layer, self.key_dim, self.value_dim = layer, config.linear_key_dim, config.linear_value_dim
        self.sizes = H * self.key_dim, H * self.key_dim, V * self.value_dim
        channels = sum(self.sizes)
        self.in_proj_qkv = nn.Linear(C, channels, bias=False)
        self.in_proj_z = nn.Linear(C, V * self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(C, V, bias=False)
        self.in_proj_a = nn.Linear(C, V, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_width, groups=channels, bias=False)
        # for training from nothing, as Mamba 2 starts: memories that halve within 1 to 700 tokens, head by head
        dt = torch.logspace(-3, -1, V)  # (V,)
        self.A_log = nn.Parameter(torch.linspace(1, 16, V).log())
        self.dt_bias = nn.Parameter(dt.expm1().log())  # softplus of it is dt
        self.norm = nn.RMSNorm(self.value_dim, config.norm_eps)  # holds the weight; rms_norm rounds as Llama does
        self.out_proj = nn.Linear(V * self.value_dim, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, layout, linear) -> Tensor:
        qkv, z, b, a = linear(self, self.INPUTS, x)  # (B, T, channels), (B, T, V * dv), (B, T, V) twice
        q, k, v = layout.convolve(self.layer, qkv, self.conv1d.weight).split(self.sizes, dim=-1)
        q, k = (unit(y.unflatten(-1, (-1, self.key_dim)).float()) for y in (q, k))  # (B, T, H, dk) fp32
        v, z = (y.unflatten(-1, (-1, self.value_dim)) for y in (v, z))  # (B, T, V, dv)
        g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)  # (B, T, V) fp32
        out = layout.recur(self.layer, q * self.key_dim**-0.5, k, v, g, b.sigmoid()).to(x.dtype)  # (B, T, V, dv)
        out = rms_norm(out, self.norm.weight, eps=self.norm.eps, plus_one=False)
        out = (out * F.silu(z.float())).to(x.dtype)  # (B, T, V, dv)
        [out] = linear(self, self.OUTPUT, out.flatten(2))
        return out  # (B, T, C)


def unit(x: Tensor) -> Tensor:
    """x / |x|, and 0 for 0: the length of key decides how much of a value a memory takes over."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def causal_conv(x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """silu of a convolution for each channel over a token and the W - 1 before it, in its own sequence.

        y[t] = silu(sum over w of weight[w] x[t - W + 1 + w])

    x         (S, channels);  weight (channels, 1, W), its last tap is the token's own; both carry gradients
    segments  of the S tokens: before an answer stand the last tokens of its prompt, before a prompt zeros
    returns   (S, channels)

    Each segment is copied behind its W - 1 predecessors, so that one convolution of the whole row mixes no two.
    """
    source, kept, _ = _with_history(segments.lengths, segments.parents, weight.shape[2] - 1, x.device)
    row = _rows(x, source)  # (S + n (W - 1), channels)
    y = F.conv1d(row.T[None], weight, groups=x.shape[1])[0].T  # (S + (n - 1) (W - 1), channels)
    return F.silu(y[kept])


def causal_conv_step(x: Tensor, weight: Tensor, tail: Tensor) -> Tensor:
    """causal_conv for one more token x (n, channels) of each row. tail (n, channels, W - 1), the inputs before it, is
    moved on in place. Returns (n, channels)."""
    window = torch.cat((tail, x[..., None]), dim=2)  # (n, channels, W)
    tail.copy_(window[..., 1:])
    return F.silu(F.conv1d(window, weight, groups=x.shape[1])[..., 0])


def last_inputs(x: Tensor, count: int, segments: Segments) -> Tensor:
    """(n, channels, count): the last `count` of each segment's x (S, channels), zeros and its prompt's before them."""
    _, _, tails = _with_history(segments.lengths, segments.parents, count, x.device)
    return _rows(x, tails).transpose(1, 2)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], where len(x) stands for a row of zeros."""
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[index]


@lru_cache(maxsize=64)  # all layers of a row ask for the same
def _with_history(
    lengths: tuple[int, ...], parents: tuple[int, ...], count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The row in which each of n segments stands behind the `count` tokens before it, as tokens (S: a zero): (S + n
    count,). Where y of each token is in its convolution: (S,). And the last `count` tokens of each: (n, count)."""
    starts = [0, *accumulate(lengths)]
    sources, kept, tails, zeros = [], [], [], torch.full((count,), starts[-1])
    for i, parent in enumerate(parents):
        sources.append(torch.cat((zeros if parent < 0 else tails[parent], torch.arange(starts[i], starts[i + 1]))))
        tails.append(sources[-1][-count:])
        kept.append(torch.arange(starts[i], starts[i + 1]) + i * count)
    return tuple(x.to(device) for x in (torch.cat(sources), torch.cat(kept), torch.stack(tails)))
