"""Wrong edits of nanogspo/run/evaluations.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/evaluations.py"
MUTANTS = {
    "tests/test_train.py": [
        (
            "self.log.sampling(len(problems), self.stop)",
            "self.log.sampling(len(problems))",
            "an exam goes on after Ctrl-C",
        ),
        (
            "            if not distributed.agree(self.stop):\n                self.keep_best(phase, facts",
            "            if True:\n                self.keep_best(phase, facts",
            "half an exam counts",
        ),
        ("if log.has(**where, eval_count=config.eval_size):", "if False:", "an exam counts twice"),
        (" if last else []", "", "answers to held-out rows at every evaluation"),
    ],
}
