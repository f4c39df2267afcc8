"""What a run leaves behind for people: one console line and one metrics.jsonl row per step, and samples.jsonl.

    with RunLog("runs/tiny", steps=400) as log:
        log.step({"step": 1, "algo": "gspo", "loss": -0.002, "reward": 0.31, ...})
        log.evaluation(step=1, phase="gspo", successes=31, count=100)
        log.samples([{"step": 1, "prompt": "47+38=", "answer": "85", "reward": 1.0}])

The files are the truth and the console is a view of them: every row is flushed as it is written, so a killed run keeps
all but the row in flight, and curves.png is drawn from metrics.jsonl alone (curves.py, on any folder, at any time). A
run that resumes at step k first drops the rows after k, since it is about to write them again.

Reading order: wilson_interval, RunLog, step_line, summary.       Tests: tests/test_log.py
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanogspo import distributed
from nanogspo.config import TrainConfig
from nanogspo.storage.files import atomic_write, writing

BAR_EVERY, LINE_EVERY = 1.0, 30.0  # seconds between two words about a rollout: on a terminal, and in a log
Z95 = 1.959964  # 95 % of a normal distribution lies within this many standard deviations


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share: which true probabilities p could well have given `successes` out of n.

        |successes / n - p| <= z * sqrt(p * (1 - p) / n)        solved for p        (1)

    Unlike the textbook p +- z * sqrt(p (1 - p) / n) it keeps inside [0, 1] and does not shrink to a point at 0 or n.
    n = 0 gives (0, 1): nothing is known.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}, want 0 <= successes <= n; swap the arguments?")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z95**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    # at both ends one bound is exactly 0 or 1; the square root misses it by a rounding error
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


class RunLog(contextlib.AbstractContextManager):
    """Owns metrics.jsonl and samples.jsonl of one run folder, and the lines on the console."""

    def __init__(
        self, folder: str | Path, *, steps: int, resume_step: int | None = None, quiet: bool = False, tracker=None
    ):
        """folder       made if missing
        steps        steps of the whole run, for the progress bar and the width of the step column
        resume_step  None starts new files; k keeps what is there up to step k and goes on after it
        quiet        files only, nothing on the console
        Of several processes the first one writes. The others keep the same notes, since decisions are made from them.
        tracker      called with every row of metrics.jsonl (trackers.py)
        """
        self.folder, self.steps, self.quiet = Path(folder), steps, quiet
        self._tracker = tracker or (lambda row: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        main = distributed.rank() == 0
        kept = [] if resume_step is None else [_drop_rows_after(path, resume_step, main) for path in paths][0]
        self._notes = [row for row in kept if "algo" not in row]  # evaluations and the like, not updates
        self._kept = [row for row in kept if "algo" in row]
        mode = "w" if resume_step is None else "a"
        # backslashreplace: half a surrogate pair, which a model may write into a tool call, as JSON spells it
        paths = paths if main else [Path(os.devnull)] * 2
        self._metrics, self._samples = (path.open(mode, -1, "utf-8", "backslashreplace", "\n") for path in paths)
        self._bar = None
        if not quiet and sys.stdout.isatty() and sys.stderr.isatty():  # in a file a bar would be a thousand lines
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=resume_step or 0, unit="step", dynamic_ncols=True, leave=False)

    def step(self, row: dict) -> None:
        """One optimiser update: `row` goes to metrics.jsonl as it is, and to the console as one line."""
        self._row(row)
        if self._bar is not None:
            self._bar.update(1)  # before the line: writing it redraws the bar, which then counts this step
        self.say(step_line(row, width=len(str(self.steps))))

    def evaluation(self, *, step: int, phase: str, successes: int, count: int, **more: float) -> dict:
        """Held-out greedy answers: `successes` of `count` exactly right. Returns the row it wrote.

        phase  which policy was examined: "start", "sft", "gspo", "grpo", or "control" (SFT continued instead of RL)
        more   other eval_* numbers for the same row
        """
        low, high = wilson_interval(successes, count)
        exact = successes / count if count else math.nan
        row = {"step": step, "phase": phase, **more, "eval_exact": exact}  # whatever name a function logs under
        row |= {"eval_low": low, "eval_high": high, "eval_count": count}
        text = f"exact {exact:6.1%} | 95 % interval {low:.1%} to {high:.1%} | {successes} of {count}"
        if "eval_reward_se" in more:
            mean, error = more["eval_reward"], more["eval_reward_se"]
            text += " | no reward given" if math.isnan(mean) else f" | reward {mean:.3f} ±{error:.3f}"
        self._examined(row, text)
        return row

    def held_out(self, *, step: int, phase: str, loss: float, accuracy: float, count: int) -> None:
        """Loss and token accuracy on `count` rows that are never trained on."""
        row = {"step": step, "phase": phase, "eval_loss": loss, "eval_token_accuracy": accuracy, "eval_count": count}
        self._examined(row, f"loss {loss:7.4f} | accuracy {accuracy:5.3f} | {count} held-out rows")

    def answers(self, step: int, rows: list[dict]) -> None:
        """Answers to held-out prompts: whole into samples.jsonl, and to the console what fits on a line each."""
        self.samples({"step": step, **row} for row in rows)
        for row in rows:
            for key in ("prompt", "answer", "reference"):
                text = row[key] if len(row[key]) <= 200 else f"{row[key][:60]} ... {row[key][-130:]}"
                self.say(f"{key:>9}  {text!r}")

    def changed(self, step: int, what: list[str]) -> None:
        """The run goes on from update `step` with other inputs than before, accepted by who resumed it."""
        if not self.has(step=step, accepted_changes=what):
            self._note({"step": step, "accepted_changes": what})
        self.say(f"goes on with what has changed: {', '.join(what)}")

    def says(self, step: int, what: str, sentence: str, **more: float) -> None:
        """A sentence of the doctor (doctor.py), once in a run."""
        if not self.has(doctor=what):
            self._note({"step": step, "doctor": what, "says": sentence, **more})
            self.say(sentence)

    def updates(self, algo: str) -> list[dict]:
        """The rows of an earlier part of this run that has been resumed."""
        return [row for row in self._kept if row["algo"] == algo]

    def has(self, **values: object) -> bool:
        """Is there a row already, other than an update's, with these values? A run killed at a phase's end wrote it."""
        return any(all(row.get(key) == value for key, value in values.items()) for row in self._notes)

    def results(self, phase: str) -> list[float]:
        """The evaluations of a phase in order, higher is better: mean reward, else the fraction right, else -loss.
        Without those in which every answer was left out, whose reward is nan, or null in a file."""
        notes = [_plain(row) for row in self._notes if row.get("phase") == phase]
        keys = [(row, [k for k in ("eval_reward", "eval_exact", "eval_loss") if k in row]) for row in notes]
        return [row[k[0]] * (-1 if k[0] == "eval_loss" else 1) for row, k in keys if k and row[k[0]] is not None]

    def _examined(self, row: dict, text: str) -> None:
        self._note(row)
        self.say(f"eval {row['step']:>{max(4, len(str(self.steps)))}} | {row['phase']:<7} | {text}")

    def _note(self, row: dict) -> None:
        self._row(row)
        self._notes.append(row)

    def _row(self, row: dict) -> None:
        _write(self._metrics, row)
        self._tracker(row)

    def samples(self, rows: Iterable[dict]) -> None:
        """One rollout's rows of {"step", "prompt", "answer", "reward", ...} for samples.jsonl."""
        for row in rows:
            _write(self._samples, row)

    def sampling(self, answers: int, stop: object = False) -> Callable[[int, int], bool]:
        """An on_step for rollout.generate that says how far it is, in the progress bar or else as a line now and then,
        and ends the sampling as soon as `stop` is true."""
        said = time.monotonic()

        def on_step(complete: int, tokens: int) -> bool:
            nonlocal said
            now = time.monotonic()
            if now - said >= (LINE_EVERY if self._bar is None else BAR_EVERY):
                said, text = now, f"sampled {complete} of {answers} answers (running: {tokens} tokens)"
                self.say(text) if self._bar is None else self._bar.set_postfix_str(text)
            if complete == answers and self._bar is not None:
                self._bar.set_postfix_str("", refresh=False)
            return bool(stop)

        return on_step

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        elif not self.quiet:
            print(text, flush=True)  # through a pipe Python would hold lines back until 8 KB are full

    def close(self) -> None:
        for file in (self._metrics, self._samples):
            with writing(file.name):  # a row that the disk had no room for is tried once more
                file.close()
        if self._bar is not None:
            self._bar.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def step_line(row: dict, width: int = 4) -> str:
    """One row as one line of fixed columns. A number that is missing, null or NaN is shown as nan.

    trunc     the share of answers that were cut off at max_new_tokens
    0-spread  the share of groups whose answers all have the same reward, which teach nothing
    unrewarded  the share of answers that no reward was given, where there are any
    ratio  the mean over sequences, and after +- the distance of the farthest one from 1
    clip   the share of sequences (GSPO) or tokens (GRPO) whose gradient the clip removed, low and high side together
    """

    def number(key: str) -> float:
        value = _plain(row.get(key))
        return math.nan if value is None else value

    head = f"step {row['step']:>{max(4, width)}}"
    time = f"{number('step_s'):.1f} s"
    if row["algo"] == "sft":
        accuracy, speed = f"accuracy {number('token_accuracy'):5.3f}", f"{number('tokens_per_s'):9,.0f} tokens/s"
        return " | ".join([head, f"loss {number('loss'):7.4f}", accuracy, speed, time])
    # max() of NaN and a number depends on their order, the sum of absolute values does not
    ends = [abs(number("ratio_min") - 1), abs(number("ratio_max") - 1)]
    spread = math.nan if any(map(math.isnan, ends)) else max(ends)
    return " | ".join(
        [
            head,
            f"reward {number('reward'):4.2f}",
            f"trunc {number('truncated_frac'):4.2f}",
            f"0-spread {number('zero_spread_frac'):4.2f}",
            *[f"unrewarded {number('unrewarded_frac'):4.2f}"] * bool(row.get("unrewarded_frac")),
            f"loss {number('loss'):6.3f}",
            f"ratio {number('ratio_mean'):5.3f} ±{spread:.4f}",
            f"clip {number('clip_low_frac') + number('clip_high_frac'):4.2f}",
            f"len {number('answer_len'):6.1f}",
            time,
        ]
    )


