"""report.html: a run in one file that opens anywhere. No network, no server, at most 20 MB.

    write_report("runs/tiny")       reads config.yaml, metrics.jsonl and samples.jsonl of any run, at any time

The page is nanogspo/run/report.html: plain HTML, CSS and JavaScript that draws SVG; Python puts one JSON object in it.
What is too much is thinned evenly, and the page says so: rows of updates one in k, answers whole groups one in k.

Tests: tests/test_report.py
"""

import html
import itertools
import json
import math
import platform
import re
import sys
from pathlib import Path

import torch

from nanogspo.objectives import EDGES
from nanogspo.run.log import read_rows
from nanogspo.storage.files import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")
ROWS, SAMPLES = 2_000, 12 * 2**20  # updates that are drawn: more than a screen has columns; bytes of answers
LONGEST = 20_000  # characters of a prompt or an answer; the middle of a longer one is left out


def write_report(folder: str | Path) -> Path:
    """Fill the template with what the run folder says. Returns folder/report.html, written whole or not at all."""
    folder = Path(folder)
    rows = read_rows(folder / "metrics.jsonl")
    updates, notes = [r for r in rows if "algo" in r], [r for r in rows if "algo" not in r]
    config = folder / "config.yaml"
    settings = config.read_text("utf-8") if config.exists() else ""
    cycle = int((re.search(r"^updates_per_rollout: (\d+)$", settings, re.M) or [0, 1])[1])
    kept, every = thinned(updates, ROWS, cycle)
    groups = [
        list(g)
        for _, g in itertools.groupby(read_rows(folder / "samples.jsonl"), lambda r: (r.get("step"), r["prompt"]))
    ]
    answers = sum(map(len, groups))
    size = sum(len(json.dumps(shortened(row))) for group in groups for row in group)
    some, every_group = thinned(groups, max(1, len(groups) * SAMPLES // max(size, 1)))
    facts = {
        "name": folder.resolve().name,
        "updates": kept,
        "notes": notes,
        "groups": [[shortened(row) for row in group] for group in some],
        "left_out": [f"one update in {every} is drawn"] * (every > 1)
        + [f"one group of answers in {every_group} is shown, of {answers:,} answers"] * (every_group > 1),
        "edges": EDGES,
        "config": settings,
        "machine": machine(),
    }
    parts = {"@TITLE@": html.escape(facts["name"]), "@DATA@": embedded(facts)}
    page = re.sub("@TITLE@|@DATA@", lambda mark: parts[mark[0]], TEMPLATE.read_text("utf-8"))
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


def thinned(items: list, most: int, cycle: int = 1) -> tuple[list, int]:
    """(every k-th item, k) for the smallest k that leaves at most `most` and has no factor in common with `cycle`: of
    updates that come in fours, every 4th would be the first of a rollout, whose ratios are 1."""
    every = next(k for k in itertools.count(max(1, -(-len(items) // most))) if math.gcd(k, cycle) == 1)
    return items[::every], every


def shortened(row: dict) -> dict:
    """A row of samples.jsonl whose texts have at most LONGEST characters, and without an episode's messages, which its
    prompt and answer repeat in part."""
    cut = lambda text: f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"  # noqa: E731
    texts = {k: cut(v) for k, v in row.items() if isinstance(v, str) and len(v) > LONGEST}
    return {k: v for k, v in row.items() if k != "messages"} | texts


def embedded(facts: dict) -> str:
    """JSON that may stand in a <script>: no text in it, whatever a model wrote, can end the element or open a comment.

    Source: HTML living standard, 4.12.1.3, restrictions for contents of script elements.
    """
    text = json.dumps(facts, ensure_ascii=False, allow_nan=False)
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)  # half a character of two: Chromium's own --dump-dom dies of it
    return re.sub("[<>&\u2028\u2029]", lambda c: f"\\u{ord(c[0]):04x}", text)


def machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return {"system": platform.platform(), "GPU": gpu, "versions": versions, "command": " ".join(sys.argv)}
