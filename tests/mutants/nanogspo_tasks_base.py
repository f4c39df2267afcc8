"""Wrong edits of nanogspo/tasks/base.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/base.py"
MUTANTS = {
    "tests/test_tasks.py": [
        (
            "zlib.crc32(key.encode()) % 10 == 0",
            "hash(key) % 10 == 0",
            "a split that is salted anew in every process",
        ),
        (
            "    random.Random(stream).shuffle(order)",
            "    random.Random(0).shuffle(order)",
            "every seed and every epoch in the same order",
        ),
        ("sorted(hashes)[:count]", "list(hashes)[:count]", "held out by the order of the file"),
        ("len(hashes) // 10) if", "len(hashes)) if", "a file of 250 rows with 50 to train on"),
    ],
}
