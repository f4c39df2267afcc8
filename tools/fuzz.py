"""Wrong inputs of every format, by chance: none may end in a traceback, a hang, a crash or another model's numbers.

    python tools/fuzz.py 400                    cases 0 to 399 of seed 0
    python tools/fuzz.py 400 --seed 7           others
    python tools/fuzz.py --seed 7 --only 17     one of them again

A case is a function of (seed, number): a copy of small sound inputs, of which tools/odd_inputs.py spoils one thing. A
value of a JSON file becomes another type, null, huge, nan or nested; a key goes, comes twice or is unknown; a file is
cut, emptied, swapped, a folder, in another encoding, or has a bit flipped; a flag has an absurd value. Then a child
process does with it what the programs do. What is promised of every case:

    it is accepted, or refused in one line of at most LONGEST characters, by what the programs end with exit code 2 on;
    no library prints on stderr past Python
    it ends within the limit of seconds and of MEMORY; a child that does not is ended, and another one goes on
    no input file changes, and nothing is written but in the run's own folder, beside the case's least of all; a state
    that is refused stays as it was
    an accepted checkpoint gives transformers' logits, an adapter PEFT's, a tokenizer and each row transformers' ids

What transformers refuses of the accepted is listed, for a reader to judge: mostly values that we do not read.
Exit code 0: every promise was kept.       Tests: tests/test_fuzz.py
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from odd_inputs import SFT, damage, make, odd_flags  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from nanogspo import checkpoint  # noqa: E402
from nanogspo.config import SampleConfig, TrainConfig, check, check_fields, parse  # noqa: E402
from nanogspo.run import program  # noqa: E402
from nanogspo.tasks.jsonl import load_jsonl  # noqa: E402
from nanogspo.tokenizer import load_tokenizer  # noqa: E402

LONGEST = 600  # characters of a refusal
MEMORY = 3 * 2**30  # bytes, beyond what Python and its libraries hold
TOKENS = torch.tensor([[5, 70, 9, 33, 120, 64, 7, 90, 41, 18, 77, 50]])  # (1, T), longer than gemma's window of 8
TEXT = "the then <|im_end|> é\n 12"
MESSAGES = [{"role": "system", "content": "the"}, {"role": "user", "content": TEXT}]
RL = """--model tiny --algo gspo --steps 1 --prompts-per-rollout 2 --group-size 2 --updates-per-rollout 2 --warm-steps 0
    --eval-size 0 --max-new-tokens 6 --device cpu""".split()
SAMPLE = "--model qwen --prompt the --max-new-tokens 3 --dtype fp32 --device cpu".split()
# what case n tries is KINDS[n % 20]
KINDS = """model tokenizer rows model flags tokenizer adapter sample state rows
    model yaml tokenizer adapter flags prompts tokenizer rows model train""".split()

# ---------------------------------------------------------------------------------------------------------------------
# what is done with an input, in its folder. What can be compared returns a function that compares: "" when all is well.

Compare = Callable[[], str]


def try_model(folder: str) -> Compare:
    ours = logits(checkpoint.load(folder, dtype=torch.float32))
    theirs = transformers.AutoModelForCausalLM.from_pretrained
    return lambda: unequal(ours, theirs(folder, dtype=torch.float32).eval()(TOKENS).logits)


def try_adapter() -> Compare:
    model = checkpoint.load("qwen", dtype=torch.float32)
    checkpoint.load_adapter(model, "adapter")
    ours = logits(model)

    def compare() -> str:
        base = transformers.AutoModelForCausalLM.from_pretrained("qwen", dtype=torch.float32)
        return unequal(ours, peft.PeftModel.from_pretrained(base, "adapter").eval()(TOKENS).logits)

    return compare


def logits(model) -> torch.Tensor:
    return model.logits(model(TOKENS))  # (1, T, V)


def unequal(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Another function moves these logits by 0.01 and more, the order of fp32 sums by 1e-5."""
    if ours.shape != theirs.shape:
        return f"logits of shape {[*ours.shape]}, theirs {[*theirs.shape]}"
    if not theirs.isfinite().all():
        return ""  # a flipped bit made a weight of 1e38: what overflows first is a matter of order
    gap, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return "" if gap <= 1e-4 * max(size, 1.0) else f"logits differ by {gap:.2g} of {size:.2g}"


