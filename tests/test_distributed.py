"""nanogspo/distributed.py and a whole run by two processes: the same run as by one, faster.

Run: python -m pytest tests/test_distributed.py
"""

import datetime
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanogspo import checkpoint, distributed, sharding, tiny
from nanogspo.config import TrainConfig
from nanogspo.families import model_config
from nanogspo.fast import fused_linear
from nanogspo.lora import add_lora
from nanogspo.model import Transformer
from nanogspo.optimizer import Optimizer
from nanogspo.packing import Example, pack, score
from nanogspo.rollout import generate
from nanogspo.run import curves
from nanogspo.run.log import read_rows
from nanogspo.storage import state as runstate
from nanogspo.storage.files import SINGLE
from nanogspo.storage.safetensors import Stored
from train import run

ROOT = Path(__file__).resolve().parent.parent
# Its masks are drawn anew for each update, in each process; of which the first has three micro-batches, the other two
DROPOUT = {"model": "tiny", "algo": "sft", "lora_r": 4, "lora_dropout": 0.3, "eval_size": 0, "threads": 1, "seed": 3,
           "batch_size": 5, "micro_batch_tokens": 8}  # fmt: skip
# 3 prompts and 5 held-out problems: no process has as many as the other
SMALL = {
    "model": "tiny", "task": "reverse", "max_new_tokens": 8, "prompts_per_rollout": 3, "group_size": 4, "batch_size": 5,
    "updates_per_rollout": 2, "steps": 6, "warm_steps": 3, "warm_until": 2.0, "eval_size": 5, "seed": 3, "threads": 1,
    "save_every": 100,
}  # fmt: skip
OWN = {"step_s", "reward_s", "peak_mem_bytes", "says"}  # clocks, memory, and the noise of log-probs in words
SCRIPT = """
import contextlib, errno, io, json, os, sys
import torch
from nanogspo import distributed
from nanogspo.config import TrainConfig
from nanogspo.run import curves
from nanogspo.sampler import Sampler
import train

curves.draw_curves = lambda *args, **kwargs: None
given = json.loads(sys.argv[1])
fault, config = given.pop("fault", ""), given["config"]
rank = int(os.environ["RANK"])
if fault == "stop":  # process 1 alone is asked to stop, in the middle of a rollout
    sys.stdout = sys.stderr
    update = train.Trainer.update
    def stopped(self, phase):
        update(self, phase)
        self.stop.asked |= rank == 1 and self.progress.step == 6
    train.Trainer.update = stopped
if fault == "reward":
    judge = Sampler.own_scores
    def broken(self, *args):
        if rank == 1 and self.config.algo == "gspo":
            raise ValueError("the reward broke")
        return judge(self, *args)
    Sampler.own_scores = broken
if fault == "loss":  # in the middle of a pass, whose collectives are FSDP2's
    loss = train.policy_loss
    def broken(*args, **kwargs):
        if rank == 1:
            raise ValueError("the loss broke")
        return loss(*args, **kwargs)
    train.policy_loss = broken
if fault == "disk":  # full in the middle of a state, whose rows all processes send
    from nanogspo.storage import safetensors
    written, raw_bytes = [], safetensors.raw_bytes
    def full(tensor):
        written.append(tensor)
        if rank == 0 and len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return raw_bytes(tensor)
    safetensors.raw_bytes = full
found, build = {}, train.policy.build
def laws(*args):  # in the middle of set_up, where all processes are together
    tensor = torch.arange(3.0) * (rank + 1)
    tensor.requires_grad_()
    tensor.grad, missing = tensor.detach() + 1, torch.nn.Parameter(torch.zeros(2))
    if rank:
        missing.grad = torch.ones(2)
    distributed.sum_gradients([tensor, missing])
    try:
        distributed.check_same([("w", torch.tensor([0.5 + 0.1 * rank]))])
    except ValueError as error:
        found["odd"] = str(error)
    distributed.check_same([("w", torch.tensor([0.5]))])
    kinds = [torch.rand(()), torch.rand(2, 3, requires_grad=True).T, torch.rand(2) > 0.5, torch.rand(3).bfloat16(),
             torch.zeros(0, 2, dtype=torch.int16), torch.nn.Parameter(torch.rand(2)), torch.rand(4, 2)[:, 0]]
    kept = distributed.gather((rank, {"kinds": kinds}))[rank][1]["kinds"]
    kept = [torch.equal(a, b) and a.dtype == b.dtype and not b.requires_grad for a, b in zip(kinds, kept, strict=True)]
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        distributed.tell("late")
    found.update({
        "heard": heard.getvalue(), "kept": kept,
        "count": distributed.total(2**40 + rank), "gather": distributed.gather(rank),
        "total": [distributed.total(ones := torch.ones(2)).tolist(), ones.tolist()],
        "mine": list(distributed.mine(5)), "agree": [distributed.agree(rank == 1), distributed.agree(False)],
        "first": distributed.first(lambda: f"made by {rank}"), "joined": distributed.joined([rank], [rank, rank]),
        "gradients": [tensor.grad.tolist(), missing.grad.tolist()],
    })
    return build(*args)
if fault == "laws":
    train.policy.build = laws
train.run(TrainConfig(**config))
print(json.dumps({"rank": rank, "ended": not torch.distributed.is_initialized(), **found}), file=sys.stderr)
"""


