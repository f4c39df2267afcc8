"""Wrong edits of nanogspo/tasks/jsonl.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/jsonl.py"
MUTANTS = {
    "tests/test_tasks.py": [
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
        ("| given | ({", "| ({", "chat_template_kwargs of a row are ignored"),
        ('({"tools": tools} if tools else {})', "{}", "tools of a row are ignored"),
        ("turn + len(messages) - turns for", "turn for", "a system turn moves the loss one turn up"),
        ("len(str(path)) :]))", "0:]))", "digits of a file's name taken for the line's"),
        ("and not tokenizer.spells(key):", "and False:", "tools that the template does not read are ignored"),
        ('refuse_foreign(row, "the row")', "None", "images of a row are ignored"),
        (
            'notes.update(f"{key!r} is not used" for key in row if key not in used)',
            "None",
            "a misspelt key is ignored in silence",
        ),
    ],
}
