"""How much faster two processes of one thread are than one: sampling, scoring and training together.

Runs of GSPO with equal settings, by turns: one process, two, one, two. What counts is the seconds of all updates but
those of the first rollout, from metrics.jsonl; two processes halve them at best. The tiny model, and a checkpoint.

Run: python benchmarks/scaleout.py [DIR]      on a machine with two idle cores; some minutes
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
U = 4  # updates a rollout
SHAPE = {"task": "reverse", "task_size": 16, "updates_per_rollout": U, "steps": 5 * U, "eval_size": 0, "warm_steps": 0,
         "threads": 1, "dtype": "fp32", "save_every": 10**6}  # fmt: skip
TINY = {"model": "tiny", "lora_r": 0, "prompts_per_rollout": 64, "group_size": 8, "max_new_tokens": 17}
SMALL = {"lora_r": 16, "prompts_per_rollout": 4, "group_size": 8, "max_new_tokens": 32, "steps": 3 * U}
CHILD = """
import json, sys
import train
from nanogspo.config import TrainConfig
from nanogspo.run import curves
curves.draw_curves = train.write_report = train.hub.save_weights = lambda *arguments, **settings: None
train.run(TrainConfig(**json.loads(sys.argv[1])))
"""


def seconds(config: dict, processes: int) -> float:
    """Of the updates after the first rollout."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        shared = {**os.environ, **address, "WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
        shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
        command = [sys.executable, "-c", CHILD, json.dumps(config | {"out": f"{folder}/run"})]
        started = [
            subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for r in range(processes)
        ]  # fmt: skip
        said = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("\n".join(said)[-3000:])
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return sum(row["step_s"] for row in rows if row.get("algo") == "gspo" and row["step"] > U)


def main() -> None:
    todo = {"tiny, all weights": SHAPE | TINY}
    if len(sys.argv) > 1:
        todo["checkpoint, LoRA"] = SHAPE | SMALL | {"model": sys.argv[1]}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    for name, config in todo.items():
        found = {1: [], 2: []}
        for _ in range(2):
            for processes, times in found.items():
                times.append(seconds(config, processes))
        one, two = (statistics.mean(times) for times in found.values())
        print(f"{name:<18} one process {found[1]} s, two {found[2]} s: {one / two:.2f} x", flush=True)


if __name__ == "__main__":
    main()
