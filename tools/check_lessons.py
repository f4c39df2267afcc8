"""Lessons cannot drift from the code: this runs them, compares what they show, and resolves what they point at.

In every lessons/NN_name.md, from top to bottom:

    Time 20 min · needs lesson 04 · CPU ok · files kernels/seq_logprob.py      stands under the title; the files exist
    **Question.** ## Picture ## Maths ... ## Read next                         are all there, in this order
    ```python                       is executed; the blocks of one lesson share one namespace
    ```bash run                     is executed; plain ```bash is only shown
    ```output                       equals what the block above it printed
    ```output ellipsis              the same, but "..." stands for anything on its line: times, paths
    ```python quote=PATH::SYMBOL    equals that symbol's source, character for character
    ```python excerpt=PATH::SYMBOL  is a run of consecutive lines of it
    `PATH::SYMBOL`                  exists: a function, class, method, field or constant
    [text](path) and ![](path.svg)  exist; an SVG parses as XML and holds no picture in bytes

The links of README.md, CONTRIBUTING.md and the other pages are resolved too. Each lesson runs in a process and a folder
of its own: the folder looks like the repository, but every entry is a symbolic link and runs/ is empty, so `python
train.py --out runs/x` leaves nothing in the tree. 60 seconds, two lessons at a time, one thread each.

Run: python tools/check_lessons.py [lessons/04_sampling_and_cache.md ...]
"""

