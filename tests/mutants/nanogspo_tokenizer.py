"""Wrong edits of nanogspo/tokenizer.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tokenizer.py"
MUTANTS = {
    "tests/test_tokenizer.py": [
        (
            "loss_mask += [True] * produced + [False] * (len(answer) - produced)",
            "loss_mask += [True] * (produced - 1) + [False] * (len(answer) - produced + 1)",
            "the turn end is not learnt",
        ),
    ],
}
