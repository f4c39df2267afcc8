"""Wrong edits of nanogspo/tasks/__init__.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/tasks/__init__.py"
MUTANTS = {
    "tests/test_tasks.py": [
        (
            "TASKS[name]() if size is None else TASKS[name](size)",
            "TASKS[name]()",
            "a size that is asked for has no effect",
        ),
    ],
}
