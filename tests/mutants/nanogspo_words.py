"""Wrong edits of nanogspo/words.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/words.py"
MUTANTS = {
    "tests/test_words.py": [
        ('.replace("-", "_").split(".")', '.split(".")', "only one spelling is known"),
        ("WORDS.get(parts[-1])", "None", "verl's data.train_batch_size is not read by its end"),
        (
            "if not entry or not all(field in fields for field in fields_of(entry)):",
            "if not entry:",
            "sample.py names flags of train.py",
        ),
        (
            'if "true" in ours else value.lower()',
            "if False else value.lower()",
            "--use-4bit without a value is not understood",
        ),
        ('and said not in ("none", "null")', "", "None is no value to copy"),
        (
            'ours = ours.get(said) or ours.get("*" * (said not in ours), "")',
            'ours = ours.get(said) or ours.get("*", "")',
            "max_steps -1 becomes --steps -1",
        ),
        ('elif ours and value.lower() in ("none", "null"):', "elif False:", "output_dir None is a folder of that name"),
        ('values if ours.startswith("--reward ") else', "values if False else", "two rewards become one name"),
        ('ours.replace("{}", shlex.quote(v))', 'ours.replace("{}", v)', "a value with a blank cannot be pasted"),
        ('["false"] if no else []', "[]", "YAML says the opposite of the flag"),
        ("in_yaml(ours) if yaml else ours", "ours", "a file's field is called by its flag"),
        ("values = [value] if equals else after[:stop]", "values = after[:stop]", "--num_generations=16 loses its 16"),
        (
            'if word.startswith("--")), len(after))',
            'if word.startswith("-")), len(after))',
            "max_steps -1 has no value",
        ),
        ("elif found and found[0]:", "elif False:", "a pasted command is corrected one flag a run"),
    ],
}
