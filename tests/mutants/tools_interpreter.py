"""Wrong edits of tools/interpreter.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "tools/interpreter.py"
MUTANTS = {
    "tests/test_backend.py": [
        (
            "    return total + d\n",
            "    return total\n",
            "the accumulator is dropped",
        ),
        (
            "for k in range(a.shape[-1]):",
            "for k in np.roll(range(a.shape[-1]), a.shape[-2]):",
            "an order of additions that follows the height of the tile, as a BLAS's may",
        ),
        (
            "rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)",
            "rounded = (bits >> 16)",
            "bf16 by truncation",
        ),
    ],
}
