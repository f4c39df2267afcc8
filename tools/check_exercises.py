"""Every exercise can be solved and can be failed: our solutions pass its test, the stub given to the reader does not.

A test that an empty stub passes checks nothing, so with the stub every test of the file must fail, but for those that
are excused below. Both runs of each file are forks of one process that has imported torch once, two at a time, in a
copy of the tree (tools/mutate.py has the parts).

Run: python tools/check_exercises.py
"""

import os
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mutate

PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that tests did not run
EXCUSED = {  # "file: test" -> why the stub passes it
}


def run(case: tuple[str, bool]) -> tuple[int | None, list[str], float]:
    """Exit code of the test file, with our solution or with the stub, the tests that passed, and its seconds."""
    test, solved = case
    started = time.monotonic()
    os.environ["EXERCISES"] = "solutions" if solved else ""
    report = mutate.tree.with_suffix(".xml")
    report.unlink(missing_ok=True)
    code, _ = mutate.run_pytest(mutate.tree, test, "--maxfail=0", f"--junitxml={report}")
    cases = xml.etree.ElementTree.parse(report).iter("testcase") if report.exists() else ()
    passed = [case.get("name") for case in cases if not len(case)]  # failures and skips are elements of a case
    return code, passed, time.monotonic() - started


def main() -> int:
    tests = sorted(str(path.relative_to(mutate.ROOT)) for path in mutate.ROOT.glob("lessons/exercises/test_ex*.py"))
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        queue = mutate.FORK.Queue()
        for name in ("a", "b"):
            queue.put(Path(scratch, name))
        mutate.copy_tree(mutate.ROOT, Path(scratch, "a"))
        shutil.copytree(Path(scratch, "a"), Path(scratch, "b"))
        mutate.import_first(Path(scratch, "a"), tests)
        start = {"initializer": mutate.start_worker, "initargs": (queue, float("inf"))}
        with ProcessPoolExecutor(2, mp_context=mutate.FORK, **start) as pool:
            cases = [(test, solved) for test in tests for solved in (True, False)]
            for (test, solved), (code, passed, seconds) in zip(cases, pool.map(run, cases), strict=True):
                print(f"{seconds:5.1f} s  {test} {'solved' if solved else 'unsolved'}", flush=True)
                if solved and code != PASSED:
                    failures.append(f"EXERCISES=solutions python -m pytest {test}: want it green, got exit code {code}")
                if not solved and code != FAILED:
                    failures.append(f"python -m pytest {test}: want a failing test, got exit code {code}")
                names = [name for name in passed if f"{Path(test).name}: {name.partition('[')[0]}" not in EXCUSED]
                if not solved and names:
                    failures.append(f"{test}: the stub passes {', '.join(names)}; want tests that it fails")
    print(f"{len(tests)} exercises; " + ("each can be solved and failed" if not failures else "these are wrong:"))
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