def two(fault="", script=SCRIPT, **changes):
    """Two processes, as torchrun would start them: their exit codes and what they said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"LOCAL_WORLD_SIZE": "2"}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    argument = json.dumps({"fault": fault, "config": SMALL | changes})
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, argument], cwd=ROOT, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


# ---------------------------------------------------------------------------------------------------------------------
# sharding: what two processes do that hold half of every weight each

# name -> dtype, config.json's changes, LoRA
CASES = {
    "full": (torch.float32, {}, False),
    "full bf16, untied": (torch.bfloat16, {"tie_word_embeddings": False}, False),
    "lora bf16": (torch.bfloat16, {}, True),
    # the gate of the shared expert has one row: process 1 holds none of it
    "experts": (
        torch.float32,
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 24} | tiny.EXPERTS,
        False,
    ),
}
# Half of a vector has 16 numbers: AdamW's kernel rounds what is left beside whole registers in another way
SMALLER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 31}


def empty(changes):
    with torch.device("meta"):
        return Transformer(model_config(tiny.CONFIG | SMALLER | {"moe_intermediate_size": 24} | changes))


def filled(folder, dtype, lora, shard=None):
    """The model in `folder`, with an adapter whose B is not 0."""
    model = checkpoint.load(folder, dtype=dtype, shard=shard)
    if lora:
        add_lora(model, r=2, alpha=4)
        draw = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=draw)
    return model.train()


def batches_of(rank, update):
    """Process 0 has three micro-batches, process 1 one."""
    draw = torch.Generator().manual_seed(10 * update + rank)
    tokens = lambda n: torch.randint(1, 31, (n,), generator=draw).tolist()  # noqa: E731
    examples = [Example.answered(tokens(4), tokens(3 + n)) for n in range(3 - 2 * rank)]
    return [batch for example in examples for batch in pack([example], max_tokens=99)]


def backward(model, batch, scale):
    (score(model, batch)[0].mean() * scale).backward()


def sharded_update(model, optimizer, update):
    own = batches_of(distributed.rank(), update)
    sharding.keep_pace(model, len(own))
    for batch in own:
        backward(model, batch, -0.25)
        optimizer.accumulate()
    with torch.no_grad():  # which leaves the root gathered: after the step it must not be the old one
        score(model, batches_of(0, 9)[0])
    return optimizer.step(1e-2, 1e9)  # clipped by a norm, whose terms are added in another order, bits would differ


def played_update(model, optimizer, update, lora):
    """The same by one process that plays both. Sharded, gradients meet after every pass, and empty passes come first;
    replicas' meet once an update."""
    sums = [[torch.zeros_like(m) for m in optimizer.masters] for _ in range(3)]
    for rank in range(2):
        own = batches_of(rank, update)
        for n, batch in enumerate(own, 3 - len(own)):
            backward(model, batch, -0.25)
            for total, (_, p) in zip(sums[rank if lora else n], optimizer.named, strict=True):
                total += 0 if p.grad is None else p.grad.float()
            model.zero_grad()
    for master, *parts in zip(optimizer.masters, *sums, strict=True):
        master.grad = sum(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: 1)
        optimizer.step(1e-2, 1e9)


