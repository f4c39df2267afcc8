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
    ],
}
