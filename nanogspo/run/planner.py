"""What a run will need, said before anything is allocated: parameters, and memory part by part.

The model is built on the meta device (`outline`), where tensors have a shape and no numbers, from config.json alone.
Weights, adapter, gradients, optimiser and KV cache are counted exactly: a run in which they exceed the free memory is
refused. Activations, vocabulary tiles and the scores of a decode step are estimates from the shapes (activations: what
autograd keeps, within a tenth; the backward pass has a few temporaries besides), and only warn.

Of several processes (`ranks`) the plan is that of each: a replica, or with --shard on its rows of every weight, and all
weights whole while it samples. --plan-for asks about another machine, and for the least time of each phase.

Reading order: outline, memory_parts, most, too_large, memory_report, approve; time_floor.
Tests: tests/test_planner.py, tests/test_recipes.py (the README's table of hardware)
"""

import dataclasses

import torch

from kernels.delta_rule import backward_bytes, longest_chunk
from kernels.packed import MAX_ROWS
from kernels.prepacked import can_prepack_head, nbytes
from nanogspo import distributed
from nanogspo.checkpoint import tensor_bytes
from nanogspo.config import TrainConfig
from nanogspo.device import choose_device, choose_dtype
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
WHOLE, GATHERED = "whole weights of a rollout", "gathered layers (estimate)"  # of a sharded model
ROLLOUT, UPDATE = (CACHE, PREPACKED, SCORES, WHOLE), (GRADIENTS, ACTIVATIONS, TILES, GATHERED)
ESTIMATES = (SCORES, GRAPH, WORKSPACES, ACTIVATIONS, TILES, GATHERED)
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


def machine(config: TrainConfig) -> dict[str, object]:
    """The fields of the configuration that the machine decides: this one, or that of --plan-for."""
    if config.plan_for:
        return {"device": "cuda", "dtype": "fp32" if config.dtype == "fp32" else "bf16", "plan_only": True}
    device = choose_device(config.device)
    stored = torch.float32 if config.model == "tiny" else torch.bfloat16
    return {"device": device, "dtype": choose_dtype(config.dtype, device, stored)}


