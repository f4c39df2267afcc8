"""Wrong edits of nanogspo/evaluation.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/evaluation.py"
MUTANTS = {
    "tests/test_evaluation.py": [
        ("    model.eval()\n", "", "a held-out loss with dropout"),
        ("    model.train(was_training)\n", "", "training goes on without dropout"),
        (
            "-logp / tokens, right / tokens",
            "-logp / len(examples), right / tokens",
            "a loss per row, beside training's per token",
        ),
        ("        if stop:\n", "        if False:\n", "held-out rows are scored though the run is asked to stop"),
        ("<= room]", "< 10**9]", "an evaluation that ends the run: no room for an answer"),
        ("if not e.loss_mask[t]), len", "if e.loss_mask[t]), len", "a reference cut to nothing"),
    ],
    "tests/test_tasks.py": [
        (" and tuple(e.tokens) not in known]", "]", "a held-out row trained on in another form"),
        ("if e.row not in chosen and tuple", "if tuple", "a held-out row trained on under another system prompt"),
        ("steps = max(1, math.ceil", "steps = max(0, math.ceil", "a run of no update, whose record is refused"),
        ("and e.line == rows[e.row]]", "]", "a repeated row measured twice"),
        ("math.ceil(round(config.epochs", "math.floor(round(config.epochs", "the last rows of the last epoch left out"),
    ],
    "tests/test_train.py": [
        ("planner.cache_slots(config, max(tokens), distributed.world())", "10**9", "an exam of 500 rows at a time"),
    ],
}
