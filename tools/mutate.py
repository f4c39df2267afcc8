"""Does the test suite notice when the code is wrong? Makes one small wrong edit at a time; every one must turn it red.

A mutant names the test file that should catch it, and that file runs first (seconds). Only if it stays green does the
whole suite run: caught there, the mutant is reported as caught elsewhere, and its own test file has a hole. What
survives both is a bug that could be merged tomorrow.

Edits are made in two temporary copies of the tree, two mutants at a time. The working tree is only read, so killing
this at any moment leaves it as it was.

Run: python tools/mutate.py [--only SUBSTRING]      exit code 1: a mutant survived; 2: the list does not fit the code
"""

import argparse
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401  imported once here, and inherited by every run
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One wrong edit, from a file of tests/mutants/: FILE, and MUTANTS = {test file: [(right, wrong, why), ...]}."""

    file: str
    right: str  # occurs exactly once in the file
    wrong: str
    test: str  # the test file that must fail
    why: str  # what a reader of the code would get wrong


def all_mutants() -> list[Mutant]:
    found = []
    for path in sorted((ROOT / "tests" / "mutants").glob("*.py")):
        listed = runpy.run_path(str(path))
        for test, rows in listed["MUTANTS"].items():
            found += [Mutant(listed["FILE"], right, wrong, test, why) for right, wrong, why in rows]
    return found


TIME_LIMIT = 600  # seconds for one test run: a mutant may loop forever, and that is noticed too
FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {
    # Python trusts a .pyc whose source has the same size and second of change: a mutant may have both
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",  # two run at a time
    "HYPOTHESIS_PROFILE": "mutants",
}


def copy_tree(to: Path) -> None:
    """The files git knows or would add: not runs/, not environments, not caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        sys.exit(f"got {ROOT} without git ({listed.stderr.strip()}), want a clone: git says which files are the tree's")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # a deleted file stays listed until the deletion is committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_pytest(tree: Path, *arguments: str) -> int | None:
    """Exit code of pytest in tree; None when it ran out of time.

    Each run is a fork of this process, which has imported torch already: half of what a run takes otherwise.
    """
    child = FORK.Process(target=_child, args=(tree, arguments))
    child.start()
    child.join(TIME_LIMIT)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)  # the child leads its own group
        child.join()
        return None
    return child.exitcode


def _child(tree: Path, arguments: tuple[str, ...]) -> None:
    os.setsid()
    for stream, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        os.dup2(os.open(os.devnull, flags), stream)
    os.environ.update(ENVIRONMENT)
    os.chdir(tree)
    sys.path[0] = str(tree)  # as python -m pytest would; the tree's own modules are not imported yet
    sys.dont_write_bytecode = True
    os._exit(pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments]))


def judge(mutant: Mutant, tree: Path) -> str:
    """One word for what became of a mutant: caught, elsewhere, SURVIVED, or UNFIT when it is no mutant at all."""
    path = tree / mutant.file
    text = path.read_text()
    try:
        path.write_text(text.replace(mutant.right, mutant.wrong))
        code = run_pytest(tree, mutant.test)
        if code in (1, None, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):  # a wrong pointer may end the process
            return "caught"
        if code != 0:
            return "UNFIT"  # the tests could not even be collected: such an edit is never merged, so it proves nothing
        return {0: "SURVIVED", 1: "elsewhere", None: "elsewhere"}.get(run_pytest(tree), "UNFIT")
    finally:
        path.write_text(text)


def own_tree(trees) -> None:
    """Each of the two workers takes a copy of the tree, once."""
    global tree
    tree = trees.get()


def timed_judge(mutant: Mutant) -> tuple[str, float]:
    started = time.monotonic()
    return judge(mutant, tree), time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="mutants with this in their file, edit or why")
    only = parser.parse_args().only
    mutants = [mutant for mutant in all_mutants() if only in "\n".join(mutant)]
    if not mutants:
        print(f"got --only {only!r}, want a part of a mutant's file, edit or why; see tests/mutants/")
        return 2
    misfits = [m for m in mutants if not (ROOT / m.file).exists() or (ROOT / m.file).read_text().count(m.right) != 1]
    for mutant in misfits:
        print(f"{mutant.file}: want {mutant.right!r} exactly once; the code has moved on, mend the list")
    if misfits:
        return 2

    with tempfile.TemporaryDirectory() as scratch:
        trees = FORK.Queue()
        for name in ("a", "b"):
            copy_tree(Path(scratch, name))
            trees.put(Path(scratch, name))
        test_files = sorted({mutant.test for mutant in mutants})
        if run_pytest(Path(scratch, "a"), *test_files) != 0:
            print(f"got failing tests without any edit, want them green first: python -m pytest {' '.join(test_files)}")
            return 2

        verdicts = []
        with ProcessPoolExecutor(2, mp_context=FORK, initializer=own_tree, initargs=(trees,)) as pool:
            for mutant, (verdict, seconds) in zip(mutants, pool.map(timed_judge, mutants), strict=True):
                verdicts.append(verdict)
                print(f"{verdict:<9} {seconds:5.1f} s  {mutant.file}: {mutant.why}", flush=True)
    for verdict, meaning in (
        ("elsewhere", "not by the test file they name"),
        ("UNFIT", "break the tests' own imports"),
    ):
        if verdict in verdicts:
            print(f"{verdicts.count(verdict)} {verdict}: {meaning}; mend the list or the tests")
    dead = verdicts.count("caught") + verdicts.count("elsewhere")
    print(f"{dead} of {len(mutants)} mutants caught")
    return 1 if "SURVIVED" in verdicts else 2 if "UNFIT" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
