"""Text and JSON out of files that people write and send around: one way to read them, one line when that fails.

Text is UTF-8. The byte order mark that Windows editors put in front is dropped. The caller knows where the bytes came
from, a file or one line of it, and puts that in front of the error.      Tests: tests/test_textfile.py
"""

import json
from pathlib import Path


def read_bytes(path: str | Path, want: str) -> bytes:
    """A whole file; `want` says what should be there, for the error, which names the path."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ValueError(f"{path}: got {reason}, want {want}; check the path") from error


def text_of(data: bytes) -> str:
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:  # start counts from after the mark
        start, data = error.start, error.object
        line, column = data.count(b"\n", 0, start) + 1, start - data.rfind(b"\n", 0, start)
        where = (f"line {line}, " if line > 1 else "") + f"column {column}"
        raise ValueError(f"got byte 0x{data[start]:02x} at {where}, want UTF-8; save the file as UTF-8") from error


def json_of(data: bytes, want: str) -> object:
    """The JSON value in data; `want` ends the error: what should be there and what to do."""
    text = text_of(data)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = (f"line {error.lineno}, " if error.lineno > 1 else "") + f"column {error.colno}"
        raise ValueError(f"got broken JSON ({error.msg}, {where}), want {want}") from error
    except RecursionError as error:
        raise ValueError(f"got JSON nested a thousand deep, want {want}") from error
    except ValueError as error:  # Python refuses to read more than 4,300
        raise ValueError(f"got a number of thousands of digits, want {want}") from error


def kind(value: object) -> str:
    """What JSON calls the type of a Python value."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else names[type(value)]