def same(model, plain):
    """Whether two models hold the same bits, as they compute."""
    with sharding.gathered(model):
        pairs = zip(model.named_parameters(), plain.named_parameters(), strict=True)
        return all(n == m and p.dtype == q.dtype and torch.equal(p, q) for (n, p), (m, q) in pairs)


def sharded_case(folder, dtype, changes, lora):
    """Runs in both processes. Returns what holds, by name."""
    shard, found = functools.partial(sharding.shard, dtype=dtype, full=not lora, device="cpu"), {}
    sizes, read = [], Stored.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read", lambda s, rows=None: sizes.append((s.shape, t := read(s, rows))) or t)
        model = filled(folder, dtype, lora, shard)
    found["rows alone are read"] = sum(t.numel() for _, t in sizes) <= 0.51 * sum(
        p.numel() for p in empty(changes).parameters()
    )
    plain = filled(folder, dtype, lora)
    optimizer, its = Optimizer(model), Optimizer(plain)
    held = sum(sharding.local(p).numel() for p in sharding.trained(model).values() if sharding.is_sharded(p))
    found["half is held"] = lora or held <= 0.51 * sum(p.numel() for p in plain.parameters())
    found["same at the start"] = same(model, plain)
    batch = batches_of(0, 9)[0]
    for update in range(2):
        with torch.no_grad():
            found[f"scores {update}"] = all(map(torch.equal, score(model, batch), score(plain, batch)))
        sharded_update(model, optimizer, update)
        played_update(plain, its, update, lora)
        found[f"update {update}"] = same(model, plain)
    prompts, how = [[3, 4, 5], [6, 7]], {"group_size": 2, "max_new_tokens": 6 - 4 * distributed.rank(), "eos_ids": (0,)}
    model.prepack = plain.prepack = False
    answers = lambda model: [(a.tokens, a.logp) for a in generate(model, prompts, **how)]  # noqa: E731
    want = answers(plain)
    with pytest.MonkeyPatch.context() as patch, sharding.gathered(model):
        patch.setattr(fused_linear, "can_concatenate", lambda weight: True)  # as on a GPU
        found["answers"] = answers(model) == want
    path = folder / "state.safetensors"
    runstate.save_state(path, model, optimizer, {}, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: 0)
        patch.setattr(distributed, "agree", bool)
        apart = folder / f"plain{os.environ['RANK']}"
        runstate.save_state(apart / "state", plain, its, {}, None)
        checkpoint.save(plain, apart)
    found["one format"] = path.read_bytes() == (apart / "state").read_bytes()
    with sharding.gathered(model):
        distributed.first(lambda: checkpoint.save(model, folder / "out"))
    found["saved"] = (folder / "out" / SINGLE).read_bytes() == (apart / SINGLE).read_bytes()
    by_two, by_one = filled(folder, dtype, lora, shard), filled(folder, dtype, lora)
    resumed = [Optimizer(other) for other in (by_two, by_one)]
    for other, again in zip((by_two, by_one), resumed, strict=True):
        runstate.load_state(path, other, again)
    sharded_update(by_two, resumed[0], 2)
    played_update(by_one, resumed[1], 2, lora)
    played_update(plain, its, 2, lora)
    found["resumed by two"], found["resumed by one"] = same(by_two, plain), same(by_one, plain)
    sharded_update(model, optimizer, 2)  # after a save the rows can be dropped and moved as ever
    found["goes on"] = same(model, plain)
    return found


