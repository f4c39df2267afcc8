"""What a run leaves behind for people: one console line and one metrics.jsonl row per step, samples.jsonl, curves.png.

    with RunLog("runs/tiny", steps=400, clip_range=(3e-4, 4e-4)) as log:
        log.step({"step": 1, "algo": "gspo", "loss": -0.002, "reward": 0.31, ...})
        log.evaluation(step=1, phase="gspo", successes=31, count=100)
        log.samples([{"step": 1, "prompt": "47+38=", "answer": "85", "reward": 1.0}])
        log.draw()

The files are the truth and the console is a view of them: every row is flushed as it is written, so a killed run keeps
all but the row in flight, and curves.png is drawn from metrics.jsonl alone (`draw_curves`, on any folder, at any time).
A run that resumes at step k first drops the rows after k, since it is about to write them again.

Reading order: wilson_interval, RunLog, step_line, draw_curves.       Tests: tests/test_runlog.py
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

BAR_EVERY, LINE_EVERY = 1.0, 30.0  # seconds between two words about a rollout: on a terminal, and in a log
NO_REWARD = (
    "three rollouts without any reward: there is nothing to compare, so nothing is learned; in a new run try "
    "--warm-steps 20 (SFT on the task's own answers first), an easier --task-size, or, if trunc is near 1, more "
    "--max-new-tokens"
)
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


class RunLog:
    """Owns metrics.jsonl, samples.jsonl and curves.png of one run folder, and the lines on the console."""

    def __init__(
        self,
        folder: str | Path,
        *,
        steps: int,
        resume_step: int | None = None,
        clip_range: tuple[float, float] | None = None,
        quiet: bool = False,
    ):
        """folder       made if missing
        steps        steps of the whole run, for the progress bar and the width of the step column
        resume_step  None starts new files; k keeps what is there up to step k and goes on after it
        clip_range   (clip_low, clip_high), drawn into the ratio panel
        quiet        files only, nothing on the console
        """
        self.folder, self.steps, self.clip_range, self.quiet = Path(folder), steps, clip_range, quiet
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        kept = [] if resume_step is None else [_drop_rows_after(path, resume_step) for path in paths][0]
        self._notes = [row for row in kept if "algo" not in row]  # evaluations and the like, not updates
        mode = "w" if resume_step is None else "a"
        self._metrics, self._samples = (path.open(mode, encoding="utf-8", newline="\n") for path in paths)
        self._unrewarded = 0  # rollouts so far; infinite once there has been a reward
        self._bar = None
        if not quiet and sys.stdout.isatty() and sys.stderr.isatty():  # in a file a bar would be a thousand lines
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=resume_step or 0, unit="step", dynamic_ncols=True, leave=False)

    def step(self, row: dict) -> None:
        """One optimiser update: `row` goes to metrics.jsonl as it is, and to the console as one line."""
        _write(self._metrics, row)
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
        row = {"step": step, "phase": phase, "eval_exact": exact, "eval_low": low, "eval_high": high}
        row |= {"eval_count": count, **more}
        self._note(row)
        self.say(
            f"eval {step:>{max(4, len(str(self.steps)))}} | {phase:<7} | exact {exact:6.1%}"
            f" | 95 % interval {low:.1%} to {high:.1%} | {successes} of {count}"
        )
        return row

    def held_out(self, *, step: int, phase: str, loss: float, accuracy: float, count: int) -> None:
        """Loss and token accuracy on `count` rows that are never trained on."""
        row = {"step": step, "phase": phase, "eval_loss": loss, "eval_token_accuracy": accuracy, "eval_count": count}
        self._note(row)
        self.say(
            f"eval {step:>{max(4, len(str(self.steps)))}} | {phase:<7} | loss {loss:7.4f} | accuracy {accuracy:5.3f}"
            f" | {count} held-out rows"
        )

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

    def has(self, **values: object) -> bool:
        """Is there a row already, other than an update's, with these values? A run killed at a phase's end wrote it."""
        return any(all(row.get(key) == value for key, value in values.items()) for row in self._notes)

    def _note(self, row: dict) -> None:
        _write(self._metrics, row)
        self._notes.append(row)

    def samples(self, rows: Iterable[dict]) -> None:
        """One rollout's rows of {"step", "prompt", "answer", "reward", ...} for samples.jsonl."""
        rewarded = False
        for row in rows:
            _write(self._samples, row)
            rewarded |= bool(row.get("reward"))
        self._unrewarded = math.inf if rewarded else self._unrewarded + 1
        if self._unrewarded == 3:
            self.say(NO_REWARD)

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

    def draw(self) -> Path | None:
        return draw_curves(self.folder, clip_range=self.clip_range)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def step_line(row: dict, width: int = 4) -> str:
    """One row as one line of fixed columns. A number that is missing, null or NaN is shown as nan.

    trunc     the share of answers that were cut off at max_new_tokens
    0-spread  the share of groups whose answers all have the same reward, which teach nothing
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
            f"loss {number('loss'):6.3f}",
            f"ratio {number('ratio_mean'):5.3f} ±{spread:.4f}",
            f"clip {number('clip_low_frac') + number('clip_high_frac'):4.2f}",
            f"len {number('answer_len'):6.1f}",
            time,
        ]
    )


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
    file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    file.flush()


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSONL file of ours, [] without a file. A half-written last line, left by a kill, is no row."""
    return [row for row, _ in _rows_and_lines(Path(path))]


