"""Does the test suite notice when the code is wrong? Makes one small wrong edit at a time; every one must turn it red.

A mutant names the test file that should catch it, and that file runs first (seconds). Only if it stays green does the
whole suite run: caught there, the mutant is reported as caught elsewhere, a failure too: its own test file has a hole.
What survives both is a bug that could be merged tomorrow. With --minutes there is no time for the suite, and what its
own test file lets through has survived. A test that is red anyway catches nothing: one not yet known
to kill a mutant runs once without the edit, and must pass.

A ledger remembers what is proven: tests/mutants/ledger/, one file for each mutated source file, one entry a line.

    key      hash of what decides: the mutated file, the edit, its test file, what the two import from tests/ and tools/
             (of the mutated file only a tool's imports), conftest.py with its imports and plugins, pytest.ini, the
             versions pinned and installed, and what below judges. Comments and docstrings do not count. Nor do other
             modules of the product, or each change would cost every proof: the 5 % and --deep are there for those.
    killer   the test that failed (or was running when the process died: `how` then names the signal)

    python tools/mutate.py              every mutant whose key is not proven (its former killer first, then its test
                                        file, then the suite), and 5 % of the rest, drawn by the commit's hash
    python tools/mutate.py --minutes 4  starts none after 4 minutes, and says how many are unproven
    python tools/mutate.py --only TEXT  those with this in their file, edit or why, proven or not
    python tools/mutate.py --deep       all, as if there were no ledger; writes it anew and says what differs. Another
                                        killer is as good, another signal is not: what is proven must be reproduced

What is proven on the way is written into the ledger at once: commit it with the change. Entries of two branches merge
line by line (.gitattributes); an entry whose key fits nothing any more is only a hint which test to try first.

Edits are made in two temporary copies of the tree, two mutants at a time. Of the working tree only the ledger is
written, so killing this at any moment leaves everything else as it was.

Exit code 0: none survived (unproven ones are counted in the last line); 1: a mutant survived, or its own test file did
not notice it; 2: tests are red without any edit, the list does not fit the code, or --deep found another way to die
than the ledger has. Tests: tests/test_mutate.py
"""

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import _hypothesis_pytestplugin  # noqa: F401  pytest would import these two in every run, and rewrite them
import hypothesis.strategies  # noqa: F401
import ledger
import pytest
import torch
from code_lines import code_lines
from ledger import drawn_again

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One wrong edit, from a file of tests/mutants/: FILE, and MUTANTS = {test file: [(right, wrong, why), ...]}."""

    file: str
    right: str  # occurs exactly once in the file
    wrong: str
    test: str  # the test file that must fail
    why: str  # what a reader of the code would get wrong
    listed: str  # the file of tests/mutants/ that has it, without .py


class Task(NamedTuple):
    """What a worker needs to judge a mutant."""

    mutant: Mutant
    killers: tuple[str, ...]  # tests to try first: they once killed it
    held: tuple[str, ...]  # those that the ledger has, tried first or not
    cpu: int  # seconds of CPU that a run of its test file may take
    suite_cpu: int  # 0: the suite is not run


class Verdict(NamedTuple):
    # caught, elsewhere, SURVIVED (the suite, or its own file where the suite is not run), UNFIT (no mutant at all),
    # RED (the killer is), late (no time was left)
    word: str
    killer: str = ""
    how: str = ""  # "" when the killer failed
    seconds: float = 0.0


TIME_LIMIT = 600  # seconds for one test file: a mutant may wait forever, and that is noticed too
SUITE_TIME_LIMIT = 7200
FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {
    # Python trusts a .pyc whose source has the same size and second of change: a mutant may have both
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",  # two run at a time
    "HYPOTHESIS_PROFILE": "mutants",
}
PRODUCT = ("kernels", "nanogspo")  # folders
DEADLY = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU)


def all_mutants(root: Path) -> list[Mutant]:
    found = []
    for path in sorted((root / "tests" / "mutants").glob("*.py")):
        listed = runpy.run_path(str(path))
        for test, rows in listed["MUTANTS"].items():
            found += [Mutant(listed["FILE"], right, wrong, test, why, path.stem) for right, wrong, why in rows]
    return found


# ----------------------------------------------------------------------------
# the ledger


class Keys:
    """Mutant -> key, for one tree. Files are read once."""

    def __init__(self, tree: Path):
        self.tree, self.texts, self.imports = tree, {}, {}
        judges = "".join(map(inspect.getsource, (run_pytest, _child, judge, timed_judge, green, cpu_limits, NodeLog)))
        shared = ["conftest.py", *self.imported("conftest.py"), "pytest.ini"]
        shared += ["requirements.txt", "requirements-test.txt"]
        limits = str((ENVIRONMENT, DEADLY, TIME_LIMIT, SUITE_TIME_LIMIT, sys.version_info[:2]))
        self.shared = [*code_lines(judges), limits, *map(self.code, shared), *self.installed(shared[-2:])]

    def installed(self, requirements: list[str]) -> list[str]:
        """The versions of what these files name; without +cpu and the like: builds of one version are as good."""
        found = []
        for name in re.findall(r"^[\w.-]+(?=[=<>])", "\n".join(map(self.code, requirements)), re.MULTILINE):
            try:
                found.append(f"{name} {importlib.metadata.version(name).partition('+')[0]}")
            except importlib.metadata.PackageNotFoundError:
                found.append(f"no {name}")
        return found

    def code(self, name: str) -> str:
        """What counts of a file; "" where there is none."""
        if name not in self.texts:
            path = self.tree / name
            text = path.read_text() if path.exists() else ""
            if name.endswith(".py"):
                text = "\n".join(code_lines(text))
            if name.startswith("requirements"):
                text = "\n".join(line.partition("#")[0].strip() for line in text.splitlines())
            self.texts[name] = text
        return self.texts[name]

    def imported(self, name: str) -> list[str]:
        """Files of tests/ and tools/ that a file imports, and those that they import."""
        if name in self.imports:
            return self.imports[name]
        found, waiting = [], [name]
        while waiting:
            path = self.tree / waiting.pop()
            for module in sorted(_imported_modules(path.read_text() if path.exists() else "")):
                last = module.rpartition(".")[2]
                for path in (f"tests/{last}.py", f"tools/{last}.py"):
                    if path not in found and path != name and (self.tree / path).exists():
                        found.append(path)
                        waiting.append(path)
        self.imports[name] = sorted(found)
        return self.imports[name]

    def __call__(self, mutant: Mutant) -> str:
        parts = [mutant.file, self.code(mutant.file), mutant.right, mutant.wrong, mutant.test, self.code(mutant.test)]
        parts += [self.code(path) for path in self.imported(mutant.test)]
        if mutant.file.startswith("tools/"):
            parts += [self.code(path) for path in self.imported(mutant.file)]
        return hashlib.sha256("\0".join(parts + self.shared).encode()).hexdigest()[:16]


def _imported_modules(text: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytest_plugins":
            names |= {*ast.literal_eval(node.value)}
    return names


class Ledger:
    """Entries of one file of tests/mutants/: {"test", "why", "key", "killer"}; "how" if it did not just fail."""

    def __init__(self, path: Path):
        self.path = path

    def entries(self) -> list[dict]:
        return ledger.read(self.path)

    def update(self, mutants: dict[str, Mutant], key: str, verdict: Verdict) -> None:
        """Writes what became of one of `mutants` (key -> all that are listed in this file).

        An entry leaves when its mutant has left the list, or was judged under another key; it is a hint until then.
        """
        mutant = mutants[key]
        listed = {(m.test, m.why) for m in mutants.values()}
        kept = [
            entry
            for entry in self.entries()
            if (entry["test"], entry["why"]) in listed
            and entry["key"] != key
            and (entry["key"] in mutants or (entry["test"], entry["why"]) != (mutant.test, mutant.why))
        ]
        if verdict.word == "caught":  # what survives its own test file is not proven, whatever was written
            how = {"how": verdict.how} if verdict.how else {}
            kept.append({"test": mutant.test, "why": mutant.why, "key": key, "killer": verdict.killer} | how)
        kept.sort(key=lambda entry: (entry["test"], entry["why"], entry["key"]))
        ledger.write(self.path, kept)


# ----------------------------------------------------------------------------
# one mutant


class NodeLog:
    """A pytest plugin that writes down each test as it starts: with -x the last one is the one that failed or died."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=0)  # what was written is there even if the next line ends the process

    def pytest_runtest_logstart(self, nodeid, location):
        self.file.write(nodeid.encode() + b"\n")