def sharded(folder):
    """Both processes: every case, then a run of train.py."""
    distributed.WAIT = datetime.timedelta(seconds=20)  # a process that waits in vain is a failure, not a hang
    found = {}
    with distributed.started():
        for name, case in CASES.items():
            found[name] = sharded_case(Path(folder) / name, *case)
        curves.draw_curves = lambda *args, **kwargs: None
        run(TrainConfig(**SMALL, shard="on", out=str(Path(folder) / "run")))
        for where, name, steps, shard in (
            ("out", "whole", 4, "off"), ("out", "parts", 3, "on"), ("resume", "parts", 4, "off")
        ):  # fmt: skip
            run(TrainConfig(**DROPOUT | {where: str(Path(folder) / name)}, steps=steps, shard=shard))
        print(json.dumps(found), file=sys.stderr)


def weights(folder):
    [file] = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run by one process, of one by two, and what these two have said to each other."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
        one, _ = run(TrainConfig(**SMALL, out=str(folder / "one")))
    codes, said = two("laws", out=str(folder / "two"))
    assert codes == [0, 0], said
    return one, folder / "two", [json.loads(text.splitlines()[-1]) for text in said]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for name, (dtype, changes, _) in CASES.items():
        model = empty(changes).to_empty(device="cpu")
        model.init_weights(0, std=0.1)
        draw = torch.Generator().manual_seed(1)
        for p in (p for p in model.parameters() if p.ndim == 1):
            p.data = 1 + 0.2 * torch.randn(p.shape, generator=draw)
        checkpoint.save(model.to(dtype), folder / name)
    script = f"from tests.test_distributed import sharded; sharded({str(folder)!r})"
    codes, said = two(script=script)
    assert codes == [0, 0], said
    return folder, [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.parametrize("kind", ["replicas", "sharded"])
def test_two_processes_make_the_run_of_one(runs, shards, kind):
    """Samples to the letter; numbers to fp32's rounding, since sums are made in another order."""
    one, both, _ = runs
    both = shards[0] / "run" if kind == "sharded" else both
    assert (one / "samples.jsonl").read_text() == (both / "samples.jsonl").read_text()
    rows, others = (read_rows(folder / "metrics.jsonl") for folder in (one, both))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - OWN:
            if isinstance(row[key], float) and not key.endswith("tokens_per_s"):
                assert other[key] == pytest.approx(row[key], rel=2e-3, abs=2e-5), key
            elif not key.endswith("tokens_per_s"):
                assert other[key] == row[key], key
    first = [row for row in others if row.get("algo") == "gspo"][::2]
    assert all(row["ratio_min"] == row["ratio_max"] == 1.0 for row in first) and len(first) == 3
    mine, theirs = weights(one), weights(both)
    assert all((mine[name] - theirs[name]).abs().max() < 1e-4 for name in mine)


def test_one_process_is_asked_and_all_stop_and_go_on(runs, tmp_path):
    """In the middle of a rollout the same number of processes goes on, to the same bits; another number is refused."""
    _, whole, _ = runs
    codes, said = two("stop", out=str(tmp_path / "run"))
    assert codes == [0, 0], said
    again = f"stopped after update 6; continue with: torchrun --nproc-per-node 2 train.py --resume {tmp_path / 'run'}"
    assert again in said[0] and again not in said[1]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 6
    with pytest.raises(ValueError, match="got 1 processes with --resume in the middle of a rollout of 2, want 2"):
        run(TrainConfig(**SMALL, resume=str(tmp_path / "run")))
    codes, said = two(resume=str(tmp_path / "run"))
    assert codes == [0, 0], said
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    mine, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_processes_say_to_each_other(runs):
    *_, found = runs
    assert [f.pop("rank") for f in found] == [0, 1] and all(f.pop("ended") for f in found)
    assert [f.pop("odd") for f in found] == [
        "got other weights or files in processes [1] than in process 0, want the same files on every host"
    ] * 2
    assert [f.pop("heard") for f in found] == ["", "process 1: late\n"]  # of process 0 it is on stdout
    assert [f.pop("mine") for f in found] == [[0, 2, 4], [1, 3]]
    assert found[0] == found[1] == {
        "kept": [True] * 7, "count": 2**41 + 1, "gather": [0, 1], "total": [[2.0, 2.0], [1.0, 1.0]],
        "agree": [True, False], "first": "made by 0",
        "joined": [[0, 1], [0, 0, 1, 1]], "gradients": [[2.0, 5.0, 8.0], [1.0, 1.0]],
    }  # fmt: skip


@pytest.mark.parametrize(("fault", "shard"), [("reward", "off"), ("loss", "on")])
def test_a_fault_of_one_process_ends_all(tmp_path, fault, shard):
    codes, said = two(fault, out=str(tmp_path / "run"), shard=shard, warm_steps=0, eval_size=0)
    # a script of one's own has the interpreter's code, which torch's threads may abort; train.py's is set (program.py)
    assert all(codes) and f"ValueError: the {fault} broke" in said[1], said
    assert "ConnectionError: another process of this run has ended" in said[0], said


def test_a_full_disk_of_process_0_ends_all(tmp_path):
    """In the middle of a state, while the other process sends its rows of a weight; and half a state is none."""
    codes, said = two("disk", out=str(tmp_path / "run"), shard="on", warm_steps=1, steps=1, eval_size=0)
    full = "state.safetensors: cannot be written ([Errno 28] No space left on device); want free space on its disk"
    assert all(codes) and full in said[0].splitlines()[-1], said
    assert "another process of this run has ended, or has kept this one waiting for 2:00:00; it, or" in said[1], said
    assert not list((tmp_path / "run" / "state").iterdir())


def test_one_process_needs_no_other():
    assert (distributed.rank(), distributed.world(), list(distributed.mine(3))) == (0, 1, [0, 1, 2])
    value = object()
    assert distributed.gather(value) == [value] and distributed.joined([1], [value]) == [[1], [value]]
    assert distributed.first(lambda: value) is value and distributed.total(2.5) == 2.5
    with distributed.started():
        assert not torch.distributed.is_initialized()


def test_processes_that_cannot_meet_are_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | place).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=r"^got no meeting of the processes at 127.0.0.1:\d+ \(.*\), want"):
            with distributed.started():
                raise AssertionError("started")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="^got no meeting of the processes at None:.*or no WORLD_SIZE$"):
        with distributed.started():
            raise AssertionError("started")


