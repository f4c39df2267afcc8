"""How much faster two processes of one thread are than one: sampling, scoring and training together.

Runs of GSPO with equal settings, by turns:

    one      a process
    two      two processes that share the same work: what is asked
    half     a process with half the prompts: what two would need if sharing cost nothing
    apart    two such runs at once that know nothing of each other: what two need on this machine, whose cores share
             caches and memory. The slower one counts

What counts is the seconds of all updates but those of the first rollout, from metrics.jsonl; sampling, rewards and the
scoring pass are "rollout", the rest is "update". Each column is the seconds of `one` over its own; two halve them at
best. The tiny model, and a checkpoint.

Run: python benchmarks/scaleout.py [DIR]      on a machine with two idle cores; 5 minutes, 30 with a checkpoint of 135M
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
SMALL = {"lora_r": 16, "prompts_per_rollout": 16, "group_size": 8, "max_new_tokens": 32, "steps": 2 * U}
CHILD = """
import json, sys
import train
from nanogspo.config import TrainConfig
from nanogspo.run import curves
curves.draw_curves = train.write_report = train.hub.save_weights = lambda *arguments, **settings: None
train.run(TrainConfig(**json.loads(sys.argv[1])))
"""


def start(config: dict, processes: int, folder: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {**os.environ, **address, "WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-c", CHILD, json.dumps(config | {"out": folder})]
    how = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, **how) for r in range(processes)
    ]


def seconds(config: dict, processes: int, runs: int) -> dict[str, float]:
    """Of the updates after the first rollout, by phase; of the slowest of `runs` equal runs at once."""
    with tempfile.TemporaryDirectory() as folder:
        started = [process for n in range(runs) for process in start(config, processes, f"{folder}/{n}")]
        said = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            raise SystemExit("\n".join(said)[-3000:])
        found = []
        for n in range(runs):
            rows = [json.loads(line) for line in Path(folder, str(n), "metrics.jsonl").read_text().splitlines()]
            rows = [row for row in rows if row.get("algo") == "gspo" and row["step"] > U]
            whole = sum(row["step_s"] for row in rows)
            update = sum(row["tokens_per_s"] * row["step_s"] / row["update_tokens_per_s"] for row in rows)
            found.append({"all": whole, "rollout": whole - update, "update": update})
    return max(found, key=lambda run: run["all"])


def main() -> None:
    todo = {"tiny, all weights": SHAPE | TINY}
    if len(sys.argv) > 1:
        todo["checkpoint, LoRA"] = SHAPE | SMALL | {"model": sys.argv[1]}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    for name, config in todo.items():
        half = config | {"prompts_per_rollout": config["prompts_per_rollout"] // 2}
        ways = {"one": (config, 1, 1), "two": (config, 2, 1), "half": (half, 1, 1), "apart": (half, 1, 2)}
        found = {way: [] for way in ways}
        for _ in range(2):
            for way, how in ways.items():
                found[way].append(seconds(*how))
                print(
                    f"{name:<18} {way:<6}" + "".join(f" {k} {v:6.1f} s " for k, v in found[way][-1].items()), flush=True
                )
        for way in ("two", "half", "apart"):
            faster = {k: [statistics.mean(run[k] for run in found[w]) for w in ("one", way)] for k in found["one"][0]}
            print(f"{name:<18} {way:<6}" + "".join(f" {k} {a / b:6.2f} x " for k, (a, b) in faster.items()), flush=True)


if __name__ == "__main__":
    main()
