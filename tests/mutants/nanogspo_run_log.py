"""Wrong edits of nanogspo/run/log.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/log.py"
MUTANTS = {
    "tests/test_log.py": [
        (
            "    with writing(file.name):\n        file.write",
            "    if True:\n        file.write",
            "a row that the disk has no room for is an error without a file",
        ),
        ("            with writing(file.name):  #", "            if True:  #", "closing the file hides which was full"),
        ("unrewarded {number('unrewarded_frac'):4.2f}", "", "answers without a reward are not seen while it trains"),
        ("centre = (share + z2 / 2) / (1 + z2)", "centre = share", "the textbook interval, which leaves [0, 1]"),
        (
            "None if isinstance(value, float) and not math.isfinite(value) else value",
            "None if value != value else value",
            "infinities are not JSON either",
        ),
        ("number('truncated_frac')", "number('zero_spread_frac')", "one share shown twice, the other never"),
        ("LINE_EVERY if self._bar is None else BAR_EVERY", "BAR_EVERY", "a log with a line a second"),
        ("said, text = now, f", "_, text = now, f", "after half a minute, a line a token"),
        ('self._bar.set_postfix_str("", refresh=False)', "pass", "the bar speaks of a rollout that has ended"),
        ("return bool(stop)", "return False", "Ctrl-C waits for the end of the rollout"),
        ("if not self.has(doctor=what):", "if True:", "the same hint at every rollout"),
        ('if row["algo"] == algo]', "if row]", "the warm-up's rows are taken for RL's"),
        ("    file.flush()", "    pass", "a killed run loses its last rows"),
        (
            "                if next(lines, None) is not None:",
            "                if False:",
            "a broken row ends the file",
        ),
        ('row.get("step", 0) <= step]', 'row.get("step", 0) < step]', "a resumed run forgets the step it was saved at"),
        ('line.removesuffix(b"\\n") + b"\\n"', "line", "a row whose end was cut off and the next share a line"),
        (
            "math.nan if any(map(math.isnan, ends)) else max(ends)",
            "max(ends)",
            "a ratio of NaN printed as a perfect one",
        ),
        (
            "number('clip_low_frac') + number('clip_high_frac')",
            "number('clip_high_frac')",
            "half of the clipping is not shown",
        ),
        ('config.lora_r and config.model != "tiny"', "config.lora_r", "the last line names a model that is nowhere"),
        ("path = shlex.quote(str(weights))", "path = str(weights)", "the last line breaks at a blank"),
    ],
}
