"""Wrong edits of nanogspo/storage/safetensors.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/safetensors.py"
MUTANTS = {
    "tests/test_checkpoint.py": [
        ("math.prod(max(n, 1) for n in shape)", "math.prod(shape)", "an empty tensor of 2**62 columns cannot be made"),
        (
            'file = safe_open(path, "pt", backend=BACKEND)',
            'file = safe_open(path, "pt")',
            "the file is mapped: loading peaks at twice the model",
        ),
        ("(ranks.index(tensors[name].dtype), name)", "name", "tensors in another order than the package's"),
        ('b" " * (-len(text) % 8)', 'b""', "a header that is not padded"),
        ("    if path.is_dir():\n", "    if False:\n", "a folder is an error without a path"),
        ("        if code not in DTYPES:", "        if False:", "a dtype that this program cannot hold is a KeyError"),
    ],
}