def _rows_and_lines(path: Path) -> list[tuple[dict, bytes]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
                raise ValueError("no row of ours")
            pairs.append((row, line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number}: got broken JSON, want a row; delete the line") from error
    return pairs


def _drop_rows_after(path: Path, step: int) -> list[dict]:
    """Returns the rows that stay."""
    from nanogspo.checkpoint import atomic_write

    kept = [(row, line) for row, line in _rows_and_lines(path) if row.get("step", 0) <= step]
    if path.exists():  # a kill here leaves the old file or the new one, never half of one
        atomic_write(path, b"".join(line.removesuffix(b"\n") + b"\n" for _, line in kept))
    return [row for row, _ in kept]


# ----------------------------------------------------------------------------
# curves.png

# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A7A7A"
PHASE_COLOURS = {"start": GREY, "sft": BLUE, "gspo": ORANGE, "grpo": ORANGE, "control": GREEN}


def draw_curves(folder: str | Path, *, clip_range: tuple[float, float] | None = None) -> Path | None:
    """Draws folder/metrics.jsonl into folder/curves.png, a panel for each thing the run measured. None without rows.

    clip_range  (clip_low, clip_high) for the ratio panel
    """
    from matplotlib.figure import Figure  # 0.5 s to import, so only when drawing; Figure alone needs no display

    rows = read_rows(Path(folder, "metrics.jsonl"))
    policy = [row for row in rows if row.get("algo") in ("gspo", "grpo")]
    sft = [row for row in rows if row.get("algo") == "sft"]
    held_out = [row for row in rows if "eval_loss" in row]
    panels = [
        (_draw_exact, [row for row in rows if "eval_exact" in row]),
        (_draw_reward, policy),
        (_draw_ratio, policy),
        (_draw_sft_loss, sft + held_out),
        (_draw_sft_accuracy, held_out and sft + held_out),
        (_draw_entropy, policy),
        (_draw_length, policy),
    ]
    panels = [(draw, data) for draw, data in panels if data]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 0.4 + 3.1 * lines), layout="constrained")
    figure.suptitle(Path(folder).resolve().name, fontsize=13, fontweight="bold")
    for index, (draw, data) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, index)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("update")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if draw is _draw_ratio:
            draw(axes, data, clip_range)
        else:
            draw(axes, data)
    path = Path(folder, "curves.png")
    figure.savefig(path, dpi=130)
    return path