def run_pytest(tree: Path, *arguments: str, cpu: int = 0, limit: int = TIME_LIMIT) -> tuple[int | None, str]:
    """(exit code of pytest in tree, the last test that ran). Code None: out of time; `cpu` limits its CPU seconds.

    Each run is a fork of this process, which has imported torch already: half of what a run takes otherwise.
    """
    nodes, temporary = tree.with_suffix(".nodes"), tree.with_suffix(".tmp")
    nodes.write_bytes(b"")
    temporary.mkdir()  # a child that dies leaves its folders: here, where they are removed
    child = FORK.Process(target=_child, args=(tree, nodes, temporary, arguments, cpu))
    child.start()
    child.join(limit)
    code = child.exitcode
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)  # the child leads its own group
        child.join()
    shutil.rmtree(temporary, ignore_errors=True)
    return code, nodes.read_text().rstrip("\n").rpartition("\n")[2]


def _child(tree: Path, nodes: Path, temporary: Path, arguments: tuple[str, ...], cpu: int) -> None:
    os.setsid()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cpu:  # unlike time on the clock it does not depend on what else the machine does
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    os.environ.update(ENVIRONMENT, TMPDIR=str(temporary))
    tempfile.tempdir = None  # which the parent has looked up
    os.chdir(tree)
    sys.path[0] = str(tree)  # as python -m pytest would; the tree's own modules are not imported yet
    sys.dont_write_bytecode = True
    for name in ("code_lines", "ledger"):  # the tree has its own
        del sys.modules[name]
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:anyio"]
    options += ["--basetemp", str(temporary / "p")]  # short: messages cut long paths
    os._exit(pytest.main([*options, *arguments], plugins=[NodeLog(nodes)]))


