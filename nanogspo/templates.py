"""Chat templates are programs that come with a checkpoint, so they run in a process of their own.

jinja2's immutable sandbox keeps a template from reaching Python's objects, but not from wasting the machine:
`10 ** (10 ** 8)`, or printing a list of two references to a list of two references, forty deep, is one call into C,
which nothing in the same process can end. Hence a renderer: a second Python, started at the first template, fed with
one JSON line a rendering and answering with one.

What is promised, of every template and every platform unless said:
- it sees a JSON copy of its arguments and no object of ours;
- it ends within SECONDS, the clock being a thread in C that ends the renderer whatever that is doing;
- it holds at most BYTES of memory on Linux. Windows and macOS do not enforce such a limit: only time bounds it there;
- what it prints is at most CHARACTERS long.
Not promised: that jinja2's sandbox has no hole. A template that escapes it runs with this user's rights.

The price: the start of a second Python (0.1 s) and 0.1 to 0.3 ms a rendering.

Source: transformers `render_jinja_template`, same environment and variables.      Tests: tests/test_templates.py
"""

import atexit
import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 5  # real templates take less than a millisecond
BYTES = 2**30
CHARACTERS = 2**24  # 4 million tokens, more than any model reads


def render(source: str, variables: str) -> str:
    """The text that a template makes of variables, a JSON object. ValueError, one line, for whatever goes wrong."""
    request = f"[{json.dumps(source)}, {variables}, {SECONDS}]\n".encode()
    with _lock:
        began = time.monotonic()
        answer = _ask(request)
        seconds = time.monotonic() - began
    if not answer:
        limit = f"{SECONDS} s" if seconds >= SECONDS else f"{BYTES >> 20} MB of memory, or broke its process"
        raise ValueError(f"it took more than {limit}")
    text, reason = json.loads(answer)
    if reason is not None:
        raise ValueError(reason)
    return text


def one_line(text: object) -> str:
    """One line, at most 300 characters: parsers and templates write as much as they like."""
    return " ".join(str(text)[:10_000].split())[:300]


# ---------------------------------------------------------------------------------------------------------------------
# this side: one renderer a process, kept until the process ends

_lock = threading.Lock()
_renderer: tuple[int, subprocess.Popen] | None = None  # with the process that started it: a fork must not share pipes


def _ask(request: bytes) -> bytes:
    """The renderer's line; empty when it had to be ended."""
    global _renderer
    if _renderer is None or _renderer[0] != os.getpid() or _renderer[1].poll() is not None:
        # away from the terminal's Ctrl-C, which asks train.py to finish its update, templates included
        apart = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # -P: this folder's own names must not hide those of the standard library
        _renderer = os.getpid(), subprocess.Popen([sys.executable, "-P", __file__], **pipes, **apart)
    process = _renderer[1]
    try:
        process.stdin.write(request)
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:  # it ended before it had read the whole request
        answer = b""
    except BaseException:  # Ctrl-C: the answer still to come must not meet the next request
        _stop()
        raise
    if not answer.endswith(b"\n"):
        _stop()
        return b""
    return answer


@atexit.register
def _stop() -> None:
    global _renderer
    if _renderer and _renderer[0] == os.getpid():
        _renderer[1].kill()
        with _renderer[1]:  # closes the pipes and waits
            pass
    _renderer = None


# ---------------------------------------------------------------------------------------------------------------------
# the renderer's side


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource  # not on Windows

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, hard) if hard < 0 else (min(BYTES, hard), hard))
    except (ImportError, ValueError, OSError):
        pass
    with open(os.devnull, "w") as nowhere:
        for request in sys.stdin.buffer:
            source, variables, seconds = json.loads(request)
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            answer = json.dumps(_answer(source, variables)).encode() + b"\n"
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(answer)
            sys.stdout.buffer.flush()


def _answer(source: str, variables: dict) -> tuple[str | None, str | None]:
    """(text, None), or (None, why not)."""
    try:
        text = _compile(source).render(variables)
    except MemoryError:
        return None, f"it took more than {BYTES >> 20} MB of memory"
    except Exception as error:  # somebody else's program: it may fail in any way
        # raise_exception(…) speaks to the reader; any other error needs its type to be understood
        known = type(error) is jinja2.TemplateError
        return None, one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
    return (text, None) if len(text) <= CHARACTERS else (None, f"it printed {len(text)} characters")


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for TRL; here it prints what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)  # compiling costs about a hundred renderings
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes "<" for HTML; models are trained on plain JSON
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


if __name__ == "__main__":
    _serve()
