"""Values out of files that others wrote: read by type and range, and shown in one line when they do not fit.

Every reader of a JSON file goes through `read_json` and `need`, so that a wrong type, a nan, a number of 300 digits or
a thousand nested lists is one ValueError with the file's name in it, before anything is allocated. `text_of` and
`json_of` are for text that people write: prompts, templates, one row of a JSONL file. `import_file`, `explained` and
`optional` are for code that is not ours.

Tests: tests/test_inputs.py
"""

import contextlib
import importlib.util
import json
import os
import stat
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

DEEPEST = 50  # levels of a JSON file; the deepest file of a checkpoint has six
ENDLESS = 2**30  # bytes that are read of what is no regular file and does not say how large it is
LONGEST = 80  # characters of a foreign value in a message
REQUIRED = object()
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "an object"}


def shown(value: Any) -> str:
    """repr(value) for a message: one line, cut."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def some(names: Iterable, most: int = 8, sep: str = ", ") -> str:
    """Names for a message: at most `most` of them, and how many more there are."""
    names = [str(name) if str(name).isprintable() and len(str(name)) <= 200 else shown(str(name)) for name in names]
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return sep.join(names[:most]) + rest


def need(values: dict, key: str, kind: type, *, where: str, low=-1e300, high=1e300, default: Any = REQUIRED) -> Any:
    """values[key], which must be of this kind; numbers within low .. high (both count; nan and inf are outside).

    kind     int, float (an integer will do), bool, str, list or dict
    where    the file, for the message
    default  what null or a missing key stands for; without one the key must be there

    Raises ValueError: got, want, where.
    """
    value = values.get(key)
    if value is None and default is not REQUIRED:
        return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    if fits and (kind not in (int, float) or low <= value <= high):
        return value
    wanted = "a positive integer" if kind is int and low == 1 else KINDS[kind]
    wanted += f" from {low:g}" * (low > -1e300 and low != 1) + f" up to {high:{',' if kind is int else 'g'}}" * (
        high < 1e300
    )
    raise ValueError(f"got {key}={shown(value)}, want {wanted} in {where}")


def tell(line: str) -> None:
    """Say something on stderr that is no error: what is left aside, or what could be meant instead."""
    print(line, file=sys.stderr)


def launched(name: str, default: int) -> int:
    """A number that torchrun leaves in the environment, or what it is in a process that nobody launched."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"got {name}={shown(text)} in the environment, want the number that torchrun sets, or none")
    return int(text)


@contextlib.contextmanager
def named(where: object) -> Iterator[None]:
    """A ValueError from within gets in front of it where that was: a file, a line, a place in a row."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def kind(value: Any) -> str:
    """What JSON calls the type of a Python value."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else names[type(value)]


def read_bytes(path: str | os.PathLike, want: str) -> bytes:
    """A whole file; `want` says what should be there, for the error, which names the path."""
    try:
        with open(path, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
            data = file.read(ENDLESS)  # a pipe, or a device, which may never end
        if len(data) == ENDLESS:
            raise ValueError(f"{ENDLESS:,} bytes and more from a pipe or a device")
        return data
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ValueError(f"{path}: got {reason}, want {want}; check the path") from error


def read_text(path: str | os.PathLike, want: str) -> str:
    """A whole file of UTF-8; `want` as in read_bytes."""
    data = read_bytes(path, want)
    with named(path):
        return text_of(data)


def text_of(data: bytes) -> str:
    """UTF-8 without the byte mark that Windows editors put in front. The caller says which file, or line of one."""
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:  # start counts from after the mark
        start, data = error.start, error.object
        line, column = data.count(b"\n", 0, start) + 1, start - data.rfind(b"\n", 0, start)
        where = (f"line {line}, " if line > 1 else "") + f"column {column}"
        raise ValueError(f"got byte 0x{data[start]:02x} at {where}, want UTF-8; save the file as UTF-8") from error


def json_of(data: bytes, want: str) -> Any:
    """The JSON value in data; `want` ends the error: what should be there and what to do."""
    text = text_of(data)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = (f"line {error.lineno}, " if error.lineno > 1 else "") + f"column {error.colno}"
        raise ValueError(f"got broken JSON ({error.msg}, {where}), want {want}") from error
    except RecursionError as error:
        raise ValueError(f"got JSON nested deeper than any file is, want {want}") from error
    except ValueError as error:  # Python refuses to read more than 4,300
        raise ValueError(f"got a number of thousands of digits, want {want}") from error


def parse_json(data: bytes, where: str) -> dict:
    """The object in these bytes of UTF-8, with or without a byte mark."""
    with named(where):
        value = json_of(data, "an object; fetch the file again")
    level = [value]
    for _ in range(DEEPEST):
        parents = (x for x in level if isinstance(x, dict | list))
        level = [child for x in parents for child in (x.values() if isinstance(x, dict) else x)]
    if level:  # json reads 990 levels; whoever copies or prints them later would run out of stack
        raise ValueError(f"{where}: got JSON nested deeper than {DEEPEST} levels; fetch the file again")
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got JSON that is no object, want {{...}}; fetch the file again")
    return value


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises ValueError for a file that is missing, unreadable, broken or no object."""
    return parse_json(read_bytes(path, "a file of the checkpoint"), str(path))


def import_file(path: str, flag: str) -> ModuleType:
    """A Python file of the user's own, as a module. ValueError with one line if there is none, or if running it fails.

    Files beside it can be imported: first of all while it is run, as in `python FILE.py`, and later behind all others,
    so that a datasets.py there does not stand in for a package that is imported by then.
    """
    path_there = os.path.realpath(path)
    if not os.path.isfile(path_there):
        raise ValueError(f"got {flag} {path}, which is no file here; want FILE.py")
    folder, name = os.path.split(path_there)
    # a name of its own: a file called random.py must not stand in for Python's
    spec = importlib.util.spec_from_file_location(f"user_{os.path.splitext(name)[0]}", path_there)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        said = explained(error, path_there)
        raise ValueError(f"{path}: got {said}, want a file that can be imported; correct it") from error
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)
    return module


def explained(error: BaseException, file: str) -> str:
    """An exception in one line, with the last line of `file` that led to it: "KeyError: 'a' (reward.py:7)"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        error, lines = type(error)(error.msg), [error.lineno]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return text + (f" ({os.path.basename(file)}:{lines[-1]})" if lines else "")


def optional(name: str, reason: str) -> ModuleType:
    """A package that only some runs need, from requirements-extra.txt."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"got {reason} without the package {name.partition('.')[0]} ({some([error])}); "
            "do: pip install -r requirements-extra.txt"
        ) from error
