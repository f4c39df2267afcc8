"""Which way the product's files import each other, and how many lines of code they are.

    train.py, sample.py  ->  nanogspo  ->  kernels          never back, nor into tests, tools, lessons or benchmarks

Code lines are those that are left without blanks, comments and docstrings. What fails:

    an import against the direction above
    a cycle of imports that KNOWN_CYCLES does not name; an import inside a function counts, it only hides the cycle
    more than BUDGET code lines

Imports of own modules inside functions are listed: each is there to hide a cycle or to spare a start some seconds.

Run: python tools/check_imports.py      tests: tests/test_check_imports.py
"""

import ast
import sys
from pathlib import Path

from code_lines import code_lines

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 9_500
RANKS = {"kernels": 0, "nanogspo": 1, "sample": 2, "train": 2}  # a file imports what stands lower, and its own package
OUTSIDE = ("benchmarks", "conftest", "lessons", "tests", "tools")
KNOWN_CYCLES = [
    {"nanogspo.tasks", "nanogspo.tasks.addition", "nanogspo.tasks.reverse"},
]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    files = [
        root / "train.py",
        root / "sample.py",
        *(root / "nanogspo").rglob("*.py"),
        *(root / "kernels").rglob("*.py"),
    ]
    found = {}
    for path in filter(Path.exists, files):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return dict(sorted(found.items()))


def imports(name: str, path: Path, known: set[str]) -> list[tuple[str, int, bool]]:
    """(module, line, inside a function) for each import of one of `known`, or of what lies outside of the product."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # never happens when the program runs
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from .x import y: relative to the package
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            wanted = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        for module in dict.fromkeys(wanted):
            if module in known or module.partition(".")[0] in OUTSIDE:
                found.append((module, node.lineno, lazy))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return found


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules each of which imports, by however many steps, all others of its set."""
    reach = {}
    for start in graph:
        reach[start], waiting = set(), [start]
        while waiting:
            for module in graph[waiting.pop()] - reach[start]:
                reach[start].add(module)
                waiting.append(module)
    found = {frozenset({b for b in reach[a] if a in reach[b]} | {a}) for a in graph if a in reach[a]}
    return sorted(map(set, found), key=sorted)


def main(root: Path = ROOT, budget: int = BUDGET) -> int:
    files, failures, graph, total = modules(root), [], {}, 0
    for name, path in files.items():
        lines = len(code_lines(path.read_text()))
        total += lines
        print(f"{lines:6}  {path.relative_to(root)}")
        found = imports(name, path, set(files))
        graph[name] = {module for module, _, _ in found if module in files and module != name}
        for module, line, lazy in found:
            here, there = name.partition(".")[0], module.partition(".")[0]
            if there in OUTSIDE or (here != there and RANKS[there] >= RANKS[here]):
                failures.append(
                    f"{path.relative_to(root)}:{line}: imports {module}, want train, sample -> nanogspo -> kernels"
                )
            if lazy:
                print(f"        line {line} imports {module} inside a function")
    print(f"{total:6}  lines of code, of at most {budget}")
    for cycle in cycles(graph):
        known = any(cycle <= names for names in KNOWN_CYCLES)
        print(f"cycle{', known' * known}: {' '.join(sorted(cycle))}")
        failures += (
            [] if known else [f"a cycle of imports: {' '.join(sorted(cycle))}; move what both need to a third file"]
        )
    if total > budget:
        failures.append(f"{total} lines of code, want at most {budget}")
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
