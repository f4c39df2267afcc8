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
            "written = [*tokenizer.encode_plain(completion), min(tokenizer.eos_ids)]",
            "written = tokenizer.encode_plain(completion)",
            "a model that never learns to stop",
        ),
        ("[False] * len(given)", "[True] * len(given)", "loss on the prompt"),
        (
            "return [_last_answer_only(*sequences[-1])]",
            "return sequences",
            "loss on what the prompt's assistant said",
        ),
        ('message["role"] == "assistant" or not', "not", "empty answers are learned"),
    ],
}
