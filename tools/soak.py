"""Long trials that CI has no time for; LOG.md has their results. On Linux.

    python tools/soak.py kills 50          kill -9 at 50 random moments of SFT, GRPO, GSPO and multi-turn runs; each is
                                           resumed, or begun anew if it had saved nothing, and must leave what the run
                                           that nobody killed left: weights, state, samples.jsonl, every field of
                                           metrics.jsonl but clocks and memory
    python tools/soak.py faults 20         two processes, every other run sharded; after a random update, and up to a
                                           second, one is killed, or the launcher gets SIGTERM or SIGINT. All processes
                                           end within 60 s, and the run, resumed, leaves what one without a fault left
    python tools/soak.py rollouts 500      a run of 500 tiny rollouts with reward processes: its memory and its open
                                           files near its end are at most 5 % above those after 50

Exit code 0 if all hold.      Tests: none, this is one. About 20 minutes for 50 kills, 5 for 500 rollouts, on one core;
10 for 20 faults, on two.
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


def faults(count: int, scratch: Path) -> int:
    flags = [*RUNS["gspo"].split(), "--shard"]
    shards, bad, moments, want = ("off", "on"), 0, random.Random(0), {}
    for shard in shards:
        finished(start(*flags, shard, "--out", scratch / shard, before=TORCHRUN))
        want[shard] = left(scratch / shard)
    for n in range(count):
        shard, fault = shards[n % 2], ("process 0 killed", "process 1 killed", "SIGTERM", "SIGINT")[n // 2 % 4]
        folder, after = scratch / f"fault-{n}", moments.randint(1, 25)
        rows, launcher = folder / "metrics.jsonl", start(*flags, shard, "--out", folder, before=TORCHRUN)
        while launcher.poll() is None and (not rows.exists() or rows.read_text().count('"algo"') < after):
            time.sleep(0.01)
        time.sleep(moments.random())
        processes, began = children(launcher.pid), time.perf_counter()
        if launcher.poll() is None and fault.endswith("killed") and len(processes) == 2:
            os.kill(processes[int(fault[8])], signal.SIGKILL)
        elif launcher.poll() is None:
            launcher.send_signal(getattr(signal, fault, signal.SIGTERM))
        try:
            _, said = launcher.communicate(timeout=120)
            took = time.perf_counter() - began
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            took = float("inf")
        over = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        state = (folder / "state" / "state.safetensors").exists()
        if not state:
            shutil.rmtree(folder, ignore_errors=True)
        finished(start(*flags, shard, "--resume" if state else "--out", folder, before=TORCHRUN))
        got = left(folder)
        differ = sorted(name for name in want[shard].keys() | got.keys() if want[shard].get(name) != got.get(name))
        bad += bool(differ) or took > 60 or bool(over)
        how = "resumed" if state else "begun anew"
        when = f"after update {after} of 30, code {launcher.returncode}, ended in {took:.1f} s"
        print(f"{n}, shard {shard}: {fault} {when}, {how}: {differ or over or 'equal'}", flush=True)
        shutil.rmtree(folder)
    print(f"{count - bad} of {count} equal")
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
