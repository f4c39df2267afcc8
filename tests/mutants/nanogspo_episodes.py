"""Wrong edits of nanogspo/episodes.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/episodes.py"
MUTANTS = {
    "tests/test_conversation.py": [
        (
            "self.parts[name] = self.parts.get(name, 0.0) + value",
            "self.parts[name] = value",
            "the last turn's part only",
        ),
        (
            "Mean.of([own.get(name, 0.0) for own in parts])",
            "sum(own.get(name, 0.0) for own in parts)",
            "a sum, no mean",
        ),
        ("[e.parts for e in episodes if not e.failed]", "[e.parts for e in episodes]", "half a reward is a component"),
    ],
    "tests/test_episodes.py": [
        (
            "self.add(answer.tokens, True)",
            "self.add(answer.tokens, not self.history)",
            "only the first turn is trained on",
        ),
        (
            "            e.add(tokens, False)\n\n\ndef go_on",
            "            e.add(tokens, True)\n\n\ndef go_on",
            "the prompt is trained on",
        ),
        (
            "    if len(e.tokens) + len(tokens) <= room:\n        e.add(tokens, False)",
            "    if len(e.tokens) + len(tokens) <= room:\n        e.add(tokens, True)",
            "tool results are trained on",
        ),
        ("return tokens[stop + 1 :]", "return tokens[stop:]", "two stop tokens after a turn"),
        (
            "tokens = chat.tokenizer.encode_continuation(after)",
            "tokens = chat.tokenizer.encode_continuation(after.rstrip())",
            "a bridge without the template's last newline",
        ),
        (
            "(e.number, e.answer if turn else 0, turn) for e",
            "(e.number, 0, turn) for e",
            "all answers of a group draw alike from the second turn on",
        ),
        (
            "(e.number, e.answer if turn else 0, turn) for e",
            "(e.number, e.answer, 1) for e",
            "the third turn is drawn like the second",
        ),
        ("if answer.finished and not e.failed]", "if not e.failed]", "a turn that was cut off is answered"),
        (
            "if answer.finished and not e.failed]",
            "if answer.finished]",
            "an environment that has failed is asked again",
        ),
        (
            "running = [e for e in asked if not e.loss_mask[-1]]",
            "running = [e for e in asked if not e.done and not e.failed]",
            "another turn without a bridge",
        ),
        ("and turn + 1 < config.max_turns", "", "a bridge after the last turn"),
        (
            "len(e.tokens) + len(tokens) <= room",
            "len(e.tokens) + len(tokens) < room",
            "the last turn that fits is not sampled",
        ),
        ("model.max_positions) - config.max_new_tokens", "model.max_positions)", "no room for the turn itself"),
        (
            "if self.rewards and not self.failed else math.nan",
            "if not self.failed else math.nan",
            "an episode without a reward earns 0",
        ),
        (
            "sum(self.rewards) if self.rewards and not self.failed",
            "sum(self.rewards) if self.rewards",
            "a failed episode earns what it had",
        ),
        ("return sum(self.rewards)", "return self.rewards[-1]", "only the last reward counts"),
        (
            "if e.truncated and e.truncated_reward is not None:",
            "if e.truncated_reward is not None:",
            "episodes that ended themselves pay for being cut off",
        ),
        ("return not self.done and not self.failed", "return not self.done", "failed episodes count as cut off"),
        (
            "(e.messages, e.tools) != (first.messages, first.tools)",
            "e.tools != first.tools",
            "an episode with messages that it has not read",
        ),
        (
            "{self.run_seed}-{self.number}",
            "{self.run_seed}-{self.number}-{self.answer}",
            "answers to different questions in one group",
        ),
        ("len(episodes) - len(running) + complete", "complete", "progress falls back at every turn"),
        ("        if stopped:\n            return None\n", "", "half a turn is trained on"),
        ("    if len(tokens) > room:\n", "    if False:\n", "a prompt beyond the limit"),
        (
            "        e.failed = str(error)\n        return\n",
            "        raise\n",
            "what one environment said ends the run",
        ),
        ("        return match[0]\n        calls", '        return ""\n        calls', "a malformed call vanishes"),
        ("(ValueError, RecursionError)", "ValueError", "a call nested too deeply ends the run"),
        ('        content = content.lstrip("\\n")\n', "", "a newline between thought and answer"),
        ('    if not again.startswith(fixed[0]):\n        return "elsewhere"\n', "", "another prompt goes unnoticed"),
        (
            'if matches(part, turn) else "thinking"',
            'if matches(part, kept) else "thinking"',
            "dropped thinking counts as none",
        ),
        (
            "fixed = [piece.removesuffix(opened) for",
            "fixed = [piece for",
            "a thought opened by the prompt counts as another prompt",
        ),
        ('"turns"].index)', '"turns"].index) and min(found)', "not the worst place"),
        (
            '    if e.tools and not chat.tokenizer.spells("tools"):\n',
            "    if False:\n",
            "tools that the model never reads about",
        ),
        ('| ({"tools": e.tools} if e.tools else {})', "", "the model is not told of its tools"),
    ],
}
