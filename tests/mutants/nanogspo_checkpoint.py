"""Wrong edits of nanogspo/checkpoint.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/checkpoint.py"
MUTANTS = {
    "tests/test_checkpoint.py": [
        (
            '        (path / "config.json").unlink(missing_ok=True)',
            "        pass",
            "new shards beside old ones look like a whole folder",
        ),
        ("        part[key] = dtype\n", "        pass\n", "fp32 weights that transformers rounds to the base's bf16"),
        (
            "get = layer.merged_weight if merge_lora else lambda base=base: base",
            "get = lambda base=base: base",
            "the export forgets the adapter",
        ),
        (
            "    if model.config.tied:  # a file may hold the head all the same\n",
            "    if False:\n",
            "a tied lm_head in the file is an error",
        ),
        (
            "    if _same_values(found.weights[HEAD], found.weights[EMBEDDING], dtype):",
            "    if True:",
            "a head that differs from the tied embedding is ignored",
        ),
        (
            "slice(first, min(first + rows, V)) for first",
            "slice(0, min(rows, V)) for first",
            "only the first rows of a tied head are compared",
        ),
        (
            "            if SKIP.search(name_there):\n",
            "            if SKIP.search(name_there):\n                continue\n",
            "a multimodal base is exported without its tower",
        ),
        (
            "                out[name_there] = ours[EMBEDDING]",
            "                pass",
            "of a tied matrix stored twice one copy is dropped",
        ),
        ("        if old.name not in weight_map.values():", "        if False:", "stale shards stay and win"),
        (
            "{name: tensors[name][1]() for name in names}, ",
            "{n: t for n, t in [(n, g()) for n, (_, g) in tensors.items()] if n in names}, ",
            "a merged copy of the whole model in memory",
        ),
    ],
    "tests/test_quant.py": [
        (
            "match[1] in linear and match[2] not in companions[match[1]]",
            "match[1] in linear",
            "of two tensors for one place the last wins",
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
        (
            "quantize_linear(stored.read().to(dtype).to(device)",
            "quantize_linear(stored.read().to(device)",
            "packed from fp32 here, from bf16 by everybody else",
        ),
        ('    if found.companions and quant == "int8":', "    if False:", "--quant int8 of a 4-bit folder is ignored"),
        (
            "    tensors = [stored for stored in tensors if stored.dtype.is_floating_point] or tensors  # no packed bytes\n",
            "",
            "sample.py computes in uint8",
        ),
        (
            'leaf == "weight":  # rounded to dtype first: the weights that everybody else packs\n            with named(f"{stored.path}: {name}")',
            'leaf == "weight":\n            with named(stored.path)',
            "which of 400 tensors is not finite?",
        ),
    ],
}
