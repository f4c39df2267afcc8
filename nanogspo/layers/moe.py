"""Mixture of experts: instead of one MLP a layer has E small ones, and a router that sends each token to k of them.

    logits = W_r x                                  (E,)    in the model's dtype                              (1)
    p      = softmax(logits)                                over all experts, in fp32                         (2)
    w, e   = the k largest of p;   w = w / sum(w) if norm_topk;   w rounded to the model's dtype              (3)
    y      = sum over j of w_j * down_ej(act(gate_ej(x)) * up_ej(x))                                          (4)
           + sigmoid(w_s x) * shared(x)                     where there is a shared expert                    (5)

Qwen3-30B-A3B has 128 experts of which a token meets 8: 30.5 B parameters, 3.3 B of them for any one token.

e in (3) jumps: no gradient says that another expert would have been better. What is left to train a router is w. And
where the k-th and the next probability nearly tie, the last bit of x decides which expert a token gets: see the lesson.

Weights of experts are stacked, (E, out, in), a projection each, under the names that the projections of an MLP have.
A stacked layer, plain, packed (quant.py) or with an adapter (lora.py), has

    stack                       what kernels/moe.py multiplies with
    with_update(y, x, groups)   y, or y and what an adapter adds

Routers watches routers: which experts are used, and the loss that evens it out. It is a `linear` argument of
Transformer.forward.

Reading order: route, ExpertLinear, Experts, MoE, Routers.   Lesson: lessons/16_experts.md   Tests: tests/test_moe.py
Source: Switch, arXiv 2101.03961; Qwen1.5-MoE (shared expert); Qwen3, arXiv 2505.09388.
Letters: T tokens, N = T k rows, E experts, k experts per token, C width, F width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.glu import glu
from kernels.moe import Groups, combine, grouped_linear, sort_by_expert, spread
from nanogspo.families import ModelConfig

ROUTER = ("gate", "shared_expert_gate")  # leaf names; small, and an error there sends tokens elsewhere: never packed


def route(logits: Tensor, k: int, norm_topk: bool) -> tuple[Tensor, Tensor]:
    """(2) and (3): logits (T, E) -> weights (T, k) in the logits' dtype, index (T, k) int64, likeliest first."""
    weights, index = logits.softmax(-1, dtype=torch.float32).topk(k)  # (T, k), (T, k)
    if norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), index


class ExpertLinear(nn.Module):
    """E linear layers without bias in one parameter."""

    bias = None

    def __init__(self, experts: int, in_features: int, out_features: int, **options):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features, **options))  # (E, out, in)

    @property
    def stack(self) -> Tensor:
        return self.weight

    def with_update(self, y: Tensor, x: Tensor, groups: Groups) -> Tensor:
        return y


class Experts(nn.Module):
    """The sum of (4): gate and up of all experts in one launch, down in another."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, C, F_ = config.num_experts, config.hidden_size, config.expert_size
        self.activation = config.activation
        self.gate_proj, self.up_proj = ExpertLinear(E, C, F_), ExpertLinear(E, C, F_)
        self.down_proj = ExpertLinear(E, F_, C)

    def forward(self, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """x (T, C), weights (T, k) -> (T, C)"""
        gate, up = _linear(spread(x, groups), groups, self.gate_proj, self.up_proj)  # (N, F) each
        [y] = _linear(glu(gate, up, activation=self.activation), groups, self.down_proj)  # (N, C)
        return combine(y, weights, groups)


def _linear(x: Tensor, groups: Groups, *layers: nn.Module) -> list[Tensor]:
    ys = grouped_linear(x, [layer.stack for layer in layers], groups)  # (N, out) each
    return [layer.with_update(y, x, groups) for layer, y in zip(layers, ys, strict=True)]


class MoE(nn.Module):
    """Router, experts and perhaps a shared expert, in the place of a block's MLP.

    make_mlp  width -> the module that is the shared expert
    """

    def __init__(self, config: ModelConfig, make_mlp):
        super().__init__()
        C, E, shared = config.hidden_size, config.num_experts, config.shared_expert_size
        self.k, self.norm_topk = config.experts_per_token, config.norm_topk
        self.INPUTS = ROUTER if shared else ROUTER[:1]
        self.gate = nn.Linear(C, E, bias=False)
        self.experts = Experts(config)
        if shared:
            self.shared_expert = make_mlp(shared)
            self.shared_expert_gate = nn.Linear(C, 1, bias=False)

    def forward(self, x: Tensor, linear) -> Tensor:
        logits, *opens = linear(self, self.INPUTS, x)  # (B, T, E), (B, T, 1)
        weights, index = route(logits.flatten(0, -2), self.k, self.norm_topk)  # (B T, k) twice
        groups = sort_by_expert(index, logits.shape[-1])
        out = self.experts(x.flatten(0, -2), weights, groups).view(x.shape)  # (B, T, C)
        return out + torch.sigmoid(opens[0]) * self.shared_expert(x, linear) if opens else out


class Routers:
    """What routers do with the tokens of one update: pass it as `linear`, call `balance` after each forward pass and
    `metrics` after the update."""

    def __init__(self):
        self.logits: dict[nn.Module, Tensor] = {}  # of the last forward pass: MoE -> (B, T, E)
        self.load, self.entropy, self.tokens = 0, 0.0, 0  # (L, E) pairs, (L,) sum over tokens, their number

    def __call__(self, module: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        out = [getattr(module, name)(x) for name in names]
        # within a backward pass gradient checkpointing runs blocks again: what is kept then would keep their graphs
        if isinstance(module, MoE) and torch._C._current_graph_task_id() < 0:
            self.logits[module] = out[0]
        return out

    def balance(self, weight: float = 1.0) -> Tensor | float:
        """The load-balancing loss of the last forward pass times a weight; counts for `metrics` with any weight.

            E * sum over e of f_e P_e       f_e  pairs sent to expert e, a token;  P_e  mean probability       (6)

        f and P are means over the tokens of all layers; k if both are even, up to E if all take the same expert. 0.0
        without experts, and with a weight of 0, of which there are no gradients either.

        Source: Switch, equations 4 to 6, as transformers' load_balancing_loss_func has it. Here in fp32.
        """
        if not self.logits:
            return 0.0
        (moe, *_), logits = self.logits, [z if weight else z.detach() for z in self.logits.values()]
        self.logits, k = {}, moe.k
        p = torch.stack([z.flatten(0, -2) for z in logits]).softmax(-1, dtype=torch.float32)  # (L, T, E)
        index = p.detach().topk(k).indices.flatten(1)  # (L, T k)
        load = F.one_hot(index, p.shape[2]).sum(1).float()  # (L, E)
        self.load, self.tokens = self.load + load, self.tokens + p.shape[1]
        self.entropy = self.entropy - torch.special.xlogy(p, p).detach().sum((1, 2))  # (L,)
        return weight * (load.mean(0) / p.shape[1] * p.mean((0, 1))).sum() * p.shape[2] if weight else 0.0

    def metrics(self) -> dict[str, float]:
        """Averages over layers, of all tokens since the last call; {} without experts. unused: the share of experts
        that no token met; max_load: the pairs of the busiest expert, 1 if all are even; entropy of p, at most ln E."""
        if not self.tokens:
            return {}
        facts = {
            "experts_unused": (self.load == 0).float().mean().item(),
            "experts_max_load": (self.load.amax(1) / self.load.mean(1)).mean().item(),
            "router_entropy": (self.entropy / self.tokens).mean().item(),
        }
        self.__init__()
        return facts
