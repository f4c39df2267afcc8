"""The code of a Python file: its lines without comments, docstrings and blank lines.

What two ledgers hash (tools/mutate.py, tools/compile_kernels.py) and what the line budget counts
(tools/check_imports.py): a better sentence in a docstring neither costs a proof nor counts as code.
"""

import ast
import io
import tokenize


def code_lines(text: str) -> list[str]:
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text_only = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if text_only and isinstance(first.value.value, str) and first.lineno > getattr(node, "lineno", 0):
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line.rstrip() for line in lines if line.strip()]