def summary(config: TrainConfig, folder: Path, picture, example: str | None, seconds: float) -> str:
    """What a run prints last: held-out exact match before and after each phase, and where things are."""
    names = {"start": "before", "sft": "after SFT", "gspo": "after GSPO", "grpo": "after GRPO", "control": "control"}
    rows = read_rows(folder / "metrics.jsonl")
    keys = "eval_exact", "eval_token_accuracy"
    exact, losses = ({row["phase"]: row for row in rows if key in row} for key in keys)
    what = "episodes that earned 1 or more" if config.environment else "exact match"
    lines = [f"held-out {what}, {config.eval_size} problems never trained on:"] * bool(exact)
    for phase, row in exact.items():
        note = "  (SFT continued instead of RL, for the same time)" if phase == "control" else ""
        interval = f"95 % interval {row['eval_low']:.1%} to {row['eval_high']:.1%}"
        lines.append(f"  {names.get(phase, f'after {phase}'):<10} {row['eval_exact']:6.1%}   {interval}{note}")
    if losses:  # SFT from a file
        lines.append(f"held-out loss and token accuracy, {config.eval_size} rows never trained on:")
    for phase, row in losses.items():
        lines.append(f"  {names[phase]:<10} {row['eval_loss']:7.4f}   {row['eval_token_accuracy']:.3f}")
    adapter = config.lora_r and config.model != "tiny"  # whose base is saved nowhere
    weights = folder / ("adapter" if adapter else "model")
    files = f"report {folder / 'report.html'}, curves {picture}, samples {folder / 'samples.jsonl'}"
    lines.append(f"{seconds:.0f} s; {files}, weights {weights}")
    if example:
        path = shlex.quote(str(weights))
        tail = f"--model {shlex.quote(config.model)} --adapter {path}" if adapter else f"--model {path}"
        tail += "" if config.quant == "none" else f" --quant {config.quant}"  # what the adapter was trained over
        tail += "" if config.model == "tiny" else f" --thinking {config.thinking}"
        lines.append(f'try it: python sample.py {tail} --temperature 0 "{example}"')
    return "\n".join(lines)