def memory_parts(config: TrainConfig, model: Transformer, longest_prompt: int, ranks: int = 1) -> dict[str, int]:
    """Bytes by part, of each of `ranks` processes. longest_prompt: tokens."""
    c = model.config
    trained = [p for p in model.parameters() if p.requires_grad]
    adapted = bool(lora_layers(model))
    numbers = sum(p.numel() for p in trained)
    masters = sum(p.numel() for p in trained if p.element_size() < 4) * 4
    element = model.norm.weight.element_size()
    rl = config.algo != "sft"
    T = batch_tokens(config, longest_prompt, ranks)
    layers = [T * layer_bytes(config, c, element, kind) for kind in c.layer_types]
    kept = T * c.hidden_size * element  # what gradient checkpointing keeps of a layer: its input
    activations = max(layers) + c.num_layers * kept if config.gradient_checkpointing == "on" else sum(layers)
    if config.device == "cuda" and "linear" in c.layer_types:
        activations += backward_bytes(T, c.linear_value_heads, c.linear_key_dim, c.linear_value_dim)
    weights = weight_parts(model)
    if config.shard == "on" and ranks > 1:
        weights |= sharded_parts(model, weights["weights"], ranks)
        if not adapted:  # a row of the shard is its own master
            numbers, masters = -(-numbers // ranks), 0
    parts = {
        **weights,
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
        rows = rollout_rows(config, ranks)
        parts[CACHE] = cache_slots(config, longest_prompt, ranks) * slot_bytes(c, element, on_gpu)
        parts[CACHE] += rows * row_bytes(c, element)
        copies = 2 if config.temperature == 1 else 3  # logits, those divided by the temperature, probabilities
        parts[SCORES] = copies * rows * c.vocab_size * 4
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


def sharded_parts(model: Transformer, whole: int, ranks: int) -> dict[str, int]:
    """What becomes of `whole` bytes of weights. A layer computes while the next one is gathered; a trained one also has
    a gradient in its own dtype, and the same in fp32 on its way to the processes."""
    frozen, element = bool(lora_layers(model)), model.norm.weight.element_size()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    root = whole // element - sum(layers)  # embedding, head and last norm
    moving = 0 if frozen else max(root, max(layers)) * (element + 4)
    rows = whole if frozen else whole // element * 4
    return {"weights": -(-rows // ranks), WHOLE: whole, GATHERED: (root + 2 * max(layers)) * element + moving}


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
    **dict.fromkeys((WHOLE, GATHERED), "LoRA over packed weights: --quant nf4 --lora-r 16"),
    CACHE: "a lower --rollout-rows, --group-size or --max-new-tokens",
    PREPACKED: "--prepack off",
    **dict.fromkeys((SCORES, GRAPH), "a lower --rollout-rows or --group-size"),
    ACTIVATIONS: "a lower --micro-batch-tokens, or --gradient-checkpointing on",
    **dict.fromkeys((GRADIENTS, MOMENTS, MASTERS, REFERENCE), "an adapter (--lora-r 16)"),
    "KV cache": "a lower --max-new-tokens",
    "nf4 weights": "a smaller --model",
    "int8 weights": "--quant nf4 or a smaller --model",
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


def decide_sharding(
    config: TrainConfig, model: Transformer, longest_prompt: int, available: float, ranks: int
) -> TrainConfig:
    """The config with shard "on" or "off" where it said "auto": on where a replica would take more than FILL of the
    available bytes even with gradient checkpointing, and sharding takes less. (With LoRA it does not: a rollout needs
    the whole base.) ValueError for what cannot be sharded."""
    packed = bool(packed_layers(model))
    if config.shard == "on" and ranks == 1:
        print("one process holds all weights: --shard on has no effect (torchrun starts several)")
    if config.shard == "on" and packed:
        got = f"--shard on with {config.model}, whose packed weights every process holds whole"
        raise ValueError(f"got {got}; want --shard auto")
    if config.shard == "auto" and ranks > 1:
        lean = dataclasses.replace(config, gradient_checkpointing="on", prepack="off")
        off, on = (dataclasses.replace(lean, shard=shard) for shard in ("off", "on"))
        replica, rows = (most(memory_parts(c, model, longest_prompt, ranks)) for c in (off, on))
        fits = packed or replica <= FILL * available or rows >= replica
        config = dataclasses.replace(config, shard="off" if fits else "on")
    if config.shard == "on" and ranks > 1 and is_copied(config) and not lora_layers(model):
        got = f"--beta {config.beta:g} with sharded full fine-tuning, whose reference would be a second whole model"
        raise ValueError(f"got {got}; want --beta 0 or an adapter (--lora-r 16)")
    return config


def decide_prepacking(
    config: TrainConfig, model: Transformer, longest_prompt: int, available: float, ranks: int = 1
) -> TrainConfig:
    """The config with prepack "on" or "off" where it said "auto": off where the copies would not fit. The sums of
    prepacked matmuls are in another order, so a resumed run keeps what was decided."""
    if config.prepack != "auto":
        return config
    parts = memory_parts(config, model, longest_prompt, ranks)
    fits = parts.get(PREPACKED, 0) == 0 or most(parts) <= FILL * available
    if not fits:
        print(f"weights are not prepacked for sampling: {human(parts[PREPACKED])} more, {human(available)} are free")
    return dataclasses.replace(config, prepack="on" if fits else "off")


def decide_checkpointing(
    config: TrainConfig, model: Transformer, longest_prompt: int, available: float, ranks: int = 1
) -> TrainConfig:
    """The config with gradient_checkpointing "on" or "off" where it said "auto": on where training would otherwise take
    more than FILL of the available bytes. Recomputing costs a third of the time, and changes no bit of a gradient."""
    if config.gradient_checkpointing != "auto":
        return config
    config = dataclasses.replace(config, gradient_checkpointing="off")
    parts = memory_parts(config, model, longest_prompt, ranks)
    needed = sum(size for name, size in parts.items() if name not in ROLLOUT)
    if needed <= FILL * available:
        return config
    print(
        f"gradient checkpointing is on: training would take {human(needed)} without it, {human(available)} are free "
        "(--gradient-checkpointing off to try)"
    )
    return dataclasses.replace(config, gradient_checkpointing="on")


FILL = 0.85  # the rest is for temporaries of the backward pass, and for what an allocator cannot use


def rollout_rows(config: TrainConfig, ranks: int = 1) -> int:
    """Answers decoded at a time: whole groups, as rollout.generate slices them."""
    rows = -(-config.prompts_per_rollout // ranks) * config.group_size
    most = config.rollout_rows or rows
    return min(rows, max(1, most // config.group_size) * config.group_size)


def cache_slots(config: TrainConfig, longest_prompt: int, ranks: int = 1) -> int:
    """Tokens a rollout's KVCache has room for: a prompt once for its group; an answer's last token is never fed."""
    rows = rollout_rows(config, ranks)
    if config.environment:  # later turns share no prompt
        return rows * config.max_episode_tokens
    return rows // config.group_size * longest_prompt + rows * (config.max_new_tokens - 1)


def slot_bytes(c: ModelConfig, element: int, on_gpu: bool) -> int:
    """Keys and values of a token; a CPU keeps them in fp32."""
    layers = c.num_layers - c.layer_types.count("linear")
    return 2 * layers * c.num_kv_heads * c.head_dim * (element if on_gpu else max(element, 4))


def row_bytes(c: ModelConfig, element: int) -> int:
    """What gated DeltaNet layers remember of a row, however long it is."""
    memory = 4 * c.linear_value_heads * c.linear_key_dim * c.linear_value_dim
    return c.layer_types.count("linear") * (memory + element * linear_channels(c) * (c.conv_width - 1))


def linear_channels(c: ModelConfig) -> int:
    return 2 * c.linear_key_heads * c.linear_key_dim + c.linear_value_heads * c.linear_value_dim


def prepacked_bytes(model: Transformer) -> int:
    """Copies that FusedLinears makes."""
    head = model.head_weight.numel() * 4 if can_prepack_head(model.head_weight) else 0
    return sum(map(nbytes, prepacked_groups(model))) + head


def batch_tokens(config: TrainConfig, longest_prompt: int, ranks: int = 1) -> int:
    """Tokens of the largest micro-batch, if every prompt is as long as the longest: as packing.pack lays them out."""
    answer = 0 if config.data and config.algo == "sft" else config.max_new_tokens
    alone = longest_prompt + answer - 1  # an example's last token predicts nothing
    prompt = longest_prompt - 1  # a prompt's last token stands before each of its answers
    N, G = config.prompts_per_rollout * config.group_size, config.group_size
    size = config.batch_size if config.algo == "sft" else N // config.updates_per_rollout
    if ranks > 1:  # in whole groups
        unit = 1 if config.algo == "sft" else G
        size = min(size, -(-size // (unit * ranks)) * unit)
    if config.environment:
        return max(config.max_episode_tokens, config.micro_batch_tokens)
    whole = size * alone
    if config.algo != "sft" and prompt >= SHARE_PROMPT_FROM:
        # groups of which an update has a part, at most
        groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))
        whole = groups * prompt + size * answer
    return max(alone, min(config.micro_batch_tokens, whole))  # pack() gives a longer example a batch of its own


def layer_bytes(config: TrainConfig, c: ModelConfig, element: int, kind: str = "full") -> int:
    """Bytes a token that one layer keeps for its backward pass. 45 kB for Qwen3-0.6B under LoRA on a GPU in bf16."""
    C, queries, keys, norms = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, 2 + 2 * c.post_norms
    # an expert also keeps its row of x and its result: 2 C, where the projections keep 4 F
    experts = c.experts_per_token * (c.expert_size + C // 2) + c.shared_expert_size
    width = max(experts, 0 if experts and all(c.moe_layers) else c.intermediate_size)
    attended = 2 * queries + 2 * keys  # q k v, out
    heads = (queries + keys) * c.qk_norm
    total = 4 * c.num_heads  # log-sum-exp of the scores, which are made again
    if kind == "linear":
        attended, heads, dk, dv, V = 0, 0, c.linear_key_dim, c.linear_value_dim, c.linear_value_heads
        if config.device == "cuda":  # q, k, v as the rule reads them, q and k of any length, z twice, gates
            total = 4 * (4 * c.linear_key_heads * dk + V * (3 * dv + 5))
            total += element * (2 * linear_channels(c) + 3 * V * dv)  # convolution, norm, out_proj
        else:  # fp32, kernels/delta_rule.py: five tensors as wide as keys, four as values, six triangles and three
            # memories a chunk; then what convolution, norm and gate keep. Counted, within a tenth
            chunk = longest_chunk(dk, dv)
            total = 4 * V * (5 * dk + 4 * dv + 6 * chunk + 3 * dk * dv // chunk)
            total += element * (6 * linear_channels(c) + 4 * V * dv)
    if config.device == "cuda":  # each kernel keeps its inputs; the norms after attention and MLP feed only a sum
        total += element * ((norms + 2) * C + heads + attended + 3 * width)  # gate, up, product
        total += 4 * norms  # 1 / rms of each row
    else:
        # an RMSNorm keeps its input in fp32 and its result; if its weight is trained, also what the weight multiplies
        norm = 4 + (0 if config.lora_r else 4 if c.norm_plus_one else element)
        total += norms * C * (norm + element) + heads * norm
        total += element * (attended + 4 * width)  # gate, act, up, product
    # an adapter keeps its layer's input, which is one of these; with dropout an fp32 copy of its own, and a mask
    if config.lora_r and config.lora_dropout:
        inputs = {"o_proj": queries, "down_proj": width}
        total += sum(5 * inputs.get(t.rsplit(".", 1)[-1], C) for t in config.lora_targets.split(","))
    return total


def memory_report(config: TrainConfig, model: Transformer, longest_prompt: int, ranks: int = 1) -> str:
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
    parts = memory_parts(config, model, longest_prompt, ranks)
    kind = "its rows of every weight" if config.shard == "on" else "a replica"
    lines.append(
        f"  memory{f' of each of {ranks} processes ({kind})' if ranks > 1 else ''}: "
        + ", ".join(f"{name} {human(size)}" for name, size in parts.items())
        + f"; together {human(sum(parts.values()))}, at one time {human(most(parts))}"
    )
    return "\n".join(lines)


def approve(config: TrainConfig, model: Transformer, longest_prompt: int, available: float) -> TrainConfig:
    """Print what the run will take, and refuse one that cannot fit. Returns the config with sharding, checkpointing and
    prepacking decided. available: bytes of the GPU, or of this host"""
    ranks, available = distributed.world(), available / (1 if config.device == "cuda" else distributed.local_world())
    if config.plan_for:
        ranks, gigabytes = map(int, config.plan_for.split("x"))
        available = gigabytes * 1e9
    config = decide_sharding(config, model, longest_prompt, available, ranks)
    config = decide_checkpointing(config, model, longest_prompt, available, ranks)
    config = decide_prepacking(config, model, longest_prompt, available, ranks)
    print(memory_report(config, model, longest_prompt, ranks))
    parts = memory_parts(config, model, longest_prompt, ranks)
    refused = too_large(parts, available, ESTIMATES)
    if refused and not config.plan_only and not config.ignore_memory_plan:
        raise ValueError(f"{refused}; or --ignore-memory-plan")
    if note := refused or too_large(parts, available):
        print(f"  {note}")
    if config.plan_for and gigabytes in CARDS:
        name, bandwidth, rate = CARDS[gigabytes]
        floors = time_floor(config, model, longest_prompt, ranks, bandwidth, rate)
        print(f"  at least ({name}): {', '.join(f'{phase} {seconds:.2g} s' for phase, seconds in floors.items())}")
    if tips := advice(config, model, longest_prompt, available, ranks):
        print(f"  {tips}")
    return config


# GB -> a usual card of that size; bytes a second, bf16 operations a second: its data sheet
CARDS = {
    24: ("RTX 4090", 1.008e12, 165e12),
    48: ("L40S", 0.864e12, 362e12),
    80: ("H100 SXM", 3.35e12, 989e12),
    141: ("H200", 4.8e12, 989e12),
}


def time_floor(
    config: TrainConfig, model: Transformer, longest_prompt: int, ranks: int, bandwidth: float, rate: float
) -> dict[str, float]:
    """Seconds by phase below which no run gets, if all prompts are as long as the longest and all answers as long as
    they may be: of a rollout and its updates, or of an update of SFT. A decode step reads every weight, and the keys
    and values of its rows; a token of scoring or training takes 2 operations a weight for each of: forward, again
    forward with gradient checkpointing, the gradient of the inputs, and that of trained weights. The first update's
    forward pass scores its own answers. Attention, kernels and messages between processes come on top.

    bandwidth  bytes a second       rate  operations a second
    """
    c, lora = model.config, bool(lora_layers(model))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3)
    active = weight_count(model) - model.embed_tokens.weight.numel() * (not c.tied)
    active -= experts * (1 - c.experts_per_token / c.num_experts) if experts else 0
    training = 2 + (config.gradient_checkpointing == "on") * 2 + 2 + 2 * (not lora)
    if config.algo == "sft":
        tokens = -(-config.batch_size // ranks) * (longest_prompt + (0 if config.data else config.max_new_tokens))
        return {"update": training * active * tokens / rate}
    rows, weights = rollout_rows(config, ranks), weight_parts(model)
    own = -(-config.prompts_per_rollout // ranks)
    groups, cut = divmod(config.prompts_per_rollout, config.updates_per_rollout)
    busiest = own if cut else config.updates_per_rollout * -(-groups // ranks)  # groups of the process that has most
    tokens = own * (longest_prompt + config.group_size * config.max_new_tokens)
    packed = sum(layer.nbytes for layer in packed_layers(model).values())
    unpacked = sum(layer.in_features * layer.out_features for layer in packed_layers(model).values())
    step = weights["weights"] + packed + (unpacked * 2 * model.norm.weight.element_size() if rows > MAX_ROWS else 0)
    step += cache_slots(config, longest_prompt, ranks) * slot_bytes(c, model.norm.weight.element_size(), True) / 2
    slices = -(-own * config.group_size // rows)
    scored = (config.algo != "reinforce") * (1 - 1 / config.updates_per_rollout) + (config.beta > 0)
    return {
        "sampling": slices * config.max_new_tokens * step / bandwidth,
        "scoring": scored * 2 * active * tokens / rate,
        f"{config.updates_per_rollout} updates": training * active * tokens / rate * busiest / own,
    }


def advice(config: TrainConfig, model: Transformer, longest_prompt: int, available: float, ranks: int) -> str:
    """A line about what would be faster, or fit; "" for nothing."""
    if too_large(memory_parts(config, model, longest_prompt, ranks), FILL * available):
        for more in (ranks, *(n for n in (2, 4, 8, 16, 32) if n > ranks)):
            whole = packed_layers(model) or (is_copied(config) and not lora_layers(model))  # as decide_sharding has it
            for shard in ("off",) if whole else ("off", "on"):
                parts = memory_parts(dataclasses.replace(config, shard=shard), model, longest_prompt, more)
                if most(parts) <= FILL * available:
                    flag = f"--shard {shard} " * (config.shard != shard)
                    return f"it fits {more} such processes: torchrun --nproc-per-node {more} train.py {flag}..."
    prompts, updates = config.prompts_per_rollout, config.updates_per_rollout
    if config.algo != "sft" and prompts < updates * ranks and ranks > 1:
        got = f"{updates} updates share {prompts} groups, so in each some of {ranks} processes wait"
        return f"{got}: --prompts-per-rollout {ranks * updates} gives every one a group"
    rows = rollout_rows(config, ranks)
    on_gpu = packed_layers(model) and config.device == "cuda" and config.algo != "sft"
    if on_gpu and rows > MAX_ROWS >= config.group_size:
        return f"--rollout-rows {MAX_ROWS} may sample faster: {rows} rows unpack every layer at every step"
    return ""


def human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit in ("B", "kB") or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable: the loop returns at GB")