def try_tokenizer(folder: str) -> Compare:
    tokenizer = load_tokenizer(folder)
    ours = [tokenizer.encode(TEXT), tokenizer.chat(MESSAGES) if tokenizer.has_chat_template else None]

    def compare() -> str:
        other = transformers.AutoTokenizer.from_pretrained(folder)
        chat = other.apply_chat_template(MESSAGES, add_generation_prompt=True) if tokenizer.has_chat_template else None
        theirs = [other(TEXT)["input_ids"], chat and chat["input_ids"]]
        return "" if ours == theirs else f"ids {ours}, theirs {theirs}"

    return compare


def try_rows() -> Compare:
    examples, _ = load_jsonl("rows.jsonl", load_tokenizer("qwen"), max_length=10**4, notify=str)

    def compare() -> str:
        tokenizer = transformers.AutoTokenizer.from_pretrained("qwen")
        lines = Path("rows.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for example in examples:
            row = {key: value for key, value in json.loads(lines[example.line - 1]).items() if value is not None}
            messages, learned = conversation(row)
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) and row["tools"] else row.get("tools")
            given = row.get("chat_template_kwargs", {})
            theirs = tokenizer.apply_chat_template(messages, tools=tools or None, **given)["input_ids"]
            if theirs[: len(example.tokens)] != example.tokens:  # turns after the last answer are left off
                return f"line {example.line}: ids {example.tokens}, theirs {theirs}"
            text = tokenizer.decode([t for t, learn in zip(example.tokens, example.loss_mask, strict=True) if learn])
            if text != "".join(f"{answer}<|im_end|>" for answer in learned):
                return f"line {example.line}: learns {text!r}, want {learned}"
        return ""

    return compare


def conversation(row: dict) -> tuple[list[dict], list[str]]:
    """(the turns of a row, the answers learned of it), without the reader under test."""
    if "messages" in row:
        turns = row["messages"]
        learned = [
            t for t in turns if t["role"] == "assistant" and t.get("weight") != 0 and t.get("train") is not False
        ]
    else:
        names = ("title", "description", "input_format", "output_format")
        pair = "prompt" in row and "completion" in row
        parts = [f"## {name.replace('_', ' ').capitalize()}\n{row[name]}" for name in names if row.get(name)]
        prompt = row["prompt"] if pair else "\n\n".join(parts)
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        learned = [{"role": "assistant", "content": row["completion" if pair else "solution"]}]
        turns = [*turns, *learned]
    if row.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": row["system"]}, *turns]
    turns = [
        {key: value for key, value in t.items() if value is not None and key not in ("weight", "train")} for t in turns
    ]
    return turns, [t.get("content") or "" for t in learned]


def try_train(argv: list[str]) -> None:
    train.run(parse(TrainConfig, argv, "fuzz")[0])


def try_sample(argv: list[str]) -> None:
    sample.run(parse(SampleConfig, argv, "fuzz")[0])


def try_flags(kind: type, argv: list[str]) -> None:
    (check if kind is TrainConfig else check_fields)(parse(kind, argv, "fuzz")[0])


