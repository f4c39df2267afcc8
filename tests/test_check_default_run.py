"""tools/check_default_run.py: which runs keep the README's promise.

Run: python -m pytest tests/test_check_default_run.py
"""

import pytest

pytest.importorskip("resource")  # the tool asks the kernel for one child's memory: Linux and macOS
import check_default_run
from check_default_run import UNIT, Run


def a_run(seed=0, gspo=0.95, sft=0.4, code=0, cpu=80.0, memory=0.5e9, **exact) -> Run:
    return Run(seed, code, 70.0, cpu, memory, {"start": 0.0, "sft": sft, "gspo": gspo} | exact, ["last words"])


def misses(runs, units=(UNIT / 2, UNIT / 2)):
    return check_default_run.misses(runs, units)


def test_one_of_three_seeds_may_be_below_90_percent_and_none_below_85():
    assert misses([a_run(0), a_run(1, 0.86), a_run(2, 0.90)]) == []
    [line] = misses([a_run(0), a_run(1, 0.86), a_run(2, 0.89)])
    assert line == "seeds 1, 2: below 90% after GSPO, want that of at most one in three"
    [line] = misses([a_run(0), a_run(1), a_run(2, 0.84)])
    assert line == "seed 2: want 85% or more after GSPO"
    assert misses([a_run(0, 0.89)]) and not misses([a_run(0, 0.90)])  # alone it has nobody to make up for it


def test_only_the_first_seeds_seconds_count():
    assert misses([a_run(0), a_run(1, cpu=200.0)]) == []
    [line] = misses([a_run(0, cpu=161.0), a_run(1)])
    assert line == "seed 0: took 161 s of CPU, want at most 160"


def test_a_slow_machine_has_more_seconds():
    assert misses([a_run(cpu=240.0)], (UNIT, 1.5 * UNIT)) == misses([a_run(cpu=240.0)], (1.5 * UNIT, UNIT)) == []
    assert misses([a_run(cpu=241.0)], (UNIT, 1.5 * UNIT)) == ["seed 0: took 241 s of CPU, want at most 240"]
    assert check_default_run.unit() > 0


def test_the_other_bars():
    assert misses([a_run(memory=1.1e9)]) == ["seed 0: peaked at 1.10 GB, want at most 1.0"]
    assert len(misses([a_run(sft=0.14)])) == 1 and len(misses([a_run(sft=0.51)])) == 1
    dead = a_run(code=2)._replace(exact={})
    lines = misses([dead])
    assert "seed 0: exit code 2 after 70 s; the last lines were\n  last words" in lines
    assert "seed 0: has no eval_exact row of phase gspo" in lines and lines[-1].startswith("seeds 0: below 90%")