def _end_with(parent: int) -> None:
    """Ends this process group when its parent has gone: a run that is killed leaves no tests behind that run on."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def judge(task: Task, tree: Path) -> Verdict:
    mutant = task.mutant
    path = tree / mutant.file
    text = path.read_text()
    tries = [(name, task.cpu, TIME_LIMIT) for name in (*task.killers, mutant.test)]
    tries += [("", task.suite_cpu, SUITE_TIME_LIMIT)] if task.suite_cpu else []
    try:
        path.write_text(text.replace(mutant.right, mutant.wrong))
        for arguments, cpu, limit in tries:
            code, node = run_pytest(tree, *filter(None, [arguments]), cpu=cpu, limit=limit)
            died = (code or 0) < 0 and -code in DEADLY  # a wrong pointer may end the process
            if died or node and code in (1, None):  # without a node no test has run: collecting failed
                how = "" if code == 1 else f"no end within {limit} s" if code is None else signal.Signals(-code).name
                killer = node or arguments or "tests"  # it may die before the first test begins
                return Verdict("caught" if killer.partition("::")[0] == mutant.test else "elsewhere", killer, how)
            if code != 0 and arguments not in task.killers:  # a killer may have been renamed since
                return Verdict("UNFIT")  # tests cannot even be collected: never merged, so it proves nothing
        return Verdict("SURVIVED")
    finally:
        path.write_text(text)


def start_worker(trees, deadline: float) -> None:
    """Each of the two workers takes a copy of the tree, once."""
    global tree, stop_at
    tree, stop_at = trees.get(), deadline


def timed_judge(task: Task) -> Verdict:
    started = time.monotonic()
    if started > stop_at:
        return Verdict("late")
    verdict = judge(task, tree)
    if verdict.killer and verdict.killer not in task.held:
        suspect = verdict.killer.partition("::")[0] if verdict.how else verdict.killer  # a death may be an aftermath
        if not green(suspect):
            verdict = Verdict("RED", how=suspect)
    return verdict._replace(seconds=time.monotonic() - started)


@functools.cache
def green(test: str) -> bool:
    """The test or file passes without any edit."""
    return run_pytest(tree, test)[0] == 0


# ----------------------------------------------------------------------------
# all of them


def copy_tree(root: Path, to: Path) -> None:
    """The files git knows or would add: not runs/, not environments, not caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode:
        sys.exit(f"got {root} without git ({listed.stderr.strip()}), want a clone: git says which files are the tree's")
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():  # a deleted file stays listed until the deletion is committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def import_first(tree: Path, tests: list[str]) -> None:
    """Imports what these test files and the product import and is not the tree's: once here, inherited by every run.

    The tree's own modules are what is mutated: each run imports them itself. That goes for `kernels` above all, a name
    which other packages look for too (there is one on PyPI).
    """
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as in conftest.py: Triton reads it when it is imported, too
    before = set(sys.modules)
    ours = {path.stem for folder in (tree, tree / "tests", tree / "tools") for path in folder.glob("*")}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        product = [str(path.relative_to(tree)) for name in PRODUCT for path in (tree / name).rglob("*.py")]
        for file in ["conftest.py", *tests, *product]:
            text = (tree / file).read_text() if (tree / file).exists() else ""
            for node in ast.walk(ast.parse(text)):
                names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if names and not ours & {name.partition(".")[0] for name in names}:
                    with contextlib.suppress(ImportError):  # a package that this machine lacks: its tests are skipped
                        exec(ast.unparse(node), {})
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ours:
            del sys.modules[name]
    gc.collect()
    gc.freeze()  # pytest collects garbage five times a run: never again what is here already


