"""The plan against reality: what run/planner.py counts, and what six short runs on this CPU come to.

SFT and GSPO, with LoRA, with all weights and with LoRA over NF4; gradient checkpointing in every other one. A run is a
process; its peak is what the system says that it had resident at most, without pages of files (the libraries' code, of
which a run touches more and more), less what it had when it began to load weights (Python, torch, data). The plan is
the one that a run prints, at its fullest moment. glibc gives blocks back as soon as they are freed (AT_ONCE): left to
itself it keeps up to 150 MB of them here, which no plan counts.

Run: python benchmarks/planner.py DIR      a checkpoint of some 100 M parameters; two minutes on an idle core
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
RUNS = {
    "SFT, LoRA": {"algo": "sft"},
    "SFT, full": {"algo": "sft", "lora_r": 0, "gradient_checkpointing": "on"},
    "SFT, NF4": {"algo": "sft", "quant": "nf4"},
    "GSPO, LoRA": {"algo": "gspo", "reward": ["length:9"], "gradient_checkpointing": "on"},
    "GSPO, full": {"algo": "gspo", "reward": ["length:9"], "lora_r": 0},
    "GSPO, NF4": {"algo": "gspo", "reward": ["length:9"], "quant": "nf4", "gradient_checkpointing": "on"},
}
# Rows of one length, which is what a plan is made for; a reward that leaves no group without a spread
ROWS = [
    {"prompt": f"Say the number {n}, and then all the numbers that come after it, until you are told to stop.",
     "completion": " ".join(f"{n}, one more is" for _ in range(12))}
    for n in range(10, 90)
]  # fmt: skip
SHAPE = {"max_new_tokens": 24, "prompts_per_rollout": 4, "group_size": 4, "updates_per_rollout": 2, "steps": 2,
         "batch_size": 8, "eval_size": 0, "dtype": "fp32", "threads": 1, "prepack": "off",
         "gradient_checkpointing": "off"}  # fmt: skip


def resident(kind: str) -> int:
    """Bytes of this process: VmHWM, the most there were; RssAnon and RssFile now, in its own pages and in files'."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


def measure(config: dict) -> dict[str, float]:
    """In a process of its own: bytes planned and bytes used."""
    import train
    from nanogspo.config import TrainConfig
    from nanogspo.run import curves, planner

    found, approve, build = {}, planner.approve, train.policy.build

    def approved(config, outline, longest, available):
        config = approve(config, outline, longest, available)
        found["plan"] = planner.most(planner.memory_parts(config, outline, longest))
        found["certain"] = planner.most(planner.memory_parts(config, outline, longest), planner.ESTIMATES)
        return config

    def built(*arguments):
        found["before"] = resident("RssAnon")
        return build(*arguments)

    planner.approve, train.policy.build = approved, built
    curves.draw_curves = train.write_report = lambda *arguments, **settings: None
    train.hub.save_weights = lambda *arguments: None  # a run's last moment, which the plan leaves out
    train.run(TrainConfig(**config))
    return found | {"peak": resident("VmHWM") - resident("RssFile") - found["before"]}


def main() -> None:
    if len(sys.argv) == 3:
        print("\n" + json.dumps(measure(json.loads(sys.argv[2]))))
        return
    worst = 0.0
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.jsonl")
            rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
            config = SHAPE | changes | {"model": sys.argv[1], "out": f"{folder}/run", "data": str(rows)}
            command = [sys.executable, __file__, sys.argv[1], json.dumps(config)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | AT_ONCE)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        bytes_of = json.loads(done.stdout.splitlines()[-1])
        apart = bytes_of["plan"] / bytes_of["peak"] - 1
        worst = max(worst, abs(apart))
        checkpointing = (SHAPE | changes)["gradient_checkpointing"]
        row = {part: f"{bytes_of[part] / 1e6:,.0f} MB" for part in ("plan", "certain", "peak", "before")}
        print(f"{name:<11} checkpointing {checkpointing:<3} {row}: the plan is {apart:+.1%} off", flush=True)
    print(f"at most {worst:.1%} off")


if __name__ == "__main__":
    main()
