"""Wrong edits of nanogspo/policy.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/policy.py"
MUTANTS = {
    "tests/test_router_replay.py": [
        (
            "if config.router_replay and not outline.config.num_experts:",
            "if False:",
            "a dense model that replays nothing",
        ),
    ],
    "tests/test_own.py": [
        ("for path in kept[:-count] if", "for path in [] if", "saves are never pruned"),
        ("for path in kept[:-count] if", "for path in kept[count:] if", "the newest saves are pruned"),
        ("key=lambda path: int(path.name))", "key=lambda path: path.name)", "save 10 is older than save 8"),
    ],
    "tests/test_train.py": [
        (' or config.model == "tiny":', ":", "the tiny model under an adapter is saved nowhere"),
        (
            "config = dataclasses.replace(config, lora_r=ranks[-1])",
            "pass",
            "config.yaml with a rank that the adapter has not",
        ),
    ],
    "tests/test_planner.py": [
        (
            'source, want="config")',
            'source, want="model")',
            "the plan waits for the weights of a hub's model",
        ),
        ("if config.plan_only else config.model", "", "a run begins with a file for a folder, and fails later"),
        ('config.model.removesuffix("config.json") if', "config.model if", "no plan of a file"),
        ("if alone := config.plan_only and not", "if alone := not", "a run trains on bytes instead of tokens"),
    ],
    "tests/test_quant.py": [
        ("    if packed_layers(outline) and not config.lora_r:", "    if False:", "full fine-tuning of a 4-bit folder"),
        ("device=device, dtype=dtype, quant=quant, shard", "device=device, dtype=dtype, shard", "--quant is ignored"),
    ],
}
