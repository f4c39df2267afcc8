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
    "tests/test_delta_net.py": [
        ("Segments.build([T] * B,", "Segments.build([B * T],", "rows of a batch remember each other"),
        (
            "tail[self.cache.prompt]",
            "tail[0 * self.cache.prompt]",
            "all rows go on behind the first prompt's last tokens",
        ),
        ("state[self.cache.prompt]", "state[0 * self.cache.prompt]", "all rows remember the first prompt"),
        (
            "last_inputs(x[0], weight.shape[2] - 1, self.segments)",
            "last_inputs(x[0], weight.shape[2] - 1, Segments.build([len(x[0])]))",
            "the tokens before a short prompt are another prompt's",
        ),
        (
            "self.cache.layers[layer].tail)[None]",
            "self.cache.layers[layer].tail.clone())[None]",
            "a step's convolution is forgotten",
        ),
        (
            "self.cache.layers[layer].state)[None]",
            "self.cache.layers[layer].state.clone())[None]",
            "a step's memory is forgotten",
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
