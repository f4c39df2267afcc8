"""Wrong edits of nanogspo/tasks/addition.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/addition.py"
MUTANTS = {
    "tests/test_tasks.py": [
        ('f"{min(a, b)}+{max(a, b)}"', 'f"{a}+{b}"', "38+47 in the exam, 47+38 in training"),
        ("            if a != b:\n", "            if True:\n", "44+44 twice an epoch"),
        (
            "zip(reversed(answer), reversed(reference), strict=False)",
            "zip(answer, reference, strict=False)",
            "digits compared from the left, where a longer number shifts them all",
        ),
        ("max(len(answer), len(reference))", "len(reference)", "digits too many cost nothing"),
        (
            'self._draw(f"{seed}/{n}", held_out=False)',
            'self._draw(f"{seed}/{n}", held_out=n % 2 == 1)',
            "training on the exam, only where pairs are not listed",
        ),
        (
            "answer_text.strip() == problem.answer",
            "answer_text == problem.answer",
            "a space in front of the number makes it wrong",
        ),
    ],
}
