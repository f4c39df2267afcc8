"""Wrong edits of nanogspo/planner.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/planner.py"
MUTANTS = {
    "tests/test_planner.py": [
        ("max(element, 4)", "element", "a CPU's cache counted in bf16"),
        ("if name not in (CACHE, BLOCKS)", "if name", "checkpointing for the sake of a cache that is gone by then"),
        ("if needed <= FILL * available:", "if needed >= FILL * available:", "checkpointing where memory abounds"),
        (
            "rows * (config.max_new_tokens - 1)",
            "rows * config.max_new_tokens",
            "a slot for the last token, which is never fed",
        ),
        (
            '"gradients": numbers * 4',
            '"gradients": numbers * element',
            "gradients are summed in fp32 whatever the weights are",
        ),
        (
            "whole = groups * prompt + size * answer",
            "whole = size * (prompt + answer)",
            "memory for a prompt for each answer",
        ),
        (
            "groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))",
            "groups = size // G",
            "updates that begin within a group",
        ),
        ("element * (2 * queries + 2 * keys", "element * (3 * queries + 2 * keys", "a second copy of out"),
    ],
    "tests/test_quant.py": [
        (
            "sum(layer.nbytes for layer in packed)",
            "sum(layer.weight.nbytes for layer in packed)",
            "scales and tables not counted",
        ),
    ],
}
