"""AdamW over fp32 masters, gradient clipping, the learning-rate schedule.

With 16-bit weights an update smaller than 2^-9 of a weight rounds to nothing: at learning rate 1e-6 and weights around
0.02 that is every update, the policy never moves and every ratio stays 1. So each 16-bit parameter has an fp32 master;
gradients are summed there and AdamW steps there, and the rounded master is copied back.

Tests: tests/test_optimizer.py       Source: AdamW, arXiv 1711.05101; masters, arXiv 1710.03740 section 3.1
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanogspo import distributed, sharding


class Optimizer:
    """AdamW on the trainable parameters of a model. state() and load_state() are flat dictionaries of tensors."""

    def __init__(self, model: nn.Module, *, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)):
        self.model, self.named = model, list(sharding.trained(model).items())
        if not self.named:
            raise ValueError("got a model without trainable parameters; add a LoRA adapter or unfreeze it")
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for _, p in self.named]
        matrices = [m for m in self.masters if m.ndim >= 2]
        vectors = [m for m in self.masters if m.ndim < 2]  # norms and biases are not decayed
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the 16-bit gradients of one backward pass to their masters' fp32 ones. fp32 parameters need nothing."""
        for (_, p), master in zip(self.named, self.masters, strict=True):
            if p is not master and p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def step(self, lr: float, grad_clip: float) -> Tensor:
        """One update. Returns the gradient's norm before clipping. A norm that is not finite raises FloatingPointError:
        the weights are then still the last good ones."""
        distributed.sum_gradients(self.masters)
        norm = sharding.whole(nn.utils.clip_grad_norm_(self.masters, grad_clip))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()}; the weights are as they were before this update; "
                "try a lower --lr"
            )
        for group in self.adamw.param_groups:
            group["lr"] = lr
        sharding.reshard(self.model)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for (_, p), master in zip(self.named, self.masters, strict=True):
            if p is not master:
                p.copy_(master)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to continue bit for bit: moments, step counts, masters. Of a sharded model
        this process's rows (sharding.whole gives all)."""
        out = {}
        for (name, p), master in zip(self.named, self.masters, strict=True):
            out.update({f"{name}.{key}": value for key, value in self.adamw.state[master].items()})
            if master.dtype != sharding.dtype(self.model, p):
                out[f"{name}.master"] = master.detach()
        return out

    def load_state(self, tensors: dict[str, Tensor], read: Callable[[str, Tensor], None] | None = None) -> None:
        """What state() returned, whole. Raises ValueError, with nothing changed, when it belongs to other parameters.

        read  (name, where to): puts a tensor to its place, so that no two are held twice; `tensors` may then be on the
              meta device. Default: a copy of those in `tensors`
        """
        read = read or (lambda name, into: into.copy_(tensors[name]))
        shapes = {}
        for (name, p), master in zip(self.named, self.masters, strict=True):
            shapes |= {f"{name}.master": master.shape} if master.dtype != sharding.dtype(self.model, p) else {}
            if f"{name}.step" in tensors:  # not before the first update
                shapes |= {f"{name}.step": (), f"{name}.exp_avg": master.shape, f"{name}.exp_avg_sq": master.shape}
        given = {name: t.shape for name, t in tensors.items() if t.dtype == torch.float32}
        wrong = sorted(name for name in shapes.keys() | tensors.keys() if shapes.get(name) != given.get(name))
        if wrong:
            raise ValueError(f"got an optimiser state whose {wrong[0]} does not fit its parameter; want the run's own")
        for (name, _), master in zip(self.named, self.masters, strict=True):
            if f"{name}.master" in shapes:
                read(f"{name}.master", master.data)
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):  # fused AdamW keeps its step count where the parameter is
                if f"{name}.{key}" in tensors:
                    empty = torch.empty((), device=master.device)
                    state[key] = empty if key == "step" else torch.empty_like(master.detach())  # fp32, as the masters
                    read(f"{name}.{key}", state[key])
            self.adamw.state[master] = state


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str) -> float:
    """Learning rate of update `step` (from 0): a linear rise over `warmup` updates, then the schedule.

    "constant" does not depend on `total`, so a run that is continued with more steps equals one that was longer.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
