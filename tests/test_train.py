"""train.py from the outside: the files a run leaves, ratios, resuming to the last byte, being stopped, and bad input.

Most runs happen in this process (`train` below is the command line without the three seconds of start-up); signals and
exit codes are also tried on real processes.

Run: python -m pytest tests/test_train.py
"""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nanogspo import checkpoint, objectives, tiny
from nanogspo.cache import KVCache
from nanogspo.config import PER_CALL, ROOT, TrainConfig
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.packing import pack, score
from nanogspo.rollout import generate
from nanogspo.run import log
from nanogspo.run.log import RunLog, read_rows
from nanogspo.run.process import available_memory, hold
from nanogspo.tasks import get_task
from nanogspo.tokenizer import load_tokenizer
from tests import oracles
from train import Phase, phases_of, run

TIMES = {"tokens_per_s", "update_tokens_per_s", "step_s", "peak_mem_bytes"}  # all that two equal runs may differ in
ROLLOUT_TIMES = {"sampling_tokens_per_s", "scoring_tokens_per_s", "reward_s"}  # in the row of a rollout's first update
ROW_KEYS = TIMES | {"step", "algo", "loss", "entropy", "grad_norm", "lr"}
RL_KEYS = ROW_KEYS | {
    "reward", "reward_std", "ratio_mean", "ratio_min", "ratio_max", "clip_low_frac", "clip_high_frac",
    "zero_spread_frac", "truncated_frac", "answer_len", "effective_groups", "ratio_std", "ratio_p01", "ratio_p99",
    "ratio_hist", "sampler_gap_max", "sampler_gap_mean", "sampler_gap_token_max",
}  # fmt: skip
SAMPLE_KEYS = {"step", "prompt", "answer", "reward", "advantage", "truncated", "length"}
# Sums: even a random model of 14 tokens gets some digits right, so groups have something to compare
TINY = "--threads 1 --task addition --task-size 2 --max-new-tokens 4 --no-control --warm-steps 0 --eval-size 0".split()
TINY += "--prompts-per-rollout 4 --group-size 4 --updates-per-rollout 4 --batch-size 4 --save-every 1000".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No picture: matplotlib would take longer than the training. And signal handlers are put back."""
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not on Windows
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def script(name, *argv, stdin=""):
    """`python NAME ...` in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    arguments = [name, *map(str, argv)]
    with patch.object(sys, "argv", arguments), patch.object(sys, "stdin", io.StringIO(stdin)):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def train(folder, *argv):
    done = script("train.py", "--out", folder, *argv)
    assert done.code == 0, done.err
    return done


def resume(folder, *argv):
    done = script("train.py", "--resume", folder, *argv)
    assert done.code == 0, done.err
    return done