def attempt(seed: int, number: int) -> tuple[str, Callable[[], Compare | None]]:
    """Spoils the sound inputs in the current folder: (what is wrong now, what to do with them)."""
    dice, kind = random.Random(f"{seed}/{number}"), KINDS[number % len(KINDS)]
    folder = Path(dice.choice(["qwen", "gemma"]))
    if kind == "model":
        weights = sorted(path for path in folder.iterdir() if "safetensors" in path.name)
        path = folder / "config.json" if dice.random() < 0.5 else dice.choice(weights)
        return damage(path, dice), lambda: try_model(folder)
    if kind == "tokenizer":
        weights = {path for path in folder.iterdir() if "safetensors" in path.name}
        return damage(dice.choice(sorted({*folder.iterdir()} - weights)), dice), lambda: try_tokenizer(folder)
    if kind == "adapter":
        names = ["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"]
        return damage(Path("adapter", dice.choice(names)), dice), try_adapter
    if kind == "state":
        names = ["state/state.safetensors"] * 4 + ["config.yaml", "metrics.jsonl", "samples.jsonl"]
        path, argv = Path("run", dice.choice(names)), ["--resume", "run", "--steps", "2", "--device", "cpu"]
        return damage(path, dice), lambda: try_train(argv)
    if kind == "rows":
        return damage(Path("rows.jsonl"), dice), try_rows
    if kind == "yaml":
        return damage(Path("config.yaml"), dice), lambda: try_flags(TrainConfig, ["--config", "config.yaml"])
    if kind == "prompts":
        argv = [{"--prompt": "--prompts", "the": "prompts.txt"}.get(word, word) for word in SAMPLE]
        return damage(Path("prompts.txt"), dice), lambda: try_sample(argv)
    if kind == "flags":  # no further than the check: a value may name any folder to write into
        config = dice.choice([TrainConfig, SampleConfig])
        argv = odd_flags([], config, dice)
        return f"{argv!r:.200}", lambda: try_flags(config, argv)
    if kind == "sample":
        argv = odd_flags(SAMPLE, SampleConfig, dice)
        return f"sample {argv[len(SAMPLE) :]!r:.200}", lambda: try_sample(argv)
    base, long = dice.choice([SFT, RL]), ("out", "resume", "steps", "eval_size", "threads", "control", "warm_steps")
    argv = odd_flags(base, TrainConfig, dice, fixed=long)
    return f"train {argv[len(base) :]!r:.200}", lambda: try_train([*argv, "--out", "new-run"])


# ---------------------------------------------------------------------------------------------------------------------
# and what is found


@dataclasses.dataclass
class Verdict:
    number: int
    wrong: str  # about the input
    outcome: str = "accepted"  # or refused; else what was found
    line: str = ""  # the refusal, or more about what was found
    note: str = ""  # what transformers says of what is accepted here

    @property
    def sound(self) -> bool:
        return self.outcome in ("accepted", "refused")


