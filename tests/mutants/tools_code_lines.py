"""Wrong edits of tools/code_lines.py, one at a time: see tools/mutate.py."""

FILE = "tools/code_lines.py"
MUTANTS = {
    "tests/test_check_imports.py": [
        ("if token.type == tokenize.COMMENT:", "if False:", "comments count as code"),
        ("first.lineno > getattr", "0 < getattr", "a docstring on the line of its def takes the def along"),
        ("ast.Module | ast.ClassDef", "ast.ClassDef", "a module's docstring counts as code"),
    ],
}