@contextlib.contextmanager
def interrupted_at(step):
    """Ctrl-C while update `step` is being logged."""
    log = RunLog.step

    def step_and_signal(self, row):
        log(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    with patch.object(RunLog, "step", step_and_signal):
        yield


@contextlib.contextmanager
def interrupted_in_rollout(number, tokens):
    """Ctrl-C while the `number`-th rollout samples its tokens number `tokens`. Yields the steps that were made."""
    sampling, rollouts, steps = RunLog.sampling, [], []

    def sampling_and_signal(self, answers, stop=False):
        on_step = sampling(self, answers, stop)
        rollouts.append(answers)

        def on_step_and_signal(complete, length):
            steps.append((len(rollouts), length))
            if steps[-1] == (number, tokens):
                os.kill(os.getpid(), signal.SIGINT)
            return on_step(complete, length)

        return on_step_and_signal

    with patch.object(RunLog, "sampling", sampling_and_signal):
        yield steps


def process(name, *argv, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, name, *map(str, argv)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def steps_of(folder):
    """The rows of updates, without what the clock decides."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "algo" in row]
    return [{key: value for key, value in row.items() if key not in TIMES | ROLLOUT_TIMES} for row in rows]


def weights_of(folder):
    [file] = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return file.read_bytes()


# ----------------------------------------------------------------------------
# a real checkpoint, small


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_checkpoint(folder, seed=0, std=0.02):
    """Qwen3's architecture at width 32, and a byte-level BPE that knows the words of the addition task."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    texts = ["user assistant What is + ? Reply with the number only."] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(backend.to_str())
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": CHATML}))
    tokenizer = load_tokenizer(folder)
    config = {
        "model_type": "qwen3",
        "vocab_size": tokenizer.vocab_size + 3,  # as in real ones, rows of the head that no token has
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_ids[0],
    }
    checkpoint.save(Transformer(model_config(config)).init_weights(seed, std), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that has seen some sums: its answers are mostly digits. Made by train.py itself."""
    root = tmp_path_factory.mktemp("checkpoint")
    random = write_checkpoint(root / "random")
    with patch("nanogspo.run.curves.draw_curves"):
        done = train(
            root / "run", "--model", random, *CHECKPOINT, *"--algo sft --lora-r 0 --steps 40 --lr 1e-2".split()
        )
    losses = [row["loss"] for row in steps_of(root / "run")]
    assert losses[-1] < 0.6 * losses[0] and "all " in done.out
    return root / "run" / "model"


CHECKPOINT = "--threads 1 --task addition --task-size 2 --max-new-tokens 4 --eval-size 0 --dtype fp32".split()
CHECKPOINT += "--prompts-per-rollout 4 --group-size 4 --batch-size 8 --save-every 1000 --warmup-updates 0".split()


# ----------------------------------------------------------------------------
# what a run leaves


def test_a_whole_run_in_a_process_of_its_own(tmp_path):
    """Warm-up, GSPO, control, evaluations, curves, summary; nothing on stderr."""
    flags = [*TINY, *"--warm-steps 10 --warm-until 2 --steps 8 --eval-size 20 --control --lr 1e-3".split()]
    child = process("train.py", "--out", tmp_path / "run", *flags)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, ""), err
    folder = tmp_path / "run"
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    want = "config.yaml metrics.jsonl samples.jsonl curves.png state/state.safetensors model/model.safetensors"
    assert {*want.split(), "model/config.json", "model/tokenizer.json"} <= present
    assert not [name for name in present if ".tmp" in name]

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(saved) == set(TrainConfig.__dataclass_fields__) - PER_CALL
    assert (saved["steps"], saved["dtype"], saved["clip_low"], saved["clip_high"]) == (8, "fp32", 3e-4, 4e-4)

    rows = read_rows(folder / "metrics.jsonl")
    updates = [row for row in rows if "algo" in row]
    rl = [row for row in updates if row["algo"] == "gspo"]
    assert [row["step"] for row in updates] == list(range(1, len(updates) + 1))
    assert [row["phase"] for row in updates[:18]] == ["sft"] * 10 + ["gspo"] * 8
    assert {row["phase"] for row in updates[18:]} == {
        "control"
    }  # as long as RL took, so how many is the clock's choice
    assert all(ROW_KEYS | {"token_accuracy"} <= set(row) for row in updates if row["algo"] == "sft")
    assert all(RL_KEYS <= set(row) for row in rl)
    assert [ROLLOUT_TIMES <= set(row) for row in rl] == [True, False, False, False] * 2
    assert all(row["update_tokens_per_s"] >= row["tokens_per_s"] > 0 for row in updates)
    assert all(row["update_tokens_per_s"] > row["tokens_per_s"] for row in (rl[0], rl[4]))  # which also sampled
    assert all(value is not None for row in rows for value in row.values())  # null is what JSON has for NaN
    evals = [row for row in rows if "eval_exact" in row]
    assert [row["phase"] for row in evals] == ["start", "sft", "gspo", "control"]
    assert all(row["eval_low"] <= row["eval_exact"] <= row["eval_high"] and row["eval_count"] == 20 for row in evals)
    check_ratios(rl)

    samples = read_rows(folder / "samples.jsonl")
    assert len(samples) == 2 * 16 and all(set(row) == SAMPLE_KEYS for row in samples)
    assert [row["step"] for row in samples] == [11] * 16 + [15] * 16
    asked = [get_task("addition", 2).train_problem(n, 0).text for n in range(8)]  # each problem once, in order
    assert [row["prompt"] for row in samples] == [asked[i // 4] for i in range(32)]
    for first in (0, 16):
        part = samples[first : first + 16]
        table = [[row["reward"] for row in part[i : i + 4]] for i in range(0, 16, 4)]
        assert [row["advantage"] for row in part] == pytest.approx(sum(oracles.group_advantages(table), []), abs=1e-5)
        row = rl[first // 4]
        assert row["truncated_frac"] == sum(sample["truncated"] for sample in part) / 16
        assert row["answer_len"] == sum(sample["length"] for sample in part) / 16
    for row in samples:  # a character a token; what is not cut off ends with a token besides, which is no text
        assert len(row["answer"]) + (not row["truncated"]) <= row["length"] <= 4
        assert row["length"] == 4 or not row["truncated"]
    # every phase warms its learning rate up anew
    assert [row["lr"] for row in rl] == pytest.approx([1e-3 * min(i, 6) / 6 for i in range(1, 9)])
    for first in (rl[0], rl[4]):
        rewards = [row["reward"] for row in samples if row["step"] == first["step"]]
        assert first["reward"] == pytest.approx(sum(rewards) / 16, abs=1e-6)

    for words in (
        "all 445,",
        "together",
        "before",
        "after SFT",
        "after GSPO",
        "control",
        "95 % interval",
        "curves.png",
    ):
        assert words in out
    # the folder of weights holds what the state holds: the GSPO result, not the control's
    model = checkpoint.load(folder / "model", dtype=torch.float32)
    header, metadata = checkpoint.read_header(folder / "state" / "state.safetensors")
    assert json.loads(metadata["state"])["progress"]["step"] == 18
    for name, p in model.named_parameters():
        assert torch.equal(p, header["model." + name].read())
    # and the command that the summary ends with works
    command = out.strip().splitlines()[-1].removeprefix("try it: python ")
    done = script(*shlex.split(command), "--max-new-tokens", "4")
    assert command.startswith("sample.py --model ") and done.code == 0
    assert re.fullmatch(r"[0-9+=]{0,4}\n", done.out)


def check_ratios(rl, updates=4):
    """Exactly 1 for the first minibatch of a rollout; afterwards moved, unless no group had anything to teach."""
    moved = 0
    for i, row in enumerate(rl):
        if i % updates == 0:
            assert row["ratio_min"] == row["ratio_max"] == row["ratio_mean"] == 1.0
            assert row["clip_low_frac"] == row["clip_high_frac"] == 0
        else:
            moved += row["ratio_min"] != 1.0 or row["ratio_max"] != 1.0
            assert row["ratio_min"] <= row["ratio_mean"] <= row["ratio_max"]
    assert moved >= (len(rl) - len(rl) // updates) / 2


@pytest.mark.isa
@pytest.mark.parametrize("algo", ["gspo", "grpo"])
def test_the_loop_is_what_its_docstring_says(tmp_path, algo):
    """One rollout and its four updates again, the slow way: no packing, no micro-batches, torch's own AdamW."""
    flags = [*TINY, "--algo", algo, *"--steps 4 --lr 1e-3 --warmup-updates 0 --micro-batch-tokens 28".split()]
    train(tmp_path / "run", *flags, "--temperature", 0.8)
    task = get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    problems = [task.train_problem(n, 0) for n in range(4)]
    prompts = [tokenizer.encode(problem.text) for problem in problems]
    answers = generate(
        model, prompts, group_size=4, max_new_tokens=4, temperature=0.8, eos_ids=tokenizer.eos_ids, seed=0
    )
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [tokenizer.decode(answer.tokens) for answer in answers] == [row["answer"] for row in samples]
    rewards = [task.reward(problems[a.prompt_index], tokenizer.decode(a.tokens)) for a in answers]
    advantages = sum(oracles.group_advantages([rewards[i : i + 4] for i in range(0, 16, 4)]), [])

    def logp(answer):
        row, start = prompts[answer.prompt_index] + answer.tokens, len(prompts[answer.prompt_index])
        z = model.logits(model(torch.tensor([row])))[0, start - 1 : -1] / 0.8  # (length, V)
        return z.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1)  # (length,)

    with torch.no_grad():
        old = [logp(answer) for answer in answers]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    low, high = (3e-4, 4e-4) if algo == "gspo" else (0.2, 0.27)
    for update, row in enumerate(steps_of(tmp_path / "run")):
        losses, ratios, rows = [], [], range(4 * update, 4 * update + 4)
        told = [i for i in rows if advantages[i]]  # what has nothing to teach is not scored
        told = told or [min(rows, key=lambda i: len(prompts[answers[i].prompt_index] + answers[i].tokens))]
        for i in rows:
            log_ratio = logp(answers[i]) - old[i]  # (length,)
            ratio = (log_ratio.mean(0, keepdim=True) if algo == "gspo" else log_ratio).exp()  # (1,) or (length,)
            A = advantages[i]
            losses.append(-torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A).mean())
            ratios += [ratio.detach()] if i in told else []
        loss, ratios = torch.stack(losses).mean(), torch.cat(ratios)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        # fp32 sums in another order, and AdamW's first steps, which are lr * sign(gradient): where a gradient is as
        # small as its rounding, a weight may differ by 1e-3. There are few of those, and the sums below do not see them
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-2, abs=1e-5)
        assert row["ratio_max"] == pytest.approx(ratios.max().item(), rel=1e-3)
        assert row["ratio_min"] == pytest.approx(ratios.min().item(), rel=1e-3)
        assert sum(row["ratio_hist"]) == len(ratios)
        for p in (1, 5, 50, 95, 99):
            want = ratios.sort().values[round(p / 100 * (len(ratios) - 1))].item()
            assert row[f"ratio_p{p:02}"] == pytest.approx(want, rel=1e-3)