def judge(seed: int, number: int, home: Path, tell: Callable[[str], None]) -> Verdict:
    """One case, in a copy of the inputs at home. `tell` is given what is going on, should it be the last thing."""
    folder, output, compare = home.with_name(f"case-{number}"), io.StringIO(), None
    shutil.copytree(home, folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        sys.stdin = io.StringIO("the\n\n")  # --chat asks
        wrong, do = attempt(seed, number)
        before, verdict = snapshot(folder), Verdict(number, wrong)
        tell(wrong)
        printed = os.fstat(2).st_size
        try:
            compare = do()
        except SystemExit:  # argparse
            verdict.outcome, verdict.line = "refused", output.getvalue().strip().rpartition("fuzz: ")[2]
        except BaseException as error:  # Rust's panics are no Exceptions
            try:
                verdict.outcome, verdict.line = "refused", program.explain(error, "memory")[0]
            except BaseException:
                verdict.outcome, verdict.line = "a traceback", "".join(traceback.format_exception(error)[-3:])
        if verdict.outcome == "refused" and (len(verdict.line) > LONGEST or not verdict.line.isprintable()):
            verdict.outcome = f"a refusal of {len(verdict.line)} characters in {len(verdict.line.splitlines())} lines"
        if os.fstat(2).st_size > printed and verdict.sound:
            verdict.outcome = "lines on stderr past Python"
        after, own = snapshot(folder), ("new-run/", "run/" if verdict.outcome == "accepted" else "new-run/")
        changed = [path for path in before | after if before.get(path) != after.get(path) and not path.startswith(own)]
        if changed and verdict.sound:
            verdict.outcome, verdict.line = "changed files", f"{sorted(changed)[:5]} {verdict.line}"
        if compare and verdict.sound:
            tell(THERE + wrong)
            try:
                with torch.no_grad():
                    verdict.line = compare()
                verdict.outcome = "another result than transformers'" if verdict.line else verdict.outcome
            except Exception as error:
                verdict.note = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    shutil.rmtree(folder)
    return verdict


THERE = "in transformers: "


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes of the files of a case and of what stands beside its folder: ../inputs, and nothing else but the log."""
    files = {os.path.relpath(path, folder): path for path in folder.parent.rglob("*") if path.is_file()}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != "../log"}
    return {name.replace(os.sep, "/"): digest for name, digest in hashes.items()}


def work(seed: int, numbers: list[int], home: Path, limit: float, pipe) -> None:
    """The child: case after case, each under the limits."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError, OSError):  # not on Windows, and no /proc on macOS: there without the limit
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with open(home.with_name("log"), "w") as log:
        os.dup2(log.fileno(), 2)  # what Rust and C++ print
        for number in numbers:
            faulthandler.dump_traceback_later(limit, exit=True, file=log)
            verdict = judge(seed, number, home, pipe.send)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(verdict)


def hunt(seed: int, numbers: Iterable[int], scratch: Path, limit: float) -> Iterator[Verdict]:
    """Verdicts on these cases, in order; scratch is an empty folder."""
    fork, home, numbers = multiprocessing.get_context("fork"), scratch / "inputs", list(numbers)
    home.mkdir()
    maker = fork.Process(target=make, args=(home,))  # this process never computes: a fork of its threads would hang
    maker.start()
    maker.join()
    assert not maker.exitcode, "the sound inputs could not be made"
    while numbers:
        here, there = fork.Pipe(duplex=False)
        child = fork.Process(target=work, args=(seed, numbers, home, limit, there))
        child.start()
        there.close()
        doing = "nothing yet"
        with contextlib.suppress(EOFError):  # it has ended
            while True:
                doing = here.recv()
                if isinstance(doing, Verdict):
                    numbers.pop(0)
                    yield doing
        child.join()
        if not isinstance(doing, Verdict):
            log = home.with_name("log").read_text(errors="replace")
            stuck = log.rfind("Timeout (")  # what faulthandler prints, the innermost call first
            how = f"no end within {limit:g} s" if stuck >= 0 else f"a child with exit code {child.exitcode}"
            line = log[stuck:][:1500] if stuck >= 0 else log[-1500:]
            verdict = Verdict(numbers.pop(0), doing.removeprefix(THERE), how, line)
            yield verdict if doing == verdict.wrong else Verdict(verdict.number, verdict.wrong, note=how)
            shutil.rmtree(home.with_name(f"case-{verdict.number}"), ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, nargs="?", default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these cases, and what is said of each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a case")
    parser.add_argument("--verbose", action="store_true", help="what is said of every case")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes, notes = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for v in hunt(args.seed, args.only or range(args.count), Path(scratch).resolve(), args.limit):
            outcomes[v.outcome] += 1
            if not v.sound or args.verbose or args.only:
                again = "" if v.sound else f"\n    again: python tools/fuzz.py --seed {args.seed} --only {v.number}"
                print(f"{v.number}: {v.wrong}\n    {v.outcome}: {v.line}{again}", flush=True)
            if v.note:
                notes.append(f"\n    {v.number}: {v.wrong}: {v.note}")
    print(f"{sum(outcomes.values())} cases: " + ", ".join(f"{n} {name}" for name, n in outcomes.most_common()))
    print(f"{len(notes)} accepted here and not by transformers" + "".join(notes))
    return 1 if outcomes.keys() - {"accepted", "refused"} else 0


if __name__ == "__main__":
    sys.exit(main())
