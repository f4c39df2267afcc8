"""How the tests run: files two at a time, longest first, each within a budget of seconds. Loaded by conftest.py.

`python -m pytest`, and every call that names a folder or files that take long together, gets two pytest-xdist workers
(none without pytest-xdist, or where there is one core); a file goes to one worker as a whole. A single file or test,
-s, --pdb and -n 0 run in this process.

tests/budget.json holds the CPU seconds of each test file, its child processes included, and of a fixed loop, as they
were on one idle machine. CPU seconds do not count what other programs do; a slower machine shows in the loop, which
each worker runs before and after its tests:

    limit of a file = (2 * its seconds + 3) * (the loop here / the loop there, at least 1)

The whole suite ends red when a file is over its limit, and when all entries together are over SUITE. A file without an
entry has NEW_FILE seconds.

After a change of the tests, on an idle machine: python -m pytest --write-budget [tests/test_it.py tests/test_more.py]
Tests: tests/test_suite.py
"""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

WORKERS = 2
WORTH_IT = 30.0  # seconds; a worker takes some to start
NEW_FILE = 10.0
SUITE = 540.0  # two at a time 4.5 minutes; the rest of six is for imports and waiting
SLOWEST = 12  # files in the summary

spent: Counter[str] = Counter()  # test file -> CPU seconds
loops: list[float] = []


def pytest_addoption(parser):
    parser.addoption("--write-budget", action="store_true", help="write what this run needs to tests/budget.json")


def budget(config) -> dict:
    path = config.rootpath / "tests" / "budget.json"
    return json.loads(path.read_text()) if path.exists() else {"loop": None, "seconds": {}}


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Asks pytest-xdist for workers, before it looks at its options."""
    option = config.option
    chosen = getattr(option, "numprocesses", 0) is not None or option.dist != "no"  # no such option: not installed
    if chosen or hasattr(config, "workerinput") or option.usepdb or option.collectonly or option.capture == "no":
        return
    files = {argument.partition("::")[0] for argument in config.args}
    known = budget(config)["seconds"]
    long = sum(known.get(file, NEW_FILE) for file in files) > WORTH_IT and len(files) > 1
    if cores() > 1 and (long or any((config.invocation_params.dir / file).is_dir() for file in files)):
        option.numprocesses, option.dist, option.loadscopereorder = min(WORKERS, cores()), "loadfile", False


def pytest_sessionstart(session):
    loops.append(loop_seconds())


def pytest_collection_modifyitems(config, items):
    """Longest first: a long file that starts last is waited for alone."""
    if hasattr(config, "workerinput"):
        seconds = budget(config)["seconds"]
        items.sort(key=lambda item: -seconds.get(file_of(item), NEW_FILE))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    before = cpu_seconds()
    try:
        return (yield)
    finally:
        spent[file_of(item)] += cpu_seconds() - before


def file_of(item) -> str:
    return item.nodeid.partition("::")[0]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


def loop_seconds() -> float:
    """CPU seconds of a fixed piece of Python, the best of three: what this machine, now, needs for it."""
    seconds = []
    for _ in range(3):
        before = time.process_time()
        sum(i * i % 7 for i in range(300_000))
        seconds.append(time.process_time() - before)
    return min(seconds)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    config = session.config
    loops.append(loop_seconds())
    if hasattr(config, "workerinput"):
        config.workeroutput["budget"] = [dict(spent), loops]
    elif config.option.write_budget:
        write(config)
    elif over(config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A worker has ended; here is what its files took."""
    seconds, its_loops = getattr(node, "workeroutput", {}).get("budget", ({}, []))
    spent.update(seconds)
    loops.extend(its_loops)


def slowdown(config) -> float:
    there = budget(config)["loop"]
    return max(1.0, max(loops) / there) if there else 1.0


def over(config) -> list[str]:
    """One line for each broken limit. Only the whole suite has one: parts, mutants and more examples are no measure."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if not whole or os.environ.get("HYPOTHESIS_PROFILE", "ci") != "ci":
        return []
    entries, slower = budget(config)["seconds"], slowdown(config)
    lines = []
    for file, seconds in sorted(spent.items()):
        entry = entries.get(file, NEW_FILE)
        limit = (2 * entry + 3) * slower
        if seconds > limit:
            lines.append(f"{file} took {seconds:.1f} s of CPU, want at most {limit:.1f}; make it cheaper")
    if sum(entries.values()) > SUITE:
        lines.append(f"tests/budget.json adds up to {sum(entries.values()):.0f} s, want at most {SUITE:.0f}")
    return lines


def pytest_terminal_summary(terminalreporter, config):
    if len(spent) < 2:
        return
    entries, slower = budget(config)["seconds"], slowdown(config)
    terminalreporter.section(f"CPU seconds, and what tests/budget.json says (this machine: {slower:.2f} times slower)")
    for file, seconds in spent.most_common(SLOWEST):
        terminalreporter.line(f"{seconds:7.1f} {entries.get(file, NEW_FILE):7.1f}  {file}")
    terminalreporter.line(f"{sum(spent.values()):7.1f} {sum(entries.get(f, NEW_FILE) for f in spent):7.1f}  together")
    for line in over(config):
        terminalreporter.line(f"OVER BUDGET: {line}", red=True)


def write(config) -> None:
    held = budget(config)
    held["loop"] = held["loop"] or round(min(loops), 4)
    slower = max(loops) / held["loop"]
    held["seconds"] |= {file: max(0.1, round(seconds / slower, 1)) for file, seconds in spent.items()}
    held["seconds"] = {f: s for f, s in sorted(held["seconds"].items()) if (config.rootpath / f).exists()}
    path = Path(config.rootpath, "tests", "budget.json")
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(held, indent=1) + "\n")
    fresh.replace(path)
