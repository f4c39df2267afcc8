"""nanogspo/tasks/rows.py: one row in every format, where it is, and what a broken file says.

With pyarrow and datasets of requirements-extra.txt real files are read; without them stand-ins are. JSONL, and all that
is checked of a row: tests/test_tasks.py.

Run: python -m pytest tests/test_rows.py
"""

import datetime
import decimal
import json
import sys
import types

import numpy as np
import pytest

from nanogspo.tasks.jsonl import load_jsonl
from nanogspo.tasks.rows import plain, read_rows
from nanogspo.tokenizer import character_tokenizer

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "dd", "level": 3, "tags": ["x", {"k": 1}]}]
EXTRA = "pip install -r requirements-extra.txt"


def test_an_array_is_known_by_its_first_character(tmp_path):
    """In a file of any name, behind the mark of Windows editors and blanks; places count from 0."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode())
    assert list(read_rows(path)) == [(f"{path}[0]", ROWS[0]), (f"{path}[1]", ROWS[1])]
    path.write_text("\n".join(["", *map(json.dumps, ROWS)]))
    assert list(read_rows(str(path))) == [(f"{path}:2", ROWS[0]), (f"{path}:3", ROWS[1])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"},\n{"prompt" "b"}]', r"rows.json: got broken JSON \(.*line 2, column 11\), want one array"),
        ('[{"prompt": "a"}, 7]', r"rows.json\[1\]: got a JSON number, want an object"),
        ("[]", "rows.json: got an empty file"),
        ('{"prompt": "a"}\n[1]', "rows.json:2: got a JSON list, want an object"),
        (" ", "rows.json: got an empty file, want one JSON object per line"),
    ],
)
def test_what_a_broken_file_says(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert "\n" not in str(error.value)


def test_rows_of_every_format_are_trained_on(tmp_path):
    """Left-out rows and errors are named by the place in the file, whatever digits the file's name has."""
    tokenizer, path = character_tokenizer("abcd"), tmp_path / "rows7.json"
    path.write_text(json.dumps(ROWS))
    examples, too_long = load_jsonl(path, tokenizer, max_length=3, notify=str)
    assert [e.line for e in examples] == [0] and too_long == [1]
    path.write_text(json.dumps([*ROWS, {"prompt": ""}]))
    with pytest.raises(ValueError, match=r"rows7.json\[2\]: got a row with 'prompt', want"):
        load_jsonl(path, tokenizer, max_length=9)


def test_values_become_what_json_can_hold():
    value = {
        "day": datetime.datetime(2026, 1, 2, 3),
        "array": np.arange(4).reshape(2, 2),
        "one": np.float32(0.5),
        "bytes": "é".encode(),
        "money": decimal.Decimal("1.50"),
        "none": None,
        "turns": ({"role": "user", "tool_calls": None}, None),
        1: True,
    }
    want = {"day": "2026-01-02T03:00:00", "array": [[0, 1], [2, 3]], "one": 0.5, "bytes": "é", "money": "1.50"}
    got = plain(value, "c")
    assert got == want | {"turns": [{"role": "user"}, None], "1": True}
    assert json.loads(json.dumps(got)) == got and type(got["array"][0][0]) is int
    for odd in (object(), b"\xff", {"a": [1j]}):
        with pytest.raises(
            ValueError, match=r"got (object|bytes|complex) in column 'picture', want text.*drop the col"
        ):
            plain(odd, "picture")


@pytest.mark.parametrize(
    ("source", "config", "split"),
    [
        ("hf:owner/name", None, "train"),
        ("hf:owner/name:main", "main", "train"),
        ("hf:owner/name:test", None, "test"),
        ("hf:owner/name:trained:test[:10%]", "trained", "test[:10%]"),
        ("hf:owner/name:train[:100]", None, "train[:100]"),
        ("hf:owner/name::dev", None, "dev"),
    ],
)
def test_what_datasets_is_asked_for(monkeypatch, source, config, split):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        return [{"day": datetime.date(2026, 1, 2), "prompt": None}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(read_rows(source)) == [(f"{source} row 0", {"day": "2026-01-02", "prompt": None})]
    assert asked == [("owner/name", config, {"split": split})]


def test_what_datasets_refuses_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise RuntimeError("no\nsuch set")

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    with pytest.raises(ValueError, match=r"hf:a/b: got RuntimeError \(no such set\), want hf:owner/name.*the network"):
        list(read_rows("hf:a/b"))
    stand_in.load_dataset = lambda *_, **__: [{"a": 1}, {"photo": object()}]
    with pytest.raises(ValueError, match="hf:a/b row 1: got object in column 'photo'"):
        list(read_rows("hf:a/b"))


@pytest.mark.parametrize(("source", "package"), [("rows.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_package_says_what_to_install(monkeypatch, source, package):
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for: it cannot be imported
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(ValueError, match=f"got {source} without the package {package} .*; do: {EXTRA}"):
        list(read_rows(source))


def test_real_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason=f"no pyarrow here: {EXTRA}")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    calls = [{"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "user", "content": "q"}]
    rows = [{"messages": calls, "day": datetime.date(2026, 1, 2)}, {"messages": calls[1:], "day": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    want = [{"messages": calls, "day": "2026-01-02"}, {"messages": calls[1:], "day": None}]
    assert list(read_rows(path)) == [(f"{path} row {i}", row) for i, row in enumerate(want)]
    parquet.write_table(pyarrow.table({"photo": [b"\xff"]}), path)
    with pytest.raises(ValueError, match="rows.parquet row 0: got bytes in column 'photo'"):
        list(read_rows(path))
    for content in (b"", b"PAR1 and no more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="rows.parquet: got .*, want a parquet file; check the path") as error:
            list(read_rows(path))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nowhere.parquet: got .*, want a parquet file"):
        list(read_rows(str(tmp_path / "nowhere.parquet")))


def test_real_datasets(tmp_path, monkeypatch):
    """A local folder stands in for a hub id, which cannot be had in tests: the rest of the way is the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets", reason=f"no datasets here: {EXTRA}")
    (tmp_path / "set").mkdir()
    for split, rows in (("train", ROWS[:1]), ("test", ROWS[:1] * 2)):
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, count in (("", 1), (":test", 2), ("::test[:1]", 1)):
        source = f"hf:{tmp_path / 'set'}{split}"
        assert list(read_rows(source)) == [(f"{source} row {i}", ROWS[0]) for i in range(count)]
    with pytest.raises(ValueError, match="got ValueError"):
        list(read_rows(f"hf:{tmp_path / 'set'}:validation"))
