"""Wrong edits of nanogspo/tasks/rows.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/rows.py"
MUTANTS = {
    "tests/test_tasks.py": [
        ("start=1):", "start=0):", "an error that names the line above the bad one"),
    ],
    "tests/test_rows.py": [
        ("    if empty:\n", "    if False:\n", "a run on no rows"),
        ('.lstrip()[:1] == b"["', '[:1] == b"["', "an array behind a blank line read as lines"),
        (
            "    if isinstance(value, dict):\n        return {str(key): plain(v, column) for key, v in value.items() if v is not None}",
            "    if isinstance(value, dict):\n        return {str(key): plain(v, column) for key, v in value.items()}",
            "tool calls of null in every turn",
        ),
        ("config, _, split = ", "split, _, config = ", "a configuration taken for a split"),
        ("(train|validation|test)\\b", "(train|validation|test)", "a configuration called trained taken for a split"),
        ('split=split or "train"', "split=split or None", "a dictionary of splits for rows"),
        ("if not isinstance(row, dict):", "if False:", "numbers for rows"),
    ],
}
