"""Wrong edits of nanogspo/config.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/config.py"
MUTANTS = {
    "tests/test_conversation.py": [
        (
            'object.__setattr__(self, "task", ("episodes",))',
            "pass",
            "an environment is asked the words of another task",
        ),
    ],
    "tests/test_router_replay.py": [
        ('(*of_rl, "router_replay")', "of_rl", "an SFT that replays nothing"),
        (
            'if config.router_replay and algo == "reinforce":',
            "if False:",
            "a run without old log-probs that replays nothing",
        ),
    ],
    "tests/test_config.py": [
        ("            base.pop(other, None)", "            pass", "a flag cannot say --epochs where a file says steps"),
        (
            'if (base | given).get("epochs") and "steps" in base | given:',
            "if False:",
            "--epochs and the default of --steps are both taken",
        ),
        ('"accept_changes", "check"', '"check"', "what was accepted once is accepted for ever"),
        ("{**base, **given}", "{**given, **base}", "the file wins over the flags"),
        (
            "if updates == 1 and",
            "if updates == 0 and",
            "REINFORCE under another name",
        ),
        ("if config.top_k or config.top_p != 1:", "if config.top_k and config.top_p != 1:", "truncated sampling in RL"),
        ("not low <= value <= high", "value < low or high < value", "nan passes every comparison"),
        ("or value == exclude", "", "a bound that is itself excluded is let through"),
        ('tag in ("int", "float", "str")', 'tag in ("int", "float")', "3e-4 in YAML is a string"),
        ("if DECIMAL.fullmatch(text):", "if DECIMAL.match(text):", "010 and 1:30 are read as Python reads them"),
        ("        if name in values:", "        if False:", "the second of two equal keys wins in silence"),
        ('if kind is str and tag == "str":', "if kind is str:", "a date, a number or no is taken for text"),
        ('if not of or "" in of or [] in of]', "if not of]", "an empty --resume starts a new run"),
        ("except RecursionError:", "except ZeroDivisionError:", "deep nesting is a traceback"),
        ("[\\0\\ud800-\\udfff]", "[\\0]", "bytes that are not UTF-8 reach the files of a run"),
        ("if c.isprintable() else", "if True else", "a flag with a line break takes two lines"),
        ("tiny.get(f.name, f.default)", "f.default", "help hides what the default run takes"),
        ("    check_fields(config)\n    rl, tiny", "    rl, tiny", "no bounds at all"),
        ('os.path.expanduser if field.metadata["path"] else scalar(field)', "scalar(field)", "a folder called ~"),
        ("type=os.path.expanduser, help=help", "help=help", "--config=~/c.yaml is not found"),
        ("return reader(field)(text)", "return text", "a tilde in YAML is a folder of that name"),
        ("allow_abbrev=False", "allow_abbrev=True", "--step is taken for --steps"),
        (
            'if f.metadata["choices"] and value not in f.metadata["choices"]:',
            "if False:",
            "from Python, a word that no flag would take",
        ),
    ],
    "tests/test_words.py": [
        ("            p.error(line)", "            pass", "another program's flag gets the nearest of ours"),
        ("if isinstance(n, yaml.ScalarNode)]", "if False]", "another program's field loses its value"),
    ],
    "tests/test_quant.py": [
        ('    if config.quant != "none" and not config.lora_r:', "    if False:", "full fine-tuning of nothing"),
    ],
}
