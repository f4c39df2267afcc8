"""Wrong edits of nanogspo/inputs.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/inputs.py"
MUTANTS = {
    "tests/test_program.py": [
        (
            "    text = os.environ.get(name) or str(default)",
            "    text = os.environ.get(name, str(default))",
            "an empty WORLD_SIZE is refused",
        ),
        ("    if not text.isdecimal():", "    if False:", "WORLD_SIZE=two is a traceback"),
    ],
    "tests/test_inputs.py": [
        ("if len(data) == ENDLESS:", "if False:", "what is read of an endless device is taken for a whole file"),
        ("            if stat.S_ISREG(", "            if not stat.S_ISREG(", "a device is read without end"),
        (
            "type(value) is kind or (kind is float and type(value) is int)",
            "isinstance(value, kind) or (kind is float and type(value) is int)",
            "true is the number 1",
        ),
        ("or low <= value <= high)", "or not (value < low or value > high))", "nan is within every range"),
        ("    if level:  # json", "    if False:  # json", "whoever copies a deep file runs out of stack"),
        ("sep.join(names[:most]) + rest", "sep.join(names) + rest", "a message of 30,000 characters"),
        ('.removeprefix(b"\\xef\\xbb\\xbf")', "", "a byte mark is broken JSON"),
        ("start) + 1, start", "start), start", "broken bytes are said to be one line higher"),
        (
            "    except RecursionError as error:",
            "    except KeyError as error:",
            "a row of brackets ends in a traceback",
        ),
        ("        sys.path.append(folder)\n", "", "a file cannot import the one beside it later, in a function"),
    ],
    "tests/test_rewards.py": [
        ("sys.path.insert(0, folder)", "sys.path.insert(0, name)", "a file cannot import the one beside it"),
        (
            'f"user_{os.path.splitext(name)[0]}"',
            "os.path.splitext(name)[0]",
            "a file called random.py replaces Python's",
        ),
        ("frame.filename == file]", "frame.filename]", "the line is that of a library"),
    ],
}
