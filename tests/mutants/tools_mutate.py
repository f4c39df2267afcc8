"""Wrong edits of tools/mutate.py, one at a time: see there."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "tools/mutate.py"
MUTANTS = {
    "tests/test_mutate.py": [
        (
            "parts += [self.code(path) for path in self.imported(mutant.test)]",
            "parts += []",
            "a change in what a test file imports leaves its proofs as they are",
        ),
        (
            'text = "\\n".join(code_lines(text))',
            "pass",
            "a comment costs all proofs of a file",
        ),
        (
            "if verdict.killer:  # one",
            "if True:  # one",
            "a mutant that survived is written down as proven",
        ),
        (
            "if code != 0 and arguments not in task.killers:",
            "if code != 0:",
            "a killer that was renamed makes its mutant unfit",
        ),
        (
            'return 1 if words["SURVIVED"] else 2 if words["UNFIT"] else 0',
            'return 2 if words["UNFIT"] else 0',
            "a survivor leaves CI green",
        ),
        (
            "if key not in proven or key in again",
            "if key not in proven",
            "what is proven is never run again",
        ),
        (
            "killers = [] if options.deep",
            "killers = [] if False",
            "deep believes former killers",
        ),
    ],
}
