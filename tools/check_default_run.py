"""`python train.py` keeps what the README promises: within two minutes and 1.5 GB it learns, whatever the seed.

For each seed, in a folder that is removed afterwards, without any flag but --seed and --out:

    wall time     <= 120 s, from the command line to the last line      peak memory   <= 1.5 GB, by the kernel's count
    after SFT     15 to 50 % of the held-out problems exactly right     after GSPO    >= 90 %
    start         the untrained model: measured and printed, with no bar

Run: python tools/check_default_run.py [SEED ...]      default 0; the numbers come from metrics.jsonl
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS, BYTES = 120, 1.5e9
PHASES = ("start", "sft", "gspo")
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB on Linux


def run(seed: int, out: Path, log: Path) -> tuple[int, float, int]:
    """(exit code, seconds, bytes) of one default run; ended by force at twice the limit."""
    command = [sys.executable, "train.py", "--seed", str(seed), "--out", str(out)]
    started = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)  # the only call that tells one child's peak memory
        seconds = time.monotonic() - started
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it once more
            return child.returncode, seconds, usage.ru_maxrss * MAXRSS_UNIT
        if seconds > 2 * SECONDS:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.05)


def last_evaluations(out: Path) -> dict[str, dict]:
    """Phase -> its last row with eval_exact: a phase may be examined on the way, too."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row.get("phase"): row for row in rows if row.get("eval_exact") is not None}


def misses(seconds: float, memory: int, exact: dict[str, float]) -> list[str]:
    bars = [
        (seconds <= SECONDS, f"took {seconds:.0f} s, want at most {SECONDS}"),
        (memory <= BYTES, f"peaked at {memory / 1e9:.2f} GB, want at most {BYTES / 1e9}"),
        *[(phase in exact, f"has no eval_exact row of phase {phase}") for phase in PHASES],
        (0.15 <= exact.get("sft", 0.15) <= 0.50, "want 15 to 50 % after SFT: GSPO needs some success, and room"),
        (exact.get("gspo", 1.0) >= 0.90, "want 90 % or more after GSPO"),
    ]
    return [text for held, text in bars if not held]


def main(seeds: list[int]) -> int:
    failed = False
    print("seed   seconds     GB" + "".join(f"{phase:>10}" for phase in PHASES))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            out, log = Path(scratch, "run"), Path(scratch, "log")
            code, seconds, memory = run(seed, out, log)
            tail = log.read_text(errors="replace").splitlines()[-20:]
            exact = {phase: row["eval_exact"] for phase, row in last_evaluations(out).items()}
        shares = "".join(f"{exact[phase]:>10.1%}" if phase in exact else f"{'-':>10}" for phase in PHASES)
        print(f"{seed:<4} {seconds:>9.1f} {memory / 1e9:>6.2f}{shares}", flush=True)
        errors = [f"exit code {code}; the last lines were", *tail] if code else misses(seconds, memory, exact)
        for error in errors:
            print(f"  seed {seed}: {error}")
        failed |= bool(errors)
    return int(failed)


if __name__ == "__main__":
    if not all(argument.isdigit() for argument in sys.argv[1:]):
        sys.exit(__doc__)
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or [0]))
