"""Wrong edits of nanogspo/tasks/forms.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/forms.py"
MUTANTS = {
    "tests/test_tasks.py": [
        (
            "if assistant or not isinstance(content, str):",
            "if not isinstance(content, str):",
            "empty answers are learned",
        ),
        ("return bool(said[0][1]) if said else learnable", "return learnable", "weight 0 and train false are ignored"),
        (
            "    if len({bool(value) for _, value in said}) > 1:",
            "    if False:",
            "weight counts, train that contradicts it does not",
        ),
        ("        if value and not learnable:", "        if False:", "train true on a user turn is ignored"),
        ('messages[0]["content"] == system)', "True)", "a second system text is ignored"),
    ],
    "tests/test_forms.py": [
        (
            'message |= {"content": "", "tool_calls"',
            'message |= {"tool_calls"',
            "a call learned twice: as text and as a call",
        ),
        (
            '("tool", "observation", "function_response"), "tool"',
            '("tool", "observation", "function_response"), "user"',
            "results of tools that users say",
        ),
        (
            "    if not chat:\n        headings",
            "    if False:\n        headings",
            "a base model that is not shown where the answer begins",
        ),
        ("pairs = [*history, [", "pairs = [[", "a conversation without its beginning"),
        ('part.get("type") != "text"', "False", "pictures with a caption read as text"),
        ('for key in ("instruction", "input") if', 'for key in ("instruction",) if', "a question without its input"),
        ('"content": value, **more}', '"content": value}', "a turn not to learn is learned"),
    ],
}
