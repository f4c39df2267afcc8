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
            '"sliding" if layer >= first else "full"',
            '"sliding" if layer > first else "full"',
            "max_window_layers off by one",
        ),
        (
            'text["query_pre_attn_scalar"] if row.attn_scalar else D',
            "D",
            "attention scale from head_dim where the file says otherwise",
        ),
        (
            'config.get("tie_word_embeddings", text.get("tie_word_embeddings", row.tied))',
            'text.get("tie_word_embeddings", config.get("tie_word_embeddings", row.tied))',
            "text_config wins over the wrapper about tying",
        ),
        (
            "if value is not None or key in NULL_MEANS}",
            "if value is not None}",
            "a soft-cap switched off by null comes back",
        ),
        (
            'text.get("use_sliding_window") and text.get("sliding_window")',
            'text.get("sliding_window")',
            "a window where use_sliding_window is false",
        ),
    ],
}
