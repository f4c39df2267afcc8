"""Rows out of files and data sets: one object each, with the words that tell a reader where it is.

    rows.jsonl                          rows.jsonl:3            the line, from 1, as editors count
    rows.json      [{...}, {...}]       rows.json[2]            the place, from 0, as Python and jq count
    rows.parquet                        rows.parquet row 2      from 0                           (pyarrow)
    hf:owner/name[:config][:split]      hf:owner/name row 2     from 0, split train              (datasets)

A JSON array is known by its first character, parquet by the end of the name. `hf:` takes what `datasets.load_dataset`
takes, a local folder too; a single word after the name is a split if it is called train, validation or test, else a
configuration.

A row of parquet or `datasets` becomes what JSON can hold: dates as ISO text, bytes as UTF-8 text, arrays as lists.
Arrow gives every object of a column the keys of all, null where a row has none: inside values null is therefore no key,
or a chat template would see tool calls that nobody made. Values without a JSON form (images) are errors.

Tests: tests/test_rows.py
"""

import contextlib
import datetime
import decimal
import re
from collections.abc import Iterable, Iterator
from typing import Any

from nanogspo.inputs import json_of, kind, named, optional, read_bytes
from nanogspo.templates import one_line

SPLIT = re.compile(r"(train|validation|test)\b")


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(where, row) in order. ValueError "WHERE: got ..., want ...; do ..." at the first bad row, and for none."""
    source = str(source)
    read, empty = _hub if source.startswith("hf:") else _parquet if source.endswith(".parquet") else _json, True
    for where, row in read(source):
        if not isinstance(row, dict):
            raise ValueError(f'{where}: got a JSON {kind(row)}, want an object; write rows like {{"prompt": "..."}}')
        yield where, row
        empty = False
    if empty:
        raise ValueError(f"{source}: got an empty file, want one JSON object per line; check the path")


def _json(path: str) -> Iterator[tuple[str, Any]]:
    data = read_bytes(path, "a JSONL file")
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        with named(path):
            rows = json_of(data, "one array of objects; fix it")
        yield from ((f"{path}[{i}]", row) for i, row in enumerate(rows))
        return
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.removeprefix(b"\xef\xbb\xbf").strip():
            continue
        with named(f"{path}:{line}"):
            row = json_of(raw, "one whole object per line; fix the line")
        yield f"{path}:{line}", row


def _parquet(path: str) -> Iterator[tuple[str, dict]]:
    parquet = optional("pyarrow.parquet", path)
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are among these
        raise ValueError(f"{path}: got {one_line(error)}, want a parquet file; check the path") from error
    return _columns(path, rows)


def _hub(source: str) -> Iterator[tuple[str, dict]]:
    datasets = optional("datasets", source)
    name, _, rest = source.removeprefix("hf:").partition(":")
    config, _, split = ("", "", rest) if SPLIT.match(rest) else rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # whatever the hub, the network or a data set's files do
        line = f"{source}: got {type(error).__name__} ({one_line(error)}), want hf:owner/name[:config][:split]"
        raise ValueError(f"{line}; check the name and the network, or download a file and name that") from error
    return _columns(source, rows)


def _columns(source: str, rows: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    for i, row in enumerate(rows):
        with named(f"{source} row {i}"):
            row = {column: plain(value, column) for column, value in row.items()}
        yield f"{source} row {i}", row


def plain(value: Any, column: str) -> Any:
    """The value as JSON would hold it; `column` is for the error."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(v, column) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(v, column) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and numbers
        return plain(value.tolist(), column)
    with contextlib.suppress(AttributeError, ValueError):  # no bytes; bytes that are no UTF-8
        return value.decode()
    raise ValueError(f"got {type(value).__name__} in column {column!r}, want text, numbers or lists; drop the column")
