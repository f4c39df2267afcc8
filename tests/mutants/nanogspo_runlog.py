"""Wrong edits of nanogspo/runlog.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/runlog.py"
MUTANTS = {
    "tests/test_runlog.py": [
        ("centre = (share + z2 / 2) / (1 + z2)", "centre = share", "the textbook interval, which leaves [0, 1]"),
        (
            "None if isinstance(value, float) and not math.isfinite(value) else value",
            "None if value != value else value",
            "infinities are not JSON either",
        ),
        ("    file.flush()", "    pass", "a killed run loses its last rows"),
        (
            'row.get("step", 0) <= step]',
            'row.get("step", 0) < step]',
            "a resumed run forgets the step it was saved at",
        ),
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
        (
            'if row.get("phase") == "sft"][-1:] + control',
            'if row.get("phase") == "sft"][-1:]',
            "the control's line is not drawn",
        ),
    ],
}
