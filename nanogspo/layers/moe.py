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

Routing is a `linear` argument of Transformer.forward that keeps which experts the tokens of one pass were sent to, or
sends them to given ones. Routers adds up an update's passes: metrics, and the loss that evens experts out.

Reading order: route, ExpertLinear, Experts, MoE, Routing, Routers.
Lesson: lessons/16_experts.md   Tests: tests/test_moe.py, tests/test_router_replay.py
Source: Switch, arXiv 2101.03961; Qwen1.5-MoE (shared expert); Qwen3, arXiv 2505.09388; routing replay: GSPO, arXiv
2507.18071, section 5.3.
Letters: T tokens, N = T k rows, E experts, k experts per token, C width, F width of an expert.
"""

import torch
from torch import Tensor, nn

from kernels.glu import glu
from kernels.moe import Groups, combine, grouped_linear, sort_by_expert, spread
from nanogspo import distributed
from nanogspo.families import ModelConfig

ROUTER = ("gate", "shared_expert_gate")  # leaf names; small, and an error there sends tokens elsewhere: never packed


def route(logits: Tensor, k: int, norm_topk: bool, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(2) and (3): logits (T, E) -> weights (T, k) in the logits' dtype, index (T, k) int64, likeliest first. An index
    that is given stays as it is: its weights are those of these logits, so a router learns from them."""
    p = logits.softmax(-1, dtype=torch.float32)  # (T, E)
    weights, index = p.topk(k) if index is None else (p.gather(-1, index), index)  # (T, k), (T, k)
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
        choose = linear.route if isinstance(linear, Routing) else MoE.route
        weights, index = choose(self, logits.flatten(0, -2))  # (B T, k) twice
        groups = sort_by_expert(index, logits.shape[-1])
        out = self.experts(x.flatten(0, -2), weights, groups).view(x.shape)  # (B, T, C)
        return out + torch.sigmoid(opens[0]) * self.shared_expert(x, linear) if opens else out

    def route(self, logits: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return route(logits, self.k, self.norm_topk, index)


class Routing:
    """The `linear` argument of one forward pass of T tokens, which keeps what its routers choose.

    linear  what multiplies the layers: model.separate, or a rollout's FusedLinears
    before  (T, L, k) integers, the experts of the same tokens in an earlier pass: L layers with experts
    replay  send the tokens to `before`, wherever these routers would send them
    """

    def __init__(self, linear, before: Tensor | None = None, replay: bool = False):
        self.linear, self.before, self.replay = linear, before, replay and before is not None
        self.layers: dict[nn.Module, int] = {}  # number of each MoE
        self.chosen: list[Tensor] = []  # (T, k) a layer: the likeliest ones, also where others are replayed
        self.scores: list[Tensor] | None = None  # (T, E) a layer, for Routers

    def __call__(self, module: nn.Module, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        return self.linear(module, names, x)

    def route(self, moe: MoE, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What MoE.route returns."""
        layer = self.layers.setdefault(moe, len(self.layers))
        weights, index = moe.route(logits)
        if layer == len(self.chosen):  # else a backward pass runs a block again (checkpointing): keep no second graph
            self.chosen.append(index)
            if self.scores is not None:
                self.scores.append(logits)
        return moe.route(logits, self.before[:, layer].long()) if self.replay else (weights, index)

    @property
    def experts(self) -> Tensor | None:
        """(T, L, k) int16, the `before` of a later pass; None of a model without experts."""
        return torch.stack(self.chosen, 1).to(torch.int16) if self.chosen else None


def flips(one: Tensor, other: Tensor) -> Tensor:
    """(T, L, k) twice -> (T, L) bool: whether a token's set of experts differs. Their order does not matter."""
    return (one.sort(-1).values != other.sort(-1).values).any(-1)


class Routers:
    """What routers do with the tokens of one update: `watch` is the `linear` of a forward pass, `balance` is called
    after each, `metrics` after the update."""

    COLUMNS = 3  # of sums, behind the pairs of E experts: entropy, flips, tokens

    def __init__(self, config: ModelConfig):
        self.sums = torch.zeros(sum(config.moe_layers), config.num_experts + self.COLUMNS, dtype=torch.float64)
        self.routing: Routing | None = None  # of the last forward pass

    def watch(self, linear, before: Tensor | None = None, replay: bool = False) -> Routing:
        self.routing = Routing(linear, before, replay)
        self.routing.scores = []
        return self.routing

    def balance(self, weight: float = 1.0) -> Tensor | float:
        """The load-balancing loss of the last forward pass times a weight; counts for `metrics` with any weight.

            E * sum over e of f_e P_e       f_e  pairs sent to expert e, a token;  P_e  mean probability       (6)

        f and P are means over the tokens of all layers; k if both are even, up to E if all take the same expert. 0.0
        without experts, and with a weight of 0, of which there are no gradients either.

        Source: Switch, equations 4 to 6, as transformers' load_balancing_loss_func has it. Here in fp32.
        """
        routing = self.routing
        if not routing or not routing.scores:
            return 0.0
        chosen, before, scores = torch.stack(routing.chosen, 1), routing.before, routing.scores  # (T, L, k)
        routing.scores = None  # their graph
        p = torch.stack([z if weight else z.detach() for z in scores]).softmax(-1, dtype=torch.float32)  # (L, T, E)
        (L, T, E), index = p.shape, (before.long() if routing.replay else chosen).transpose(0, 1).flatten(1)  # (L, T k)
        load = p.new_zeros(L, E).scatter_add_(1, index, torch.ones_like(index, dtype=p.dtype))  # (L, E)
        flipped = flips(chosen, chosen if before is None else before).sum(0)  # (L,)
        entropy = -torch.special.xlogy(p, p).detach().sum((1, 2))  # (L,)
        columns = torch.stack([entropy, flipped, torch.full_like(entropy, T)], 1)  # (L, COLUMNS)
        self.sums = self.sums.to(p.device) + torch.cat([load, columns], 1)
        return weight * (load.mean(0) / T * p.mean((0, 1))).sum() * E if weight else 0.0

    def metrics(self) -> dict[str, float | list[float]]:
        """Averages over layers, and a list with a number for each (NAME_by_layer), of all tokens of all processes since
        the last call; {} without experts.

            experts_unused    the share of experts that no token met
            experts_max_load  the pairs of the busiest expert, 1 if all are even
            router_entropy    of p, at most ln E
            experts_flipped   the share of tokens whose routers choose other experts than under the weights that scored
                              them first; 0 in SFT, and in the first update of a rollout, whose own pass that is
        """
        if not len(self.sums):
            return {}
        sums = distributed.total(self.sums).float()  # (L, E + COLUMNS)
        load, (entropy, flipped, tokens) = sums[:, : -self.COLUMNS], sums[:, -self.COLUMNS :].T  # (L, E), (L,) thrice
        by_layer = {
            "experts_unused": (load == 0).float().mean(1),
            "experts_max_load": load.amax(1) / load.mean(1),
            "router_entropy": entropy / tokens,
            "experts_flipped": flipped / tokens,
        }
        self.sums = torch.zeros_like(self.sums)
        means = {name: x.mean().item() for name, x in by_layer.items()}
        return means | {f"{name}_by_layer": [round(v, 5) for v in x.tolist()] for name, x in by_layer.items()}
