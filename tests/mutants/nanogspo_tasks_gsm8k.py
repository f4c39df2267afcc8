"""Wrong edits of nanogspo/tasks/gsm8k.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/gsm8k.py"
MUTANTS = {
    "tests/test_gsm8k.py": [
        ("marked[-1]", "marked[0]", "a number that was corrected"),
        ("LAST_LINE.fullmatch(", "LAST_LINE.search(", "strict is as lenient as lenient"),
        ("held_out=len(rows) // 10", "held_out=0", "nothing is held out"),
        ('re.sub(r"<<.*?>>", "", answer)', "answer", "calculator notes to imitate"),
        ("0.5 * self", "1.0 * self", "form pays nothing"),
    ],
}
