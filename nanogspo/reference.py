"""The policy at the start of RL, which --beta keeps the trained one near.

    frozen = freeze(model, config)              before the first rollout; saved with the state, planned with the memory
    with reference(model, frozen):              the same model, for as long, with the weights of then
        ref_logp = score(model, batch)

A fresh adapter adds exactly 0, so the policy of then is the model with its adapter switched off, and nothing is kept.
After a warm-up, with --adapter and without LoRA the trained tensors of then are kept: an adapter, or a whole model.
Where a --beta is accepted in the middle of a run, "then" is the next rollout.

Tests: tests/test_train_objectives.py       Elsewhere: TRL GRPOTrainer, disable_adapter() or a second model
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from nanogspo.config import TrainConfig
from nanogspo.lora import lora_layers


def is_copied(config: TrainConfig) -> bool:
    """Whether the reference takes memory of its own."""
    fresh_adapter = config.lora_r and not config.adapter and not config.warm_steps
    return config.algo != "sft" and config.beta > 0 and not fresh_adapter


def freeze(model: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """Copies of all trained tensors; {} where the run needs none."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.detach().clone() for name, p in trained} if is_copied(config) else {}


@contextlib.contextmanager
def reference(model: nn.Module, frozen: dict[str, Tensor]) -> Iterator[None]:
    """Within it, `model` is the policy at the start of RL. frozen: what `freeze` returned."""
    trained, layers = dict(model.named_parameters()), lora_layers(model).values()
    now = {name: trained[name].data for name in frozen}
    scales = [layer.scale for layer in layers]
    for name, tensor in frozen.items():
        trained[name].data = tensor
    for layer in layers if not frozen else ():
        layer.scale = 0.0  # and not without the adapter: the sums run as ever, so equal weights give equal bits
    try:
        yield
    finally:
        for name, tensor in now.items():
            trained[name].data = tensor
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
