"""Long trials that CI has no time for; LOG.md has their results. On Linux.

    python tools/soak.py kills 50          kill -9 at 50 random moments of SFT, GRPO, GSPO and multi-turn runs; each is
                                           resumed, or begun anew if it had saved nothing, and must leave what the run
                                           that nobody killed left: weights, state, samples.jsonl, every field of
                                           metrics.jsonl but clocks and memory
    python tools/soak.py faults 28         two processes, every other run sharded. After a random update, and up to a
                                           second, one is killed, the launcher gets SIGTERM or SIGINT, or the disk of
                                           process 0 has room for a random number of bytes only: all processes end
                                           within 60 s, those of rewards too. Or the reward of process 1 hangs: once,
                                           which the run gets over, or from the start of a resumed run, which ends
                                           within 60 s and the reward's time. stderr has one line that says why, and
                                           the run, resumed, leaves what one without a fault left
    python tools/soak.py rollouts 500      a run of 500 tiny rollouts with reward processes: its memory and its open
                                           files near its end are at most 5 % above those after 50

Exit code 0 if all hold.      Tests: none, this is one. About 20 minutes for 50 kills, 5 for 500 rollouts, on one core;
30 for 28 faults, on two.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CLOCKS = {"step_s", "tokens_per_s", "update_tokens_per_s", "sampling_tokens_per_s", "scoring_tokens_per_s", "reward_s"}
CLOCKS |= {"peak_mem_bytes"}
TINY = "--model tiny --task reverse --eval-size 8 --save-every 3 --threads 1 --max-new-tokens 8"
RUNS = {
    "sft": f"{TINY} --algo sft --steps 24",
    "grpo": f"{TINY} --algo grpo --warm-steps 6 --steps 24 --prompts-per-rollout 4 --group-size 4",
    "gspo": f"{TINY} --algo gspo --warm-steps 6 --steps 24 --prompts-per-rollout 4 --group-size 4 --eval-every 8",
    "multi-turn": "--task customer_service --algo gspo --steps 16 --prompts-per-rollout 2 --group-size 4 --max-turns 3 "
    "--eval-size 2 --save-every 3 --threads 1 --max-new-tokens 16 --lora-r 4 --dtype fp32 --warm-steps 0",
}


def chat_checkpoint(folder: Path) -> Path:
    """A model with a chat template, random but for a bias that ends a turn after some four tokens."""
    import torch

    from lessons.small_chat import small_tokenizer
    from nanogspo.checkpoint import save
    from nanogspo.families import model_config
    from nanogspo.model import Transformer

    tokenizer = small_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 32, "vocab_size": 406, "max_position_embeddings": 4096, "mlp_bias": True}
    model = Transformer(model_config({"model_type": "llama", **shape})).init_weights(0, std=0.3)
    with torch.no_grad():
        model.layers[-1].mlp.down_proj.bias[0] = 20.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_ids[0], 0] = 0.8
    save(model, str(folder))
    tokenizer.save(folder)
    return folder


def start(*arguments: object, before: Sequence[str] = ()) -> subprocess.Popen:
    command = [sys.executable, *before, "train.py", *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)


def finished(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {said[-2000:]}")


def left(folder: Path) -> dict[str, object]:
    """What a run has left, without its clocks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
        elif path.suffix in (".safetensors", ".jsonl"):
            found[name] = path.read_bytes()
    return found


def kills(count: int, scratch: Path) -> int:
    chat, bad, moments = chat_checkpoint(scratch / "chat"), 0, random.Random(0)
    for kind, flags in RUNS.items():
        flags = flags.split() + (["--model", chat] if kind == "multi-turn" else [])
        whole, began = scratch / f"{kind}-whole", time.perf_counter()
        finished(start(*flags, "--out", whole))
        seconds, want = time.perf_counter() - began, left(whole)
        share = count // len(RUNS) + (list(RUNS).index(kind) < count % len(RUNS))
        for n in range(share):
            folder, moment = scratch / f"{kind}-{n}", moments.uniform(0, seconds)
            process = start(*flags, "--out", folder)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
            rows = folder / "metrics.jsonl"
            updates = rows.read_text().count('"algo"') if rows.exists() else 0
            state = (folder / "state" / "state.safetensors").exists()
            if state:
                finished(start(*flags, "--resume", folder))
            else:  # killed before the first save: there is nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
                finished(start(*flags, "--out", folder))
            got = left(folder)
            differ = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
            bad += bool(differ)
            how = "resumed" if state else "begun anew"
            ended = "killed" if process.returncode == -signal.SIGKILL else "had ended"
            when = f"{ended} at {moment:.1f} of {seconds:.1f} s, {updates} updates"
            print(f"{kind} {n}: {when}, {how}: {differ or 'equal'}", flush=True)
            shutil.rmtree(folder)
    print(f"{count - bad} of {count} equal")
    return int(bad > 0)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "60")


