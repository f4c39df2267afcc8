"""10,000 reward calls of which 1 % hang, 1 % raise, 1 % return nan, 1 % None, and 0.1 % kill their process.

    python benchmarks/rewards.py                     one function per answer
    python benchmarks/rewards.py --form batch        TRL's form: 8 answers a call, repeated one by one where it fails

Shows that each is counted, that no call takes longer than its limit, and that the values are those of a run in which
the same answers abstain, so that training is too. Exit code 1 if one of these is not so.

Tests: tests/test_rewards.py has the same with 60 calls.
"""

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanogspo.run import rewards as run_rewards  # noqa: E402
from nanogspo.run.rewards import Rewards  # noqa: E402
from nanogspo.run.worker import Worker  # noqa: E402
from nanogspo.tasks.rewards import Group  # noqa: E402

FILE = """
import os, signal, time

def wild(answer, row):
    n = int(answer)
    if n % 100 == 7:
        time.sleep(3600)
    if n % 100 == 17:
        raise ValueError("no")
    if n % 1000 == 47:
        os.kill(os.getpid(), signal.SIGSEGV) if n % 2000 == 47 else os._exit(1)
    return float("nan") if n % 100 == 27 else None if n % 100 == 37 else n % 5

def wild_batch(completions, **columns):
    return [wild(answer, columns) for answer in completions]

def abstains(answer, row):
    n = int(answer)
    return None if n % 100 in (7, 17, 27, 37) or n % 1000 == 47 else n % 5
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--form", choices=["answer", "batch"], default="answer")
    parser.add_argument("--timeout", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    slowest, ask = [0.0], Worker.ask

    def timed(self, message, seconds):
        start = time.monotonic()
        reply = ask(self, message, seconds)
        if seconds != run_rewards.START:
            slowest[0] = max(slowest[0], time.monotonic() - start)
        return reply

    Worker.ask = timed
    steps = [
        [Group("?", {"answer": "x" * 200}, [str(n) for n in range(first, first + 8)], [[n] * 100 for n in range(8)])
         for first in range(step, min(step + 400, options.calls), 8)]
        for step in range(0, options.calls, 400)
    ]  # fmt: skip
    facts, values, expected = Counter(), [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "wild.py")
        file.write_text(FILE)
        name = "wild" if options.form == "answer" else "wild_batch"
        with Rewards([f"{file}:{name}"], timeout=options.timeout, workers=options.workers) as rewards:
            start = time.monotonic()
            for step, groups in enumerate(steps):
                scores = rewards(groups, step)
                values += scores.values
                facts.update({k.rpartition("/")[2]: v for k, v in scores.facts.items() if k.count("/") == 2})
            seconds = time.monotonic() - start
        with Rewards([f"{file}:abstains"], workers=options.workers) as rewards:
            start = time.monotonic()
            for step, groups in enumerate(steps):
                expected += rewards(groups, step).values
            well = time.monotonic() - start
    N = len(values)
    equal = all(a == b or (math.isnan(a) and math.isnan(b)) for (a,), (b,) in zip(values, expected, strict=True))
    wanted = {"late": N // 100, "failed": N // 100, "not_finite": N // 100, "none": N // 100, "died": N // 1000}
    print(
        f"{N} answers in {seconds:.1f} s; all well: {well:.1f} s, {well / N * 1e6:.0f} us each; counted {dict(facts)}"
    )
    print(f"longest call {slowest[0]:.3f} s of {options.timeout:g} s; values as where they abstain: {equal}")
    return 0 if equal and dict(facts) == wanted and slowest[0] < options.timeout + 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
