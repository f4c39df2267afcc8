"""Wrong edits of nanogspo/experience.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/experience.py"
MUTANTS = {
    "tests/test_router_replay.py": [
        ("experts[i] = routing.experts", "pass", "nothing is kept that could be replayed"),
        (
            "flips(routed.cpu()[batch.scored], drawn)",
            "flips(routed.cpu()[: len(drawn)], drawn)",
            "the experts of the row's first tokens",
        ),
        (
            'for name in ("old_logp", "ref_logp", "experts"):',
            'for name in ("old_logp", "ref_logp"):',
            "a resumed rollout goes on without replay",
        ),
    ],
    "tests/test_experience.py": [
        ("gap, mean = torch.cat(gaps).abs()", "gap, mean = torch.cat(gaps)", "gaps of both signs that cancel"),
        (
            "gaps[-1], batch.cu_scored) / batch.lengths)",
            "gaps[-1], batch.cu_scored))",
            "a sum where the ratio has a mean",
        ),
        (
            "if abs(A[i]) > 0 or (with_zeros and A[i] == 0)]",
            "if A[i] == A[i]]",
            "answers with nothing to teach are trained on",
        ),
        ("torch.tensor(kept)[b.index]", "b.index + rows[0]", "advantages of other answers, once some are left out"),
        ("min(rows, key=lambda", "max(rows, key=lambda", "of a minibatch with nothing to teach the longest is kept"),
        (
            "[examples[i] for i in kept]",
            "[examples[i - first] for i in kept]",
            "every minibatch trains on the answers of the first",
        ),
    ],
    "tests/test_train.py": [
        ("(update or score_first)", "(update and score_first)", "no first rollout is scored twice"),
    ],
    "tests/test_train_objectives.py": [
        ("or (with_zeros and A[i] == 0)]", "]", "no KL for answers of zero-spread groups"),
        ("if abs(A[i]) > 0 or", "if A[i] != 0 or", "answers that are left out are scored"),
        ("score_old and (update or score_first)", "(update or score_first)", "REINFORCE scores what it does not need"),
        ("    with reference or nullcontext():", "    with nullcontext():", "the policy is its own reference"),
        ("return weights, trained, trained", "return weights, size, trained", "what is left out weighs in twice"),
        ("trained / max(int(counts.sum()), 1)", "trained / size", "a mean over answers that are left out"),
    ],
}