def _series(rows: list[dict], *keys: str) -> list[list[float]]:
    """Steps, then the values of each key, over the rows in which all of them are numbers."""
    whole = [row for row in rows if all(row.get(key) is not None for key in ("step", *keys))]
    return [[row[key] for row in whole] for key in ("step", *keys)]


def _by_phase(rows: list[dict]) -> dict[str, list[dict]]:
    phases = {}
    for row in rows:
        phases.setdefault(row.get("phase") or row.get("algo") or "", []).append(row)
    return phases


def _titled(axes, title: str, rows: list[dict], key: str) -> None:
    missing = sum(row.get(key) is None for row in rows)
    axes.set_title(title + (f"  ({missing} not finite)" if missing else ""), fontsize=11, loc="left")


def _smooth(axes, steps, values, colour: str, label: str | None = None, possible: tuple = (0.0, math.inf)) -> None:
    """The values as points; from FEW of them on also the mean of the nearest w, with the 95 % interval of that mean
    shaded as far as it is possible at all."""
    if len(values) < FEW:
        axes.plot(steps, values, "o-", color=colour, markersize=5, linewidth=1.2, label=label)
        return
    axes.plot(steps, values, ".", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
    mean, low, high = [], [], []
    for near in _windows(values):
        mean.append(sum(near) / len(near))
        variance = sum((v - mean[-1]) ** 2 for v in near) / (len(near) - 1)
        half = Z95 * math.sqrt(variance / len(near))
        low.append(max(mean[-1] - half, possible[0]))
        high.append(min(mean[-1] + half, possible[1]))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=label)


FEW = 20  # points; of fewer a reader sees each, and a mean of neighbours would hide most of what happened


def _windows(values: list[float]) -> list[list[float]]:
    """For each value the nearest w = 2 * reach + 1, about a twentieth of the run; fewer at both ends."""
    reach = max(2, len(values) // 40)
    return [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]


def _one_per_rollout(rows: list[dict]) -> list[dict]:
    """All updates of a rollout carry its facts: repeated, they would look like a trend of four equal measurements."""
    facts = [[row.get(key) for key in ("reward", "reward_std", "answer_len", "truncated_frac")] for row in rows]
    return [row for i, row in enumerate(rows) if i == 0 or facts[i] != facts[i - 1]]


def _draw_exact(axes, rows: list[dict]) -> None:
    """The policy's own path (start, SFT, RL), and beside it the control's, which leaves where SFT ended."""
    _titled(axes, "held-out exact match, 95 % interval", rows, "eval_exact")
    control = [row for row in rows if row.get("phase") == "control"]
    path = [row for row in rows if row.get("phase") != "control"]
    if control:
        control = [row for row in path if row.get("phase") == "sft"][-1:] + control
    for line, colour, style in ((path, ORANGE, "-"), (control, GREEN, "--")):
        steps, exact, low, high = _series(line, "eval_exact", "eval_low", "eval_high")
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, exact, style, color=colour, linewidth=1.8)
    for phase, group in _by_phase(rows).items():
        steps, exact, low, high = _series(group, "eval_exact", "eval_low", "eval_high")
        if not steps:
            continue
        colour = PHASE_COLOURS.get(phase, ORANGE)
        last = f"{phase} {exact[-1]:.0%}".strip()  # a phase may be examined many times
        axes.plot(steps, exact, "o", color=colour, markersize=5, label=last)
        axes.vlines(steps, low, high, color=colour, linewidth=1.5)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="best")


def _draw_reward(axes, rows: list[dict]) -> None:
    _titled(axes, "reward of the sampled answers", rows, "reward")
    steps, values = _series(_one_per_rollout(rows), "reward")
    share = all(0 <= value <= 1 for value in values)  # what every task here gives; others' rewards know no bounds
    _smooth(axes, steps, values, ORANGE, possible=(0, 1) if share else (-math.inf, math.inf))


def _draw_sft_loss(axes, rows: list[dict]) -> None:
    _titled(axes, "SFT loss, nats per token", [row for row in rows if "eval_loss" not in row], "loss")
    _draw_sft(axes, rows, "loss", math.inf)


