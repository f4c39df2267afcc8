"""What a run will need, said before it is allocated: parameters, and memory part by part.

Weights, adapter, gradients, optimiser and KV cache are counted exactly. Activations are an estimate from the shapes
(about 20 % either way): per token and layer the backward pass keeps the block's inputs and outputs of every matrix.

Tests: tests/test_planner.py
"""

from torch import nn

from nanogspo.checkpoint import tensor_bytes
from nanogspo.config import TrainConfig
from nanogspo.lora import describe, lora_layers
from nanogspo.model import Transformer


def memory_parts(config: TrainConfig, model: Transformer, longest_prompt: int) -> dict[str, int]:
    """Bytes by part. longest_prompt: tokens."""
    c = model.config
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = tensor_bytes(p for p in model.parameters() if not p.requires_grad or not lora_layers(model))
    numbers = sum(p.numel() for p in trained)
    masters = sum(p.numel() for p in trained if p.element_size() < 4) * 4
    element = model.norm.weight.element_size()
    T = min(config.micro_batch_tokens, max(config.micro_batch_tokens, longest_prompt + config.max_new_tokens))
    # two norms (fp32 inside), q k v and their rotated copies, attention out, gate, up, their product, two residuals
    width = 2 * (4 + element) * c.hidden_size // element + 2 * c.hidden_size + 3 * c.intermediate_size
    width += (3 * c.num_heads + 4 * c.num_kv_heads) * c.head_dim
    layers = 2 if config.gradient_checkpointing else c.num_layers
    activations = (
        T * (width * layers + (c.num_layers if config.gradient_checkpointing else 0) * c.hidden_size) * element
    )
    parts = {
        "weights": weights,
        "adapter": tensor_bytes(trained) if lora_layers(model) else 0,
        "gradients": numbers * 4,
        "optimiser (two moments)": numbers * 8,
        "fp32 masters": masters,
        "activations (estimate)": activations,
        "vocabulary tiles": 2 * 32 * 1024**2 if c.vocab_size > 8192 else 2 * T * c.vocab_size * 4,
    }
    if config.algo != "sft":
        rows = config.prompts_per_rollout * config.group_size
        per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * element
        parts["KV cache of a rollout"] = rows * (longest_prompt + config.max_new_tokens) * per_token
    return {name: size for name, size in parts.items() if size}


def plan(config: TrainConfig, model: Transformer, longest_prompt: int) -> str:
    """The first thing a run prints: what is trained, with what, and what it will take."""
    c = model.config
    total = sum(p.numel() for p in model.parameters())
    lines = [
        f"{config.algo} on {config.data or config.task} with {config.model}: {c.family}, {c.num_layers} layers, width {c.hidden_size}, "
        f"{c.num_heads} heads on {c.num_kv_heads}, vocabulary {c.vocab_size:,}; {config.dtype} on {config.device}, seed {config.seed}",
        describe(model) if lora_layers(model) else f"  all {total:,} parameters are trained",
    ]
    if config.algo == "sft":
        lines.append(f"  {config.steps} updates of {config.batch_size} examples, lr {config.lr:.1e}")
    else:
        lines.append(
            f"  {config.steps} updates, {config.updates_per_rollout} per rollout of {config.prompts_per_rollout} prompts x {config.group_size} answers "
            f"of at most {config.max_new_tokens} tokens; clip -{config.clip_low:.0e} / +{config.clip_high:.0e}, lr {config.lr:.1e}"
        )
    parts = memory_parts(config, model, longest_prompt)
    lines.append(
        "  memory: "
        + ", ".join(f"{name} {human(size)}" for name, size in parts.items())
        + f"; together {human(sum(parts.values()))}"
    )
    return "\n".join(lines)


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable: the loop returns at GB")


def trained_share(model: nn.Module) -> float:
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / total
