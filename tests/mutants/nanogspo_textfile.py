"""Wrong edits of nanogspo/textfile.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/textfile.py"
MUTANTS = {
    "tests/test_textfile.py": [
        ('.removeprefix(b"\\xef\\xbb\\xbf")', "", "a byte order mark becomes a character"),
        ("start) + 1, start", "start), start", "broken bytes are said to be one line higher"),
        (
            "    except RecursionError as error:",
            "    except ZeroDivisionError as error:",
            "deep nesting is a traceback",
        ),
    ],
}
