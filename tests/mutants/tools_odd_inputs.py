"""Wrong edits of tools/odd_inputs.py, one at a time: see tools/mutate.py."""

FILE = "tools/odd_inputs.py"
MUTANTS = {
    "tests/test_fuzz.py": [
        (
            'key if how == "twice" else "unknown"',
            '"unknown"',
            "no key comes twice",
        ),
        ("    path.unlink()\n    if how", "    if how", "no file is gone"),
        ('elif what == "turned":\n            entry', "elif what:\n            entry", "no offsets are wrong"),
        ('path.suffix in (".json", ".jsonl")', 'path.suffix == ".json"', "rows are spoiled as plain text"),
        ("dice.random() < 0.25 or not", "not", "no bytes are spoiled"),
    ],
}
