"""nanogspo/run/report.py: the page holds what the run folder says, whatever a model wrote, and a browser opens it.

Run: python -m pytest tests/test_report.py
"""

import contextlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tracemalloc

import pytest

from nanogspo.objectives import EDGES
from nanogspo.run import report
from nanogspo.run.report import embedded, shortened, thinned, thinned_groups, write_report
from tests.test_log import GSPO, SFT

NASTY = "</script><script>document.title='broken'</script> <!-- & ]]> \u2028 \ud83d @DATA@ @TITLE@ \x00 <b>bold</b>"


def a_run(folder, updates=8, group=4, text="1"):
    """A run folder without a run: rows, groups of two problems a rollout, a sentence of the doctor, settings."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": 0, "phase": "start", "eval_exact": 0.1, "eval_low": 0.05, "eval_high": 0.2, "eval_count": 100}]
    rows += [{**SFT, "step": 1, "phase": "sft", "grad_norm": 1.0, "peak_mem_bytes": 4e8}]
    for step in range(2, updates + 2):
        hist = [0] * 27
        hist[13 if step % 4 == 2 else 18] = 16
        row = {**GSPO, "step": step, "phase": "gspo", "ratio_hist": hist, "grad_norm": 1.0, "peak_mem_bytes": 4e8}
        row |= {"reward_s": 0.1} if step % 4 == 2 else {}
        for n, name in enumerate(("experts_max_load", "router_entropy", "experts_unused", "experts_flipped")):
            row[f"{name}_by_layer"] = [10 * n + step, 10 * n, 10 * n + 1]
        rows.append(row | {"ratio_p01": 0.99, "ratio_p50": 1.0, "ratio_p99": 1.01, "reward": min(1.0, step / updates)})
    rows += [{"step": 2, "doctor": "truncated", "says": "every answer was cut off"}]
    samples = [
        {"step": step, "prompt": f"{p}+{text}=", "answer": text, "reward": g / group, "advantage": g - 1.5, "length": 3}
        for step in range(2, updates + 2, 4)
        for p in range(2)
        for g in range(group)
    ]  # fmt: skip
    for name, content in (("metrics", rows), ("samples", samples)):
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "config.yaml").write_text("algo: gspo\nupdates_per_rollout: 4\nclip_low: 0.0003\nclip_high: 0.0004\n")
    return rows, samples


def data_of(page):
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_holds_the_run(tmp_path):
    rows, samples = a_run(tmp_path / "my run")
    path = write_report(tmp_path / "my run")
    page = path.read_text("utf-8")
    facts = data_of(page)
    assert path.name == "report.html" and facts["name"] == "my run" and "<title>my run" in page
    assert facts["updates"] == [row for row in rows if "algo" in row]
    assert facts["notes"] == [row for row in rows if "algo" not in row]
    assert [len(group) for group in facts["groups"]] == [4] * 4 and sum(facts["groups"], []) == samples
    assert facts["edges"] == EDGES and facts["left_out"] == [] and "clip_low: 0.0003" in facts["config"]
    assert set(facts["machine"]) == {"system", "GPU", "versions", "command"}
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|import\(|fetch\(|innerHTML ?=", page)


def test_nothing_a_model_writes_can_leave_its_place(tmp_path):
    a_run(tmp_path / "<i>x&y", text=NASTY)
    page = write_report(tmp_path / "<i>x&y").read_text("utf-8")
    empty = report.TEMPLATE.read_text("utf-8")
    assert page.count("<script") == empty.count("<script") and page.count("</script") == empty.count("</script")
    assert page.count("<!--") == empty.count("<!--") and "<title>&lt;i&gt;x&amp;y" in page
    assert data_of(page)["groups"][0][0]["answer"] == NASTY.replace("\ud83d", "\ufffd")
    assert not set("<>&\u2028") & set(embedded({"a": NASTY}))


def test_too_much_is_thinned_evenly_and_said(tmp_path, monkeypatch):
    a_run(tmp_path, updates=100, text="1" * 100)
    monkeypatch.setattr(report, "ROWS", 52)
    monkeypatch.setattr(report, "SAMPLES", 10_000)
    facts = data_of(write_report(tmp_path).read_text("utf-8"))
    steps = [row["step"] for row in facts["updates"]]
    assert steps == list(range(1, 102, 3))  # 2 would be enough, and show updates 2 and 4 of each rollout only
    assert all(len(group) == 4 for group in facts["groups"])
    shown = [group[0]["prompt"][0] for group in facts["groups"]], [group[0]["step"] for group in facts["groups"]]
    [first, second] = facts["left_out"]
    every = int(re.fullmatch(r"one group of answers in (\d+) is shown, of 200 answers", second)[1])
    assert first == "one update in 3 is drawn" and len(facts["groups"]) == -(-50 // every) and every > 1
    assert 5_000 < len(json.dumps(facts["groups"])) < 11_000 and shown[1][-1] > 80


def test_answers_of_a_long_run_are_never_all_in_memory(tmp_path, monkeypatch):
    a_run(tmp_path, updates=80, group=50, text="1" * 500)
    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(report, "SAMPLES", 100_000)
    tracemalloc.start()
    write_report(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * (tmp_path / "samples.jsonl").stat().st_size


def test_a_folder_of_a_run_is_all_it_asks_for(tmp_path, monkeypatch, capsys):
    """`python -m nanogspo.run.report RUN`, of a run that goes on or was killed."""
    a_run(tmp_path)
    for folder, code in ((tmp_path, None), ("none", 2)):
        monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as ended:
            runpy.run_path(report.__file__, run_name="__main__")
        assert not code or ended.value.code == code
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'report.html'}\n" and (tmp_path / "report.html").exists()
    assert err == "got ['none'], want a run's folder: python -m nanogspo.run.report runs/tiny\n"


def test_thinning_and_shortening(monkeypatch):
    assert thinned([*range(10)], 10) == ([*range(10)], 1)
    assert thinned([*range(10)], 9) == ([0, 2, 4, 6, 8], 2) and thinned([*range(10)], 9, 2) == ([0, 3, 6, 9], 3)
    assert thinned([], 5) == ([], 1) and thinned_groups([]) == ([], 0, 1)
    rows = [{"step": n // 4, "prompt": str(n // 2), "reward": 0} for n in range(20)]  # ten groups of two
    whole = "".join(thinned_groups(rows)[0])
    assert json.loads(f"[{whole}]") == [rows[n : n + 2] for n in range(0, 20, 2)]
    monkeypatch.setattr(report, "SAMPLES", len(whole) - 1)
    groups, answers, every = thinned_groups(rows)
    assert json.loads(f"[{''.join(groups)}]") == [rows[n : n + 2] for n in range(0, 20, 4)] and (answers, every) == (
        20,
        2,
    )
    monkeypatch.setattr(report, "SAMPLES", 1)
    assert len(thinned_groups(rows)[0]) == 1  # the first, however long
    row = shortened({"prompt": "a" * 10**5 + "b", "answer": "c", "messages": [1], "reward": None})
    assert len(row["prompt"]) < 20_100 and row["prompt"][-1] == "b" and row["answer"] == "c" and "messages" not in row


def test_an_empty_folder_and_an_sft_run_have_a_page_too(tmp_path):
    assert data_of(write_report(tmp_path).read_text("utf-8"))["updates"] == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**SFT, "step": 1}) + "\n")
    assert data_of(write_report(tmp_path).read_text("utf-8"))["updates"] == [{**SFT, "step": 1}]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def opened(page):
    """(the page as Chromium has drawn it, milliseconds until then). An error of its script before its last statement
    would leave the mark of that statement out."""
    flags = "--headless --no-sandbox --disable-gpu --timeout=20000 --dump-dom".split()
    flags += [f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    dom = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120).stdout
    return dom, int(re.search(r'data-ready="(\d+)"', dom)[1])


in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")


@in_a_browser
def test_a_browser_opens_it(tmp_path):
    a_run(tmp_path, text=NASTY)
    dom, _ = opened(write_report(tmp_path))
    assert "<title>broken" not in dom
    assert "every answer was cut off" in dom and dom.count("<rect") >= 8 and dom.count('class="answer"') == 4
    assert "&lt;b&gt;bold&lt;/b&gt;" in dom and dom.count("<path") >= 8
    # 8 updates are 2 rollouts, of which the second has a mean of 7.5 in the first of 3 layers
    assert re.findall(r'<canvas width="(\d+)" height="(\d+)"', dom) == [("2", "3")] * 4
    assert re.findall(r"white (\d+), orange ([\d.]+); update 2 to 9", dom) == [
        ("0", "7.5"), ("10", "17.5"), ("20", "27.5"), ("30", "37.5"),
    ]  # fmt: skip


@in_a_browser
def test_a_browser_opens_a_thousand_rollouts_in_two_seconds(tmp_path):
    """64 answers each, more than the page may hold: as much as it ever has to draw. 0.3 s on 2 busy cores."""
    a_run(tmp_path, updates=4000, group=32, text="1" * 150)
    page = write_report(tmp_path)
    dom, ready = opened(page)
    assert ready <= 2000 and 6 * 2**20 < page.stat().st_size < 20e6 and "of 64,000 answers" in dom
