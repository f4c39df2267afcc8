"""Wrong edits of tools/suite.py, one at a time: see tools/mutate.py."""

FILE = "tools/suite.py"
MUTANTS = {
    "tests/test_suite.py": [
        ("limit = (2 * entry + 3) * slower", "limit = 2 * entry + 3", "a slow machine turns the suite red"),
        ("return max(1.0, max(loops) / there)", "return max(loops) / there", "a fast machine has less time"),
        (
            "        session.exitstatus = pytest.ExitCode.TESTS_FAILED",
            "        pass",
            "a broken budget leaves CI green",
        ),
        ("lambda item: -seconds", "lambda item: seconds", "the shortest file starts first"),
        ("    if not whole or os", "    if os", "a part of the suite is held to the budget of the whole"),
        ("sum(os.times()[:4])", "os.times()[4]", "what other programs do counts"),
        ("> WORTH_IT and", "> 0 and", "short files wait for workers"),
    ],
}
