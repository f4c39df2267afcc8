"""Does the test suite notice when the code is wrong? Makes one small wrong edit at a time; every one must turn it red.

A mutant names the test file that should catch it, and that file runs first (seconds). Only if it stays green does the
whole suite run: caught there, the mutant is reported as caught elsewhere, and its own test file has a hole. What
survives both is a bug that could be merged tomorrow.

Edits are made in two temporary copies of the tree, two mutants at a time. The working tree is only read, so killing
this at any moment leaves it as it was.

Run: python tools/mutate.py [--only SUBSTRING]      exit code 1: a mutant survived; 2: the list does not fit the code
"""

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 600  # seconds for one test run: a mutant may loop forever, and that is noticed too


class Mutant(NamedTuple):
    file: str
    right: str  # occurs exactly once in the file
    wrong: str
    test: str  # the test file that must fail
    why: str  # what a reader of the code would get wrong


MUTANTS = [
    # ---- tasks
    Mutant(
        "nanogspo/tasks/__init__.py",
        "zlib.crc32(key.encode()) % 10 == 0",
        "hash(key) % 10 == 0",
        "tests/test_tasks.py",
        "a split that is salted anew in every process",
    ),
    Mutant(
        "nanogspo/tasks/__init__.py",
        "    random.Random(stream).shuffle(order)",
        "    random.Random(0).shuffle(order)",
        "tests/test_tasks.py",
        "every seed and every epoch in the same order",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        'f"{min(a, b)}+{max(a, b)}"',
        'f"{a}+{b}"',
        "tests/test_tasks.py",
        "38+47 in the exam, 47+38 in training",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        "            if a != b:\n",
        "            if True:\n",
        "tests/test_tasks.py",
        "44+44 twice an epoch",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        "zip(reversed(answer), reversed(reference), strict=False)",
        "zip(answer, reference, strict=False)",
        "tests/test_tasks.py",
        "digits compared from the left, where a longer number shifts them all",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        "max(len(answer), len(reference))",
        "len(reference)",
        "tests/test_tasks.py",
        "digits too many cost nothing",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        'self._draw(f"{seed}/{n}", held_out=False)',
        'self._draw(f"{seed}/{n}", held_out=n % 2 == 1)',
        "tests/test_tasks.py",
        "training on the exam, only where pairs are not listed",
    ),
    Mutant(
        "nanogspo/tasks/addition.py",
        "answer_text.strip() == problem.answer",
        "answer_text == problem.answer",
        "tests/test_tasks.py",
        "a space in front of the number makes it wrong",
    ),
    Mutant(
        "nanogspo/tasks/reverse.py",
        "is_held_out(min(word, word[::-1]))",
        "is_held_out(word)",
        "tests/test_tasks.py",
        "the exam asks for a word whose answer was a training prompt",
    ),
    Mutant(
        "nanogspo/tasks/reverse.py",
        "diagonal + 1 if x == y else",
        "row[j + 1] + 1 if x == y else",
        "tests/test_tasks.py",
        "one letter matched many times",
    ),
    Mutant(
        "nanogspo/tasks/reverse.py",
        "/ max(len(answer), len(problem.answer))",
        "/ len(problem.answer)",
        "tests/test_tasks.py",
        "an answer that holds every letter sequence scores 1",
    ),
    # ---- SFT files
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "start=1):\n        if not raw",
        "start=0):\n        if not raw",
        "tests/test_tasks.py",
        "an error that names the line above the bad one",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "if len(tokens) <= max_length]",
        "if len(tokens) < max_length]",
        "tests/test_tasks.py",
        "a row of exactly the maximal length is left out",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "            too_long.append(line)",
        "            pass",
        "tests/test_tasks.py",
        "rows left out in silence",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "written = [*tokenizer.encode_plain(completion), min(tokenizer.eos_ids)]",
        "written = tokenizer.encode_plain(completion)",
        "tests/test_tasks.py",
        "a model that never learns to stop",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "[False] * len(given)",
        "[True] * len(given)",
        "tests/test_tasks.py",
        "loss on the prompt",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        "return [_last_answer_only(*sequences[-1])]",
        "return sequences",
        "tests/test_tasks.py",
        "loss on what the prompt's assistant said",
    ),
    Mutant(
        "nanogspo/tasks/jsonl.py",
        'message["role"] == "assistant" or not',
        "not",
        "tests/test_tasks.py",
        "empty answers are learned",
    ),
    # ---- the run's files
    Mutant(
        "nanogspo/runlog.py",
        "centre = (share + z2 / 2) / (1 + z2)",
        "centre = share",
        "tests/test_runlog.py",
        "the textbook interval, which leaves [0, 1]",
    ),
    Mutant(
        "nanogspo/runlog.py",
        "None if isinstance(value, float) and not math.isfinite(value) else value",
        "None if value != value else value",
        "tests/test_runlog.py",
        "infinities are not JSON either",
    ),
    Mutant(
        "nanogspo/runlog.py",
        "    file.flush()",
        "    pass",
        "tests/test_runlog.py",
        "a killed run loses its last rows",
    ),
    Mutant(
        "nanogspo/runlog.py",
        'row.get("step", 0) <= step]',
        'row.get("step", 0) < step]',
        "tests/test_runlog.py",
        "a resumed run forgets the step it was saved at",
    ),
    Mutant(
        "nanogspo/runlog.py",
        "math.nan if any(map(math.isnan, ends)) else max(ends)",
        "max(ends)",
        "tests/test_runlog.py",
        "a ratio of NaN printed as a perfect one",
    ),
    Mutant(
        "nanogspo/runlog.py",
        "number('clip_low_frac') + number('clip_high_frac')",
        "number('clip_high_frac')",
        "tests/test_runlog.py",
        "half of the clipping is not shown",
    ),
    Mutant(
        "nanogspo/runlog.py",
        'if row.get("phase") == "sft"][-1:] + control',
        'if row.get("phase") == "sft"][-1:]',
        "tests/test_runlog.py",
        "the control's line is not drawn",
    ),
]


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