def test_what_is_left_out_counts_in_the_average(tmp_path):
    """The gradient's norm of an update is that of the mean over all its answers, whoever had nothing to teach."""
    flags = [*TINY, *"--steps 1 --updates-per-rollout 2 --lr 1e-3 --warmup-updates 0 --prompts-per-rollout 8".split()]
    train(tmp_path / "run", *flags)
    [row] = steps_of(tmp_path / "run")
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    advantages = sum(oracles.group_advantages([[r["reward"] for r in samples[i : i + 4]] for i in range(0, 16, 4)]), [])
    assert 0 < sum(a == 0 for a in advantages) < 16  # the first of two updates; or this test would show nothing
    task = get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    answers = generate(
        model,
        [tokenizer.encode(task.train_problem(n, 0).text) for n in range(8)],
        group_size=4,
        max_new_tokens=4,
        eos_ids=tokenizer.eos_ids,
        seed=0,
    )
    losses = []
    for answer, A in zip(answers[:16], advantages, strict=True):  # on the first update, d ratio = d mean logp
        prompt = tokenizer.encode(task.train_problem(answer.prompt_index, 0).text)
        z = model.logits(model(torch.tensor([prompt + answer.tokens])))[0, len(prompt) - 1 : -1]  # (length, V)
        losses.append(-A * z.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None]).mean())
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert row["loss"] == pytest.approx(-sum(advantages) / 16, abs=1e-6)


@pytest.mark.isa
def test_the_first_rollout_of_a_run_compares_two_passes(tmp_path, monkeypatch):
    """And only that one: afterwards the first update's own forward is the old one. A difference ends the run."""
    calls, run = [], [*TINY, *"--steps 8 --lr 1e-3".split()]
    monkeypatch.setattr("nanogspo.experience.score", lambda *a, **k: calls.append(1) or score(*a, **k))
    train(tmp_path / "right", *run)
    assert len(calls) == 4 + 3
    train(tmp_path / "half", *run[:-4], *"--steps 6 --lr 1e-3".split())  # ends in the middle of the second rollout
    calls.clear()
    resume(tmp_path / "half", "--steps", 12)  # what it goes on with shows nothing; the third rollout is compared
    assert len(calls) == 4
    monkeypatch.setattr("nanogspo.experience.score", lambda *a, **k: [x * (1 + 2**-20) for x in score(*a, **k)])
    with pytest.raises(AssertionError, match="want exactly 1.0; old and new log-probs were not scored the same way"):
        train(tmp_path / "wrong", *run)


def test_an_exam_takes_no_more_memory_than_a_rollout(tmp_path, monkeypatch):
    """A group shares its prompt, and in an exam every row has its own: fewer rows at a time."""
    caches, init = {1: [], 4: []}, KVCache.__init__

    def spy(self, config, prompts, group_size, capacity, **more):
        P = len(prompts.lengths)
        caches[group_size].append((P, P * max(prompts.lengths) + P * group_size * capacity))
        init(self, config, prompts, group_size, capacity, **more)

    monkeypatch.setattr(KVCache, "__init__", spy)
    train(tmp_path / "run", *TINY, *"--steps 4 --eval-size 40".split())
    assert sum(rows for rows, _ in caches[1]) == 2 * 40  # before and after
    assert max(slots for _, slots in caches[1]) <= max(slots for _, slots in caches[4])


def test_phases():
    """Warm-up and control belong to RL, and a control continues a warm-up."""
    config = TrainConfig(steps=7, lr=1e-3, warm_lr=2e-3, warm_until=0.4, warm_steps=5, control=True)
    warm_up, main = Phase("sft", "sft", 5, 2e-3, until=0.4), Phase("gspo", "gspo", 7, 1e-3)
    control = Phase("control", "sft", sys.maxsize, 2e-3)
    assert phases_of(config) == [warm_up, main, control]
    assert phases_of(dataclasses.replace(config, control=False)) == [warm_up, main]
    assert phases_of(dataclasses.replace(config, warm_steps=0)) == [main]
    assert phases_of(dataclasses.replace(config, algo="sft")) == [Phase("sft", "sft", 7, 1e-3)]


# ----------------------------------------------------------------------------
# resuming

