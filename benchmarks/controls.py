"""What GSPO is worth on the default task, beside what else could have been done from the same warm start.

    python benchmarks/controls.py                3 seeds x 4 runs of `python train.py`: 30 to 40 minutes of one core
    python benchmarks/controls.py --draw         nothing is trained: the table and the picture of what the file holds

    SFT               where the warm-up ends, and every other arm begins
    SFT continued     the same optimiser and batches for as many seconds as GSPO took (--control)
    REINFORCE         the same rollouts and updates as GSPO; no ratio and no clip, though 3 of 4 updates are off-policy
    GRPO              the same; a ratio for each token, clipped at 0.8 and 1.27
    GSPO              the default run
    GSPO, clip auto   the range measured by the noise of the first rollout, 3e-4 / 4e-4 at least

Two budgets cannot both be equal. The arms of RL share rollouts and updates (160 and 640), whatever these take; SFT
continued shares the clock with GSPO, and makes several times as many updates. All arms of a seed have the same seed,
data order and warm start; its weights are hashed, and an arm that starts elsewhere ends this program.

Writes benchmarks/results/controls.json after every run, and goes on from there if it is stopped; draws
lessons/19_controls.png. Lesson 19 prints the table from the file.
Tests: tests/test_controls.py
"""

import argparse
import collections
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from nanogspo.run.log import read_rows, wilson_interval  # noqa: E402
from nanogspo.storage.files import atomic_write  # noqa: E402
from nanogspo.storage.safetensors import raw_bytes, read_header  # noqa: E402

RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "controls.json", ROOT / "lessons" / "19_controls.png"
FLAGS = {  # the run of each arm of RL; the two of SFT are parts of GSPO's
    "GSPO": ["--control"],
    "GRPO": ["--algo", "grpo"],
    "REINFORCE": ["--algo", "reinforce"],
    "GSPO, clip auto": ["--clip", "auto"],
}
ARMS = "SFT", "SFT continued", "REINFORCE", "GRPO", "GSPO", "GSPO, clip auto"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 95 % of Student's t, by the number of seeds
OKABE_ITO = dict(zip(ARMS, ("#7A7A7A", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#E69F00"), strict=True))


def weights_hash(path: Path) -> str:
    """Of the weights in a file of safetensors: a model, or the model in a saved state."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_header(path)[0].items()}
    own = {name: t for name, t in tensors.items() if not name.startswith(("optimizer.", "rollout.", "reference."))}
    return hashlib.sha256(b"".join(bytes(raw_bytes(own[name].read())) for name in sorted(own))).hexdigest()[:16]


def train(arm: str, seed: int) -> dict:
    """One run in a folder that is removed afterwards: its evaluations, and what it took."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "run")
        flags = [*FLAGS[arm], "--seed", str(seed), "--eval-every", "80"]
        command = [sys.executable, "train.py", *flags, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        rows = read_rows(out / "metrics.jsonl")
        hashes = {"warm": weights_hash(out / "state" / "warm.safetensors")}
        hashes["end"] = weights_hash(out / "model" / "model.safetensors")
    updates = collections.Counter(row["phase"] for row in rows if "algo" in row)
    seconds = collections.Counter()
    for row in rows:
        seconds[row.get("phase")] += row.get("step_s", 0.0)
    keep = "phase", "step", "eval_exact", "eval_count"
    evaluations = [{key: row[key] for key in keep} for row in rows if "eval_exact" in row]
    spent = {"updates": dict(updates), "seconds": {phase: round(seconds[phase], 1) for phase in updates}}
    return {"arm": arm, "seed": seed, "flags": " ".join(flags), **hashes, **spent, "evaluations": evaluations}


def results(runs: list[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> its last evaluation, with "updates" after the warm-up and "end", the hash of RL's weights."""
    found = {arm: {} for arm in ARMS}
    for run in runs:
        last = {row["phase"]: row for row in run["evaluations"]}  # of each phase
        phase = next(name for name in last if name not in ("start", "sft", "control"))
        found[run["arm"]][run["seed"]] = last[phase] | {"updates": run["updates"][phase], "end": run["end"]}
        if run["arm"] == "GSPO":
            found["SFT"][run["seed"]] = last["sft"] | {"updates": 0, "end": ""}
            found["SFT continued"][run["seed"]] = last["control"] | {"updates": run["updates"]["control"], "end": ""}
    return found


def right(row: dict) -> tuple[float, float, float]:
    """An evaluation as (share of right answers, its 95 % interval)."""
    n = row["eval_count"]
    return row["eval_exact"], *wilson_interval(round(row["eval_exact"] * n), n)


def table(runs: list[dict]) -> str:
    """Per cent right of each seed with its interval, their mean, and by how much GSPO is ahead: the mean of the paired
    differences with the 95 % interval of Student's t over seeds, which is wide for three of them."""
    found = results(runs)
    seeds = sorted(found["GSPO"])
    head = "".join(f"{f'seed {seed}':<21}" for seed in seeds)
    lines = [f"{'':<17}{'updates':<14}{head}{'mean':<7}GSPO is ahead by"]
    for arm in ARMS:
        rows, GSPO = (found[name] for name in (arm, "GSPO"))
        updates = sorted({row["updates"] for row in rows.values()})
        spent = f"{updates[0]}" + f" to {updates[-1]}" * (len(updates) > 1)
        cells = ("{:6.1%} ({:.1%}-{:.1%})".format(*right(rows[seed])) if seed in rows else "not run" for seed in seeds)
        lead = [100 * (GSPO[seed]["eval_exact"] - row["eval_exact"]) for seed, row in rows.items()]
        half = T95[len(rows)] * statistics.stdev(lead) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf
        same = all(row["end"] == GSPO[seed]["end"] for seed, row in rows.items())
        ahead = "the same bits" * (arm != "GSPO") if same else f"{statistics.mean(lead):+.1f} +- {half:.1f}"
        mean = f"{100 * statistics.mean(row['eval_exact'] for row in rows.values()):5.1f}"
        cells = "".join(f"{cell.replace('%', ''):<21}" for cell in cells)
        lines.append(f"{arm:<17}{spent:<14}{cells}{mean:<7}{ahead}".rstrip())
    return "\n".join(lines)


def saved_runs() -> list[dict]:
    return json.loads(RESULTS.read_text("utf-8"))["runs"]


def source(runs: list[dict]) -> str:
    """A hash of the numbers: the picture carries it, so that a test can tell a picture of other ones."""
    return hashlib.sha256(json.dumps(runs).encode()).hexdigest()


def curve(runs: list[dict], arm: str) -> dict[int, list[float]]:
    """Updates of RL -> the share of right answers in each seed, from the end of the warm-up (0) on."""
    found = {}
    for run in (run for run in runs if run["arm"] == arm):
        warm = [row for row in run["evaluations"] if row["phase"] == "sft"][-1:]
        rows = warm + [row for row in run["evaluations"] if row["phase"] not in ("start", "sft", "control")]
        for row in rows:
            found.setdefault(row["step"] - rows[0]["step"], []).append(row["eval_exact"])
    return found


def draw(runs: list[dict], path: Path) -> None:
    """Left: held-out exact match while RL runs, mean and seeds; right: the end of each seed with its 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes, title in ((curves, "held-out exact match over updates of RL"), (ends, "at the end, 95 % interval")):
        axes.set_title(title, fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_ylim(0.3, 1.02)
    curves.set_xlabel("updates after the warm-up, four a rollout")
    for arm in FLAGS:
        steps, by_seed = zip(*curve(runs, arm).items(), strict=True)
        for shares in zip(*by_seed, strict=True):
            curves.plot(steps, shares, color=OKABE_ITO[arm], linewidth=0.7, alpha=0.5)
        mean = [statistics.mean(shares) for shares in by_seed]
        style = "--" if arm == "GSPO, clip auto" else "-"  # else it would hide GSPO, whose numbers it may share
        curves.plot(steps, mean, style, color=OKABE_ITO[arm], linewidth=2.2, label=arm)
    curves.legend(frameon=False, fontsize=9, loc="lower right")
    for place, (arm, by_seed) in enumerate(results(runs).items()):
        for shift, (_, row) in zip((-0.22, 0, 0.22), sorted(by_seed.items()), strict=False):
            share, low, high = right(row)
            ends.vlines(place + shift, low, high, color=OKABE_ITO[arm], linewidth=1.6)
            ends.plot(place + shift, share, "o", color=OKABE_ITO[arm], markersize=4.5)
    names = [arm.replace(" ", "\n", 1) for arm in ARMS]
    ends.set_xticks(range(len(ARMS)), names, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Source": source(runs)})


def machine() -> dict:
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": name, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": 1, **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    saved = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"machine": machine(), "runs": []}
    runs = saved["runs"]
    for arm in FLAGS if not options.draw else []:
        for seed in options.seeds:
            if any((run["arm"], run["seed"]) == (arm, seed) for run in runs):
                continue
            runs.append(train(arm, seed))
            starts = {run["warm"] for run in runs if run["seed"] == seed}
            if len(starts) > 1:
                raise SystemExit(f"got {arm}, seed {seed}, from another warm start than the other arms")
            atomic_write(RESULTS, json.dumps(saved, indent=1) + "\n")
            print(arm, seed, runs[-1]["seconds"], runs[-1]["evaluations"][-1], flush=True)
    print(table(runs))
    draw(runs, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