def budgets(tree: Path) -> dict[str, float]:
    """Test file -> its seconds; tests/budget.json."""
    path = tree / "tests" / "budget.json"
    return json.loads(path.read_text())["seconds"] if path.exists() else {}


def cpu_limits(cost: dict[str, float], test: str) -> tuple[int, int]:
    """Seconds of CPU for a test file and for the whole suite: five times the budget, and a start."""
    return int(60 + 5 * cost.get(test, 60)), int(600 + 5 * sum(cost.values()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="mutants with this in their file, edit or why")
    parser.add_argument("--deep", action="store_true", help="all of them, whatever the ledger says; write it anew")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no mutant later than this")
    parser.add_argument("--tests-passed", action="store_true", help="the suite was green just now, do not try again")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root, deadline = options.root.resolve(), time.monotonic() + 60 * options.minutes
    mutants = [m for m in all_mutants(root) if options.only in "\n".join(m)]
    if not mutants:
        print(f"got --only {options.only!r}, want a part of a mutant's file, edit or why; see tests/mutants/")
        return 2
    misfits = [m for m in mutants if not (root / m.file).exists() or (root / m.file).read_text().count(m.right) != 1]
    for mutant in misfits:
        print(f"{mutant.file}: want {mutant.right!r} exactly once; the code has moved on, mend the list")
    if misfits:
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        trees = [Path(scratch, name) for name in ("a", "b")]
        copy_tree(root, trees[0])
        shutil.copytree(trees[0], trees[1])
        return run_all(root, trees, mutants, options, deadline)


def run_all(root: Path, trees: list[Path], mutants: list[Mutant], options, deadline: float) -> int:
    keys = Keys(trees[0])
    everything = {keys(mutant): mutant for mutant in all_mutants(root)}
    wanted = {key: mutant for key, mutant in everything.items() if mutant in mutants}
    folder = root / "tests" / "mutants" / "ledger"
    ledgers = {m.listed: Ledger(folder / f"{m.listed}.jsonl") for m in everything.values()}
    known = [(listed, entry) for listed, held in ledgers.items() for entry in held.entries()]
    known = [(listed, entry) for listed, entry in known if entry["killer"].partition("::")[0] == entry["test"]]
    proven = {entry["key"]: entry for _, entry in known if entry["key"] in everything}
    if options.deep or options.only:
        chosen = list(wanted)
    else:
        again = drawn_again(root, sorted(proven))
        chosen = [key for key in wanted if key not in proven or key in again]
    cost = budgets(trees[0])
    tasks = {}
    for key in chosen:
        mutant = wanted[key]
        name = mutant.listed, mutant.test, mutant.why
        held = tuple(dict.fromkeys(e["killer"] for at, e in known if (at, e["test"], e["why"]) == name))
        cpu, suite_cpu = cpu_limits(cost, mutant.test)
        suite_cpu = suite_cpu if options.minutes == float("inf") else 0  # it may take longer than the minutes
        tasks[key] = Task(mutant, () if options.deep else held, held, cpu, suite_cpu)
    # the unproven first; of them those that a known test will kill in a second, then cheap test files
    chosen.sort(key=lambda key: (key in proven, not tasks[key].killers, cost.get(wanted[key].test, 60)))
    if not options.deep:
        print(f"{len(proven)} of {len(everything)} mutants proven; {len(chosen)} to run", flush=True)

    tests = sorted({wanted[key].test for key in chosen})
    import_first(trees[0], tests)
    queue = FORK.Queue()
    for tree in trees:
        queue.put(tree)
    verdicts = {}
    with ProcessPoolExecutor(2, mp_context=FORK, initializer=start_worker, initargs=(queue, deadline)) as pool:
        if not options.tests_passed:
            order = sorted(tests, key=lambda test: -cost.get(test, 60))
            red = [test for test, passed in zip(order, pool.map(green, order), strict=True) if not passed]
            if red:
                print(f"got failing tests without any edit, want them green first: python -m pytest {' '.join(red)}")
                return 2
        running = {pool.submit(timed_judge, tasks[key]): key for key in chosen}
        for done in as_completed(running):  # each is kept when it ends: one that takes long holds up no other
            key, verdict = running[done], done.result()
            if verdict.word == "late":
                continue
            if verdict.word == "RED":
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"got a failing test without any edit, want it green first: python -m pytest {verdict.how!r}")
                return 2
            verdicts[key] = verdict
            mutant = wanted[key]
            siblings = {k: m for k, m in everything.items() if m.listed == mutant.listed}
            ledgers[mutant.listed].update(siblings, key, verdict)
            print(f"{verdict.word:<9} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.why}", flush=True)
    reproduced = not options.deep or compare(wanted, proven, verdicts)
    return summary(everything, proven, verdicts) or (0 if reproduced else 2)


