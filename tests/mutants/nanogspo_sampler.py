"""Wrong edits of nanogspo/sampler.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/sampler.py"
MUTANTS = {
    "tests/test_rewards.py": [
        ("else Mean.of(v) for", "else sum(v) / len(v) for", "a mean of means is logged for the mean"),
    ],
    "tests/test_router_replay.py": [
        (
            "torch.cat(e.experts) if e.experts else None",
            "e.experts[-1] if e.experts else None",
            "only the last turn's experts",
        ),
    ],
    "tests/test_sampler.py": [
        (
            '"effective_groups": sum(group.teaches for group in groups)',
            '"effective_groups": len(groups)',
            "groups without a spread count as effective",
        ),
        (
            "answer.logp, chat.text(answer.tokens), not answer.finished",
            "answer.logp, chat.text(answer.tokens), answer.finished",
            "truncated says its opposite",
        ),
        (
            "            temperature=config.temperature,\n            device",
            "            temperature=1.0,\n            device",
            "old log-probs scored at another temperature",
        ),
        (
            "[(n, 0, 0) for n in numbers]",
            "[(0, 0, 0) for n in numbers]",
            "every rollout is sampled with the same random numbers",
        ),
        (
            "train_problem(first_problem + i, config.seed)",
            "train_problem(i, config.seed)",
            "the same problems in every rollout",
        ),
    ],
    "tests/test_own.py": [
        ("sample.notes |= note", "pass", "samples.jsonl without what each reward function gave"),
        ("problem.row or {", "{", "reward functions do not see the columns of their row"),
        ("if problem.task and value == value:", "if value == value:", "metrics of a task that has no name"),
        ("facts if there.all() else facts", "facts if True else facts", "answers without a reward are not counted"),
    ],
    "tests/test_train.py": [
        (
            "if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):",
            "if not any(a.finished for a in answers):",
            "half a rollout is trained on",
        ),
        (".index(True)], False)", ".index(True)])", "samples.jsonl without the marks that the model reads"),
    ],
    "tests/test_train_objectives.py": [
        (
            "advantages[torch.tensor([s.truncated for s in samples])] = torch.nan",
            "pass",
            "--mask-truncated does nothing",
        ),
        (
            "key=lambda i: not groups[i].teaches)[:count]",
            "key=lambda i: groups[i].teaches)[:count]",
            "groups without a spread are kept",
        ),
        ("for i in sorted(first)]", "for i in first]", "groups out of their order"),
        (
            "self.round(first_problem + len(groups), step",
            "self.round(first_problem, step",
            "every round asks the same problems",
        ),
        (
            "while len(facts) <= config.dynamic_sampling",
            "while len(facts) < max(1, config.dynamic_sampling)",
            "a round too few",
        ),
        ("| rollout_facts(groups)", "| rollout_facts(kept)", "the reward of groups with a spread alone"),
    ],
}
