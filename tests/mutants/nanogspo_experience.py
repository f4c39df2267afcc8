"""Wrong edits of nanogspo/experience.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/experience.py"
MUTANTS = {
    "tests/test_experience.py": [
        ("if advantages[i] != 0]", "]", "answers with nothing to teach are trained on"),
        ("torch.tensor(kept)[b.index]", "b.index + rows[0]", "advantages of other answers, once some are left out"),
        ("min(rows, key=lambda", "max(rows, key=lambda", "of a minibatch with nothing to teach the longest is kept"),
        (
            "[examples[i] for i in kept]",
            "[examples[i - first] for i in kept]",
            "every minibatch trains on the answers of the first",
        ),
        ('"truncated": not a.finished, ', '"truncated": a.finished, ', "truncated says its opposite"),
        (
            "        temperature=config.temperature,\n        device=config.device,",
            "        temperature=1.0,\n        device=config.device,",
            "old log-probs scored at another temperature",
        ),
        ("first_prompt=first_problem,", "", "every rollout is sampled with the same random numbers"),
        (
            "train_problem(first_problem + i, config.seed)",
            "train_problem(i, config.seed)",
            "the same problems in every rollout",
        ),
    ],
    "tests/test_train.py": [
        ("if update or score_first", "if update and score_first", "no first rollout is scored twice"),
        (
            "if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):",
            "if not any(a.finished for a in answers):",
            "half a rollout is trained on",
        ),
        ("(prompt, skip_special_tokens=False)", "(prompt)", "samples.jsonl without the marks that the model reads"),
    ],
}
