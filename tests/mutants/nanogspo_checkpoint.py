"""Wrong edits of nanogspo/checkpoint.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/checkpoint.py"
MUTANTS = {
    "tests/test_checkpoint.py": [
        (
            'if t["start"] != expected or t["end"] - t["start"] != bytes_:',
            'if t["end"] - t["start"] != bytes_:',
            "overlapping tensors are read",
        ),
        ('text += b" " * (-len(text) % 8)', 'text += b""', "data not aligned"),
        (
            'if SKIP.search(name) or (config.tied and ours == "lm_head.weight"):',
            "if SKIP.search(name):",
            "a tied lm_head in the file is an error",
        ),
        (
            "get = layer.merged_weight if merge_lora else lambda layer=layer: base_weight(layer)",
            "get = lambda layer=layer: base_weight(layer)",
            "the export forgets the adapter",
        ),
        ('(math.sqrt(r) if config.get("use_rslora") else r)', "r", "rank-stabilised adapters scaled wrongly"),
        ('"lora_alpha": first.scale * first.r,', '"lora_alpha": first.scale,', "PEFT would divide by r once more"),
        ("        if old.name not in written:", "        if False:", "stale shards stay and win"),
        ("if 8 + length + expected != size:", "if False:", "a truncated file is read"),
        (
            "except errors.GatedRepoError as e:",
            "except errors.DisabledRepoError as e:",
            "a gated repository looks like an unknown one",
        ),
        ("if any(file.parent != folder for file in files):", "if False:", "an index may point outside its folder"),
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
            "a merged export without the adapter",
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
