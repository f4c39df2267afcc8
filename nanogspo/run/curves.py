"""curves.png: what metrics.jsonl says, a panel for each thing the run measured.

    draw_curves("runs/tiny", clip_range=(3e-4, 4e-4))       any folder, at any time: nothing else is read

Tests: tests/test_curves.py
"""

import functools
import math
import statistics
from pathlib import Path

from nanogspo.run.log import Z95, read_rows
from nanogspo.storage.files import whole_file

# Okabe and Ito's colours, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A7A7A"
PHASE_COLOURS = {"start": GREY, "sft": BLUE, "gspo": ORANGE, "grpo": ORANGE, "control": GREEN}


def draw_curves(folder: str | Path, *, clip_range: tuple[float, float] | None = None) -> Path | None:
    """Draws folder/metrics.jsonl into folder/curves.png, a panel for each thing the run measured. None without rows.

    clip_range  (clip_low, clip_high) for the ratio panel
    """
    from matplotlib.figure import Figure  # 0.5 s to import, so only when drawing; Figure alone needs no display

    rows = read_rows(Path(folder, "metrics.jsonl"))
    policy = [row for row in rows if row.get("algo") not in (None, "sft")]
    sft = [row for row in rows if row.get("algo") == "sft"]
    held_out = [row for row in rows if "eval_loss" in row]
    panels = [
        (_draw_exact, [row for row in rows if "eval_exact" in row]),
        (_draw_reward, policy),
        (functools.partial(_draw_ratio, clip_range=clip_range), policy),
        (functools.partial(_draw_sft, title="SFT loss, nats per token", key="loss", most=math.inf), sft + held_out),
        (functools.partial(_draw_sft, title="SFT token accuracy", key="token_accuracy"), held_out and sft + held_out),
        (functools.partial(_draw_plain, title="entropy, nats per token", key="entropy"), policy),
        (functools.partial(_draw_plain, title="answer length, tokens", key="answer_len"), _one_per_rollout(policy)),
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
        draw(axes, data)
    path = Path(folder, "curves.png")
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
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


def _draw_sft(axes, rows: list[dict], title: str, key: str, most: float = 1.0) -> None:
    """Training rows phase by phase, over them the held-out rows."""
    training = [row for row in rows if "eval_loss" not in row]
    _titled(axes, title, training, key)
    phases = _by_phase(training)
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


def _draw_plain(axes, rows: list[dict], title: str, key: str) -> None:
    _titled(axes, title, rows, key)
    _smooth(axes, *_series(rows, key), GREY)