import ast
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import types
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 60  # seconds per lesson: a reader waits that long
LONGEST = 250  # lines of Markdown: one sitting
FRONT = re.compile(r"Time \d+ min · needs (?P<needs>.+?) · (CPU ok|GPU .+?) · files (?P<files>.+)")
SECTIONS = [
    "**Question.**",
    "## Picture",
    "## Maths",
    "## Code walk",
    "## Run it",
    "## Break it",
    "## Exercise",
    "## What the big systems do",
    "## Read next",
]
SYMBOL = re.compile(r"`([\w./-]+\.py)::([\w.]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the word after the fence, the rest of that line, the line number of the fence, what is inside."""

    language: str
    info: str
    line: int
    body: str


def blocks_of(text: str) -> tuple[list[Block], str]:
    """The fenced blocks, and the prose with them blanked out (so that code is not searched for links)."""
    blocks, prose, open_line, opening, body = [], [], 0, None, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.fullmatch(r"```(\w*)[ \t]*(.*)", line)
        if opening is None and fence:
            opening, open_line, body = fence, number, []
        elif opening is not None and line.rstrip() == "```":
            blocks.append(Block(opening[1], opening[2].strip(), open_line, "\n".join(body)))
            opening = None
        elif opening is not None:
            body.append(line)
        prose.append("" if opening is not None or fence else line)
    if opening is not None:
        raise ValueError(f"{open_line}: the block that opens here is never closed")
    return blocks, "\n".join(prose)


# ----------------------------------------------------------------------------
# what can be checked without running anything


def source_of(path: str, symbol: str) -> str:
    """Source of a function, class, method, field or constant, decorators included, outer indentation removed."""
    text = (ROOT / path).read_text()
    node = ast.parse(text)
    for name in symbol.split("."):
        node = next((n for n in getattr(node, "body", []) if name in _names(n)), None)
        if node is None:
            raise LookupError(f"{path} has no {symbol}")
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


def _names(node: ast.stmt) -> list[str]:
    targets = getattr(node, "targets", []) or [getattr(node, "target", None)]
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


def check_quote(info: str, body: str) -> str | None:
    kind, _, target = info.partition("=")
    path, _, symbol = target.partition("::")
    try:
        source = source_of(path, symbol)
    except (OSError, LookupError) as error:
        return f"quotes something that is not there: {error}"
    if kind == "quote":
        return None if body.strip() == source.strip() else f"quote differs from {target}; paste the current source"
    lines = textwrap.dedent(source).splitlines()
    wanted = textwrap.dedent(body).strip("\n").splitlines()
    starts = range(len(lines) - len(wanted) + 1)
    if not any(textwrap.dedent("\n".join(lines[i : i + len(wanted)])).splitlines() == wanted for i in starts):
        return f"excerpt is not a run of lines of {target}; paste the current source"
    return None


def check_links(page: Path, prose: str, *, symbols: bool) -> list[str]:
    """Every relative link, picture and PATH::SYMBOL of a page that leads nowhere."""
    errors = []
    for number, line in enumerate(prose.splitlines(), start=1):
        for target in LINK.findall(line):
            file = target.partition("#")[0]
            if "://" in target or target.startswith("mailto:") or not file:
                continue
            if not (page.parent / file).exists():
                errors.append(f"{number}: links to {file}, which does not exist")
            elif file.endswith(".svg"):
                errors += [f"{number}: {error}" for error in check_svg(page.parent / file)]
        for path, symbol in SYMBOL.findall(line) if symbols else []:
            try:
                source_of(path, symbol)
            except (OSError, LookupError, SyntaxError) as error:
                errors.append(f"{number}: `{path}::{symbol}` leads nowhere: {error}")
    return errors


def check_svg(path: Path) -> list[str]:
    try:
        root = xml.etree.ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except (ValueError, xml.etree.ElementTree.ParseError) as error:
        return [f"{path.name} is not an SVG: {error}"]
    if not root.tag.endswith("svg"):
        return [f"{path.name} is not an SVG: its outermost element is <{root.tag}>"]
    images = [element for element in root.iter() if element.tag.endswith("}image") or element.tag == "image"]
    return [f"{path.name} holds a picture in bytes; draw it in lines and text, so that changes can be read"] * bool(
        images
    )


def check_shape(lesson: Path, prose: str) -> list[str]:
    """Front line, sections in order, length, exercise files."""
    lines, errors = prose.splitlines(), []
    written = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not written or not written[0][1].startswith("# "):
        errors.append("1: want a title, '# NN. Name', on the first line")
    number, front = written[1] if len(written) > 1 else (1, "")
    if match := FRONT.fullmatch(front.strip()):
        for file in re.split(r"[,\s]+", match["files"].replace("`", "")):
            if not (ROOT / file).exists():
                errors.append(f"{number}: names the file {file}, which does not exist")
        for needed in re.findall(r"lessons? (\d\d(?:(?:, | and )\d\d)*)", match["needs"]):
            for other in re.findall(r"\d\d", needed):
                if not list(lesson.parent.glob(f"{other}_*.md")):
                    errors.append(f"{number}: needs lesson {other}, which does not exist")
    else:
        errors.append(f"{number}: want 'Time NN min · needs ... · CPU ok · files ...' under the title, got {front!r}")
    position = 0
    for section in SECTIONS:
        found = next((n for n, line in enumerate(lines, start=1) if line.startswith(section) and n > position), None)
        if found is None:
            exists = any(line.startswith(section) for line in lines)
            errors.append(
                f"{position + 1}: want {section!r} {'after this, it comes earlier' if exists else 'from here on'}"
            )
        else:
            position = found
    if len(lines) > LONGEST:
        errors.append(f"{len(lines)}: got {len(lines)} lines, want at most {LONGEST}; split the lesson or cut it")
    for file in (f"ex{lesson.name[:2]}.py", f"test_ex{lesson.name[:2]}.py", f"solutions/ex{lesson.name[:2]}.py"):
        if not (lesson.parent / "exercises" / file).exists():
            errors.append(f"1: has no lessons/exercises/{file}")
    return errors


# ----------------------------------------------------------------------------
# what has to be run: this part runs in the lesson's own process


def run_blocks(lesson: Path, report: Path) -> None:
    """Executes the blocks in order and stops at the first that fails; writes what it found to `report`, line by line.

    A line of the report is a JSON list, ["at", line] before a block and ["error", line, text] after one.
    """
    sys.path.insert(0, os.getcwd())
    module = sys.modules["lesson"] = types.ModuleType("lesson")  # dataclasses look their module up
    namespace, printed = module.__dict__, None
    with report.open("w", buffering=1) as out:
        for block in blocks_of(lesson.read_text())[0]:
            out.write(json.dumps(["at", block.line]) + "\n")
            error = None
            if block.language == "output":
                error = compare(printed, block)
                printed = None
            elif block.language == "python" and not block.info:
                printed, error = run_python(block, lesson, namespace)
            elif block.language == "bash" and block.info == "run":
                printed, error = run_bash(block)
            if error:
                out.write(json.dumps(["error", block.line, error]) + "\n")
                if block.language != "output":
                    return  # what follows leans on this block


def compare(printed: str | None, block: Block) -> str | None:
    if printed is None:
        return "output block without a block above it that was run"
    got, want = printed.strip(), block.body.strip()
    same = got == want
    if block.info == "ellipsis":
        same = re.fullmatch(".*?".join(map(re.escape, want.split("..."))), got) is not None  # "." stops at a line's end
    return None if same else f"the block above prints\n{textwrap.indent(got, '    ')}"


def run_python(block: Block, lesson: Path, namespace: dict) -> tuple[str, str | None]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            # blank lines in front: a traceback then names the line of the Markdown file
            exec(compile("\n" * block.line + block.body, str(lesson), "exec"), namespace)
    except BaseException as error:  # SystemExit too: a lesson that calls exit() skips the rest of itself
        lines = [entry.lineno for entry in traceback.extract_tb(error.__traceback__) if entry.filename == str(lesson)]
        at = f" in line {lines[-1]}" if lines else ""
        return out.getvalue(), f"{type(error).__name__}{at}: {error}"
    return out.getvalue(), None


def run_bash(block: Block) -> tuple[str, str | None]:
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", block.body], capture_output=True, text=True, check=False)
    error = (
        f"exit code {run.returncode}\n{textwrap.indent(run.stderr.strip()[-2000:], '    ')}" if run.returncode else None
    )
    return run.stdout, error


# ----------------------------------------------------------------------------
# a lesson in a process of its own


def run_lesson(lesson: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        tree, report = Path(scratch, "nanogspo"), Path(scratch, "report")
        tree.mkdir()
        for entry in ROOT.iterdir():
            if entry.name != "runs" and not entry.name.startswith("."):
                (tree / entry.name).symlink_to(entry)
        python = Path(sys.executable).parent  # `python` in a bash block is the one that runs this
        environment = {
            **os.environ,
            "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', '')}",
            "OMP_NUM_THREADS": "1",  # the last bit of a sum depends on the number of threads
            "MPLBACKEND": "Agg",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, __file__, "--blocks-of", str(lesson), str(report)]
        with open(Path(scratch, "noise"), "w+b") as noise:
            child = subprocess.Popen(
                command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = child.wait(timeout=TIME_LIMIT)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(child.pid, signal.SIGKILL)  # the child leads its own group: its train.py ends with it
                child.wait()
            noise.seek(0)
            said = noise.read().decode(errors="replace").strip()[-2000:]
        events = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    errors = [f"{line}: {text}" for kind, line, *rest in events if kind == "error" for text in rest]
    at = max((line for kind, line, *_ in events if kind == "at"), default=1)
    if code is None:
        errors.append(f"{at}: still running after {TIME_LIMIT} s; make it smaller")
    elif code != 0:
        errors.append(f"{at}: the lesson's process ended with code {code}\n{textwrap.indent(said, '    ')}")
    return errors


def check(lesson: Path) -> tuple[list[str], float]:
    started = time.monotonic()
    try:
        blocks, prose = blocks_of(lesson.read_text(encoding="utf-8"))
    except ValueError as error:
        return [str(error)], 0.0
    errors = check_shape(lesson, prose) + check_links(lesson, prose, symbols=True)
    for block in blocks:
        quoted = block.info.startswith(("quote=", "excerpt="))
        if quoted and (error := check_quote(block.info, block.body)):
            errors.append(f"{block.line}: {error}")
        known = {"python": ("",), "bash": ("", "run"), "output": ("", "ellipsis")}.get(block.language, (block.info,))
        if not quoted and block.info not in known:
            errors.append(
                f"{block.line}: got ```{block.language} {block.info}, want a word that the head of {__file__} lists"
            )
    return errors + run_lesson(lesson), time.monotonic() - started


def main(arguments: list[str]) -> int:
    lessons = [Path(argument).resolve() for argument in arguments] or sorted((ROOT / "lessons").glob("[0-9]*.md"))
    if not lessons:
        print("got no lessons/NN_name.md to check, want at least one")
        return 1
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(lessons, pool.map(check, lessons), strict=True))
    failures = 0
    for lesson, (errors, seconds) in results.items():
        print(f"{'ok  ' if not errors else 'BAD '} {seconds:5.1f} s  {lesson.relative_to(ROOT)}")
        for error in errors:
            print(f"  {lesson.relative_to(ROOT)}:{error}")
        failures += bool(errors)
    pages = [] if arguments else [*ROOT.glob("*.md"), ROOT / "lessons" / "README.md"]
    for page in (page for page in pages if page.exists()):
        # LOG.md is a diary: what it names may since have gone
        for error in check_links(page, blocks_of(page.read_text())[1], symbols=page.name != "LOG.md"):
            print(f"BAD   {page.relative_to(ROOT)}:{error}")
            failures += 1
    print(f"{len(lessons)} lessons agree with the code" if not failures else f"{failures} pages have errors")
    return int(failures > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--blocks-of"]:
        run_blocks(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
