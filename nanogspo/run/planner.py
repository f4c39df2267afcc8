"""What a run will need, said before anything is allocated: parameters, and memory part by part.

The model is built on the meta device (`outline`), where tensors have a shape and no numbers, from config.json alone.
Weights, adapter, gradients, optimiser and KV cache are counted exactly: a run in which they exceed the free memory is
refused. Activations, vocabulary tiles and the scores of a decode step are estimates from the shapes (activations: what
autograd keeps, within a tenth; the backward pass has a few temporaries besides), and only warn.

Reading order: outline, memory_parts, most, too_large, memory_report, approve.      Tests: tests/test_planner.py
"""

import dataclasses

import torch

from kernels.prepacked import can_prepack_head, nbytes
from nanogspo.checkpoint import tensor_bytes
from nanogspo.config import TrainConfig
from nanogspo.families import ModelConfig, model_config
from nanogspo.fast.fused_linear import prepacked_groups
from nanogspo.lora import describe, lora_layers
from nanogspo.model import Transformer
from nanogspo.packing import SHARE_PROMPT_FROM
from nanogspo.quant import NF4Linear, packed_layers, quantize_as_stored, quantize_model, weight_count
from nanogspo.reference import is_copied

# Parts of the memory that only a rollout holds, and those that only an update does
CACHE, PREPACKED, SCORES = "KV cache of a rollout", "prepacked weights", "scores of a decode step (estimate)"
GRAPH, WORKSPACES = "CUDA graph of a decode step (estimate)", "library workspaces"
GRADIENTS, ACTIVATIONS, TILES = "gradients", "activations (estimate)", "vocabulary tiles"
MOMENTS, MASTERS, REFERENCE = "optimiser (two moments)", "fp32 masters", "reference policy"
ROLLOUT, UPDATE = (CACHE, PREPACKED, SCORES), (GRADIENTS, ACTIVATIONS, TILES)
ESTIMATES = (SCORES, GRAPH, WORKSPACES, ACTIVATIONS, TILES)
WORKSPACE = 32 * 2**20  # bytes cuBLAS takes on sm_90 for each stream that multiplies (torch's :4096:2:16:8)


def outline(raw: dict, dtype: torch.dtype, quant: str | None) -> Transformer:
    """The model without its numbers, on the meta device.

    raw    config.json, parsed
    quant  "nf4" or "int8": linear layers packed; None: as the checkpoint says it is
    """
    with torch.device("meta"):
        model = Transformer(model_config(raw)).to(dtype)
    if not quantize_as_stored(model, raw.get("quantization_config")) and quant:
        quantize_model(model, quant)
    return model


def memory_parts(config: TrainConfig, model: Transformer, longest_prompt: int) -> dict[str, int]:
    """Bytes by part. longest_prompt: tokens."""
    c = model.config
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = bool(lora_layers(model))
    numbers = sum(p.numel() for p in trained)
    masters = sum(p.numel() for p in trained if p.element_size() < 4) * 4
    element = model.norm.weight.element_size()
    rl = config.algo != "sft"
    T = batch_tokens(config, longest_prompt)
    layer = T * layer_bytes(config, c, element)
    kept = T * c.hidden_size * element  # what gradient checkpointing keeps of a layer: its input
    activations = layer + c.num_layers * kept if config.gradient_checkpointing == "on" else c.num_layers * layer
    parts = {
        **weight_parts(model),
        "adapter": tensor_bytes(trained) if adapted else 0,
        GRADIENTS: numbers * 4,
        MOMENTS: numbers * 8,
        MASTERS: masters,
        REFERENCE: tensor_bytes(trained) if is_copied(config) else 0,
        ACTIVATIONS: activations,
        TILES: 2 * 32 * 1024**2 if c.vocab_size > 8192 else 2 * T * c.vocab_size * 4,
    }
    on_gpu = config.device == "cuda"
    parts[WORKSPACES] = 2 * WORKSPACE if on_gpu else 0  # the default stream's and the capture stream's
    # evaluations sample, too
    parts[PREPACKED] = 0 if on_gpu or config.prepack == "off" else prepacked_bytes(model)
    if rl:
        parts[CACHE] = cache_slots(config, longest_prompt) * slot_bytes(c, element, on_gpu)
        copies = 2 if config.temperature == 1 else 3  # logits, those divided by the temperature, probabilities
        parts[SCORES] = copies * rollout_rows(config) * c.vocab_size * 4
        parts[GRAPH] = parts[SCORES] if on_gpu else 0  # the pool of all graphs keeps what a step makes, for good
    return {name: size for name, size in parts.items() if size}


