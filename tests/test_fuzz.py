"""tools/fuzz.py and tools/odd_inputs.py: the first cases keep every promise, and each broken promise is found.

Run: python -m pytest tests/test_fuzz.py
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("peft")
if not hasattr(os, "fork"):
    pytest.skip("a case runs in a fork", allow_module_level=True)

import fuzz  # noqa: E402
import odd_inputs  # noqa: E402
import torch  # noqa: E402


def test_the_first_cases(tmp_path):
    verdicts = list(fuzz.hunt(0, range(20), tmp_path, limit=60))
    assert [v for v in verdicts if not v.sound] == [] and [v.number for v in verdicts] == [*range(20)]
    assert {v.outcome for v in verdicts} == {"accepted", "refused"}
    assert [v for v in verdicts if v.note] == []  # a comparison that breaks would compare nothing
    assert all(bool(v.line) == (v.outcome == "refused") for v in verdicts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "log"]


def fails(error):
    raise error


def allocates():
    return bytearray(fuzz.MEMORY + 2**30)  # touches nothing: refused, not paid for


PLANTED = {  # what happens in a case -> (outcome, something of its line or note)
    lambda: {}["gone"]: ("a traceback", "KeyError: 'gone'"),
    lambda: fails(AssertionError("ours")): ("a traceback", "ours"),
    lambda: fails(ValueError("got 1, want 2")): ("refused", "got 1, want 2"),
    lambda: fails(ValueError("x" * (fuzz.LONGEST + 1))): ("a refusal of 601 characters in 1 lines", "xxx"),
    lambda: fails(ValueError("got \0")): ("a refusal of 5 characters in 1 lines", ""),
    lambda: time.sleep(60): ("no end within 4 s", "in <lambda>"),
    lambda: os._exit(3): ("a child with exit code 3", ""),
    lambda: Path("input").write_text("y") and None: ("changed files", "['input']"),
    lambda: Path("beside").mkdir() or Path("beside/file").touch(): ("changed files", "['beside/file']"),
    lambda: Path("run").mkdir() or Path("run/file").touch(): ("accepted", ""),
    lambda: os.write(2, b"a panic") and None: ("lines on stderr past Python", ""),
    lambda: Path("run").mkdir() or Path("run/file").touch() or fails(ValueError("no")): ("changed files", "no"),
    lambda: fuzz.try_flags(fuzz.TrainConfig, ["--lr", "x"]): ("refused", "argument --lr: invalid float value: 'x'"),
    lambda: lambda: "": ("accepted", ""),
    lambda: lambda: "ids [1]": ("another result than transformers'", "ids [1]"),
    lambda: lambda: fails(KeyError("theirs")): ("accepted", "KeyError: 'theirs'"),
    lambda: lambda: os._exit(4): ("accepted", "a child with exit code 4"),
    lambda: Path("../x").write_text("y") and None: ("changed files", "['../x']"),
    lambda: Path("../inputs/input").write_text("y") and None: ("changed files", "['../inputs/input']"),
}
if sys.platform == "linux":  # only Linux enforces RLIMIT_AS
    PLANTED[allocates] = "refused", "out of memory"


def test_every_broken_promise_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "make", lambda home: (home / "input").write_text("x"))
    monkeypatch.setattr(fuzz, "attempt", lambda seed, number: (f"plant {number}", [*PLANTED][number]))
    verdicts = list(fuzz.hunt(0, range(len(PLANTED)), tmp_path, limit=4))
    for verdict, (outcome, says) in zip(verdicts, PLANTED.values(), strict=True):
        assert verdict.outcome == outcome and says in verdict.line + verdict.note, verdict
        assert verdict.wrong == f"plant {verdict.number}"

    monkeypatch.setattr(sys, "argv", ["fuzz.py", "3", "--seed", "5"])
    assert fuzz.main() == 1
    out = capsys.readouterr().out
    assert "again: python tools/fuzz.py --seed 5 --only 1\n" in out and "3 cases: 2 a traceback, 1 refused\n" in out
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--only", "2", "15"])
    assert fuzz.main() == 0
    out = capsys.readouterr().out
    assert "2: plant 2\n    refused: got 1, want 2\n" in out and "1 accepted here and not by transformers\n" in out


def test_what_is_another_result():
    logits = torch.tensor([[1.0, -4.0]])
    for ours, says in [
        (logits + 3e-4, ""),
        (logits + 1e-3, "logits differ by 0.001 of 4"),
        (logits[:, :1], "logits of shape"),
    ]:
        assert fuzz.unequal(ours, logits).startswith(says) and bool(fuzz.unequal(ours, logits)) == bool(says)
    assert fuzz.unequal(logits, logits / 0) == ""
    said, rest = {"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "c"}
    turns, learned = fuzz.conversation({"messages": [odd_inputs.ASK, said, rest], "system": "s"})
    assert learned == ["c"] and [t.get("weight") for t in turns] == [None] * 4 and turns[0]["content"] == "s"


def test_damage_is_a_function_of_its_dice(tmp_path):
    """And of every kind: in JSON, in bytes, in a header, in text."""
    sound = {
        "a.json": json.dumps({"a": {"b": [1, "x"]}, "c": True}).encode(),
        "b.jsonl": b'{"a": 1}\n{"b": [2]}\n',
        "c.yaml": b"steps: 5\nlr: 1\n",
        "d.safetensors": (66).to_bytes(8, "little")
        + b'{"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'.ljust(66)
        + b"12345678",
    }
    said, kinds = [], set()
    for n in range(400):
        name, results = [*sound][n % 4], []
        for copy in range(2):
            path = tmp_path / f"{n}-{copy}" / name
            path.parent.mkdir()
            for other, data in sound.items():
                (path.parent / other).write_bytes(data)
            what = odd_inputs.damage(path, random.Random(n))
            results.append((what.partition(name)[2], path.read_bytes() if path.is_file() else path.is_dir()))
        assert results[0] == results[1]
        said.append(results[0][1] != sound[name])
        kinds |= {word.rstrip(":,") for word in what.split()[1:4]}
        if "twice /c" in what:
            pairs = json.loads(path.read_text(), object_pairs_hook=list)
            assert [key for key, _ in pairs].count("c") == 2
        assert ("at piece" in what) <= (name == "c.yaml")  # rows are spoiled as JSON
        if ": offsets of" in what:
            assert b"[0, 8]" not in path.read_bytes()
    assert kinds >= {*"set drop twice add wrap".split(), *"name dtype shape turned offsets piece".split()}
    assert kinds >= {*"cut flip empty folder gone utf-16 utf-8-sig latin-1 crlf swapped tail".split()}
    assert sum(said) > 360  # some words are those that stood there
