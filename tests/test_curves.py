"""nanogspo/run/curves.py: every panel shows its numbers, and matplotlib is there only to draw.

Run: python -m pytest tests/test_curves.py
"""

import functools
import json
import math
import os
import statistics
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from nanogspo.run import curves
from nanogspo.run.curves import draw_curves
from nanogspo.run.log import RunLog
from tests.test_log import GSPO, SFT


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft_rows(steps, **more):
    return [{**SFT, "step": step, **more} for step in steps]


def gspo_rows(steps, **more):
    return [{**GSPO, "step": step, **more} for step in steps]


def eval_row(step, phase, low=0.2, **more):
    return {"step": step, "phase": phase, "eval_exact": 0.3, "eval_low": low, "eval_high": 0.4, **more}


RUNS = {
    "both": [
        eval_row(0, "start"),
        *sft_rows(range(1, 30)),
        eval_row(29, "sft"),
        *gspo_rows(range(30, 60)),
        eval_row(59, "gspo"),
        *sft_rows(range(30, 60), phase="control"),
        eval_row(59, "control"),
    ],
    "sft only": sft_rows(range(1, 4)),
    "one step": gspo_rows([1]),
    "no phase": [{"step": 1, "eval_exact": 0.5, "eval_low": 0.4, "eval_high": 0.6}],
    "control alone": [eval_row(3, "control")],
    "all null": [
        *gspo_rows([1, 2], **dict.fromkeys((set(GSPO) | {"entropy"}) - {"algo"})),
        *sft_rows([1], loss=None),
        eval_row(1, "gspo", low=None),
    ],
    "some null": gspo_rows([1, 2]) + gspo_rows([3], reward=None, ratio_min=None, entropy=None),
    "far outside the clip range": gspo_rows([1, 2], ratio_min=0.5, ratio_max=7.0),
    "missing keys": [{"step": 1, "algo": "grpo", "reward": 0.5}, {"step": 2, "algo": "sft"}],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("error")  # matplotlib warns about what it cannot draw: empty limits, lost glyphs
def test_curves_of_any_run(tmp_path, name):
    write_rows(tmp_path, RUNS[name])
    path = draw_curves(tmp_path, clip_range=(3e-4, 4e-4))
    image = imread(path)
    assert path == tmp_path / "curves.png" and image.std() > 0.01  # something is drawn on the white


def test_more_measurements_make_more_panels(tmp_path):
    """One panel for an SFT run, five for RL alone, six for both: three in a row, so the picture grows."""
    sizes = {}
    for name, rows in {"sft": sft_rows([1, 2]), "rl": gspo_rows([1, 2]), "both": RUNS["both"]}.items():
        write_rows(tmp_path, rows)
        sizes[name] = imread(draw_curves(tmp_path)).shape[:2]
    assert sizes["sft"][1] < sizes["rl"][1] == sizes["both"][1]
    assert sizes["sft"][0] < sizes["rl"][0]


def test_every_panel_shows_its_numbers(tmp_path):
    """A panel that is wired to the wrong column, or to none, would draw the same picture for other numbers."""
    pictures = []
    for key in ("step_s", "reward", "entropy", "answer_len", "ratio_max", "ratio_mean"):  # step_s is in no panel
        write_rows(tmp_path, gspo_rows(range(1, 9)) + gspo_rows([9], **{key: 3.0}))
        pictures.append(imread(draw_curves(tmp_path, clip_range=(3e-4, 4e-4))))
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_the_clip_range_and_the_control_are_drawn(tmp_path):
    def picture(rows, **options):
        write_rows(tmp_path, rows)
        return imread(draw_curves(tmp_path, **options))

    bare, ranged = picture(RUNS["one step"]), picture(RUNS["one step"], clip_range=(3e-4, 4e-4))
    assert (bare != ranged).any()

    def green(image):
        red, green, blue = (image[..., channel] for channel in range(3))
        return ((green > 0.5) & (red < 0.2) & (blue < 0.6)).sum()  # only the control is green

    evaluations = [eval_row(0, "start"), eval_row(29, "sft"), eval_row(59, "gspo"), eval_row(59, "control")]
    whole, rootless, without = evaluations, [evaluations[0], *evaluations[2:]], evaluations[:3]
    # the control's line starts where SFT ended, and without that point there is no line, only the control's own marker
    assert green(picture(whole)) > green(picture(rootless)) + 100 > 100 > green(picture(without)) == 0


def panel(draw, *arguments, **options):
    """What a panel holds: the points and lines as [(x, y), ...] each, and the corners of its bands likewise."""
    axes = Figure().add_subplot()
    draw(axes, *arguments, **options)
    lines = [line.get_xydata().tolist() for line in axes.lines]
    return lines, [path.vertices.tolist() for band in axes.collections for path in band.get_paths()]


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=60))
@example(values=[0.0, 1.0, 1.0, 1.0, 1.0] * 5)  # bands that would pass 1, and 0
@example(values=[1.0, 0.0, 0.0, 0.0, 0.0] * 5)
def test_bands_are_drawn_from_twenty_points_on_and_within_what_is_possible(values):
    """Of fewer points the line is the points. The mean of neighbours lies in its band, the band within the bounds."""
    steps = list(range(len(values)))
    lines, bands = panel(curves._smooth, steps, values, "b", possible=(0, 1))
    assert lines[0] == [[step, value] for step, value in zip(steps, values, strict=True)]
    assert len(lines) == 1 + (len(values) >= 20) and len(bands) == (len(values) >= 20)
    for band in bands:
        assert all(0 <= y <= 1 for _, y in band)
        for step, mean in lines[1]:
            near = values[max(0, int(step) - 2) : int(step) + 3]
            assert mean == pytest.approx(sum(near) / len(near))
            low, *_, high = sorted(y for x, y in band if x == step)
            assert low - 1e-9 <= mean <= high + 1e-9
            want = 1.959964 * statistics.stdev(near) / math.sqrt(len(near))
            assert (low, high) == pytest.approx((max(0, mean - want), min(1, mean + want)))


