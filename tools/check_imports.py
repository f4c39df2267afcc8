"""Which way the product's files import each other, and how many lines of code they and their functions are.

ORDER is the order to read the files in: a file imports only files above it. Code lines are those that are left without
blanks, comments and docstrings. What fails:

    an import against ORDER, or of train, sample, tests, tools, lessons, benchmarks; a file that ORDER does not name
    an import of an own module inside a function: it hides a cycle, or a file in the wrong place
    a cycle of imports
    more than BUDGET code lines in all, more than LIMITS in a file, a function of more than LONGEST

The median of the functions' lines is printed.

Run: python tools/check_imports.py      tests: tests/test_check_imports.py
"""

import ast
import statistics
import sys
from pathlib import Path

from code_lines import code_lines

ROOT = Path(__file__).resolve().parent.parent
# 8,237 after the reshape of November 2026, and what each room was then given: one's own data and environments 1,000,
# doctor and report 700, mixture of experts and DeltaNet 1,000, several processes 350; since then routing that is
# seen and replayed 120, the delta rule's backward kernels 140, shards and plans for other machines 220,
# messages between processes that hold tensors, and plans without a tokenizer 70
BUDGET, LONGEST = 11_870, 80
LIMITS = {"train.py": 300, "nanogspo/model.py": 200}
# A row is a file, or all files of a package that have no row of their own; these may import each other, without a cycle
ORDER = """
    kernels
    nanogspo.inputs nanogspo.distributed nanogspo.sharding nanogspo.words nanogspo.config nanogspo.device
    nanogspo.families
    nanogspo.tasks.base
    nanogspo.storage.files nanogspo.tasks.mix nanogspo.tasks.addition nanogspo.tasks.remote nanogspo.tasks.rewards
    nanogspo.special_tokens nanogspo.templates nanogspo.tokenizer
    nanogspo.layers nanogspo.cache nanogspo.layouts nanogspo.model
    nanogspo.storage.safetensors nanogspo.quant nanogspo.lora nanogspo.fast
    nanogspo.packing nanogspo.chat nanogspo.tiny nanogspo.rollout
    nanogspo.storage nanogspo.checkpoint
    nanogspo.objectives nanogspo.reference nanogspo.experience nanogspo.episodes nanogspo.sampler nanogspo.optimizer
    nanogspo.storage.state nanogspo.tasks
    nanogspo.run.program nanogspo.run.process nanogspo.run.log nanogspo.run.phases nanogspo.run.trackers
    nanogspo.run.curves nanogspo.run.planner nanogspo.run.worker nanogspo.run.rewards nanogspo.run.environments
    nanogspo.evaluation nanogspo.data nanogspo.policy nanogspo.run.evaluations nanogspo.run.doctor nanogspo.run.report
    nanogspo.run.hub
    sample train
""".split()
OUTSIDE = ("benchmarks", "conftest", "lessons", "tests", "tools", "train", "sample")


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
    """(module, line, inside a function) for each import of one of `known`, or of what nothing may import."""
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


def row_of(name: str) -> int:
    """The place of a module in ORDER: its own row, else that of its package; -1 where there is none."""
    while name not in ORDER and "." in name:
        name = name.rpartition(".")[0]
    return ORDER.index(name) if name in ORDER else -1


def functions(text: str) -> dict[str, int]:
    """Name -> code lines, of every function and method. Of two of one name, the longer one."""
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            header = ["if True:"] * (node.col_offset > 0)  # makes an indented function a program
            whole = "\n".join([*header, *lines[node.lineno - 1 : node.end_lineno]])
            found[node.name] = max(found.get(node.name, 0), len(code_lines(whole)) - len(header))
    return found


def main(root: Path = ROOT, budget: int = BUDGET, limits: dict[str, int] = LIMITS, longest: int = LONGEST) -> int:
    files, failures, graph, total, lengths = modules(root), [], {}, 0, []
    for name, path in files.items():
        place, text = str(path.relative_to(root)), path.read_text()
        lines = len(code_lines(text))
        total += lines
        print(f"{lines:6}  {place}")
        if lines > limits.get(place, budget):
            failures.append(f"{place}: {lines} lines of code, want at most {limits[place]}")
        if lines and row_of(name) < 0:
            failures.append(f"{place}: has no row in ORDER; give it one where a reader meets it")
        for function, n in functions(text).items():
            lengths.append(n)
            if n > longest:
                failures.append(f"{place}: {function} has {n} lines of code, want at most {longest}; name its parts")
        found = imports(name, path, set(files))
        graph[name] = {module for module, _, _ in found if module in files and module != name}
        for module, line, lazy in found:
            if module.partition(".")[0] in OUTSIDE or row_of(module) > row_of(name):
                failures.append(f"{place}:{line}: imports {module}, want only what ORDER has above {name}")
            elif lazy:
                failures.append(f"{place}:{line}: imports {module} inside a function, want it at the top of the file")
    print(f"{total:6}  lines of code, of at most {budget}")
    median, most = statistics.median(lengths or [0]), max(lengths, default=0)
    print(f"{len(lengths):6}  functions: median {median:g} lines, longest {most}")
    for cycle in cycles(graph):
        failures.append(f"a cycle of imports: {' '.join(sorted(cycle))}; move what both need to a third file")
    if total > budget:
        failures.append(f"{total} lines of code, want at most {budget}")
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