def test_the_command_that_started_this():
    assert distributed.launcher() == "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world", lambda: 8)
        patch.setattr(distributed, "local_world", lambda: 8)
        assert distributed.launcher() == "torchrun --nproc-per-node 8"
        patch.setattr(distributed, "local_world", lambda: 4)
        assert distributed.launcher() == "torchrun --nnodes 2 --nproc-per-node 4"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_order_is_restored(world, count):
    things = list("abcdefgh"[:count])
    assert distributed.in_order([things[r::world] for r in range(world)]) == things


# ---------------------------------------------------------------------------------------------------------------------
# sharding


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_of_every_weight_are_one_with_all(shards, case):
    _, found = shards
    assert found[0][case] == found[1][case] == dict.fromkeys(found[0][case], True)


def test_dropout_of_every_process_goes_on_as_it_would_have(shards):
    """Of process 1, too, whose generator no state holds, and which makes an empty pass where weights are sharded."""
    folder, _ = shards
    one, other = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one) and len(one) > 10


def test_masks_of_dropout_differ_between_updates_and_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    drawn = []
    with torch.random.fork_rng():
        for rank, step in ((0, 0), (1, 0), (0, 1), (1, 1), (0, 0)):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            distributed.seed(2**63 - 1, step)
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn.pop()) and len({tuple(d.tolist()) for d in drawn}) == 4


def test_one_process_goes_on_with_a_sharded_run(shards, tmp_path, monkeypatch):
    """Between two rollouts, and it is not sharded any more."""
    folder = shutil.copytree(shards[0] / "run", tmp_path / "run")
    monkeypatch.setattr(curves, "draw_curves", lambda *args, **kwargs: None)
    run(TrainConfig(**SMALL | {"steps": 8}, shard="on", resume=str(folder)))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "grad_norm" in row]
    assert [row["step"] for row in rows] == list(range(1, 12)) and rows[-2]["ratio_min"] == rows[-2]["ratio_max"] == 1.0
