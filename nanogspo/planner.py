"""What a run will need, said before it is allocated: parameters, and memory part by part.

Weights, adapter, gradients, optimiser and KV cache are counted exactly. Activations are an estimate from the shapes
(what autograd keeps on a CPU, within a tenth; the backward pass has a few temporaries besides).

Tests: tests/test_planner.py
"""

import dataclasses

from kernels.blocked import can_block_head, nbytes
from nanogspo.checkpoint import tensor_bytes
from nanogspo.config import TrainConfig
from nanogspo.families import ModelConfig
from nanogspo.lora import describe, lora_layers
from nanogspo.model import Projections, Transformer
from nanogspo.packing import SHARE_FROM
from nanogspo.quant import NF4Linear, packed_layers, weight_count


def memory_parts(config: TrainConfig, model: Transformer, longest_prompt: int) -> dict[str, int]:
    """Bytes by part. longest_prompt: tokens."""
    c = model.config
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = bool(lora_layers(model))
    weights = tensor_bytes(p for p in model.parameters() if not p.requires_grad or not adapted)
    numbers = sum(p.numel() for p in trained)
    packed = packed_layers(model).values()
    kind = "nf4" if any(isinstance(layer, NF4Linear) for layer in packed) else "int8"
    masters = sum(p.numel() for p in trained if p.element_size() < 4) * 4
    element = model.norm.weight.element_size()
    rl = config.algo != "sft"
    T = batch_tokens(config, longest_prompt)
    layer = T * layer_bytes(config, c, element)
    kept = T * c.hidden_size * element  # what gradient checkpointing keeps of a layer: its input
    activations = layer + c.num_layers * kept if config.gradient_checkpointing == "on" else c.num_layers * layer
    parts = {
        "weights": weights,
        f"{kind} weights": sum(layer.nbytes for layer in packed),
        "one layer unpacked": max((layer.in_features * layer.out_features for layer in packed), default=0) * element,
        "adapter": tensor_bytes(trained) if adapted else 0,
        "gradients": numbers * 4,
        "optimiser (two moments)": numbers * 8,
        "fp32 masters": masters,
        "activations (estimate)": activations,
        "vocabulary tiles": 2 * 32 * 1024**2 if c.vocab_size > 8192 else 2 * T * c.vocab_size * 4,
    }
    if rl:
        on_gpu = model.head_weight.is_cuda
        slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim * (element if on_gpu else max(element, 4))
        parts[CACHE], parts[BLOCKS] = cache_slots(config, longest_prompt) * slot, blocked_bytes(model)
    return {name: size for name, size in parts.items() if size}


CACHE, BLOCKS = "KV cache of a rollout", "weights in blocks"  # gone before anything is trained


def decide_checkpointing(config: TrainConfig, model: Transformer, longest_prompt: int, available: int) -> TrainConfig:
    """The config with gradient_checkpointing "on" or "off" where it said "auto": on where training would otherwise take
    more than FILL of the available bytes. Recomputing costs a third of the time, and changes no bit of a gradient."""
    if config.gradient_checkpointing != "auto":
        return config
    config = dataclasses.replace(config, gradient_checkpointing="off")
    parts = memory_parts(config, model, longest_prompt)
    needed = sum(size for name, size in parts.items() if name not in (CACHE, BLOCKS))
    if needed <= FILL * available:
        return config
    print(
        f"gradient checkpointing is on: training would take {human(needed)} without it, {human(available)} are free "
        "(--gradient-checkpointing off to try)"
    )
    return dataclasses.replace(config, gradient_checkpointing="on")


FILL = 0.85  # the rest is for temporaries of the backward pass, and for what an allocator cannot use


def cache_slots(config: TrainConfig, longest_prompt: int) -> int:
    """Tokens a rollout's KVCache has room for: a prompt once for its group; an answer's last token is never fed."""
    rows = config.prompts_per_rollout * config.group_size
    if config.rollout_rows:  # whole groups, as rollout.generate slices them
        rows = min(rows, max(1, config.rollout_rows // config.group_size) * config.group_size)
    return rows // config.group_size * longest_prompt + rows * (config.max_new_tokens - 1)


def blocked_bytes(model: Transformer) -> int:
    """What `Transformer.sampling` lays out in blocks."""
    groups = [layers for m in model.modules() if isinstance(m, Projections) for _, layers in m.blockable()]
    head = model.head_weight.numel() * 4 if can_block_head(model.head_weight) else 0
    return sum(map(nbytes, groups)) + head


def batch_tokens(config: TrainConfig, longest_prompt: int) -> int:
    """Tokens of the largest micro-batch, if every prompt is as long as the longest: as packing.pack lays them out."""
    answer = 0 if config.data else config.max_new_tokens
    alone = longest_prompt + answer - 1  # an example's last token predicts nothing
    prompt = longest_prompt - 1  # a prompt's last token stands before each of its answers
    N, G = config.prompts_per_rollout * config.group_size, config.group_size
    size = config.batch_size if config.algo == "sft" else N // config.updates_per_rollout
    whole = size * alone
    if config.algo != "sft" and prompt >= SHARE_FROM:
        # groups of which an update has a part, at most
        groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))
        whole = groups * prompt + size * answer
    return max(alone, min(config.micro_batch_tokens, whole))  # pack() gives a longer example a batch of its own


def layer_bytes(config: TrainConfig, c: ModelConfig, element: int) -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    normed = (4 if c.post_norms else 2) * c.hidden_size
    # an RMSNorm keeps its input in fp32 and its result; where its weight is trained, also what the weight multiplies
    norm = 4 + (0 if config.lora_r else 4 if c.norm_plus_one else element)
    total = normed * (norm + element) + ((queries + keys) * norm if c.qk_norm else 0)
    total += element * (2 * queries + 2 * keys + 4 * c.intermediate_size)  # q k v, out; gate, act, up, product
    total += 4 * c.num_heads  # log-sum-exp of the scores, which are made again
    # an adapter keeps its layer's input, which is one of these; with dropout an fp32 copy of its own, and a mask
    if config.lora_r and config.lora_dropout:
        inputs = {"o_proj": queries, "down_proj": c.intermediate_size}
        total += sum(5 * inputs.get(t.rsplit(".", 1)[-1], c.hidden_size) for t in config.lora_targets.split(","))
    return total


def plan(config: TrainConfig, model: Transformer, longest_prompt: int) -> str:
    """The first thing a run prints: what is trained, with what, and what it will take."""
    c = model.config
    total = weight_count(model)
    lines = [
        f"{config.algo} on {config.data or config.task} with {config.model}: "
        f"{c.family}, {c.num_layers} layers, width {c.hidden_size}, "
        f"{c.num_heads} heads on {c.num_kv_heads}, vocabulary {c.vocab_size:,}; "
        f"{config.dtype} on {config.device}, seed {config.seed}",
        describe(model) if lora_layers(model) else f"  all {total:,} parameters are trained",
    ]
    if config.algo == "sft":
        lines.append(f"  {config.steps} updates of {config.batch_size} examples, lr {config.lr:.1e}")
    else:
        lines.append(
            f"  {config.steps} updates, {config.updates_per_rollout} per rollout of "
            f"{config.prompts_per_rollout} prompts x {config.group_size} answers "
            f"of at most {config.max_new_tokens} tokens; "
            f"clip -{config.clip_low:.0e} / +{config.clip_high:.0e}, lr {config.lr:.1e}"
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
