"""Wrong edits of nanogspo/storage/names.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/names.py"
MUTANTS = {
    "tests/test_checkpoint.py": [
        (
            "    return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)",
            "    return HEAD if name.endswith(HEAD) else next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)",
            "any name that ends like the head's is the head",
        ),
        (
            "(match := FOREIGN_PART.search(name)) and",
            "(match := FOREIGN_PART.match(name)) and",
            "a compiled block's names are a list of unknown tensors",
        ),
    ],
}
