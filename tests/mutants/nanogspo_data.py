"""Wrong edits of nanogspo/data.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/data.py"
MUTANTS = {
    "tests/test_data.py": [
        (
            "if longest + config.max_new_tokens > model.max_positions:",
            "if longest > model.max_positions:",
            "no room for an answer, found out in a rollout",
        ),
        ("if longest_answer > config.max_new_tokens:", "if False:", "answers that are always cut"),
        ("seed + SFT_STREAM", "seed", "a warm-up on the problems that RL starts with"),
        ("self.seed + PROBE_STREAM", "self.seed", "a probe of the problems that RL starts with"),
    ],
    "tests/test_conversation.py": [
        ("if isinstance(self.task, type):", "if False:", "a class as a task ends in a traceback"),
        ('return {"environment": "python"}', "return {}", "a resumed run goes on without its environment"),
        ("if len(self.weights) not in {0, len(self.rewards)}:", "if False:", "weights without rewards are dropped"),
        (
            'if config.environment == "python" and given.environment is None:',
            "if False:",
            "a resumed run goes on without its environment, until it asks it",
        ),
        (
            'talks != {config.environment == "conversation"}:',
            "False:",
            "beside conversations half of the problems fail, or have no customer",
        ),
        ('if config.environment not in ("", "conversation", "python"):', "if False:", "--environment is dropped"),
        (
            "if not fit or not all(map(math.isfinite, self.weights)):",
            "if False:",
            "a weight of nan takes all rewards away",
        ),
        ("lacks := [name", "lacks := [] and [name", "the name of a task ends in a traceback"),
    ],
    "tests/test_train.py": [
        (
            '(model.max_positions, "max_position_embeddings")',
            '(2**40, "max_position_embeddings")',
            "rows that the model cannot see whole are trained on",
        ),
    ],
}
