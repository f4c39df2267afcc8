"""benchmarks/controls.py: what it measures is what its table says, and file, picture and README are of one measurement.

Run: python -m pytest tests/test_controls.py
"""

import re
import struct
from types import SimpleNamespace

import torch

from benchmarks import controls
from benchmarks.controls import ARMS, FLAGS, PICTURE, curve, draw, results, saved_runs, source, table, weights_hash
from nanogspo.config import ROOT, TrainConfig, parse
from nanogspo.storage.safetensors import write_safetensors
from train import run as trained

SMALL = "--task-size 3 --steps 4 --warm-steps 3 --warm-until 2 --eval-size 4 --max-new-tokens 5"
SMALL += " --prompts-per-rollout 8 --group-size 8 --batch-size 4"


def a_run(arm, seed, right, same=()):
    """40 % after SFT, and `right` of 500 in the end."""
    phase = "grpo" if arm == "GRPO" else "reinforce" if arm == "REINFORCE" else "gspo"
    rows = [("start", 0, 0), ("sft", 70, 200), (phase, 150, 300), (phase, 710, right)]
    rows += [("control", 1000 + seed, 500)] * (arm == "GSPO")
    evaluations = [{"phase": p, "step": s, "eval_exact": n / 500, "eval_count": 500} for p, s, n in rows]
    updates = {"sft": 70, phase: 640} | ({"control": 930 + seed} if arm == "GSPO" else {})
    end = "GSPO" if arm in same else arm
    return {"arm": arm, "seed": seed, "updates": updates, "end": f"{end}{seed}", "evaluations": evaluations}


def all_runs(same=()):
    right = {"GSPO": (490, 480, 485), "GRPO": (485, 485, 485), "REINFORCE": (450, 430, 440)}
    right["GSPO, clip auto"] = right["GSPO"]
    return [a_run(arm, seed, right[arm][seed], same) for arm in FLAGS for seed in range(3)]


def test_the_table_by_hand():
    lines = table(all_runs(same=("GSPO, clip auto",))).splitlines()
    rows = {arm: line for arm in ARMS for line in lines if line.startswith(f"{arm}  ")}
    assert list(rows) == list(ARMS) and all(len(line) <= 130 for line in lines)
    assert re.split("  +", rows["SFT"])[1:3] == ["0", "40.0 (35.8-44.4)"]  # Wilson, as in nanogspo/run/log.py
    assert re.split("  +", rows["SFT continued"])[1] == "930 to 932" and rows["SFT continued"].endswith("  -3.0 +- 2.5")
    # ahead of REINFORCE by 40, 50 and 45 of 500: mean 9 points, and 4.303 * 1 / sqrt 3 on both sides
    assert rows["REINFORCE"].endswith("  +9.0 +- 2.5") and rows["GRPO"].endswith("  +0.0 +- 2.5")
    assert rows["GSPO"].endswith("97.0") and rows["GSPO, clip auto"].endswith("the same bits")
    assert table(all_runs()).splitlines()[-1].endswith("+0.0 +- 0.0")  # equal results of other weights


def test_a_curve_begins_where_the_warm_up_ends():
    early = {"phase": "sft", "step": 40, "eval_exact": 0.1, "eval_count": 500}
    one = a_run("GRPO", 1, 485)
    one["evaluations"].insert(1, early)
    want = {0: [0.4, 0.4], 80: [0.6, 0.6], 640: [0.97, 0.9]}
    assert curve([one, a_run("GSPO", 1, 500), a_run("GRPO", 2, 450)], "GRPO") == want


def test_a_run_is_measured(monkeypatch, tmp_path):
    """The real thing, small, in this process: flags, evaluations of every phase, hashes of both ends."""
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)

    def in_process(command, **how):
        trained(parse(TrainConfig, [*command[2:], *SMALL.split()], "train.py")[0])

    monkeypatch.setattr(controls, "subprocess", SimpleNamespace(run=in_process, DEVNULL=None))
    one, other = controls.train("GSPO", 3), controls.train("GRPO", 3)
    assert one["warm"] == other["warm"] and one["end"] != other["end"] != one["warm"]
    assert one["updates"] | {"control": 0} == {"sft": 3, "gspo": 4, "control": 0} and one["seconds"]["gspo"] > 0
    assert other["updates"] == {"sft": 3, "grpo": 4} and "--seed 3" in other["flags"]
    assert [row["phase"] for row in other["evaluations"]] == ["start", "sft", "grpo"]
    assert [row["phase"] for row in one["evaluations"]] == ["start", "sft", "gspo", "control"]


def test_the_hash_is_of_weights_alone(tmp_path):
    weights = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.zeros(2)}
    write_safetensors(tmp_path / "a", weights, {})
    state = {
        "model.norm.weight": torch.ones(2),
        "model.lm_head.weight": torch.zeros(2),
        "optimizer.step": torch.ones(1),
    }
    write_safetensors(tmp_path / "b", state, {"state": "{}"})
    write_safetensors(tmp_path / "c", weights | {"lm_head.weight": torch.tensor([0.0, 1e-30])}, {})
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b") != weights_hash(tmp_path / "c")


def test_the_file_holds_every_arm_from_one_start_per_seed():
    runs = saved_runs()
    for seed in range(3):
        mine = [run for run in runs if run["seed"] == seed]
        assert {run["arm"] for run in mine} == set(FLAGS) and len({run["warm"] for run in mine}) == 1
        for row in (row for run in mine for row in run["evaluations"]):
            assert row["eval_count"] == 500 and round(500 * row["eval_exact"], 6).is_integer()
    assert len({run["warm"] for run in runs}) == 3


def text_of(png):
    """The tEXt chunks of a PNG: keyword -> text."""
    data, at, found = png.read_bytes(), 8, {}
    while at < len(data):
        [length] = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            found[key.decode()] = value.decode()
        at += 12 + length
    return found


def test_the_picture_is_drawn_from_the_file(tmp_path):
    assert text_of(PICTURE)["Source"] == source(saved_runs())
    draw(all_runs(), tmp_path / "x.png")
    assert text_of(tmp_path / "x.png")["Source"] == source(all_runs()) != source(all_runs()[1:])


def test_the_readme_says_what_the_file_says():
    found = results(saved_runs())
    [line] = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if "benchmarks/controls.py" in line]
    for arm in ("SFT", "SFT continued", "REINFORCE", "GRPO", "GSPO"):
        shares = " / ".join(f"{100 * found[arm][seed]['eval_exact']:.1f}" for seed in range(3))
        assert f"{arm} {shares}" in line, arm
