"""tools/suite.py, on a toy suite: who gets workers, in which order files start, and what a budget does.

Run: python -m pytest tests/test_suite.py
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import os, time
from pathlib import Path

def test_it():
    with Path("order").open("a") as file:
        file.write(f"{Path(__file__).stem} {os.environ.get('PYTEST_XDIST_WORKER')}\\n")
    until = time.process_time() + SECONDS
    while time.process_time() < until:
        pass
"""
BUDGET = {"loop": 100.0, "seconds": {"tests/test_a.py": -1.4, "tests/test_b.py": 5.0, "tests/test_c.py": 20.0}}


@pytest.fixture
def toy(tmp_path):
    """A suite whose tests/test_a.py takes 0.4 s of CPU, more than 2 * its entry + 3, which is 0.2."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["suite"]\n')
    (tmp_path / "tests" / "budget.json").write_text(json.dumps(BUDGET))
    for name, seconds in (("a", 0.4), ("b", 0), ("c", 0)):
        (tmp_path / "tests" / f"test_{name}.py").write_text(WORK.replace("SECONDS", str(seconds)))

    def run(*arguments, **environment):
        xdist = ["-p", "xdist"] if importlib.util.find_spec("xdist") else []  # no other plugin: half the time
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *xdist, *arguments]
        fixed = {"PYTHONPATH": str(ROOT / "tools"), "HYPOTHESIS_PROFILE": "ci", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment = {**os.environ, **fixed, **environment}
        environment.pop("PYTEST_XDIST_WORKER", None)
        (tmp_path / "order").unlink(missing_ok=True)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, (tmp_path / "order").read_text().split()

    return run


def test_the_whole_suite(toy, tmp_path):
    """Red although every test passes, two files at a time, the longest first."""
    pytest.importorskip("xdist")
    code, out, order = toy()
    assert code == 1 and "3 passed" in out
    assert "OVER BUDGET: tests/test_a.py took 0." in out and "s of CPU, want at most 0.2" in out
    if suite.cores() > 1:
        assert set(order[1::2]) == {"gw0", "gw1"} and order.index("test_c") < order.index("test_a")  # both are gw0's
    code, out, order = toy("--write-budget", "-n", "0")
    assert code == 0 and order[1::2] == ["None"] * 3
    written = json.loads((tmp_path / "tests" / "budget.json").read_text())
    assert written["loop"] == 100.0 and list(written["seconds"]) == sorted(BUDGET["seconds"])


def test_a_part_of_it(toy):
    """Short files run in this process, and a part of the suite is no measure."""
    code, out, order = toy("tests/test_a.py", "tests/test_b.py")
    assert code == 0 and order == ["test_a", "None", "test_b", "None"] and "OVER BUDGET" not in out
    assert "together" in out and "tests/test_a.py" in out.partition("together")[0]
    assert toy("tests/test_b.py")[2] == ["test_b", "None"]


def test_waiting_is_no_work():
    """For a lock, a disk, a processor that another program has."""
    before = suite.cpu_seconds()
    time.sleep(0.5)
    assert suite.cpu_seconds() - before < 0.25


@pytest.mark.parametrize("loops, factor", [([0.2, 0.1], 1.0), ([0.3, 0.9], 3.0)])
def test_a_slower_machine_has_more_time(monkeypatch, loops, factor):
    class Config:
        args_source = pytest.Config.ArgsSource.TESTPATHS

    monkeypatch.setattr(suite, "budget", lambda config: {"loop": 0.3, "seconds": {"a": 2.0, "b": 600.0}})
    monkeypatch.setattr(suite, "loops", loops)
    monkeypatch.setattr(suite, "spent", {"a": 7.01 * factor, "b": 1.0, "new": 23.0 * factor - 0.1})
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "ci")
    first, second = suite.over(Config)
    assert f"took {7.01 * factor:.1f} s of CPU, want at most {7 * factor:.1f}" in first
    assert "adds up to 602 s, want at most 540" in second
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "mutants")
    assert suite.over(Config) == []
