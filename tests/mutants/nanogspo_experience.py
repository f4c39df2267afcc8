"""Wrong edits of nanogspo/experience.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/experience.py"
MUTANTS = {
    "tests/test_train.py": [
        ("if advantages[i] != 0]", "]", "answers with nothing to teach are trained on"),
        ("torch.tensor(kept)[b.index]", "b.index + rows[0]", "advantages of other answers, once some are left out"),
        (
            "min(rows, key=lambda",
            "max(rows, key=lambda",
            "of a minibatch with nothing to teach the longest is kept",
        ),
        ("if update or score_first", "if update and score_first", "no first rollout is scored twice"),
        (
            "[examples[i] for i in kept]",
            "[examples[i - first] for i in kept]",
            "every minibatch trains on the answers of the first",
        ),
    ],
}
