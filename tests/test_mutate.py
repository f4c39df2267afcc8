"""tools/mutate.py, on a toy tree with a toy list: what is proven, what runs, what is written, what ends it.

In a process of its own, because it forks from one that has imported torch and little else.

Run: python -m pytest tests/test_mutate.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")  # the tool forks: Linux and macOS
ROOT = Path(__file__).resolve().parent.parent

TREE = {
    "toy.py": '"""A toy."""\n\n\ndef double(x):\n    return 2 * x\n\n\n'
    "def half(x):\n    return x / 2\n\n\nunused = 1\nkept = 1\n",
    "tests/helper.py": 'TWO = 2\n\n\nclass Odd(ValueError):\n    """A docstring, and nothing else."""\n',
    "tests/test_toy.py": "import tempfile\n\nimport helper\nimport toy\n\n\n"
    "def test_it():\n    tempfile.mkdtemp()\n    assert toy.double(helper.TWO) == 4\n"
    "\n\ndef test_zero():\n    assert toy.double(0) == 0\n",
    "tests/test_other.py": "import toy\nfrom toy import kept\n\n\ndef test_half():\n    assert toy.half(4) == 2\n",
    "tests/mutants/toy.py": """FILE = "toy.py"
MUTANTS = {
    "tests/test_toy.py": [
        ("return 2 * x", "return 3 * x", "three times"),
        ("return 2 * x", "while True: pass", "without an end"),
        ("return 2 * x", "import os; os.abort()", "the process dies"),
        ("return 2 * x", "return (", "does not parse"),
        ("return x / 2", "return x // 3", "another file notices"),
        ("unused = 1", "unused = 2", "nobody notices"),
        ("kept = 1", "gone = 1", "another file cannot import it"),
    ]
}
""",
    "conftest.py": "import sys\nsys.path[:0] = ['.', 'tests', 'tools']\npytest_plugins = ['plugin']\n",
    "tools/plugin.py": "limit = 1\n",
    "pytest.ini": "[pytest]\ntestpaths = tests\n",
    "tests/budget.json": '{"seconds": {"tests/test_toy.py": -11.0}}',  # 5 s of CPU for what has no end
}
LEDGER = "tests/mutants/ledger/toy.jsonl"
UNPROVEN = {
    "another file notices": "elsewhere",
    "another file cannot import it": "UNFIT",
    "does not parse": "UNFIT",
    "nobody notices": "SURVIVED",
}
SCRIPT = """
import contextlib, io, json, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
import mutate
root = pathlib.Path(sys.argv[2])
report = {}

def run(name, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = mutate.main(["--root", str(root), *arguments])
    ledger = root / "tests/mutants/ledger/toy.jsonl"
    report[name] = [code, out.getvalue(), ledger.read_text() if ledger.exists() else ""]

def edit(file, old, new):
    path = root / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))

draw = mutate.drawn_again
mutate.drawn_again = lambda root, keys: set()
run("no time", "--minutes", "0", "--tests-passed")
run("all")
run("minutes", "--minutes", "9", "--only", "notices", "--tests-passed")
for line in (root / "tests/mutants/toy.py").read_text().splitlines():
    if any(f'"{why}"' in line for why in sys.argv[3:]):
        edit("tests/mutants/toy.py", line, "")
edit("tests/test_toy.py", "import toy", "import toy  # in other words")
edit("toy.py", "A toy.", "A better sentence.")
run("prose")
mutate.drawn_again = lambda root, keys: {keys[0]}
run("drawn", "--tests-passed")
mutate.drawn_again = lambda root, keys: set()
edit("tests/helper.py", "TWO = 2", "TWO = 2.0")
run("helper", "--only", "three times", "--tests-passed")
edit("tools/plugin.py", "limit = 1", "limit = 2")
run("plugin", "--minutes", "0", "--tests-passed")
edit("tests/test_toy.py", "def test_it", "def test_renamed")
run("renamed", "--only", "three times", "--tests-passed")
run("deep", "--deep", "--only", "e", "--tests-passed")
edit("tests/mutants/ledger/toy.jsonl", "SIGABRT", "SIGSEGV")
run("another death", "--deep", "--only", "the process dies", "--tests-passed")
edit("tests/test_toy.py", "== 4", "== 5")
edit("tests/test_toy.py", "def test_renamed", "def test_red")
run("red", "--only", "three times")
run("red killer", "--only", "three times", "--tests-passed")
run("nothing", "--only", "no such mutant")
edit("toy.py", "2 * x", "x + x")
run("misfit")
keys = [f"{i:016x}" for i in range(2000)]
first = draw(root, keys)
author = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "t"], cwd=root, check=True)
second = draw(root, keys)
report["shares"] = [len(first), len(second), len(first & second)]
report["left"] = sorted(str(path.relative_to(root)) for path in root.rglob("*") if ".git" not in path.parts)
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "tools"), str(root), *UNPROVEN]
    temporary = tmp_path_factory.mktemp("temporary")
    dates = {"GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z", "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"}
    environment = {**os.environ, **dates, "TMPDIR": str(temporary)}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("REPORT")[2]) | {"temporary": os.listdir(temporary)}