def _draw_sft_accuracy(axes, rows: list[dict]) -> None:
    _titled(axes, "SFT token accuracy", [row for row in rows if "eval_loss" not in row], "token_accuracy")
    _draw_sft(axes, rows, "token_accuracy", 1.0)


def _draw_sft(axes, rows: list[dict], key: str, most: float) -> None:
    """Training rows phase by phase, over them the held-out rows."""
    phases = _by_phase([row for row in rows if "eval_loss" not in row])
    for phase, group in phases.items():
        label = phase if len(phases) > 1 else "training"
        _smooth(axes, *_series(group, key), PHASE_COLOURS.get(phase, BLUE), label, possible=(0.0, most))
    held_out = [row for row in rows if "eval_loss" in row]
    if held_out:
        axes.plot(*_series(held_out, f"eval_{key}"), "o-", color=ORANGE, markersize=5, linewidth=1.5, label="held out")
    if held_out or len(phases) > 1:
        axes.legend(frameon=False, fontsize=9)


def _draw_ratio(axes, rows: list[dict], clip_range: tuple[float, float] | None) -> None:
    """Where nine of ten ratios lie, and the range outside of which the clip takes the gradient away. Few updates are
    drawn one by one, from the smallest ratio to the largest; of many, medians of neighbours, without the first update
    of every rollout, whose ratios are 1 by construction."""
    _titled(axes, "ratio - 1: median, 5 % to 95 %", rows, "ratio_mean")
    if len(rows) >= FEW:
        rows = [row for row in rows if not row.get("ratio_min") == row.get("ratio_max") == 1] or rows
    older = {"ratio_p05": "ratio_min", "ratio_p50": "ratio_mean", "ratio_p95": "ratio_max"}  # runs before quantiles
    rows = [row | {new: row.get(new, row.get(old)) for new, old in older.items()} for row in rows]
    steps, *columns = _series(rows, "ratio_p05", "ratio_p50", "ratio_p95", "ratio_min", "ratio_max")
    low, median, high, least, most = ([ratio - 1 for ratio in column] for column in columns)
    if len(steps) < FEW:
        axes.vlines(steps, least, most, color=ORANGE, linewidth=1)
        axes.vlines(steps, low, high, color=ORANGE, alpha=0.5, linewidth=5)
        axes.plot(steps, median, "o", color=ORANGE, markersize=5)
    else:
        low, median, high = ([statistics.median(near) for near in _windows(line)] for line in (low, median, high))
        axes.fill_between(steps, low, high, color=ORANGE, alpha=0.3, linewidth=0)
        axes.plot(steps, median, color=ORANGE, linewidth=1.8)
    if clip_range:
        low_edge, high_edge = -clip_range[0], clip_range[1]
        label = f"not clipped: {low_edge:+.0e} to {high_edge:+.0e}"
        axes.axhspan(low_edge, high_edge, facecolor=BLUE, edgecolor=BLUE, alpha=0.3, label=label)
        linear = max(clip_range)
        if max(map(abs, [*axes.dataLim.intervaly])) > 20 * linear:  # else both edges would lie on the zero line
            axes.set_yscale("symlog", linthresh=linear)
            axes.set_yticks([tick for tick in axes.get_yticks() if tick == 0 or abs(tick) >= linear])
        axes.legend(fontsize=9, edgecolor="none", framealpha=0.8, loc="lower right")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # matplotlib's own would put 1e-3 over the title


def _draw_entropy(axes, rows: list[dict]) -> None:
    _titled(axes, "entropy, nats per token", rows, "entropy")
    _smooth(axes, *_series(rows, "entropy"), GREY)


def _draw_length(axes, rows: list[dict]) -> None:
    _titled(axes, "answer length, tokens", rows, "answer_len")
    _smooth(axes, *_series(_one_per_rollout(rows), "answer_len"), GREY)
