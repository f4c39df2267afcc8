"""Wrong edits of nanogspo/run/curves.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/curves.py"
MUTANTS = {
    "tests/test_curves.py": [
        (
            "    with whole_file(path) as file:",
            '    with open(path, "wb") as file:',
            "a full disk leaves half a picture",
        ),
        ("if len(values) < FEW:", "if not values:", "six points smoothed away"),
        ("max(mean[-1] - half, possible[0])", "mean[-1] - half", "a share below 0"),
        ("min(mean[-1] + half, possible[1])", "mean[-1] + half", "a share above 1"),
        ("(0, 1) if share else (-math.inf, math.inf)", "(0, 1)", "a reward of 5 under a band that ends at 1"),
        ("if i == 0 or facts[i] != facts[i - 1]", "if facts", "one rollout counted as four measurements"),
        (
            'row.get("ratio_max") == 1] or rows',
            'row.get("ratio_max") == 2] or rows',
            "a comb that touches 1 at every fourth update",
        ),
        ("new: row.get(new, row.get(old))", "new: row.get(old)", "minimum and maximum drawn as quantiles"),
        ('_series(held_out, f"eval_{key}")', '_series(held_out, "eval_loss")', "a loss drawn as an accuracy"),
        (
            'if row.get("phase") == "sft"][-1:] + control',
            'if row.get("phase") == "sft"][-1:]',
            "the control's line is not drawn",
        ),
    ],
}