RUNS = {
    "gspo": [*TINY, "--steps", 10, "--lr", 1e-3],
    "grpo": [*TINY, "--algo", "grpo", "--steps", 10, "--lr", 1e-3],
    "sft": [*TINY, "--algo", "sft", "--steps", 10, "--lr", 1e-3],
    "masters": [*TINY, "--steps", 10, "--lr", 1e-3, "--dtype", "bf16", "--weight-decay", 0.1],
    "cosine": [*TINY, "--steps", 10, "--lr", 1e-3, "--lr-schedule", "cosine", "--rollout-rows", 4]
    + ["--temperature", 0.7],  # old log-probs scored at another temperature end in the loop's own assertion
    "warm": [*TINY, *"--warm-steps 5 --warm-until 2 --steps 5 --lr 1e-3".split()],
    "lora": [*CHECKPOINT, *"--lora-r 4 --steps 10 --lr 1e-2".split()],
    "lora-sft": [*CHECKPOINT, *"--lora-r 4 --steps 10 --lr 1e-2 --algo sft --lora-dropout 0.1 --dtype bf16".split()],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """name -> folder of the run that nothing interrupted; each is made once."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        train(folder, *flags_of(name, base))
        return folder

    return make


def flags_of(name, base):
    return RUNS[name] + (["--model", base] if name.startswith("lora") else [])


# N on both sides of the rollout's end at 4, in the middle, at the last update, and on both sides of the warm-up's end
@pytest.mark.isa
@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("gspo", [1]), ("gspo", [4]), ("gspo", [2, 3, 7, 9]), ("grpo", [5]), ("sft", [3]), ("masters", [4, 6]),
        ("cosine", [5]), ("warm", [3]), ("warm", [5, 6]), ("lora", [6]), ("lora-sft", [3]),
    ],
)  # fmt: skip
def test_stopped_and_resumed_equals_the_whole_run_to_the_last_byte(tmp_path, whole, base, name, stops):
    """Weights, optimiser, schedule, random states, data cursor, the rollout at hand: or bytes would differ."""
    flags, folder = flags_of(name, base), tmp_path / "run"
    for i, stop in enumerate(stops):
        with interrupted_at(stop):
            done = resume(folder) if i else train(folder, *flags)
        assert f"stopped after update {stop}; continue with: python train.py --resume {folder}" in done.out
        assert steps_of(folder)[-1]["step"] == stop
    assert f"resumed {folder} after update {stops[-1]}" in resume(folder).out
    assert weights_of(folder) == weights_of(whole(name))
    state = "state/state.safetensors"
    assert (folder / state).read_bytes() == (whole(name) / state).read_bytes()
    assert steps_of(folder) == steps_of(whole(name))
    assert read_rows(folder / "samples.jsonl") == read_rows(whole(name) / "samples.jsonl")


@pytest.mark.parametrize("name, stops", [("gspo", [(1, 1), (1, 3), (2, 2)]), ("lora", [(2, 1)])])
def test_stopped_inside_a_rollout_nothing_of_it_remains(tmp_path, whole, base, name, stops):
    """Sampling ends with the very step, the answers are thrown away, and the resumed run draws them again."""
    flags, folder = flags_of(name, base), tmp_path / "run"
    for i, (number, tokens) in enumerate(stops):
        with interrupted_in_rollout(number, tokens) as steps:
            done = resume(folder) if i else train(folder, *flags)
        assert steps[-1] == (number, tokens)
        updates = 4 * (number - 1)
        assert f"stopped after update {updates}; continue with: python train.py --resume {folder}" in done.out
        assert len(steps_of(folder)) == updates and len(read_rows(folder / "samples.jsonl")) == 4 * updates
    assert f"resumed {folder} after update {updates}" in resume(folder).out
    assert weights_of(folder) == weights_of(whole(name))
    state = "state/state.safetensors"
    assert (folder / state).read_bytes() == (whole(name) / state).read_bytes()
    assert steps_of(folder) == steps_of(whole(name))
    assert read_rows(folder / "samples.jsonl") == read_rows(whole(name) / "samples.jsonl")


def test_stopped_inside_an_evaluation_it_is_made_when_the_run_goes_on(tmp_path):
    """The first, one in the middle and the last; none counts half an exam."""
    flags = [*TINY, *"--steps 4 --eval-size 5 --eval-every 2 --max-new-tokens 12".split()]
    stopped_inside_evaluations(tmp_path / "one phase", flags, ((1, 0), (3, 2), (4, 4)))  # the second is the rollout


def test_stopped_inside_the_evaluation_between_two_phases_the_second_has_not_begun(tmp_path):
    flags = [*TINY, *"--warm-steps 2 --warm-until 2 --steps 4 --eval-size 5 --max-new-tokens 12".split()]
    stopped_inside_evaluations(tmp_path, flags, ((2, 2),))


def stopped_inside_evaluations(tmp_path, flags, stops):
    train(tmp_path / "whole", *flags)
    for number, updates in stops:
        folder = tmp_path / str(number)
        with interrupted_in_rollout(number, 1) as steps:
            done = train(folder, *flags)
        assert steps[-1] == (number, 1)
        assert f"stopped after update {updates}; continue with" in done.out
        measured = [row for row in logged(folder) if "doctor" not in row]
        assert not any("eval_exact" in row for row in measured[updates + (number > 1) :])
        resume(folder)
        assert logged(folder) == logged(tmp_path / "whole")
        assert weights_of(folder) == weights_of(tmp_path / "whole")


def test_the_runs_compared_above_are_not_all_alike(whole):
    """Each must have learned something, or byte-equality says nothing; and ratios hold in bf16, GRPO and LoRA too."""
    weights = {name: weights_of(whole(name)) for name in RUNS}
    assert len(set(weights.values())) == len(RUNS)
    for name in ("gspo", "grpo", "masters", "cosine", "lora"):
        rows = steps_of(whole(name))
        check_ratios(rows)
        assert any(row["grad_norm"] > 0 for row in rows)


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, whole):
    """N steps, then --steps 2N: with the constant schedule the same as 2N at once."""
    folder = tmp_path / "run"
    train(folder, *RUNS["gspo"], "--steps", 6)
    resume(folder, "--steps", 10)
    assert weights_of(folder) == weights_of(whole("gspo"))
    assert steps_of(folder) == steps_of(whole("gspo"))


def test_stopping_at_the_update_that_ends_the_warm_up(tmp_path):
    """The warm-up ends early because enough is right; Ctrl-C in that very update must not start it again."""
    flags = [*TINY, *"--warm-steps 20 --warm-until 0.5 --steps 3 --lr 1e-3".split()]
    with patch("nanogspo.tasks.addition.Addition.exact", lambda *_: True):
        train(tmp_path / "whole", *flags)
        first = next(row["step"] for row in steps_of(tmp_path / "whole") if row["phase"] == "gspo")
        assert 1 < first < 20
        with interrupted_at(first - 1):
            train(tmp_path / "run", *flags)
        resume(tmp_path / "run")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_stopped_inside_a_probe_it_is_made_when_the_run_goes_on(tmp_path):
    """Half of one does not end the warm-up, although what it has would count as right."""
    flags = [*TINY, *"--warm-steps 20 --warm-until 0.5 --steps 2 --lr 1e-3 --max-new-tokens 12".split()]
    with patch("nanogspo.tasks.addition.Addition.exact", lambda *_: True):
        train(tmp_path / "whole", *flags)
        with interrupted_in_rollout(1, 1) as steps:
            done = train(tmp_path / "run", *flags)
        assert steps == [(1, 1)] and "stopped after update 5; continue with" in done.out
        state = checkpoint.read_header(tmp_path / "run" / "state" / "state.safetensors")[1]["state"]
        assert json.loads(state)["progress"]["phase_done"] is False
        resume(tmp_path / "run")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_the_control_can_be_interrupted_and_the_run_resumed(tmp_path):
    """The control is timed, so its length differs; what is kept, and where RL goes on, must not."""
    flags = [*TINY, *"--warm-steps 4 --warm-until 2 --steps 4 --lr 1e-3 --control".split()]
    log = RunLog.step

    def bounded(self, row):
        log(self, row)
        assert row["step"] < 2000, "the control does not end"

    with patch.object(RunLog, "step", bounded):
        train(tmp_path / "whole", *flags)
        with interrupted_at(9):
            train(tmp_path / "run", *flags)
        assert steps_of(tmp_path / "run")[-1]["phase"] == "control"
        resume(tmp_path / "run")
        assert steps_of(tmp_path / "run")[:8] == steps_of(tmp_path / "whole")[:8]
        assert steps_of(tmp_path / "run")[8] == steps_of(tmp_path / "whole")[8]  # both continue the same warm-up
        assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
        resume(tmp_path / "run", "--steps", 6)
        train(tmp_path / "longer", *flags, "--steps", 6)
    rl = [[row for row in steps_of(tmp_path / name) if row["phase"] == "gspo"] for name in ("run", "longer")]
    assert rl[0] == rl[1] and len(rl[0]) == 6
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "longer")


def logged(folder):
    """All rows of metrics.jsonl, without what the clock decides."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES | ROLLOUT_TIMES} for row in rows]


def test_killed_between_any_two_writes_and_resumed_leaves_what_the_whole_run_leaves(tmp_path):
    """A run changes its folder by a row or by a file that is renamed into place, so a copy of the folder at each of
    these is what a kill between two of them leaves. Each copy is resumed: no row may be missing, or there twice."""
    flags = [*TINY, *"--warm-steps 2 --warm-until 2 --steps 4 --eval-size 5 --eval-every 2 --save-every 2".split()]
    folder, left = tmp_path / "whole", {}
    write, replace = log._write, os.replace

    def copy(cut=0):
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
        files[Path("metrics.jsonl")] = files.get(Path("metrics.jsonl"), b"")[: -cut or None]
        weights = {name for name in files if name.parts[0] == "model"}  # written as one of the last: none, or some
        key = [(name, data) for name, data in sorted(files.items()) if name.suffix != ".tmp" and name not in weights]
        left[tuple([*key, bool(weights)])] = files

    def write_and_copy(file, row):
        write(file, row)
        if "answer" not in row:
            copy()
        if "eval_exact" in row:
            copy(cut=1 + 8 * (row["phase"] == "sft"))  # all of a line but its end, or less of it

    def copy_and_replace(source, target):
        copy()  # with the temporary file
        replace(source, target)
        copy()

    with patch("nanogspo.run.log._write", write_and_copy), patch("os.replace", copy_and_replace):
        train(folder, *flags, "--lr", 1e-3)
    rows = logged(folder)
    evals = [(row["step"], row["phase"]) for row in rows if "eval_exact" in row]
    assert evals == [(0, "start"), (2, "sft"), (4, "gspo"), (6, "gspo")] and len(rows) == 12  # the doctor's two
    copy()  # and the finished run, which has nothing left to do
    resumable = [files for files in left.values() if Path("state", "state.safetensors") in files]
    assert len(resumable) >= 14
    for i, files in enumerate(resumable):
        for name, data in files.items():
            (tmp_path / str(i) / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(i) / name).write_bytes(data)
        resume(tmp_path / str(i))
        assert logged(tmp_path / str(i)) == rows, i
        assert weights_of(tmp_path / str(i)) == weights_of(folder)
        for name in ("state/state.safetensors", "samples.jsonl"):
            assert (tmp_path / str(i) / name).read_bytes() == (folder / name).read_bytes(), i


def test_an_exam_of_another_size_is_another_exam(tmp_path):
    train(tmp_path / "run", *TINY, *"--steps 4 --eval-size 5".split())
    resume(tmp_path / "run", "--eval-size", 6)
    evals = [(row["step"], row["eval_count"]) for row in logged(tmp_path / "run") if "eval_exact" in row]
    assert evals == [(0, 5), (4, 5), (4, 6)]


def test_seeds_decide_everything(tmp_path, whole):
    train(tmp_path / "other", *RUNS["gspo"], "--seed", 1)
    assert weights_of(tmp_path / "other") != weights_of(whole("gspo"))
    assert read_rows(tmp_path / "other" / "samples.jsonl") != read_rows(whole("gspo") / "samples.jsonl")


def wait_for_update(child, folder, step):
    deadline = time.monotonic() + 60
    while not any(row.get("step", 0) >= step for row in read_rows(folder / "metrics.jsonl")):
        assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_a_signal_at_any_moment_costs_at_most_what_was_not_saved(tmp_path, number):
    """Ctrl-C finishes its update, saves and exits; after kill -9 the last whole state is there. Both go on from it."""
    folder, flags = tmp_path / "run", [*RUNS["gspo"], "--save-every", 3]
    child = process("train.py", "--out", folder, *flags, "--steps", 100_000)
    try:
        wait_for_update(child, folder, 8)
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    _, metadata = checkpoint.read_header(folder / "state" / "state.safetensors")
    saved = json.loads(metadata["state"])["progress"]["step"]
    if number == signal.SIGINT:
        assert child.returncode == 0 and f"stopped after update {saved};" in out and "Traceback" not in err
        assert steps_of(folder)[-1]["step"] == saved
    else:
        assert child.returncode == -signal.SIGKILL and saved % 3 == 0 and saved >= 6
    assert (folder / "report.html").exists() == (number == signal.SIGINT)  # not at every save: it grows with the run
    resume(folder, "--steps", saved + 2)
    assert (folder / "report.html").exists()
    train(tmp_path / "whole", *flags, "--steps", saved + 2)
    assert weights_of(folder) == weights_of(tmp_path / "whole")
    assert steps_of(folder) == steps_of(tmp_path / "whole")
    assert read_rows(folder / "samples.jsonl") == read_rows(tmp_path / "whole" / "samples.jsonl")


# ----------------------------------------------------------------------------
# settings that must not matter, or not break


def test_too_little_memory_switches_recomputing_on_and_says_so(tmp_path, whole):
    with patch("nanogspo.run.process.available_memory", lambda device: 1000):
        done = train(tmp_path / "gspo", *RUNS["gspo"], "--ignore-memory-plan")
    assert "gradient checkpointing is on: training would take " in done.out and "1 kB are free" in done.out
    assert "gradient_checkpointing: 'on'" in (tmp_path / "gspo" / "config.yaml").read_text()
    assert weights_of(tmp_path / "gspo") == weights_of(whole("gspo"))
    assert "gradient_checkpointing: 'off'" in (whole("gspo") / "config.yaml").read_text()


def test_memory_savers_change_rounding_only(tmp_path, whole):
    """Recomputing gives the same bits. Other micro-batches sum in another order: fp32 rounding in the gradient."""
    for name in ("gspo", "sft"):
        train(tmp_path / name, *RUNS[name], "--gradient-checkpointing", "on")
        assert weights_of(tmp_path / name) == weights_of(whole(name))
        small = tmp_path / f"{name}-small"
        train(small, *RUNS[name], "--micro-batch-tokens", 9)  # one row at a time
        one, other = steps_of(whole(name)), steps_of(small)
        # the loss of the first update before AdamW, which divides by the gradient's size, has blown rounding up
        assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5, abs=1e-6)
        assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-4)
        assert one[0]["entropy"] == pytest.approx(other[0]["entropy"], rel=1e-5)
        for a, b in zip(one, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=0.02, abs=0.02)
    check_ratios(steps_of(tmp_path / "gspo-small"))


