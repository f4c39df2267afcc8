"""Wrong edits of nanogspo/layouts.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/layouts.py"
MUTANTS = {
    "tests/test_layouts.py": [
        ("(key > query - window))[:, None]", "(key >= query - window))[:, None]", "a sliding window one key too wide"),
        (
            "if not window or query.shape[1] <= window:",
            "if not window or query.shape[1] <= window + 1:",
            "the shortcut skips a window that already bites",
        ),
        (
            "scores = torch.tanh(scores / softcap) * softcap",
            "scores = torch.tanh(scores / softcap)",
            "soft-cap does not scale back",
        ),
        (
            "k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
            "k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)",
            "query heads paired with the wrong kv heads",
        ),
        (
            "self.segments, self.positions = segments, segments.positions[None]",
            "self.segments, self.positions = segments, torch.arange(len(segments.positions))[None]",
            "an answer stands behind the answers before it, not behind its prompt",
        ),
        (
            "q, k, v = (x.squeeze(0) for x in (q, k, v))",
            "q, k, v = (x[0] for x in (q, k, v))",
            "a backward that copies whole gradients",
        ),
        ("    if len(tokens) != 1:\n", "    if False:\n", "two rows where one is packed"),
        ("    if torch.is_grad_enabled():\n", "    if False:\n", "gradients through a cache"),
        (
            "return Decode(cache) if segments is None else Prefill(segments, cache)",
            "return Decode(cache) if segments is None else Packed(segments)",
            "prompts are never stored",
        ),
    ],
    "tests/test_model.py": [
        (
            "        self.cache.prefill(layer, k[0], v[0])\n",
            "        self.cache.prefill(layer, v[0], k[0])\n",
            "keys and values change places in the cache",
        ),
    ],
}