# ----------------------------------------------------------------------------
# files


def _plain(value: object) -> object:
    """What JSON can say: tensors of one element become numbers, NaN and infinities null (JSON has no word for them)."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a tensor or a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(file, row: dict) -> None:
    with writing(file.name):
        file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")
        file.flush()


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSONL file of ours, [] without a file. A half-written last line, left by a kill, is no row."""
    return [*each_row(path)]


def each_row(path: str | Path) -> Iterator[dict]:
    """The same, one at a time: samples.jsonl grows with the run."""
    return (row for row, _ in _rows_and_lines(Path(path)))


def _rows_and_lines(path: Path) -> Iterator[tuple[dict, bytes]]:
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
                    raise ValueError("no row of ours")
            except ValueError as error:
                if next(lines, None) is not None:
                    raise ValueError(f"{path}:{number}: got broken JSON, want a row; delete the line") from error
                return
            yield row, line


def _drop_rows_after(path: Path, step: int, write: bool) -> list[dict]:
    """Returns the rows that stay."""
    kept = [(row, line) for row, line in _rows_and_lines(path) if row.get("step", 0) <= step]
    if write and path.exists():  # a kill here leaves the old file or the new one, never half of one
        atomic_write(path, b"".join(line.removesuffix(b"\n") + b"\n" for _, line in kept))
    return [row for row, _ in kept]
