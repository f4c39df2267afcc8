"""Wrong edits of benchmarks/controls.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "benchmarks/controls.py"
MUTANTS = {
    "tests/test_controls.py": [
        ("half = T95[len(rows)] *", "half = 1.96 *", "an interval of three seeds as narrow as that of many"),
        (
            'all(row["end"] == GSPO[seed]["end"]',
            'all(row["eval_exact"] == GSPO[seed]["eval_exact"]',
            "equal results pass for the same weights",
        ),
        ('startswith(("optimizer.", ', "startswith((", "a start that differs in its optimiser is another start"),
        ('metadata={"Source": source(runs)}', "metadata={}", "a picture of older numbers"),
        ('f"{updates[0]}" + f" to {updates[-1]}" *', 'f"{updates[0]}" + "" *', "updates of one seed stand for all"),
    ],
}
