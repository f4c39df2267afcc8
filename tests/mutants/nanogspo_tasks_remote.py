"""Wrong edits of nanogspo/tasks/remote.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/remote.py"
MUTANTS = {
    "tests/test_rewards.py": [
        ("if not self.model or", "if", "asked without a model"),
    ],
}
