"""Wrong edits of nanogspo/storage/peft.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/peft.py"
MUTANTS = {
    "tests/test_checkpoint.py": [
        (
            "os.path.realpath(os.path.expanduser(name))",
            "os.path.realpath(pathlib.Path(name).expanduser())",
            "an adapter whose base has the ~ of an unknown user is a traceback",
        ),
        (
            'if not any(_peft_wraps(config, f"{p}{name}", where) for p in prefixes)]',
            "if False]",
            "tensors that PEFT leaves aside are used",
        ),
        (
            'return any(f".{layer}".endswith(f".{end}") for end in value)',
            "return any(layer.endswith(end) for end in value)",
            "a target is any end of a name",
        ),
        ("    return chosen and named(", "    return named(", "layers_to_transform does not count"),
        (' and not named("exclude_modules", [])', "", "exclude_modules does not count"),
        (
            'named("target_modules", ["q_proj", "v_proj"])',
            'named("target_modules", [])',
            "an adapter without target_modules is refused",
        ),
        ('value == "all-linear" or ', "", "an adapter of all linear layers is refused"),
        (
            "len(value) <= 10_000 and _ways(value) < MOST_WAYS:",
            "_ways(value) < MOST_WAYS:",
            "an adapter with a megabyte of regular expression",
        ),
        ("30 * choices ** min(args[1], 30)", "30 * choices", "a stranger's regular expression runs for years"),
        (
            "with contextlib.suppress(TypeError, re.error,",
            "with contextlib.suppress(TypeError,",
            "a broken regular expression is a traceback",
        ),
        (
            "{PEFT_PREFIX}{model.config.module_prefix}{own",
            "{PEFT_PREFIX}model.{own",
            "an adapter over a multimodal base does nothing in peft",
        ),
        (
            "return leaves if plain else",
            "return leaves if True else",
            "peft wraps the tower of a multimodal base as well",
        ),
        (
            "    if towers and not model.norm.weight.is_meta:",
            "    if towers:",
            "what an adapter leaves aside is said twice",
        ),
        (
            "        if SKIP.search(name):\n            towers",
            "        if False:\n            towers",
            "an adapter of peft that wraps the tower too is refused",
        ),
        (
            "if v and k not in ADAPTER_NO_EFFECT and v not in NEUTRAL.get(k, ())}",
            'if v and k in ("use_dora", "modules_to_save")}',
            "keys of a new kind of adapter are ignored",
        ),
        (
            "    return same or bool(",
            "    return True or bool(",
            "an adapter over another base is loaded without a word",
        ),
        (
            '(math.sqrt(r) if need(config, "use_rslora", bool, default=False, where=where) else r)',
            "r",
            "rank-stabilised adapters scaled wrongly",
        ),
        ('"lora_alpha": first.scale * first.r,', '"lora_alpha": first.scale,', "PEFT would divide by r once more"),
    ],
    "tests/test_quant.py": [
        (
            "for name in linear_layers(model) if not name.endswith(",
            "for name, m in linear_layers(model).items() if type(m).__name__ == 'Linear' and not name.endswith(",
            "an adapter of some layers says it is of all",
        ),
    ],
}