def ledger(report, run):
    return {entry["why"]: entry for entry in map(json.loads, report[run][2].splitlines())}


def test_without_time_nothing_starts_and_the_unproven_are_counted(report):
    assert report["no time"] == [0, "0 of 7 mutants proven; 7 to run\n0 of 0 mutants caught; 7 of 7 unproven\n", ""]


def test_each_word(report):
    code, out, _ = report["all"]
    words = {line.rpartition(": ")[2]: line.split()[0] for line in out.splitlines() if " s  toy.py: " in line}
    caught = dict.fromkeys(["three times", "without an end", "the process dies"], "caught")
    assert code == 1 and words == caught | UNPROVEN
    assert out.endswith("3 of 7 mutants caught; 4 of 7 unproven\n")


def test_with_minutes_the_suite_is_not_run_and_what_passes_its_own_test_file_has_survived(report):
    code, out, _ = report["minutes"]
    words = {line.rpartition(": ")[2]: line.split()[0] for line in out.splitlines() if " s  toy.py: " in line}
    assert code == 1 and words == {"another file notices": "SURVIVED", "nobody notices": "SURVIVED"}


def test_the_ledger_names_what_killed_it(report):
    entries = ledger(report, "all")
    ends = {why: (entry["killer"], entry.get("how")) for why, entry in entries.items()}
    assert ends == {
        "three times": ("tests/test_toy.py::test_it", None),
        "without an end": ("tests/test_toy.py::test_it", "SIGXCPU"),  # by CPU time, not by the clock
        "the process dies": ("tests/test_toy.py::test_it", "SIGABRT"),
    }
    assert report["all"][2].splitlines() == sorted(report["all"][2].splitlines())


def test_comments_and_docstrings_cost_no_proof(report):
    assert report["prose"][:2] == [0, "3 of 3 mutants proven; 0 to run\n0 of 0 mutants caught; 0 of 3 unproven\n"]


def test_a_part_of_the_proven_runs_again(report):
    assert (
        "3 of 3 mutants proven; 1 to run" in report["drawn"][1]
        and "1 of 1 mutants caught; 0 of 3" in report["drawn"][1]
    )
    first, second, both = report["shares"]  # of 2000 keys, before and after a commit; 100 +- 10 each
    assert 60 <= first <= 140 and 60 <= second <= 140 and both <= 20


def test_a_module_the_tests_import_is_part_of_the_key(report):
    assert report["helper"][1].startswith("0 of 3 mutants proven") and report["helper"][1].endswith("2 of 3 unproven\n")
    assert report["plugin"][1].startswith("0 of 3 mutants proven")
    before, after = ledger(report, "all"), ledger(report, "helper")
    assert before["three times"]["key"] != after["three times"]["key"]
    assert len(after) == 3 and after["without an end"] == before["without an end"]  # no proof any more, but a hint


def test_a_killer_that_is_gone_is_no_obstacle(report):
    assert report["renamed"][0] == 0
    assert ledger(report, "renamed")["three times"]["killer"] == "tests/test_toy.py::test_renamed"


def test_deep_proves_all_anew_and_says_what_differs(report):
    code, out, _ = report["deep"]
    assert code == 0 and "2 of 3 entries of the ledger differ" in out and out.endswith("0 of 3 unproven\n")
    assert "differs: toy.py: without an end: was unproven, is tests/test_toy.py::test_renamed" in out
    code, out, _ = report["another death"]
    assert (
        code == 2 and "was tests/test_toy.py::test_renamed SIGSEGV, is tests/test_toy.py::test_renamed SIGABRT" in out
    )


def test_red_tests_and_a_list_that_does_not_fit_are_errors(report):
    assert report["red"][0] == 2 and "want them green first: python -m pytest tests/test_toy.py" in report["red"][1]
    code, out, entries = report["red killer"]  # is asked without the edit, and proves nothing
    assert code == 2 and "want it green first: python -m pytest 'tests/test_toy.py::test_red'" in out
    assert entries == report["red"][2]
    assert report["nothing"][0] == 2 and "want a part of a mutant's file" in report["nothing"][1]
    assert report["misfit"][0] == 2 and "want 'return 2 * x' exactly once" in report["misfit"][1]


def test_of_the_tree_only_the_ledger_is_written(report):
    assert report["left"] == sorted({*TREE, "tests", "tests/mutants", "tools", LEDGER, str(Path(LEDGER).parent)})
    assert report["temporary"] == []
