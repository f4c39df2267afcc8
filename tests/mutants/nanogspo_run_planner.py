"""Wrong edits of nanogspo/run/planner.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/planner.py"
MUTANTS = {
    "tests/test_planner.py": [
        (
            " * -(-groups // ranks)",
            " * groups // ranks",
            "8 processes make an update of two groups in an eighth of the time",
        ),
        ("ranks and ranks > 1:", "ranks:", "one process waits for others"),
        (
            "whole = packed_layers(model) or (is_copied(config) and not lora_layers(model))",
            "whole = packed_layers(model)",
            "an advice that is then refused",
        ),
        ("* (config.shard != shard)", "", "a way that is not the one that fits"),
        ("for more in (ranks, *(", "for more in (2 * ranks, *(", "nobody is told that shards of the same GPUs fit"),
        (
            "at one time {human(most(parts))}",
            "at one time {human(sum(parts.values()))}",
            "the plan of a run that fits says that it does not",
        ),
        ("max(element, 4)", "element", "a CPU's cache counted in bf16"),
        ("if name not in ROLLOUT)", "if name)", "checkpointing for the sake of a cache that is gone by then"),
        ("if needed <= FILL * available:", "if needed >= FILL * available:", "checkpointing where memory abounds"),
        (
            "rows * (config.max_new_tokens - 1)",
            "rows * config.max_new_tokens",
            "a slot for the last token, which is never fed",
        ),
        (
            "GRADIENTS: numbers * 4",
            "GRADIENTS: numbers * element",
            "gradients are summed in fp32 whatever the weights are",
        ),
        (
            "whole = groups * prompt + size * answer",
            "whole = size * (prompt + answer)",
            "memory for a prompt for each answer",
        ),
        (
            "groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))",
            "groups = size // G",
            "updates that begin within a group",
        ),
        ("if not quantize_as_stored(", "if quantize_as_stored(", "a 4-bit folder is planned in 16 bits"),
        (
            'raw.get("quantization_config")) and quant:',
            "None) and quant:",
            "what config.json says of packed weights is not read",
        ),
        ("- min(rollout, update)", "", "a rollout and an update counted as if they were there together"),
        ("V * (3 * dv + 5)", "V * (dv + 5)", "a gate that keeps nothing"),
        (
            "activations += backward_bytes(T,",
            "activations += 0 * backward_bytes(T,",
            "what backward of a linear layer works on is free",
        ),
        ("    if needed <= available:", "    if True:", "a run that cannot fit is started"),
        ("    needed = most(parts, without)", "    needed = most(parts)", "a run is refused for an estimate"),
        ("if config.temperature == 1 else 3", "if True else 3", "scores divided by the temperature are another copy"),
        (
            "copies * rows *",
            "copies * config.prompts_per_rollout * config.group_size *",
            "rows are decoded in slices",
        ),
        ("element if on_gpu else max", "element if False else max", "a GPU's cache counted in fp32"),
        (
            '0 if on_gpu or config.prepack == "off" else prepacked_bytes(model)\n    if rl',
            '0 if config.prepack == "off" else prepacked_bytes(model)\n    if rl',
            "a GPU prepacks nothing",
        ),
        (
            'replace(config, prepack="on" if fits else "off")',
            'replace(config, prepack="on")',
            "copies that do not fit are made all the same",
        ),
        (
            "(CACHE, PREPACKED, SCORES, WHOLE), (GRADIENTS",
            "(CACHE, PREPACKED, SCORES, WHOLE, GRAPH), (GRADIENTS",
            "the pool of the graphs counted as free in an update",
        ),
        ("attended = 2 * queries + 2 * keys", "attended = 3 * queries + 2 * keys", "a second copy of out"),
        ("and not config.ignore_memory_plan", "", "--ignore-memory-plan does not"),
        ("if refused and not config.plan_only and", "if refused and", "who asks for the plan is refused"),
        (
            "refused = too_large(parts, available, ESTIMATES)",
            'refused = ""',
            "a run that cannot fit is started at once",
        ),
        (
            '    if config.device == "cuda":  # each kernel',
            "    if False:  # each kernel",
            "a GPU's kernels keep fp32 copies",
        ),
        ("element * ((norms + 2) * C +", "element * (2 * norms * C +", "norms that feed a sum keep their result"),
        ("parts[GRAPH] = parts[SCORES] if on_gpu else 0", "parts[GRAPH] = 0", "a graph's pool takes nothing"),
        ("parts[WORKSPACES] = 2 * WORKSPACE if on_gpu else 0", "parts[WORKSPACES] = 0", "libraries take nothing"),
        ("rows = whole if frozen else whole // element * 4", "rows = whole", "rows of trained weights counted in bf16"),
        (
            "numbers, masters = -(-numbers // ranks), 0",
            "masters = 0",
            "gradients and moments of all weights in every process",
        ),
        ("fits = packed or replica <=", "fits = replica <=", "packed weights are sharded, which nothing can do"),
        (" or rows >= replica", "", "a frozen base is sharded, and takes more"),
        ("-(-size // (unit * ranks)) * unit", "-(-size // ranks)", "a group is cut across processes"),
        (
            "rows = -(-config.prompts_per_rollout // ranks) * config.group_size",
            "rows = config.prompts_per_rollout * config.group_size",
            "every process decodes all rows",
        ),
        (" + 2 + 2 * (not lora)", " + 2 + 2 * lora", "frozen weights get gradients"),
        ("if rows > MAX_ROWS else 0)", "if True else 0)", "a few rows unpack every layer"),
        ("experts * (1 - c.experts_per_token / c.num_experts)", "0", "a token goes through every expert"),
        (" * (1 - 1 / config.updates_per_rollout)", "", "the first update's answers are scored twice"),
        ('else ("off", "on"):', 'else ("on",):', "more processes are not advised where replicas would fit"),
        ("(0 if config.data else config.max_new_tokens))", "0)", "a task's answers are not trained on in SFT"),
    ],
    "tests/test_quant.py": [
        (
            "sum(layer.nbytes for layer in packed)",
            "sum(layer.weight.nbytes for layer in packed)",
            "scales and tables not counted",
        ),
        ('"one layer unpacked": widest * model', '"one layer unpacked": 0 * model', "unpacking takes no memory"),
    ],
    "tests/test_train_objectives.py": [
        (
            "REFERENCE: tensor_bytes(trained) if is_copied(config) else 0",
            "REFERENCE: 0",
            "a copy of the model that no plan counts",
        ),
    ],
}
