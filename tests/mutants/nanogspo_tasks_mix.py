"""Wrong edits of nanogspo/tasks/mix.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/mix.py"
MUTANTS = {
    "tests/test_mix.py": [
        ("self.shares[name] * total - self._counts[name]", "self.shares[name]", "one task gets every problem"),
        ("train_problem(own, seed)", "train_problem(n, seed)", "a task's problems are skipped"),
        ("i < count % len(self.tasks)", "0", "fewer held-out problems than asked for"),
        ("share / sum(shares)", "share", "shares that do not sum to 1"),
        ("else reward >= 1", "else reward > 0", "a task without exact calls half a reward right"),
    ],
}
