"""Wrong edits of nanogspo/storage/state.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/state.py"
MUTANTS = {
    "tests/test_router_replay.py": [
        (
            'routed = {name: (3, torch.int16) for name in sizes if name == "experts"}',
            "routed = {}",
            "a rollout with experts cannot be resumed",
        ),
    ],
    "tests/test_state.py": [
        ('r"(?:gsm8k|conversation):', 'r"(?:conversation):', "rows of gsm8k may change under a resumed run"),
        ("{'code' if path.suffix == '.py' else 'read'}", "code", "an older run with a reward of its own cannot go on"),
        ("if scored or i < prompt else ~token", "", "of an episode everything after the prompt is trained on"),
        ("(part[: prompt + 1] >= 0)", "(part[:prompt] >= 0)", "an example whose first scored token is none"),
        (" if n.startswith(ROLLOUT)}", "}", "a run that fits in memory cannot be resumed"),
        (
            '(weight_files(folder) if kind == "model" else ())',
            'folder.glob("*.safetensors")',
            "a weight file that nobody reads keeps a run from being resumed",
        ),
        ("resolve(name, want=kind)", "resolve(name)", "of an adapter's repository the whole model is fetched"),
        ('files["data"].is_file()', 'files["data"].exists()', "the hash of a pipe that has been read is no hash"),
        (
            "({some([old[name]])} -> {some([new[name]])})",
            "({old[name]} -> {new[name]})",
            "a forged state prints what it likes",
        ),
        (
            "kind != (sharding.dtype(model, wanted[name]), tuple(wanted[name].shape))",
            "kind[1] != tuple(wanted[name].shape)",
            "fp32 weights resumed in bf16 without a word",
        ),
        ("if changed and not config.accept_changes:", "if False:", "other data, and not a word"),
        ('if name.split("/")[0] in kinds}', "}", "a file that only a later version knows of counts as changed"),
        ('known = then["files"].keys() | {', 'known = then["files"].keys() & {', "a file that is gone does not count"),
        (
            "file.seek(i * (size - PIECE) // (PIECES - 1))",
            "file.seek(i * PIECE)",
            "only the beginning of large weights counts",
        ),
        ("type(value) is not kinds[n] or value < 0]", "not isinstance(value, kinds[n])]", "true is a step, and -1"),
        (
            'then.get("updates_per_rollout", TrainConfig.updates_per_rollout)',
            'then["updates_per_rollout"]',
            "a config.yaml without the line is a traceback",
        ),
        ("    if not progress.update:\n", "    if not rollout:\n", "in the middle of a rollout that is not there"),
        (
            "[i >= prompt and token >= 0 for i, token in",
            "[i > prompt and token >= 0 for i, token in",
            "the first token of a saved answer is not scored",
        ),
        ('_checksum(stored.read()) != facts["checksums"][n]', "False", "a damaged tensor is trained on"),
        (' or text != _sealed(text[:-22] + "}")', "", "damaged JSON is believed"),
        ("lengths[:, 1] < lengths[:, 0]", "lengths[:, 1] <= lengths[:, 0]", "an answer without a token is resumed"),
    ],
    "tests/test_train.py": [
        ("names = SMALL_FILES if", "names = () if", "the tokenizer and the configuration of a model may change"),
        ('("adapter", config.adapter)', '("adapter", "")', "the adapter a run began with may change"),
    ],
    "tests/test_train_objectives.py": [
        (
            "    tensors |= {REFERENCE + name: t for name, t in (frozen or {}).items()}\n",
            "",
            "the reference is not saved",
        ),
        (
            "for n, p in trained.items() if kinds}",
            "for n, p in sorted(trained.items()) if kinds}",
            "a resumed run's state has another order",
        ),
        ("if sizes and changed and (missing", "if False and (missing", "what is missing in a rollout is called damage"),
    ],
}