@pytest.mark.parametrize("algo", ["gspo", "grpo"])
def test_what_is_said_of_the_ratios_does_not_depend_on_micro_batches(tmp_path, monkeypatch, algo):
    """Of GRPO's, which are tokens', a micro-batch of long answers has more."""
    seen, real = [], objectives.ratio_quantiles
    monkeypatch.setattr(objectives, "ratio_quantiles", lambda logs: seen.append(torch.cat(logs)) or real(logs))
    train(tmp_path / "run", *RUNS["gspo"], "--algo", algo, "--micro-batch-tokens", 9)
    rows = steps_of(tmp_path / "run")
    for row, log_ratio in zip(rows, seen, strict=True):
        ratio = log_ratio.exp().double()
        assert row["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-6)
        # a mean of squares less a squared mean: rounding of 1 in float32, whose root is taken
        assert row["ratio_std"] == pytest.approx(ratio.std(correction=0).item(), rel=1e-3, abs=2 * 2**-12)
    assert len({row["ratio_mean"] for row in rows}) > 3


def test_every_sft_update_sees_new_examples(tmp_path):
    """At a learning rate of 1e-12 the model stays as it is, so equal batches would give equal losses."""
    train(tmp_path / "run", *TINY, *"--algo sft --steps 6 --lr 1e-12 --batch-size 2".split())
    assert len({round(row["loss"], 5) for row in steps_of(tmp_path / "run")}) == 6


def test_groups_without_spread_teach_nothing_and_break_nothing(tmp_path):
    """Sampled at temperature 0.001 all answers of a group are alike: advantages 0, gradient 0, weights as they were."""
    train(tmp_path / "run", *TINY, *"--steps 5 --lr 1e-3 --temperature 1e-3 --task-size 1".split())
    rows = steps_of(tmp_path / "run")
    assert all(row["zero_spread_frac"] == 1 and row["reward_std"] == 0 for row in rows)
    assert all(row["grad_norm"] == 0 and row["loss"] == 0 and row["ratio_max"] == 1 for row in rows)
    assert all(value is not None for row in rows for value in row.values())
    train(tmp_path / "less", *TINY, *"--steps 1 --lr 1e-3 --temperature 1e-3 --task-size 1".split())
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "less")


