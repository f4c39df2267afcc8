"""Wrong edits of nanogspo/tasks/prompts.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/tasks/prompts.py"
MUTANTS = {
    "tests/test_prompts.py": [
        (" if key not in chosen]", "]", "held-out prompts trained on"),
        ('f"{seed}-{epoch}"', 'f"{seed}"', "every epoch in one order"),
        ("        self._rows = kept\n", "", "prompts that are too long"),
        ('turn in turns if turn["role"] != "system"]', "turn in messages]", "one question on both sides"),
        ('row.get("system") or ""', "system", "a system turn of the row's own lost"),
        ('        if messages[0]["role"] != "system":\n', "        if True:\n", "two system turns that differ"),
        ("isinstance(row.get(key), str)", "key in row", "a number for an answer"),
        ('not in ("user", "tool")', "in ()", "a prompt that has its answer"),
        ('problem.answer != "" and ', "", "nothing said is right where no answer is known"),
    ],
}
