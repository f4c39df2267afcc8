"""Wrong edits of nanogspo/run/hub.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/hub.py"
MUTANTS = {
    "tests/test_hub.py": [
        ("(model.eval(), merged)", "(model, merged)", "dropout counts as a fault of the merge"),
        ("if not apart <= CLOSE[weight.dtype]:", "if False:", "a wrong merge is announced"),
        (
            "available_memory(weight.device.type) / 2",
            "available_memory(weight.device.type)",
            "a second model that does not fit",
        ),
        (
            '"adapter" if config.lora_r and not config.save_merged else "model"',
            '"adapter" if config.lora_r else "model"',
            "merged weights stay here",
        ),
        (
            "except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:",
            "except ZeroDivisionError as error:",
            "a run that has trained ends in a traceback",
        ),
        ("if value != usual[name]}", "}", "a recipe of ninety lines"),
        (
            'if config.model.count("/") == 1 and not Path(config.model).exists()',
            "if True",
            "a folder named as a model of the hub",
        ),
    ],
}