def weight_parts(model: Transformer) -> dict[str, int]:
    """Frozen weights, or all where there is no adapter."""
    adapters = {p for layer in lora_layers(model).values() for p in (layer.lora_A.weight, layer.lora_B.weight)}
    packed = packed_layers(model).values()
    kind = "nf4" if any(isinstance(layer, NF4Linear) for layer in packed) else "int8"
    widest = max((layer.in_features * layer.out_features for layer in packed), default=0)
    return {
        "weights": tensor_bytes(p for p in model.parameters() if p not in adapters),
        f"{kind} weights": sum(layer.nbytes for layer in packed),
        "one layer unpacked": widest * model.norm.weight.element_size(),
    }


def sampling_parts(model: Transformer, slots: int, device: str) -> dict[str, int]:
    """What sample.py holds. slots: tokens that the KV cache has room for."""
    slot = slot_bytes(model.config, model.norm.weight.element_size(), device == "cuda")
    blocks = 0 if device == "cuda" else prepacked_bytes(model)
    return {**weight_parts(model), "KV cache": slots * slot, PREPACKED: blocks}


def most(parts: dict[str, int], without: tuple[str, ...] = ()) -> int:
    """Bytes at the fullest moment: a rollout and an update come after each other, the other parts stay."""
    parts = {name: size for name, size in parts.items() if name not in without}
    rollout, update = (sum(parts.get(name, 0) for name in names) for names in (ROLLOUT, UPDATE))
    return sum(parts.values()) - min(rollout, update)


LOWER = {
    CACHE: "a lower --rollout-rows, --group-size or --max-new-tokens",
    PREPACKED: "--prepack off",
    **dict.fromkeys((SCORES, GRAPH), "a lower --rollout-rows or --group-size"),
    ACTIVATIONS: "a lower --micro-batch-tokens, or --gradient-checkpointing on",
    **dict.fromkeys((GRADIENTS, MOMENTS, MASTERS, REFERENCE), "an adapter (--lora-r 16)"),
    "KV cache": "a lower --max-new-tokens",
}


def too_large(parts: dict[str, int], available: int, without: tuple[str, ...] = ()) -> str:
    """One line with what to lower where these parts need more than the available bytes; else "".

    without  ESTIMATES: what is left is certain, and a run that cannot fit is refused
    """
    needed = most(parts, without)
    if needed <= available:
        return ""
    largest = max((name for name in parts if name not in without), key=parts.get)
    return (
        f"got a run of {'at least' if without else 'about'} {human(needed)} ({largest}: {human(parts[largest])}) where "
        f"{human(available)} are free; want {LOWER.get(largest, '--quant nf4, --dtype bf16 or a smaller --model')}"
    )


def decide_prepacking(config: TrainConfig, model: Transformer, longest_prompt: int, available: float) -> TrainConfig:
    """The config with prepack "on" or "off" where it said "auto": off where the copies would not fit. The sums of
    prepacked matmuls are in another order, so a resumed run keeps what was decided."""
    if config.prepack != "auto":
        return config
    parts = memory_parts(config, model, longest_prompt)
    fits = parts.get(PREPACKED, 0) == 0 or most(parts) <= FILL * available
    if not fits:
        print(f"weights are not prepacked for sampling: {human(parts[PREPACKED])} more, {human(available)} are free")
    return dataclasses.replace(config, prepack="on" if fits else "off")


def decide_checkpointing(config: TrainConfig, model: Transformer, longest_prompt: int, available: int) -> TrainConfig:
    """The config with gradient_checkpointing "on" or "off" where it said "auto": on where training would otherwise take
    more than FILL of the available bytes. Recomputing costs a third of the time, and changes no bit of a gradient."""
    if config.gradient_checkpointing != "auto":
        return config
    config = dataclasses.replace(config, gradient_checkpointing="off")
    parts = memory_parts(config, model, longest_prompt)
    needed = sum(size for name, size in parts.items() if name not in ROLLOUT)
    if needed <= FILL * available:
        return config
    print(
        f"gradient checkpointing is on: training would take {human(needed)} without it, {human(available)} are free "
        "(--gradient-checkpointing off to try)"
    )
    return dataclasses.replace(config, gradient_checkpointing="on")


FILL = 0.85  # the rest is for temporaries of the backward pass, and for what an allocator cannot use


