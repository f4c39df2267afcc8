"""Wrong edits of nanogspo/run/phases.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/phases.py"
MUTANTS = {
    "tests/test_train.py": [
        ('if config.algo == "sft" or not config.warm_steps:', "if not config.warm_steps:", "SFT is warmed up by SFT"),
        ("if config.control else [warm_up, main]", "if True else [warm_up, main]", "a control that nobody asked for"),
        ("config.warm_lr, until=config.warm_until)", "config.warm_lr)", "a warm-up that ends only with its steps"),
    ],
}
