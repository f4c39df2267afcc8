"""nanogspo/inputs.py: foreign JSON is read by type and range, and what does not fit is one line.

`corrupted` is the generator of wrong files that the tests of every reader draw from.
"""

import copy
import os
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from nanogspo import inputs
from nanogspo.inputs import (
    DEEPEST,
    import_file,
    json_of,
    kind,
    need,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    shown,
    some,
    text_of,
)

DEEP: list = []
for _ in range(900):  # json reads it, and nobody after it could copy or print it
    DEEP = [DEEP]
GONE = object()
FOREIGN = [GONE, None, True, 0, 1, -1, 10**12, 10**400, 1.5, float("nan"), float("inf"), "", "x\n", [], [[]], ["x"], {},
           {"a": {"b": 1}}, DEEP]  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a JSON tree below its root."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def corrupted(value: dict) -> Iterator[tuple[str, dict]]:
    """The tree with one value of it gone or replaced by every value of FOREIGN, and what was done."""
    for path in places(value):
        for wrong in FOREIGN:
            tree = copy.deepcopy(value)
            owner = tree
            for key in path[:-1]:
                owner = owner[key]
            if wrong is GONE:
                del owner[path[-1]]
            else:
                owner[path[-1]] = wrong
            yield f"{path} {'gone' if wrong is GONE else shown(wrong) if wrong is not DEEP else 'deep'}", tree


def refused_or(reader, tree: object) -> bool:
    """Whether reader(tree) accepts; a refusal is a plain ValueError of one line that is not long."""
    try:
        reader(tree)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and len(str(error)) < 900, error
        return False
    return True


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (int, [1, 7], [None, True, 0, 8, 1.0, "1", [1], 10**400]),
        (float, [1, 1.5, 7], [None, False, 0.5, 7.1, float("nan"), float("inf"), "1", 10**400]),
        (bool, [True, False], [None, 0, 1, "true"]),
        (str, ["", "x"], [None, 1, ["x"]]),
        (list, [[], [1]], [None, {}, "x", 1]),
        (dict, [{}, {"a": 1}], [None, [], "x"]),
    ],
)
def test_need_takes_its_kind_within_its_range(kind, good, bad):
    for value in good:
        assert need({"k": value}, "k", kind, low=1, high=7, where="w") is value
    for value in bad:
        with pytest.raises(ValueError, match=r"^got k=.*, want .* in w$"):
            need({"k": value}, "k", kind, low=1, high=7, where="w")
    assert need({"k": None}, "k", kind, default=5, where="w") == need({}, "k", kind, default=5, where="w") == 5
    with pytest.raises(ValueError, match="got k=None, want a positive integer up to 1,000 in w"):
        need({}, "k", int, low=1, high=1000, where="w")


def test_messages_are_short_and_of_one_line():
    assert some(["a", "b"]) == "a, b" and some(range(10), 3, "; ") == "0; 1; 2 and 7 more"
    assert some(range(3000), 1) == "0 and 2,999 more" and some([]) == ""
    assert some(["a\nb"]) == repr("a\nb") and len(some(["x" * 5000] * 5000)) < 1000
    assert shown("x" * 5000) == "'" + "x" * 79 + "..."


