"""Wrong edits of nanogspo/families.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/families.py"
MUTANTS = {
    "tests/test_families.py": [
        (
            '"full" if layer % 2 else "sliding"',
            '"sliding" if layer % 2 else "full"',
            "Gemma 2 starts with a full layer",
        ),
        (
            '"sliding" if (layer + 1) % n else "full"',
            '"sliding" if layer % n else "full"',
            "Gemma 3 starts with a full layer",
        ),
        (
            '"window_flag": lambda layer, first: layer >= first',
            '"window_flag": lambda layer, first: layer > first',
            "max_window_layers off by one",
        ),
        (
            'need(text, "query_pre_attn_scalar", float, low=1e-3, high=1e6, where=where) if row.attn_scalar else D',
            "D",
            "attention scale from head_dim where the file says otherwise",
        ),
        (
            'need(config, "tie_word_embeddings", bool, default=row.tied, where=where)',
            'need(text, "tie_word_embeddings", bool, default=row.tied, where=where)',
            "text_config wins over the wrapper about tying",
        ),
        (
            "if v is not None or k in SOFTCAPS}",
            "if v is not None}",
            "a soft-cap switched off by null comes back",
        ),
        (
            'need(text, "use_sliding_window", bool, default=False, where=where):',
            "window:",
            "a window where use_sliding_window is false",
        ),
        (
            'outer in ("qwen2_vl", "qwen2_5_vl") and flag("tie_word_embeddings")',
            "False",
            "Qwen 2 VL files with an inner tie flag get a head of their own",
        ),
        ("    if wrapped and caps[1]:", "    if False:", "a cap around a tower, which transformers ignores"),
        (
            '        if row.layer_pattern == "full":  # transformers',
            "        if False:  # transformers",
            "sliding layers of a Llama, whose class has none",
        ),
        ("isinstance(n, str) and n in classes for n in named", "True for n in named", "code of its own is ignored"),
        (
            "k for part in (config, text) for k, v in part.items() if v is not None and k not in known",
            "k for k in ()",
            "unknown keys are dropped in silence",
        ),
        ("    if new and old and new != old:", "    if False:", "of two RoPE entries one wins in silence"),
        ("        if range_ and key in p:", "        if False:", "a negative RoPE factor"),
        ("if rotary_dim % 2 or not rotary_dim:", "if False:", "half a pair of channels is rotated"),
    ],
}