def compare(wanted: dict[str, Mutant], proven: dict[str, dict], verdicts: dict[str, Verdict]) -> bool:
    """Prints where the ledger that --deep has written is not the one that was there. False: one died in another way."""
    different, reproduced = 0, True
    for key, verdict in verdicts.items():
        old = proven.get(key, {})
        if (old.get("killer", ""), old.get("how", "")) != (verdict.killer, verdict.how):
            different += 1
            before = f"{old.get('killer', 'unproven')} {old.get('how', '')}".strip()
            now = f"{verdict.killer or verdict.word} {verdict.how}".strip()
            print(f"differs: {wanted[key].file}: {wanted[key].why}: was {before}, is {now}")
            reproduced &= not old or (verdict.word, verdict.how) == ("caught", old.get("how", ""))
    print(f"{different} of {len(verdicts)} entries of the ledger differ from those that were there")
    return reproduced


def summary(everything: dict[str, Mutant], proven: dict[str, dict], verdicts: dict[str, Verdict]) -> int:
    words = Counter(verdict.word for verdict in verdicts.values())
    for word, meaning in (("elsewhere", "not by the test file they name"), ("UNFIT", "break the tests' own imports")):
        if words[word]:
            print(f"{words[word]} {word}: {meaning}; mend the list or the tests")
    unproven = sum(verdicts[key].word != "caught" if key in verdicts else key not in proven for key in everything)
    print(f"{words['caught']} of {len(verdicts)} mutants caught; {unproven} of {len(everything)} unproven")
    return 1 if words["SURVIVED"] or words["elsewhere"] else 2 if words["UNFIT"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
