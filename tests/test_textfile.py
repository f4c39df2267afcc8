"""nanogspo/textfile.py: marks dropped, and one line that says where the first broken byte or brace is.

Run: python -m pytest tests/test_textfile.py
"""

import re

import pytest

from nanogspo.textfile import json_of, kind, read_bytes, text_of

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
        (b"[" * 100_000, "got JSON nested a thousand deep, want an object"),
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


def test_kinds_are_those_of_json():
    values = [None, True, 1, 1.5, "", [], {}]
    assert [kind(value) for value in values] == ["null", "boolean", "number", "number", "string", "list", "object"]
