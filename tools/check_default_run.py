"""`python train.py` keeps what the README promises: in a minute or two and 1.0 GB it learns, whatever the seed.

Runs without any flag but --seed and --out, in folders that are removed afterwards. The first seed runs alone and its
seconds count; the others run side by side, for what they learn.

    CPU time      <= 160 s for the first seed. The README gives the clock's seconds on an idle machine: the same there,
                  because the run uses one thread. 89 s on one machine; on another 101 s one day, and 129 to 143 s
                  another day, where its neighbours were busy and Python's own speed varied by a half
    peak memory   <= 1.0 GB each, by the kernel's count
    after SFT     15 to 50 % of the held-out problems exactly right, each
    after GSPO    >= 90 %; of three seeds one may be below, none below 85 %
    start         the untrained model: measured and printed, with no bar

Run: python tools/check_default_run.py [SEED ...]      default 0 1 2; the numbers come from metrics.jsonl
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CPU_SECONDS, BYTES = 160, 1.0e9
PATIENCE = 1800  # seconds by the clock, then it is ended by force
LEARNED, NEARLY = 0.90, 0.85
PHASES = ("start", "sft", "gspo")
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB on Linux


class Run(NamedTuple):
    seed: int
    code: int
    seconds: float  # by the clock
    cpu: float
    memory: int  # bytes
    exact: dict[str, float]  # phase -> share of the held-out problems
    tail: list[str]  # the last lines it printed


def run(seed: int) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        out, log = Path(scratch, "run"), Path(scratch, "log")
        command = [sys.executable, "train.py", "--seed", str(seed), "--out", str(out)]
        started = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        pid = 0
        while not pid:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)  # the only call that tells one child's peak memory
            seconds = time.monotonic() - started
            if not pid and seconds > PATIENCE:
                child.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it once more
        tail = log.read_text(errors="replace").splitlines()[-20:]
        exact = {phase: row["eval_exact"] for phase, row in last_evaluations(out).items()}
    memory = usage.ru_maxrss * MAXRSS_UNIT
    return Run(seed, child.returncode, seconds, usage.ru_utime + usage.ru_stime, memory, exact, tail)


def last_evaluations(out: Path) -> dict[str, dict]:
    """Phase -> its last row with eval_exact: a phase may be examined on the way, too."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row.get("phase"): row for row in rows if row.get("eval_exact") is not None}


def misses(runs: list[Run]) -> list[str]:
    """One line for each bar that is not held. The first run's CPU time counts."""
    found = []
    for i, (seed, code, seconds, cpu, memory, exact, tail) in enumerate(runs):
        bars = [
            (code == 0, "\n  ".join([f"exit code {code} after {seconds:.0f} s; the last lines were", *tail])),
            (i > 0 or cpu <= CPU_SECONDS, f"took {cpu:.0f} s of CPU, want at most {CPU_SECONDS}"),
            (memory <= BYTES, f"peaked at {memory / 1e9:.2f} GB, want at most {BYTES / 1e9}"),
            *[(phase in exact, f"has no eval_exact row of phase {phase}") for phase in PHASES],
            (0.15 <= exact.get("sft", 0.15) <= 0.50, "want 15 to 50 % after SFT: GSPO needs some success, and room"),
            (exact.get("gspo", 1.0) >= NEARLY, f"want {NEARLY:.0%} or more after GSPO"),
        ]
        found += [f"seed {seed}: {text}" for held, text in bars if not held]
    below = [str(run.seed) for run in runs if run.exact.get("gspo", 0.0) < LEARNED]
    if len(below) > len(runs) // 3:
        found.append(f"seeds {', '.join(below)}: below {LEARNED:.0%} after GSPO, want that of at most one in three")
    return found


def main(seeds: list[int]) -> int:
    print("seed   seconds    CPU     GB" + "".join(f"{phase:>10}" for phase in PHASES), flush=True)
    runs = []
    for together in (seeds[:1], seeds[1:]):
        with ThreadPoolExecutor(2) as pool:
            for done in pool.map(run, together):
                runs.append(done)
                cells = (f"{done.exact[phase]:>10.1%}" if phase in done.exact else f"{'-':>10}" for phase in PHASES)
                numbers = f"{done.seed:<4} {done.seconds:>9.1f} {done.cpu:>6.1f} {done.memory / 1e9:>6.2f}"
                print(numbers + "".join(cells), flush=True)
    failures = misses(runs)
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    if not all(argument.isdigit() for argument in sys.argv[1:]):
        sys.exit(__doc__)
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or [0, 1, 2]))
