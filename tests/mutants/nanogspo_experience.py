"""Wrong edits of nanogspo/experience.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/experience.py"
MUTANTS = {
    "tests/test_experience.py": [
        (
            "if advantages[i].abs() > 0 or (with_zeros and advantages[i] == 0)]",
            "if advantages[i] == advantages[i]]",
            "answers with nothing to teach are trained on",
        ),
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
        ("(update or score_first)", "(update and score_first)", "no first rollout is scored twice"),
        (
            "if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):",
            "if not any(a.finished for a in answers):",
            "half a rollout is trained on",
        ),
        (
            "(group.prompt, skip_special_tokens=False)",
            "(group.prompt)",
            "samples.jsonl without the marks that the model reads",
        ),
    ],
    "tests/test_train_objectives.py": [
        ("or (with_zeros and advantages[i] == 0)]", "]", "no KL for answers of zero-spread groups"),
        ("if advantages[i].abs() > 0 or", "if advantages[i] != 0 or", "answers that are left out are scored"),
        (
            "advantages[torch.tensor([not a.finished for a in answers])] = torch.nan",
            "pass",
            "--mask-truncated does nothing",
        ),
        ("score_old and (update or score_first)", "(update or score_first)", "REINFORCE scores what it does not need"),
        (
            "key=lambda i: groups[i].spread == 0)[:count]",
            "key=lambda i: groups[i].spread != 0)[:count]",
            "groups without a spread are kept",
        ),
        ("for i in sorted(first)]", "for i in first]", "groups out of their order"),
        ("first_problem + rounds * P, on_step", "first_problem, on_step", "every round asks the same problems"),
        (
            "while rounds <= config.dynamic_sampling",
            "while rounds < max(1, config.dynamic_sampling)",
            "a round too few",
        ),
        ("rollout_facts(task, groups) |", "rollout_facts(task, kept) |", "the reward of groups with a spread alone"),
        ("    with reference or nullcontext():", "    with nullcontext():", "the policy is its own reference"),
        ("trained / max(int(counts.sum()), 1)", "trained / size", "a mean over answers that are left out"),
    ],
}
