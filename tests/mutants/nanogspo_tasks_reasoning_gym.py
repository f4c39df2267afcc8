"""Wrong edits of nanogspo/tasks/reasoning_gym.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/tasks/reasoning_gym.py"
MUTANTS = {
    "tests/test_reasoning_gym.py": [
        ('is_held_out(row["question"]) == held_out', "True", "held-out questions trained on"),
        ("(answers or [answer_text])[-1]", "(answers or [answer_text])[0]", "a first try counts"),
        ("            return 0.0\n", "            raise\n", "a scorer's error ends the run"),
    ],
}
