"""Wrong edits of nanogspo/tasks/reverse.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/reverse.py"
MUTANTS = {
    "tests/test_tasks.py": [
        (
            "is_held_out(min(word, word[::-1]))",
            "is_held_out(word)",
            "the exam asks for a word whose answer was a training prompt",
        ),
        ("diagonal + 1 if x == y else", "row[j + 1] + 1 if x == y else", "one letter matched many times"),
        (
            "/ max(len(answer), len(problem.answer))",
            "/ len(problem.answer)",
            "an answer that holds every letter sequence scores 1",
        ),
    ],
}