def test_json_is_an_object_of_bounded_depth(tmp_path):
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "w") == {"a": 1}  # a byte mark, as Windows editors write
    whole = lambda depth: b'{"a":' + b"[" * depth + b"]" * depth + b"}"  # noqa: E731
    assert parse_json(whole(DEEPEST - 1), "w")
    for data, says in [
        (whole(DEEPEST), "w: got JSON nested deeper than 50 levels"),
        (whole(100_000), "w: got JSON nested deeper than any file is, want an object; fetch the file again"),
        (b'{"a": %s}' % (b"1" * 5000), "w: got a number of thousands of digits"),
        (b"[1]", "w: got JSON that is no object"),
        (b"\xff", "w: got byte 0xff at column 1, want UTF-8"),
        (b'{"a"', "w: got broken JSON"),
    ]:
        with pytest.raises(ValueError, match=says):
            parse_json(data, "w")
    with pytest.raises(ValueError, match="no such file"):
        read_json(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{tmp_path}: got is a directory, want a file of"):
        read_json(tmp_path)


# ---- text and JSON of people

MARK = b"\xef\xbb\xbf"


def test_reads_text_and_json_with_and_without_a_mark():
    for mark in (b"", MARK):
        assert text_of(mark + "é\r\n".encode()) == "é\r\n"
        assert json_of(mark + b'{"a": [1, null]}', "an object") == {"a": [1, None]}
    assert text_of(b"a" + MARK) == "a\ufeff"  # in the middle it is a character


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\xff", "got byte 0xff at column 3, want UTF-8; save the file as UTF-8"),
        (MARK + b"a\nb\nc\xc3(", "got byte 0xc3 at line 3, column 2, want UTF-8; save the file as UTF-8"),
        (b'{"a": ', r"got broken JSON \(Expecting value, column 7\), want an object"),
        (b'{"a":\n\n1 2}', r"got broken JSON \(.*, line 3, column 3\), want an object"),
        (b"[" * 100_000, "got JSON nested deeper than any file is, want an object"),
        (b"1" * 5000, r"got a number of thousands of digits, want an object"),
        (b"", r"got broken JSON \(Expecting value, column 1\), want an object"),
    ],
)
def test_says_what_is_wrong_in_one_line(data, message):
    with pytest.raises(ValueError) as error:
        json_of(data, "an object")
    assert re.fullmatch(message, str(error.value))


def test_says_what_is_no_file(tmp_path):
    cases = [(tmp_path / "nowhere", "no such file or directory"), (tmp_path, "is a directory")]
    for path, reason in [*cases, ("a\0b", "embedded null byte")]:
        with pytest.raises(ValueError) as error:
            read_bytes(path, "a YAML file")
        assert str(error.value) == f"{path}: got {reason}, want a YAML file; check the path"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_read_to_its_end_if_it_has_one(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for data, fits in ((b"x" * 99, True), (b"x" * 100, False)):
        monkeypatch.setattr(inputs, "ENDLESS", 100)
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
        writer.start()
        if fits:
            assert read_bytes(tmp_path / "pipe", "text") == data
        else:
            with pytest.raises(ValueError, match="pipe: got 100 bytes and more from a pipe or a device, want text; ch"):
                read_bytes(tmp_path / "pipe", "text")
        writer.join()
    (tmp_path / "file").write_bytes(b"x" * 101)  # a file says how large it is
    assert len(read_bytes(tmp_path / "file", "text")) == 101


def test_text_that_is_none_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"a\ncaf\xe9")
    with pytest.raises(ValueError, match="latin.txt: got byte 0xe9 at line 2, column 4, want UTF-8; save the file as"):
        read_text(tmp_path / "latin.txt", "text")


def test_kinds_are_those_of_json():
    values = [None, True, 1, 1.5, "", [], {}]
    assert [kind(value) for value in values] == ["null", "boolean", "number", "number", "string", "list", "object"]


def test_what_is_beside_a_users_file_can_be_imported_then_and_later(tmp_path, monkeypatch):
    """Later behind everything else: a datasets.py there does not stand in for the package."""
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in ("beside_now", "beside_later"):
        (tmp_path / f"{name}.py").write_text(f"said = {name!r}")
    (tmp_path / "mine.py").write_text(
        "import beside_now\n\ndef later():\n    import beside_later\n    return beside_later.said"
    )
    module = import_file(str(tmp_path / "mine.py"), "--task")
    assert module.beside_now.said == "beside_now" and module.later() == "beside_later"
    assert sys.path[-1] == os.path.realpath(tmp_path) and sys.path.count(sys.path[-1]) == 1