def test_sft_from_a_file_then_rl_from_its_adapter(tmp_path, base):
    """JSONL in, adapter out; the adapter is where the next run starts, and --save-merged writes both."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i}"}]}
        for i in range(6)
    ]
    long = {"prompt": "a long one " * 300, "completion": "yes"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], long, *rows[3:]])))
    flags = ["--model", base, *CHECKPOINT, "--lora-r", 4, "--lr", 1e-2]
    done = train(
        tmp_path / "sft", *flags, "--algo", "sft", "--task", "jsonl", "--data", tmp_path / "rows.jsonl",
        *"--steps 12 --save-merged".split(),
    )  # fmt: skip
    assert "left out 1 rows longer than 256 tokens (max_position_embeddings): lines 4\n" in done.out
    table = steps_of(tmp_path / "sft")
    assert table[-1]["loss"] < 0.8 * table[0]["loss"]
    merged = checkpoint.load(tmp_path / "sft" / "model", dtype=torch.float32)
    model = checkpoint.load(base, dtype=torch.float32)
    checkpoint.load_adapter(model, tmp_path / "sft" / "adapter")
    tokens = torch.tensor([[1, 2, 3, 4]])
    # fp32 logits up to 10, each weight rounded once more by the merge
    torch.testing.assert_close(merged.logits(merged(tokens)), model.logits(model(tokens)), rtol=0, atol=1e-4)
    given = ["--adapter", tmp_path / "sft" / "adapter", "--lora-r", 8]
    done = train(tmp_path / "rl", *flags, "--steps", 4, *given)
    assert f"{tmp_path / 'sft' / 'adapter'}: an adapter of rank 4, so --lora-r 8 is not used\n" in done.out
    assert yaml.safe_load((tmp_path / "rl" / "config.yaml").read_text())["lora_r"] == 4
    fresh = checkpoint.read_header(tmp_path / "rl" / "adapter" / "adapter_model.safetensors")[0]
    assert fresh.keys() == checkpoint.read_header(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")[0].keys()
    [first] = [row for row in read_rows(tmp_path / "rl" / "samples.jsonl")][:1]
    asked = get_task("addition", 2).train_problem(0, 0).messages[0]["content"]  # as rendered, with its marks
    assert first["prompt"] == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def test_the_tiny_model_is_saved_merged_beside_its_adapter(tmp_path):
    """Its base, random weights and a warm-up's, is saved nowhere else: the adapter by itself is of no use."""
    done = train(tmp_path / "run", *TINY, *"--lora-r 4 --steps 4 --lr 1e-2".split())
    merged = checkpoint.load(tmp_path / "run" / "model", dtype=torch.float32)
    _, model = tiny.build(get_task("addition", 2).characters, seed=0)
    checkpoint.load_adapter(model, tmp_path / "run" / "adapter")
    tokens, base = torch.tensor([[1, 2, 3, 4]]), tiny.build(get_task("addition", 2).characters, seed=0)[1]
    want = model.logits(model(tokens))
    # fp32 logits below 10, each weight rounded once more by the merge
    torch.testing.assert_close(merged.logits(merged(tokens)), want, rtol=0, atol=1e-4)
    assert (want - base.logits(base(tokens))).abs().max() > 1e-2
    assert f"--model {tmp_path / 'run' / 'model'}" in done.out.splitlines()[-1]


