"""Wrong edits of nanogspo/checkpoint.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/checkpoint.py"
MUTANTS = {
    "tests/test_runstate.py": [
        ("        left.unlink(missing_ok=True)", "        pass", "each kill leaves a half-written file for ever"),
    ],
    "tests/test_checkpoint.py": [
        (
            'if getattr(e, "filename", None):',
            "if False:",
            "a cache that may not be written reads like a broken network",
        ),
        (
            '        (path / "config.json").unlink(missing_ok=True)',
            "        pass",
            "new shards beside old ones look like a whole folder",
        ),
        (
            'path.with_name(f".{path.name}.{os.getpid()}.tmp")',
            'path.with_name(f".{path.name}.0.tmp")',
            "two writers' bytes in one file",
        ),
        (
            "pathlib.Path(os.path.expanduser(path_or_repo))",
            "pathlib.Path(path_or_repo).expanduser()",
            "the ~ of an unknown user is a traceback",
        ),
        (
            "os.path.realpath(os.path.expanduser(name))",
            "os.path.realpath(pathlib.Path(name).expanduser())",
            "an adapter whose base has the ~ of an unknown user is a traceback",
        ),
        (
            "    return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)",
            "    return HEAD if name.endswith(HEAD) else next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)",
            "any name that ends like the head's is the head",
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
        (
            "30 * choices ** min(args[1], 30)",
            "30 * choices",
            "a stranger's regular expression runs for years",
        ),
        (
            "with contextlib.suppress(TypeError, re.error,",
            "with contextlib.suppress(TypeError,",
            "a broken regular expression is a traceback",
        ),
        (
            'if t["start"] != expected or t["end"] - t["start"] != bytes_:',
            'if t["end"] - t["start"] != bytes_:',
            "overlapping tensors are read",
        ),
        ('text += b" " * (-len(text) % 8)', 'text += b""', "data not aligned"),
        (
            "    if config.tied:  # a file may hold the head all the same\n",
            "    if False:\n",
            "a tied lm_head in the file is an error",
        ),
        (
            "        if _same_values(found[HEAD], found[EMBEDDING], dtype):",
            "        if True:",
            "a head that differs from the tied embedding is ignored",
        ),
        (
            'start = entry["start"] + first * C * DTYPES[entry["dtype"]].itemsize',
            'start = entry["start"]',
            "only the first rows of a tied head are compared",
        ),
        (
            "(folder / INDEX).exists() and not (folder / SINGLE).exists()",
            "(folder / INDEX).exists()",
            "of two sets of weights the stale shards win",
        ),
        (
            "{PEFT_PREFIX}{model.config.module_prefix}{name}.{part}.weight",
            "{PEFT_PREFIX}model.{name}.{part}.weight",
            "an adapter over a multimodal base does nothing in peft",
        ),
        (
            "return leaves if plain else",
            "return leaves if True else",
            "peft wraps the tower of a multimodal base as well",
        ),
        (
            "            if SKIP.search(stored):\n                if COMPANION",
            "            if SKIP.search(stored):\n                continue\n                if COMPANION",
            "a multimodal base is exported without its tower",
        ),
        (
            "        part[key] = dtype\n",
            "        pass\n",
            "fp32 weights that transformers rounds to the base's bf16",
        ),
        (
            "                out[stored] = ours[EMBEDDING]",
            "                pass",
            "of a tied matrix stored twice one copy is dropped",
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
            '    if want in ("model", "config") and not is_model:',
            "    if False:",
            "an adapter given as --model has no config.json: fetch it again",
        ),
        (
            "(match := FOREIGN_PART.search(name)) and",
            "(match := FOREIGN_PART.match(name)) and",
            "a compiled block's names are a list of unknown tensors",
        ),
        (
            "        error = error.__cause__ or error.__context__",
            "        error = None",
            "the hub's 429 reads like a broken network",
        ),
        ("    except ImportError as e:", "    except MemoryError as e:", "a SOCKS proxy ends in a traceback"),
        (
            "math.prod(max(n, 1) for n in shape)",
            "math.prod(shape)",
            "an empty tensor of 2**62 columns cannot be made",
        ),
        (
            "get = layer.merged_weight if merge_lora else lambda layer=layer: base_weight(layer)",
            "get = lambda layer=layer: base_weight(layer)",
            "the export forgets the adapter",
        ),
        (
            '(math.sqrt(r) if need(config, "use_rslora", bool, default=False, where=where) else r)',
            "r",
            "rank-stabilised adapters scaled wrongly",
        ),
        ('"lora_alpha": first.scale * first.r,', '"lora_alpha": first.scale,', "PEFT would divide by r once more"),
        ("        if old.name not in written:", "        if False:", "stale shards stay and win"),
        ("if 8 + length + expected != size:", "if False:", "a truncated file is read"),
        (
            "except errors.GatedRepoError as e:",
            "except errors.DisabledRepoError as e:",
            "a gated repository looks like an unknown one",
        ),
        (
            r'if any(re.search(r"[/\\\0]|^\.*$|.{256}", name) for name in names):',
            "if False:",
            "an index may point outside its folder",
        ),
        (
            't["start"] + 8 + length, t["end"] + 8 + length',
            't["start"] + length, t["end"] + length',
            "every tensor read 8 bytes early",
        ),
    ],
    "tests/test_quant.py": [
        (
            "match[1] in linear and match[2] not in companions[match[1]]",
            "match[1] in linear",
            "of two tensors for one place the last wins",
        ),
        (
            "                if tensor.dtype != dtype:\n",
            "                if False:\n",
            "packed from fp32 here, from bf16 by everybody else",
        ),
        (
            "        model.requires_grad_(False)  # packed",
            "        pass  # packed",
            "norms and embeddings of a 4-bit folder are trained",
        ),
        ("    as_nf4 = not (merge_lora and layers) and ", "    as_nf4 = ", "a merged export without the adapter"),
        (
            "merged(dtype) if merged else layer.unpack(dtype)",
            "layer.unpack(dtype)",
            "a merged export of unpacked layers without the adapter",
        ),
        ("    return [] if q.shape == shape else", "    return [] if True else", "a transposed weight is loaded"),
        ('    if companions and quant == "int8":', "    if False:", "--quant int8 of a 4-bit folder is ignored"),
        (
            '    entries = [entry for entry in entries if DTYPES[entry["dtype"]].is_floating_point] or entries  # no packed bytes\n',
            "",
            "sample.py computes in uint8",
        ),
        (
            '                    raise ValueError(f"{file}: {name}: {e}") from e',
            "                    raise",
            "which of 400 tensors is not finite?",
        ),
        (
            "if isinstance(m, LINEAR) and not _inside_lora(n)",
            "if isinstance(m, nn.Linear) and not _inside_lora(n)",
            "an adapter of some layers says it is of all",
        ),
    ],
}