def rollout_rows(config: TrainConfig) -> int:
    """Answers decoded at a time: whole groups, as rollout.generate slices them."""
    rows = config.prompts_per_rollout * config.group_size
    most = config.rollout_rows or rows
    return min(rows, max(1, most // config.group_size) * config.group_size)


def cache_slots(config: TrainConfig, longest_prompt: int) -> int:
    """Tokens a rollout's KVCache has room for: a prompt once for its group; an answer's last token is never fed."""
    rows = rollout_rows(config)
    if config.environment:  # later turns share no prompt
        return rows * config.max_episode_tokens
    return rows // config.group_size * longest_prompt + rows * (config.max_new_tokens - 1)


def slot_bytes(c: ModelConfig, element: int, on_gpu: bool) -> int:
    """Keys and values of a token; a CPU keeps them in fp32."""
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * (element if on_gpu else max(element, 4))


def prepacked_bytes(model: Transformer) -> int:
    """Copies that FusedLinears makes."""
    head = model.head_weight.numel() * 4 if can_prepack_head(model.head_weight) else 0
    return sum(map(nbytes, prepacked_groups(model))) + head


def batch_tokens(config: TrainConfig, longest_prompt: int) -> int:
    """Tokens of the largest micro-batch, if every prompt is as long as the longest: as packing.pack lays them out."""
    answer = 0 if config.data and config.algo == "sft" else config.max_new_tokens
    alone = longest_prompt + answer - 1  # an example's last token predicts nothing
    prompt = longest_prompt - 1  # a prompt's last token stands before each of its answers
    N, G = config.prompts_per_rollout * config.group_size, config.group_size
    size = config.batch_size if config.algo == "sft" else N // config.updates_per_rollout
    if config.environment:
        return max(config.max_episode_tokens, config.micro_batch_tokens)
    whole = size * alone
    if config.algo != "sft" and prompt >= SHARE_PROMPT_FROM:
        # groups of which an update has a part, at most
        groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))
        whole = groups * prompt + size * answer
    return max(alone, min(config.micro_batch_tokens, whole))  # pack() gives a longer example a batch of its own


def layer_bytes(config: TrainConfig, c: ModelConfig, element: int) -> int:
    """Bytes a token that one layer keeps for its backward pass. 45 kB for Qwen3-0.6B under LoRA on a GPU in bf16."""
    C, queries, keys, norms = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, 2 + 2 * c.post_norms
    attended = 2 * queries + 2 * keys  # q k v, out
    heads = (queries + keys) * c.qk_norm
    total = 4 * c.num_heads  # log-sum-exp of the scores, which are made again
    if config.device == "cuda":  # each kernel keeps its inputs; the norms after attention and MLP feed only a sum
        total += element * ((norms + 2) * C + heads + attended + 3 * c.intermediate_size)  # gate, up, product
        total += 4 * norms  # 1 / rms of each row
    else:
        # an RMSNorm keeps its input in fp32 and its result; if its weight is trained, also what the weight multiplies
        norm = 4 + (0 if config.lora_r else 4 if c.norm_plus_one else element)
        total += norms * C * (norm + element) + heads * norm
        total += element * (attended + 4 * c.intermediate_size)  # gate, act, up, product
    # an adapter keeps its layer's input, which is one of these; with dropout an fp32 copy of its own, and a mask
    if config.lora_r and config.lora_dropout:
        inputs = {"o_proj": queries, "down_proj": c.intermediate_size}
        total += sum(5 * inputs.get(t.rsplit(".", 1)[-1], C) for t in config.lora_targets.split(","))
    return total


def memory_report(config: TrainConfig, model: Transformer, longest_prompt: int) -> str:
    """The first thing a run prints: what is trained, with what, and what it will take."""
    c = model.config
    total = weight_count(model)
    # conversation and python are no files: the task says more
    what = config.environment if ":" in config.environment else config.data or ", ".join(config.task)
    lines = [
        f"{config.algo} on {what} with {config.model}: "
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


def approve(config: TrainConfig, model: Transformer, longest_prompt: int, available: float) -> TrainConfig:
    """Print what the run will take, and refuse one that cannot fit. Returns the config with checkpointing and
    prepacking decided."""
    config = decide_checkpointing(config, model, longest_prompt, available)
    config = decide_prepacking(config, model, longest_prompt, available)
    print(memory_report(config, model, longest_prompt))
    parts = memory_parts(config, model, longest_prompt)
    refused = too_large(parts, available, ESTIMATES)
    if refused and not config.plan_only and not config.ignore_memory_plan:
        raise ValueError(f"{refused}; or --ignore-memory-plan")
    if note := refused or too_large(parts, available):
        print(f"  {note}")
    return config


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable: the loop returns at GB")