def test_rows_held_out_are_measured_and_answered_and_never_trained_on(tmp_path, base):
    """Epochs of the other rows; loss and accuracy before, on the way and after; a few answers at the end. Stopped and
    resumed it is the same run, and resumed once more nothing is written twice."""
    rows = [{"messages": [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": f"{2 * i}"}]}
            for i in (*range(14), 3, 5)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", base, *CHECKPOINT, *"--lora-r 4 --lr 1e-2 --lora-dropout 0.1 --algo sft".split()]
    flags += [
        "--task",
        "jsonl",
        "--data",
        tmp_path / "rows.jsonl",
        *"--epochs 2 --eval-size 5 --eval-every 2 --batch-size 4".split(),
    ]
    trained = set()

    def spy(examples, **options):
        trained.update(tuple(e.tokens) for e in examples)
        return pack(examples, **options)

    with patch("nanogspo.packing.pack", spy):
        done = train(tmp_path / "whole", *flags)
    [count] = re.findall(r"5 rows held out.*: (\d+) examples to train on", done.out)
    updates = steps_of(tmp_path / "whole")
    assert len(updates) == -(-2 * int(count) // 4) and f"4 an update: {len(updates)} updates" in done.out
    assert len(trained) == 9 and int(count) >= 9  # 14 different rows; of the others a repeated one is trained on twice
    evals = [row for row in read_rows(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evals] == sorted({*range(0, len(updates), 2), len(updates)})
    assert len({row["eval_loss"] for row in evals}) == len(evals) and all(row["eval_count"] == 5 for row in evals)
    assert all(0 <= row["eval_token_accuracy"] <= 1 for row in evals)
    assert f"eval    0 | start   | loss {evals[0]['eval_loss']:7.4f} | accuracy" in done.out
    assert f"  after SFT  {evals[-1]['eval_loss']:7.4f}   {evals[-1]['eval_token_accuracy']:.3f}" in done.out
    answers = read_rows(tmp_path / "whole" / "samples.jsonl")
    assert len(answers) == 3 and all(row["step"] == len(updates) and row["reward"] is None for row in answers)
    tokenizer = load_tokenizer(base)
    texts = {tokenizer.decode(list(tokens), skip_special_tokens=False) for tokens in trained}
    for row in answers:
        assert not any(text.startswith(row["prompt"]) for text in texts)
        assert f"answer  {row['answer']!r}" in done.out and f"reference  {row['reference']!r}" in done.out
    with interrupted_at(2):
        train(tmp_path / "run", *flags)
    assert not read_rows(tmp_path / "run" / "samples.jsonl")
    for _ in range(2):
        resume(tmp_path / "run")
        assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
        assert steps_of(tmp_path / "run") == updates and read_rows(tmp_path / "run" / "samples.jsonl") == answers
        assert [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row] == evals
    assert "want the run's own" in refusal("--resume", tmp_path / "run", "--eval-size", 4)


# ----------------------------------------------------------------------------
# bad input


def refusal(*argv):
    """The one line on stderr of a run that ends with exit code 2."""
    done = script("train.py", *argv)
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.err.startswith("train.py: ") and done.err.count("\n") == 1 and "Traceback" not in done.err
    return done.err


def rewrite(folder, change):
    """The checkpoint with its tensors renamed, reshaped or left out."""
    file = folder / "model.safetensors"
    tensors = {name: stored.read() for name, stored in checkpoint.read_header(file)[0].items()}
    checkpoint.write_safetensors(file, change(tensors), {})


NORM = "model.layers.1.input_layernorm.weight"


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def to_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


DAMAGES = {
    "unknown family": (lambda f: edit_json(f, "config.json", model_type="mamba"), "got model_type 'mamba'"),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: {n: x for n, x in t.items() if n != NORM}),
        f"missing {NORM[6:]}",
    ),
    "renamed tensor": (
        lambda f: rewrite(f, lambda t: {n.replace("up_", "upp_"): x for n, x in t.items()}),
        "unexpected",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: {**t, NORM: t[NORM][:-1]}),
        "has shape [31], config.json wants [32]",
    ),
    "truncated": (truncate, "file not fully covered"),
    "pickle": (to_pickle, "pickles that can run code"),
    "renamed pickle": (lambda f: torch.save({}, f / "model.safetensors"), "got a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "missing weight files model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "want a tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, base, damage):
    shutil.copytree(base, tmp_path / "model")
    change, message = DAMAGES[damage]
    change(tmp_path / "model")
    assert message in refusal("--model", tmp_path / "model", "--out", tmp_path / "run", *CHECKPOINT)


def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path, base):
    shutil.copytree(base, tmp_path / "plain")
    edit_json(tmp_path / "plain", "tokenizer_config.json", chat_template=None)
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    flags = ["--out", out, *CHECKPOINT, "--algo", "sft", "--task", "jsonl", "--data", data]
    turns = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert "want a JSONL file" in refusal("--model", base, *flags)
    for text, message in (
        ("", "got an empty file"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', f"{data}:2: got broken JSON"),
        ('{"text": "a"}', f"{data}:1: got a row with 'text'"),
    ):
        data.write_text(text)
        assert message in refusal("--model", base, *flags)
    data.write_text(json.dumps(turns))
    assert "without a chat template" in refusal("--model", tmp_path / "plain", *flags)
    assert "want a real --model" in refusal("--model", "tiny", *flags)
    assert refusal("--model", base, *flags, "--algo", "gspo")


@pytest.mark.isa
def test_flags_that_cannot_work_are_refused_in_one_line(tmp_path, base):
    model, out = ["--model", base, "--dtype", "fp32"], ["--out", tmp_path / "run"]  # auto may say why it is not bf16
    assert "did you mean --steps?" in refusal("--stepz", 3)
    assert "--group-size 1 with gspo" in refusal(*model, *out, "--group-size", 1)
    assert "--group-size 1 with grpo" in refusal(*model, *out, "--group-size", 1, "--algo", "grpo")
    assert "want some of: down_proj, gate_proj" in refusal(*model, *out, *CHECKPOINT, "--lora-targets", "query")
    assert "want one of addition, reverse" in refusal(*model, *out, "--task", "chess")
    assert "no folder here" in refusal("--model", tmp_path / "absent", "--dtype", "fp32", *out)
    assert "adapter_config.json" in refusal(*model, *out, *CHECKPOINT, "--adapter", base)
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refusal(*model, *out, *CHECKPOINT, "--device", "cuda")
    # the model is there, the prompt and its answer are longer than it can see
    assert "max_position_embeddings" in refusal(*model, *out, *CHECKPOINT, "--max-new-tokens", 1000)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a long one", "completion": "yes"}))
    data = ["--algo", "sft", "--task", "jsonl", "--data", tmp_path / "rows.jsonl", "--max-length", 4]
    assert "1 rows, all longer than 4 tokens; raise --max-length" in refusal(*model, *out, *CHECKPOINT, *data)
    # after each of these the folder is still free
    assert "held-out problems, want 1 to" in refusal(*out, *TINY, "--eval-size", 10**6)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
    (tmp_path / "file").write_text("")
    assert "cannot make the folder" in refusal("--out", tmp_path / "file" / "run", *TINY)


def test_sft_warms_nothing_up_and_has_no_control(tmp_path, base):
    """Warm-up and control belong to RL: plain SFT is --steps updates, whatever the configuration says about them."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    extra = "--algo sft --steps 3 --warm-steps 5 --control".split()
    train(tmp_path / "task", *TINY, *extra)
    train(tmp_path / "data", *CHECKPOINT, *extra, "--model", base, "--task", "jsonl", "--data", tmp_path / "rows.jsonl")
    for name in ("task", "data"):
        assert [row["phase"] for row in steps_of(tmp_path / name)] == ["sft"] * 3


def test_a_folder_that_holds_another_run_is_not_written_over(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole("sft"), folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    message = refusal("--out", folder, *RUNS["sft"])
    assert "holds another run" in message and f"--resume {folder}" in message
    assert "which is a file" in refusal("--out", folder / "config.yaml", *RUNS["sft"])
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_what_cannot_be_resumed_is_refused_in_one_line(tmp_path, whole):
    assert "want the folder of an earlier run" in refusal("--resume", tmp_path / "absent")
    folder = tmp_path / "run"
    shutil.copytree(whole("sft"), folder)
    state = folder / "state" / "state.safetensors"
    assert "--dtype (was fp32)" in refusal("--resume", folder, "--dtype", "bf16")
    assert "--seed (was 0)" in refusal("--resume", folder, "--seed", 3)
    whole_state = state.read_bytes()
    state.write_bytes(whole_state[:-10])
    assert "file not fully covered" in refusal("--resume", folder)
    state.unlink()
    assert "no state to resume from" in refusal("--resume", folder)
    state.write_bytes(whole_state)
    resume(folder)
    # a rollout in progress was cut into minibatches, and 2 of the 4 are done
    with interrupted_at(2):
        train(tmp_path / "gspo", *RUNS["gspo"])
    assert "--updates-per-rollout" in refusal("--resume", tmp_path / "gspo", "--updates-per-rollout", 2)
    resume(tmp_path / "gspo", "--micro-batch-tokens", 9)  # which is only about memory


def test_a_run_is_resumed_with_what_it_was_made_of(tmp_path, base):
    """Data, model, adapter, a setting: one line names what has changed; --accept-changes goes on and notes it."""
    data, model, folder = tmp_path / "rows.jsonl", tmp_path / "model", tmp_path / "run"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    shutil.copytree(base, model)
    train(tmp_path / "first", *CHECKPOINT, *"--steps 1 --algo sft --lora-r 4".split(), "--model", model)
    adapter = tmp_path / "first" / "adapter"
    flags = ["--algo", "sft", "--task", "jsonl", "--data", data, "--model", model, "--adapter", adapter, "--lora-r", 4]
    train(folder, *CHECKPOINT, *flags, "--steps", 1)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def changes_named(*argv):
        message = refusal("--resume", folder, "--steps", 2, *argv)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        return re.search(r"than it was saved with: (.*); want them as they were, or --accept-changes", message)[1]

    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    refusal("--resume", folder, "--steps", 2)
    assert (folder / "config.yaml").read_bytes() == before[folder / "config.yaml"]  # steps 1
    (folder / "metrics.jsonl").rmdir()
    (folder / "metrics.jsonl").write_bytes(before[folder / "metrics.jsonl"])
    data.write_text('{"prompt": "c", "completion": "b"}\n' * 4)  # of the same size
    assert changes_named() == "data"
    edit_json(model, "config.json", eos_token_id=[1, 2])
    rewrite(model, lambda t: {n: -x if n == NORM else x for n, x in t.items()})
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    files = "adapter/adapter_config.json, data, model/config.json, model/model.safetensors"
    assert changes_named() == files
    assert re.search(r"--lr \(was .*--accept-changes", refusal("--resume", folder, "--lr", 0.5))
    config = yaml.safe_load(before[folder / "config.yaml"])
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "lr": 0.25}))  # by hand
    before[folder / "config.yaml"] = (folder / "config.yaml").read_bytes()
    what = f"--lr ({config['lr']} -> 0.25), {files}"
    assert changes_named() == what
    what = what.replace("0.25", "0.5")
    with patch.object(RunLog, "step", side_effect=KeyError), pytest.raises(KeyError):  # ended before it saved by itself
        script("train.py", "--resume", folder, "--steps", 2, "--lr", 0.5, "--accept-changes")
    note = {"step": 1, "accepted_changes": [what.split(", ")[0], *files.split(", ")]}
    assert [row for row in logged(folder) if "algo" not in row] == [note]
    assert "accept_changes" not in yaml.safe_load((folder / "config.yaml").read_text())
    resume(folder)  # accepted once is accepted
    resume(folder, "--steps", 3)
    assert [row.get("lr", row) for row in logged(folder)] == [config["lr"], note, 0.5, 0.5]
    # from Python, where no flags are compared with config.yaml
    with pytest.raises(ValueError, match=r"with other inputs .* -> \), --seed \(0 -> 3\), data; "):
        run(dataclasses.replace(resolved(folder), seed=3, data="", task="addition", resume=str(folder)))
    run(dataclasses.replace(resolved(folder), steps=4, resume=str(folder)))


def resolved(folder):
    return TrainConfig(**yaml.safe_load((folder / "config.yaml").read_text()))


def test_a_folder_is_held_while_a_run_writes_into_it(tmp_path, whole):
    """Both by --resume and by --out; and let go after an error, in a process that goes on."""
    folder = tmp_path / "run"
    shutil.copytree(whole("sft"), folder)
    with hold(folder):
        assert f"is being written by another run (process {os.getpid()})" in refusal("--resume", folder)
        assert "is being written by another run" in refusal("--out", folder, *RUNS["sft"])
    with patch.object(RunLog, "step", side_effect=KeyError), pytest.raises(KeyError):
        script("train.py", "--resume", folder, "--steps", 12)
    resume(folder, "--steps", 11)


def test_a_saved_state_is_promised_only_where_there_is_one(tmp_path, monkeypatch):
    """Not by an earlier run in this process, and not before the first save, which is at the end of the warm-up."""
    flags = [*TINY, *"--steps 4 --save-every 2 --warm-steps 1 --warm-until 2".split()]
    log = RunLog.step

    def refused(step, *argv):
        def full_disk(self, row):
            log(self, row)
            if row["step"] == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(RunLog, "step", full_disk)
        return refusal(*argv).removeprefix("train.py: [Errno 28] No space left on device")

    intact = f"; the last saved state is intact (--resume {tmp_path / 'one'})\n"
    assert refused(4, "--out", tmp_path / "one", *flags) == intact
    assert refused(1, "--out", tmp_path / "none", *flags) == "\n"
    assert refused(2, "--out", tmp_path / "two", *flags) == intact.replace("one", "two")
    assert refused(3, "--resume", tmp_path / "one") == intact


def test_a_system_without_memory_figures_runs_and_says_so(tmp_path, monkeypatch, capsys):
    """Windows has neither `resource` nor os.sysconf, nor /proc."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    assert available_memory("cpu", str(tmp_path)) == math.inf
    assert capsys.readouterr().out.count("does not say how much memory is free") == 1
    with patch("nanogspo.run.process.available_memory", lambda device: math.inf):
        done = train(tmp_path / "run", *TINY, "--steps", 2)
    assert "gradient checkpointing" not in done.out and "inf" not in done.out
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "algo" in row]
    assert [row["peak_mem_bytes"] for row in rows] == [None, None]


@pytest.mark.isa
def test_exit_code_and_stderr_of_a_real_process(tmp_path, base):
    """Once without torch (a wrong flag) and once with (a checkpoint that is none)."""
    (tmp_path / "empty").mkdir()
    for argv, words in (
        (["--stepz", 3], "--steps"),
        (["--model", tmp_path / "empty", "--dtype", "fp32", "--out", tmp_path / "r"], "empty"),
    ):
        child = process("train.py", *argv)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 2 and out == ""
        assert err.startswith("train.py: ") and words in err and err.count("\n") == 1