def children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def family(process: int) -> list[int]:
    """Its children, and theirs."""
    return [pid for child in children(process) for pid in (child, *family(child))]


FAULTS = ("process 0 killed", "process 1 killed", "SIGTERM", "SIGINT", "disk full", "reward hangs", "reward hangs once")
LIMIT = 4  # seconds, --reward-timeout
# In TRL's form, so that a group that is late is asked again, answer by answer. It keeps Python's lock and is deaf to
# signals, as long as the flag is there; an evaluation asks for one answer at a time, which is not asked again
REWARD = """
import os, pathlib, re, signal
FLAG = pathlib.Path(__file__).with_name("hang")

def fraction(completions, **columns):
    fault = FLAG.read_text() if os.environ["RANK"] == "1" and FLAG.exists() else ""
    if fault == "reward hangs" or fault and len(completions) > 1:
        if fault == "reward hangs once":
            FLAG.unlink()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        re.match("(a+)+$", "a" * 60 + "b")
    return [sum(c in "abc" for c in completion[0]["content"]) / 8 for completion in completions]
"""
# Runs train.py. As long as there is a file `full` with a number, process 0 can write so many bytes more to files
DISK = """
import builtins, errno, io, os, pathlib, runpy, sys
FLAG, usual, written = pathlib.Path(__file__).with_name("full"), io.open, 0

class Disk(io.FileIO):
    def write(self, data):
        global written
        data = memoryview(data).cast("B")
        if FLAG.exists() and (room := int(FLAG.read_text()) - written) < len(data):
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[:room]
        count = super().write(data)
        written += count if FLAG.exists() else 0
        return count

def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
    if not set(mode) & set("wa") or str(file) == os.devnull or not isinstance(file, (str, os.PathLike)):
        return usual(file, mode, buffering, encoding, errors, newline, **more)
    bytes_ = io.BufferedWriter(Disk(file, mode.replace("b", "")))
    return bytes_ if "b" in mode else io.TextIOWrapper(bytes_, encoding, errors, newline)

if os.environ["RANK"] == "0":
    builtins.open = io.open = opened
sys.argv, sys.path[0] = sys.argv[1:], os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ended(launcher: subprocess.Popen, seconds: float, processes: list[int]) -> tuple[str, str]:
    """(what it said on stderr, what is wrong with how it ended: "" for nothing). seconds: how long it may take."""
    until = time.perf_counter() + seconds
    try:
        _, said = launcher.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        return "", f"not ended within {seconds:.0f} s"
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.perf_counter() < until:
        time.sleep(0.05)  # a process that lost its parent is there until the system has waited for it
    over = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    return said, f"left processes {over}" if over else ""


def misses(said: str, *words: str) -> str:
    """What is wrong with the lines of our processes: one has these words, others say that another process has ended."""
    lines = [line for line in said.splitlines() if line.startswith("train.py") and line != "train.py FAILED"]
    causes = [line for line in lines if "another process of this run has ended" not in line]
    return "" if len(causes) == 1 and all(word in causes[0] for word in words) else f"said {causes}"


def strike(fault: str, launcher: subprocess.Popen, scratch: Path, room: int) -> str:
    """One fault of a run that goes on. Returns what is wrong with how it ended."""
    processes, own = children(launcher.pid), family(launcher.pid)
    if launcher.poll() is not None:
        said, wrong = ended(launcher, 60, own)
        return wrong or (f"ended before it, {said[-2000:]}" if launcher.returncode else "")
    if fault.endswith("killed") and len(processes) == 2:
        os.kill(processes[int(fault[8])], signal.SIGKILL)
    elif fault == "disk full":
        (scratch / "full").write_text(str(room))
    elif fault == "reward hangs once":
        (scratch / "hang").write_text(fault)
    else:
        launcher.send_signal(getattr(signal, fault, signal.SIGTERM))
    said, wrong = ended(launcher, 600 if fault == "reward hangs once" else 60, own)
    if fault == "disk full" and launcher.returncode:  # 0: the room was enough
        wrong = wrong or misses(said, "train.py: ", "cannot be written", "No space left", "free space")
    if fault == "reward hangs once":
        wrong = wrong or (f"code {launcher.returncode}" if launcher.returncode else "")
    for flag in ("full", "hang"):
        (scratch / flag).unlink(missing_ok=True)
    return wrong


def hangs(scratch: Path, *command: object) -> str:
    """A run whose reward hangs in process 1 from the start. Returns what is wrong with how it ended."""
    (scratch / "hang").write_text("reward hangs")
    launcher, own = start(*command, before=TORCHRUN), set()
    began, limit = time.perf_counter(), 60 + 3 * LIMIT  # a group, then its four answers by two processes
    while launcher.poll() is None and time.perf_counter() - began < limit:
        own |= {*family(launcher.pid)}
        time.sleep(0.2)
    said, wrong = ended(launcher, max(1.0, limit - (time.perf_counter() - began)), [*own])
    (scratch / "hang").unlink()
    wrong = wrong or ("" if launcher.returncode else "code 0")
    return wrong or misses(said, "(process 1): reward fraction", f"no answer within {LIMIT} s", "--reward-timeout")


def faults(count: int, scratch: Path) -> int:
    (scratch / "reward.py").write_text(REWARD)
    (scratch / "disk.py").write_text(DISK)
    flags = [*RUNS["gspo"].split(), "--keep-saves", 2, "--reward", scratch / "reward.py:fraction"]
    flags += ["--reward-timeout", LIMIT, "--shard"]
    shards, bad, longest, moments, want = ("off", "on"), 0, 0.0, random.Random(0), {}
    for shard in shards:
        finished(start(*flags, shard, "--out", scratch / shard, before=TORCHRUN))
        want[shard] = left(scratch / shard)
    for n in range(count):
        shard, fault = shards[n % 2], FAULTS[n // 2 % len(FAULTS)]
        folder, after, room = (
            scratch / f"fault-{n}",
            moments.randint(1, 25),
            moments.choice((0, 1000, 10**6, 6 * 10**6)),
        )
        launcher = start(*flags, shard, "--out", folder, before=(*TORCHRUN, scratch / "disk.py"))
        rows = folder / "metrics.jsonl"
        while launcher.poll() is None and (not rows.exists() or rows.read_text().count('"algo"') < after):
            time.sleep(0.01)
        time.sleep(moments.random())
        began = time.perf_counter()
        wrong = strike(fault, launcher, scratch, room)
        took = time.perf_counter() - began
        state = (folder / "state" / "state.safetensors").exists()
        if not state:
            shutil.rmtree(folder, ignore_errors=True)
        again = (*flags, shard, "--resume" if state else "--out", folder)
        if fault == "reward hangs":
            began = time.perf_counter()
            wrong = wrong or hangs(scratch, *again)
            took = time.perf_counter() - began
        finished(start(*again, before=TORCHRUN))
        got = left(folder)
        differ = sorted(name for name in want[shard].keys() | got.keys() if want[shard].get(name) != got.get(name))
        bad += bool(differ or wrong)
        longest = max(longest, took if fault != "reward hangs once" else 0)
        how = "resumed" if state else "begun anew"
        when = f"after update {after} of 30, code {launcher.returncode}, ended in {took:.1f} s"
        print(f"{n}, shard {shard}: {fault} {when}, {how}: {differ or wrong or 'equal'}", flush=True)
        shutil.rmtree(folder)
    print(f"{count - bad} of {count} equal; the longest end took {longest:.1f} s")
    return int(bad > 0)


def used(process: int) -> tuple[int, int]:
    """Resident bytes and open files of a process and its children."""
    bytes_, files = 0, 0
    for pid in (process, *children(process)):
        bytes_ += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files += len(os.listdir(f"/proc/{pid}/fd"))
    return bytes_, files


def rollouts(count: int, scratch: Path) -> int:
    (scratch / "reward.py").write_text("def fraction(answer, row):\n    return sum(c in 'abc' for c in answer) / 8\n")
    flags = f"{TINY} --algo gspo --warm-steps 0 --prompts-per-rollout 2 --group-size 4 --updates-per-rollout 2"
    flags = [*flags.split(), "--steps", 2 * count, "--eval-every", 40, "--reward", f"{scratch}/reward.py:fraction"]
    process, rows, seen = start(*flags, "--out", scratch / "run"), scratch / "run" / "metrics.jsonl", {}
    while process.poll() is None:
        time.sleep(0.05)
        done = rows.read_text().count('"algo"') // 2 if rows.exists() else 0
        for mark in (50, count - 5):  # before its last rollouts: the process is still there
            if done >= mark and mark not in seen:
                seen[mark] = used(process.pid)
                print(f"after {done} rollouts: {seen[mark][0] / 2**20:.1f} MiB, {seen[mark][1]} open files", flush=True)
    finished(process)
    (bytes_then, files_then), (bytes_now, files_now) = seen[50], seen[count - 5]
    print(f"memory {bytes_now / bytes_then - 1:+.1%}, open files {files_now / files_then - 1:+.1%}")
    return int(bytes_now > 1.05 * bytes_then or files_now > 1.05 * files_then)


if __name__ == "__main__":
    parser, trials = argparse.ArgumentParser(), {"kills": kills, "faults": faults, "rollouts": rollouts}
    parser.add_argument("trial", choices=trials)
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    if asked.count < (least := {"kills": 1, "faults": 1, "rollouts": 100}[asked.trial]):
        parser.error(f"got {asked.trial} {asked.count}, want {least} or more")
    with tempfile.TemporaryDirectory() as made:
        sys.exit(trials[asked.trial](asked.count, Path(made)))
