"""report.html: a run in one file that opens anywhere. No network, no server, at most 20 MB.

    write_report("runs/tiny")       reads config.yaml, metrics.jsonl and samples.jsonl of any run, at any time
    python -m nanogspo.run.report runs/tiny         the same, of a run that goes on or was killed

A run writes it once, when it ends or is stopped: at every save it would cost more and more of the run's time.
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
from collections.abc import Iterable
from pathlib import Path

import torch

from nanogspo.objectives import EDGES
from nanogspo.run.log import each_row, read_rows
from nanogspo.storage.files import whole_file

TEMPLATE = Path(__file__).with_name("report.html")
ROWS, SAMPLES = 2_000, 12 * 2**20  # updates that are drawn: more than a screen has columns; characters of answers
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
    groups, answers, every_group = thinned_groups(each_row(folder / "samples.jsonl"))
    facts = {
        "name": folder.resolve().name,
        "updates": kept,
        "notes": notes,
        "left_out": [f"one update in {every} is drawn"] * (every > 1)
        + [f"one group of answers in {every_group} is shown, of {answers:,} answers"] * (every_group > 1),
        "edges": EDGES,
        "config": settings,
        "machine": machine(),
    }
    before, _, after = TEMPLATE.read_text("utf-8").partition("@DATA@")
    before = before.replace("@TITLE@", html.escape(facts["name"]))
    parts = before, embedded(facts).removesuffix("}"), ', "groups": [', *groups, "]}", after
    with whole_file(folder / "report.html") as file:
        file.writelines(part.encode() for part in parts)
    return folder / "report.html"


def thinned(items: list, most: int, cycle: int = 1) -> tuple[list, int]:
    """(every k-th item, k) for the smallest k that leaves at most `most` and has no factor in common with `cycle`: of
    updates that come in fours, every 4th would be the first of a rollout, whose ratios are 1."""
    every = next(k for k in itertools.count(max(1, -(-len(items) // most))) if math.gcd(k, cycle) == 1)
    return items[::every], every


def thinned_groups(rows: Iterable[dict]) -> tuple[list[str], int, int]:
    """(JSON of every k-th group of answers, with commas between; how many answers all groups have; k, a power of two).
    k is doubled whenever the groups so far have more than SAMPLES characters, so a file of any size fits in memory."""
    kept, size, answers, every = [], 0, 0, 1
    for n, (_, group) in enumerate(itertools.groupby(rows, lambda r: (r.get("step"), r["prompt"]))):
        group = [shortened(row) for row in group]
        answers += len(group)
        if n % every == 0:
            kept.append("," * bool(kept) + embedded(group))
            size += len(kept[-1])
        while size > SAMPLES and len(kept) > 1:
            kept, every = kept[::2], 2 * every
            size = sum(map(len, kept))
    return kept, answers, every


def shortened(row: dict) -> dict:
    """A row of samples.jsonl whose texts have at most LONGEST characters, and without an episode's messages, which its
    prompt and answer repeat in part."""
    cut = lambda text: f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"  # noqa: E731
    texts = {k: cut(v) for k, v in row.items() if isinstance(v, str) and len(v) > LONGEST}
    return {k: v for k, v in row.items() if k != "messages"} | texts


def embedded(facts: dict | list) -> str:
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


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "metrics.jsonl").exists():
        print(f"got {sys.argv[1:]}, want a run's folder: python -m nanogspo.run.report runs/tiny", file=sys.stderr)
        sys.exit(2)
    print(write_report(sys.argv[1]))
