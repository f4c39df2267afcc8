"""GRPO against GSPO on the tiny mixture of experts, with and without --router-replay: what they reach, how far ratios
spread, how often a token's experts change.

    python benchmarks/moe_rl.py OUT.json [--arms gspo,grpo,...] [--seeds 0,1,2]

Each arm is configs/tiny_moe.yaml (160 rollouts of 512 answers, 4 updates each) with another --algo; a seed decides the
weights at the start, the problems and the sampling, so the arms of a seed share them and their SFT warm-up. The same
500 held-out problems for all. `next` is configs/tiny_next.yaml, for its time. A run takes 70 to 90 s of one core, 15
of them 20 minutes. OUT.json is written after each run, and runs that are in it already are not made again.

Kept of a run: right answers of 500 before RL and after, with Wilson's 95 % interval; seconds by the clock and of the
CPU; and of updates 2 to 4 of each rollout, where ratios can move,

    log_ratio    of answers, (seq_logp - old_seq_logp) / length, for GRPO as for GSPO: standard deviation, quantiles
    clipped      the share of answers (GSPO) or tokens (GRPO) whose gradient the clip removed
    experts_flipped, experts_flipped_sampler, experts_unused, experts_max_load, router_entropy: means of metrics.jsonl's

Lesson 16 shows the result, benchmarks/results/moe_rl.json.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ARMS = {
    "gspo": ["--algo", "gspo"],
    "gspo_replay": ["--algo", "gspo", "--router-replay"],
    "grpo": ["--algo", "grpo"],
    "grpo_replay": ["--algo", "grpo", "--router-replay"],
    "next": ["--config", "configs/tiny_next.yaml"],
}
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


def one(folder: str, flags: list[str]) -> None:
    """The run, in a process of its own, with a note of every answer's log-ratio."""
    import torch

    import train
    from kernels.seq_logprob import sequence_sums
    from nanogspo.config import TrainConfig, parse

    loss, noted = train.policy_loss, []

    def policy_loss(algo, logp, old_logp, cu_seqlens, *rest, **clip):
        noted.append(sequence_sums(logp.detach() - old_logp, cu_seqlens) / cu_seqlens.diff())  # (N,)
        return loss(algo, logp, old_logp, cu_seqlens, *rest, **clip)

    train.policy_loss = policy_loss
    config, _ = parse(TrainConfig, [*flags, "--out", folder], "moe_rl.py")
    train.run(config)
    torch.save(noted, f"{folder}/log_ratios.pt")


def summary(folder: pathlib.Path) -> dict:
    import torch

    from nanogspo.run.log import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    exams = [row for row in rows if "eval_exact" in row]
    warm = [row for row in exams if row["phase"] == "sft"][-1]
    moved = [row for row in rows if row.get("algo") in ("gspo", "grpo") and "reward_s" not in row]
    kept = {"curve": [[row["step"], row["eval_exact"]] for row in exams]}
    for name, row in (("warm", warm), ("final", exams[-1])):
        kept[name] = {key: row[f"eval_{key}"] for key in ("exact", "low", "high")}
    kept["clipped"] = sum(row["clip_low_frac"] + row["clip_high_frac"] for row in moved) / len(moved)
    log_ratios = [x for x in torch.load(folder / "log_ratios.pt") if x.any()]  # not the first of a rollout
    third, every = len(log_ratios) // 3, torch.cat(log_ratios)
    thirds = log_ratios[:third], log_ratios[third:-third], log_ratios[-third:]
    kept["log_ratio"] = {"std": every.std().item(), "std_by_thirds": [torch.cat(part).std().item() for part in thirds]}
    kept["log_ratio"] |= {"largest": every.abs().max().item()}
    kept["log_ratio"] |= {f"p{100 * q:02.0f}": every.quantile(q).item() for q in QUANTILES}
    names = [key for key in moved[0] if key.startswith(("experts_", "router_")) and not key.endswith("_by_layer")]
    return kept | {key: sum(row[key] for row in moved) / len(moved) for key in names}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=pathlib.Path)
    p.add_argument("--arms", default=",".join(ARMS))
    p.add_argument("--seeds", default="0,1,2")
    args = p.parse_args()
    import torch

    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), cpu)
    found |= {"cpu": cpu, "torch": torch.__version__, "python": platform.python_version()}
    runs = found.setdefault("runs", {})
    for seed in args.seeds.split(","):
        for arm in (arm for arm in args.arms.split(",") if f"{arm}:{seed}" not in runs):
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary, "run")
                config = [] if "--config" in ARMS[arm] else ["--config", "configs/tiny_moe.yaml"]
                flags = [*config, *ARMS[arm], "--seed", seed, "--save-every", "100000"]
                command = [sys.executable, __file__, "--one", folder, *flags]
                before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
                times = {"wall_s": wall, "cpu_s": after.ru_utime - before.ru_utime}
                runs[f"{arm}:{seed}"] = times | summary(folder)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(arm, seed, json.dumps(runs[f"{arm}:{seed}"]), flush=True)


if __name__ == "__main__":
    one(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--one"] else main()
