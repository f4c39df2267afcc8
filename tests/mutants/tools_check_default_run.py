"""Wrong edits of tools/check_default_run.py, one at a time: see tools/mutate.py."""

FILE = "tools/check_default_run.py"
MUTANTS = {
    "tests/test_check_default_run.py": [
        ("if len(below) > len(runs) // 3:", "if len(below) > 1:", "a single seed may be below 90 %"),
        ("(i > 0 or cpu <= most,", "(cpu <= most,", "two runs side by side are held to the clock"),
        ('exact.get("gspo", 1.0) >= NEARLY', 'exact.get("gspo", 1.0) >= 0.5', "a seed that hardly learns passes"),
        ("max(1.0, *(seconds / UNIT for seconds in units))", "1.0", "a slow machine breaks the README's promise"),
        ("max(1.0, *(", "max(*(", "a fast machine has less time than the README says"),
        ("            (code == 0, ", "            (True, ", "a run that ended with an error passes"),
    ],
}