def test_only_a_reward_that_is_a_share_is_held_to_0_and_1():
    for scale in (1, 5):
        rows = [{"step": n, "reward": scale * (n % 2)} for n in range(40)]
        _, [band] = panel(curves._draw_reward, rows)
        assert (min(y for _, y in band) >= 0 and max(y for _, y in band) <= 1) == (scale == 1)


def test_a_rollout_is_one_point_of_reward_and_length():
    """Its four updates tell the same number four times; taken for four measurements they would narrow the interval."""
    rows = [{**GSPO, "step": n, "reward": n // 4 / 9, "answer_len": 5.0 + n // 4} for n in range(28)]
    [line], _ = panel(curves._draw_reward, rows)
    assert line == [[4 * n, n / 9] for n in range(7)]
    length = functools.partial(curves._draw_plain, title="", key="answer_len")
    [line], _ = panel(length, curves._one_per_rollout(rows))
    assert line == [[4 * n, 5.0 + n] for n in range(7)]


def test_the_ratio_panel_shows_quantiles():
    """Few updates one by one, from end to end; of many the medians of neighbours, but for those that are 1 by
    construction; runs from before the quantiles with minimum, mean and maximum in their place."""
    spread = {"ratio_p05": 0.75, "ratio_p50": 1.125, "ratio_p95": 1.25, "ratio_min": 0.5, "ratio_max": 3.0}
    still = {name: 1.0 for name in (*spread, "ratio_mean")}
    few = [{**GSPO, **(spread if n % 4 else still), "step": n} for n in range(6)]
    lines, bands = panel(curves._draw_ratio, few, None)
    assert lines == [[[n, 0.125 if n % 4 else 0.0] for n in range(6)]]
    assert [[y for _, y in band] for band in bands] == [
        [low, high] if n % 4 else [0, 0] for low, high in ((-0.5, 2.0), (-0.25, 0.25)) for n in range(6)
    ]
    many = [{**GSPO, **(spread if n % 4 else still), "step": n} for n in range(40)]
    many[5] |= {"ratio_p95": 1000.0}  # one update among its neighbours
    [line], [band] = panel(curves._draw_ratio, many, None)
    assert line == [[n, 0.125] for n in range(40) if n % 4] and {y for _, y in band} == {-0.25, 0.25}
    [line], [band] = panel(curves._draw_ratio, [{**GSPO, "step": n} for n in range(40)], None)
    assert {y for _, y in line} == {0.0} and {y for _, y in band} == {GSPO["ratio_min"] - 1, GSPO["ratio_max"] - 1}


def test_held_out_loss_and_accuracy_are_drawn_over_the_training_rows(tmp_path):
    held = [{"step": n, "phase": "sft", "eval_loss": 2.0 - n, "eval_token_accuracy": n / 2} for n in (0, 1)]
    rows = [*sft_rows([1, 2]), *held]
    for key in ("loss", "token_accuracy"):
        lines, _ = panel(curves._draw_sft, rows, "title", key)
        assert lines == [[[n, SFT[key]] for n in (1, 2)], [[0, held[0][f"eval_{key}"]], [1, held[1][f"eval_{key}"]]]]
    write_rows(tmp_path, rows)
    height, width, _ = imread(draw_curves(tmp_path)).shape
    assert width > 2 * height  # two panels, where SFT rows alone make one


def test_nothing_to_draw(tmp_path):
    assert draw_curves(tmp_path) is None
    with RunLog(tmp_path, steps=1, quiet=True) as log:
        assert draw_curves(tmp_path) is None
        log.step({**GSPO, "step": 1})
        assert draw_curves(tmp_path) == tmp_path / "curves.png"
    assert os.listdir(tmp_path).count("curves.png") == 1


def test_matplotlib_is_imported_only_to_draw():
    program = "import sys, nanogspo.run.curves; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_full_disk_leaves_the_picture_of_before(tmp_path, monkeypatch):
    write_rows(tmp_path, sft_rows([1, 2]))
    before = draw_curves(tmp_path).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"curves\.png: cannot be written .*; want free space on its disk"):
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
