"""Wrong edits of nanogspo/tasks/addition.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/addition.py"
MUTANTS = {
    "tests/test_tasks.py": [
        ('f"{min(a, b)}+{max(a, b)}"', 'f"{a}+{b}"', "38+47 in the exam, 47+38 in training"),
        ("            if a != b:\n", "            if True:\n", "44+44 twice an epoch"),
        (
            "zip(reversed(number), reversed(reference), strict=False)",
            "zip(number, reference, strict=False)",
            "digits compared from the left, where a longer number shifts them all",
        ),
        ("max(len(number), len(reference))", "len(reference)", "digits too many cost nothing"),
        (
            'self._draw(f"{seed}/{n}", held_out=False)',
            'self._draw(f"{seed}/{n}", held_out=n % 2 == 1)',
            "training on the exam, only where pairs are not listed",
        ),
        (
            "last_number(answer_text) == problem.answer",
            "answer_text.strip() == problem.answer",
            "a sentence around the right number makes it wrong",
        ),
        ('sign = "-" if found[-1]', 'sign = "-" if found[0]', "the sign of another number"),
        ("(?<![\\w)])[-−]", "[-−]", "47-38 ends in -38"),
        ('+(?![0-9])"', '+"', "1,2345 read as 1,234 and a 5"),
        ('if decimals.strip("0") else', "if decimals else", "85.0 is not 85"),
    ],
}
