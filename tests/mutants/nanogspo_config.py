"""Wrong edits of nanogspo/config.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/config.py"
MUTANTS = {
    "tests/test_config.py": [
        ("{**base, **given}", "{**given, **base}", "the file wins over the flags"),
        (
            "if config.updates_per_rollout == 1:",
            "if config.updates_per_rollout == 0:",
            "REINFORCE under another name",
        ),
        (
            "if config.top_k or config.top_p != 1:",
            "if config.top_k and config.top_p != 1:",
            "truncated sampling in RL",
        ),
        ("math.isfinite(getattr(config, f.name))", "True", "nan passes every comparison"),
        ("if kind is float and isinstance(value, str):", "if False:", "3e-4 in YAML is a string"),
        ("allow_abbrev=False", "allow_abbrev=True", "--step is taken for --steps"),
    ],
    "tests/test_quant.py": [
        ('    if config.quant != "none" and not config.lora_r:', "    if False:", "full fine-tuning of nothing"),
    ],
}
