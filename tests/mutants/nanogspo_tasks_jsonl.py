"""Wrong edits of nanogspo/tasks/jsonl.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/jsonl.py"
MUTANTS = {
    "tests/test_tasks.py": [
        (
            "start=1):\n        if not raw",
            "start=0):\n        if not raw",
            "an error that names the line above the bad one",
        ),
        (
            "if len(tokens) <= max_length]",
            "if len(tokens) < max_length]",
            "a row of exactly the maximal length is left out",
        ),
        ("            too_long.append(line)", "            pass", "rows left out in silence"),
        (
            "written = [*tokenizer.encode_continuation(completion), min(tokenizer.eos_ids)]",
            "written = tokenizer.encode_continuation(completion)",
            "a model that never learns to stop",
        ),
        ("[False] * len(prompt)", "[True] * len(prompt)", "loss on the prompt"),
        (
            '"content": completion}], [len(messages)]',
            '"content": completion}], None',
            "loss on what the prompt's assistant said, and a given turn that refuses its row",
        ),
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
        ("| given | ({", "| ({", "chat_template_kwargs of a row are ignored"),
        ('({"tools": tools} if tools else {})', "{}", "tools of a row are ignored"),
        ("[turn + 1 for turn in learn]", "learn", "a system turn moves the loss one turn up"),
        ("    elif system and messages[0]", "    elif False and messages[0]", "a second system text is ignored"),
        ("and not tokenizer.spells(key):", "and False:", "tools that the template does not read are ignored"),
        ('_refuse_foreign(row, "the row")', "None", "images of a row are ignored"),
        (
            'notes.update(f"{key!r} is not used" for key in row if key not in used)',
            "None",
            "a misspelt key is ignored in silence",
        ),
    ],
}
