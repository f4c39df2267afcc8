"""Wrong edits of nanogspo/tasks/countdown.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/countdown.py"
MUTANTS = {
    "tests/test_countdown.py": [
        (' and sorted(used) == sorted(problem.row["numbers"])', "", "the target itself is a right answer"),
        ("sorted(used) == sorted", "set(used) == set", "numbers used as often as one likes"),
        ("evaluate(answers[-1])", "evaluate(answers[0])", "a first try counts, the correction does not"),
        ('.rpartition("</think>")[2]', "", "thinking aloud is bad form"),
        ("FORM.fullmatch(", "FORM.search(", "anything around the answer is good form"),
        ('f"{sorted(numbers)}={target}"', 'f"{numbers}={target}"', "one question on both sides"),
        ("{1,200}", "+", "brackets that the parser has no stack for"),
        ("ast.Div: operator.truediv", "ast.Div: operator.floordiv", "3/2*2 is 2"),
        (
            "            return -value(node.operand)",
            "            return value(node.operand)",
            "a minus sign that is not read",
        ),
    ],
}