def pytest(tree: Path, *arguments: str) -> int | None:
    """Exit code of pytest in tree; None when it ran out of time."""
    environment = {
        **os.environ,
        # Python trusts a .pyc whose source has the same size and second of change: a mutant may have both
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # two run at a time
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    child = subprocess.Popen(
        command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return child.wait(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the child leads its own group
        child.wait()
        return None


def judge(mutant: Mutant, tree: Path) -> str:
    """One word for what became of a mutant: caught, elsewhere, SURVIVED, or UNFIT when it is no mutant at all."""
    path = tree / mutant.file
    text = path.read_text()
    try:
        path.write_text(text.replace(mutant.right, mutant.wrong))
        code = pytest(tree, mutant.test)
        if code in (1, None):
            return "caught"
        if code != 0:
            return "UNFIT"  # the tests could not even be collected: such an edit is never merged, so it proves nothing
        return {0: "SURVIVED", 1: "elsewhere", None: "elsewhere"}.get(pytest(tree), "UNFIT")
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="mutants with this in their file, edit or why")
    only = parser.parse_args().only
    mutants = [mutant for mutant in MUTANTS if only in "\n".join(mutant)]
    if not mutants:
        print(f"got --only {only!r}, want a part of a mutant's file, edit or why; see MUTANTS in {__file__}")
        return 2
    misfits = [m for m in mutants if not (ROOT / m.file).exists() or (ROOT / m.file).read_text().count(m.right) != 1]
    for mutant in misfits:
        print(f"{mutant.file}: want {mutant.right!r} exactly once; the code has moved on, mend the list")
    if misfits:
        return 2

    with tempfile.TemporaryDirectory() as scratch:
        trees = queue.Queue()
        for name in ("a", "b"):
            copy_tree(Path(scratch, name))
            trees.put(Path(scratch, name))
        test_files = sorted({mutant.test for mutant in mutants})
        if pytest(Path(scratch, "a"), *test_files) != 0:
            print(f"got failing tests without any edit, want them green first: python -m pytest {' '.join(test_files)}")
            return 2

        def run(mutant: Mutant) -> tuple[str, float]:
            tree, started = trees.get(), time.monotonic()
            try:
                return judge(mutant, tree), time.monotonic() - started
            finally:
                trees.put(tree)

        verdicts = []
        with ThreadPoolExecutor(2) as pool:
            for mutant, (verdict, seconds) in zip(mutants, pool.map(run, mutants), strict=True):
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
