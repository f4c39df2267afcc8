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
            'if verdict.word == "caught":  # what',
            "if verdict.killer:  # what",
            "a mutant that only another file catches is written down as proven",
        ),
        (
            "if code != 0 and arguments not in task.killers:",
            "if code != 0:",
            "a killer that was renamed makes its mutant unfit",
        ),
        (
            'return 1 if words["SURVIVED"] or words["elsewhere"] else 2 if words["UNFIT"] else 0',
            'return 2 if words["UNFIT"] else 0',
            "a survivor leaves CI green",
        ),
        (
            "if key not in proven or key in again",
            "if key not in proven",
            "what is proven is never run again",
        ),
        (
            "() if options.deep else held, held,",
            "held, held,",
            "deep believes former killers",
        ),
        (
            "if not green(suspect):",
            "if False:",
            "a test that is red anyway kills",
        ),
        (
            "if died or node and code in (1, None):",
            "if died or code in (1, None):",
            "a test file that cannot be imported kills",
        ),
        (
            "names |= {*ast.literal_eval(node.value)}",
            "pass",
            "a plugin of conftest.py may change at no cost",
        ),
        (
            "(0 if reproduced else 2)",
            "0",
            "deep may find another death than the ledger has",
        ),
    ],
}
