"""tools/check_lessons.py: a sound page passes, and for each rule a page that breaks it is refused, with its line.

Run: python -m pytest tests/test_check_lessons.py
"""

import json

import check_lessons
import pytest

PAGE = """# 01. Toy

Time 5 min · needs lesson 01 · CPU ok · files toy.py

**Question.** Why?

## Picture
![a toy](toy.svg)
## Maths
## Code walk
`toy.py::Toy.double` and [its file](../toy.py)

```python quote=toy.py::Toy.double
def double(self, x):
    return 2 * x
```

```python excerpt=toy.py::Toy.double
return 2 * x
```

## Run it

```python
for n in range(2):
    print("took", n, "s")
```

```output ellipsis
took ... s
took 1 s
```

```bash
rm -rf no/such/folder
```

## Break it
## Exercise
## What the big systems do
## Read next
"""
TREE = {
    "toy.py": "class Toy:\n    def double(self, x):\n        return 2 * x\n",
    "lessons/01_toy.md": PAGE,
    "lessons/toy.svg": "<svg xmlns='http://www.w3.org/2000/svg'><text>a</text></svg>",
    "lessons/README.md": "[the first](01_toy.md)\n",
    "README.md": "[lessons](lessons/README.md)\n",
    "lessons/exercises/ex01.py": "",
    "lessons/exercises/test_ex01.py": "",
    "lessons/exercises/solutions/ex01.py": "",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A sound tree. Blocks are run in this process: what check_lessons.run_lesson adds is a process and its limits."""
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run_lesson(lesson):
        check_lessons.run_blocks(lesson, tmp_path / "report")
        events = map(json.loads, (tmp_path / "report").read_text().splitlines())
        return [f"{line}: {text}" for kind, line, *rest in events if kind == "error" for text in rest]

    monkeypatch.setattr(check_lessons, "ROOT", tmp_path)
    monkeypatch.setattr(check_lessons, "run_lesson", run_lesson)
    monkeypatch.setattr(check_lessons.sys, "path", [*check_lessons.sys.path])
    monkeypatch.setitem(check_lessons.sys.modules, "lesson", None)
    return tmp_path


BAD = [  # (file, what is replaced, by what, what is said of it); the file's other rules hold
    ("lessons/01_toy.md", "# 01. Toy", "01. Toy", "1: want a title"),
    ("lessons/01_toy.md", "Time 5 min", "Five minutes", "3: want 'Time NN min"),
    ("lessons/01_toy.md", "files toy.py", "files toy.py, gone.py", "3: names the file gone.py, which does not exist"),
    ("lessons/01_toy.md", "needs lesson 01", "needs lessons 01 and 07", "3: needs lesson 07, which does not exist"),
    ("lessons/01_toy.md", "## Maths\n", "", "want '## Maths' from here on"),
    ("lessons/01_toy.md", "## Break it\n## Exercise\n", "## Exercise\n## Break it\n", "want '## Exercise' after this"),
    ("lessons/01_toy.md", "## Read next\n", "## Read next\n" + 220 * "\n", "lines, want at most 250"),
    ("lessons/01_toy.md", "(../toy.py)", "(../gone.py)", "11: links to ../gone.py, which does not exist"),
    ("lessons/01_toy.md", "`toy.py::Toy.double`", "`toy.py::Toy.half`", "11: `toy.py::Toy.half` leads nowhere"),
    ("lessons/01_toy.md", "quote=toy.py::Toy.double", "quote=toy.py::Toy.half", "quotes something that is not there"),
    ("lessons/01_toy.md", "excerpt=toy.py::", "excerpt=gone.py::", "quotes something that is not there"),
    ("lessons/01_toy.md", "    return 2 * x\n", "    return x * 2\n", "13: quote differs from toy.py::Toy.double"),
    ("lessons/01_toy.md", "```\n\n```python exc", "\n```\n\n```python exc", ""),  # a blank line is no difference
    ("lessons/01_toy.md", "(self, x):\n    return 2 * x\n", "(self, x):\n", "13: quote differs"),  # a part of it
    ("lessons/01_toy.md", "\nreturn 2 * x\n", "\nreturn 2\n", "18: excerpt is not a run of lines"),
    ("lessons/01_toy.md", "```bash\n", "```bash runs\n", "got ```bash runs, want a word"),
    ("lessons/01_toy.md", "folder\n```\n", "folder\n", "the block that opens here is never closed"),
    ("lessons/01_toy.md", "took 1 s", "took 2 s", "29: the block above prints\n    took 0 s\n    took 1 s"),
    ("lessons/01_toy.md", "took ... s\ntook 1 s", "took ...", "29: the block above prints"),  # "..." ends with its line
    ("lessons/01_toy.md", " ellipsis", "", "29: the block above prints"),
    ("lessons/01_toy.md", "```python\nfor", "```bash\nfor", "output block without a block above it that was run"),
    ("lessons/01_toy.md", 'print("took"', 'exit() or ("took"', "24: SystemExit in line 26"),
    ("lessons/toy.svg", "</svg>", "", "8: toy.svg is not an SVG: no element found"),
    ("lessons/toy.svg", "svg", "html", "8: toy.svg is not an SVG: its outermost element is"),
    ("lessons/toy.svg", "text>", "image>", "8: toy.svg holds a picture in bytes"),
    ("lessons/README.md", "01_toy.md", "02_toy.md", "1: links to 02_toy.md, which does not exist"),
    ("README.md", "lessons/README.md", "lessons/INDEX.md", "1: links to lessons/INDEX.md, which does not exist"),
]


@pytest.mark.parametrize("file, right, wrong, says", BAD)
def test_each_rule(root, capsys, file, right, wrong, says):
    assert right in TREE[file]
    (root / file).write_text(TREE[file].replace(right, wrong))
    code = check_lessons.main([])
    out = capsys.readouterr().out
    page = file if file.endswith(".md") else "lessons/01_toy.md"
    errors = [line for line in out.splitlines() if f" {page}:" in line]
    assert (code, len(errors)) == ((1, 1) if says else (0, 0)) and says in out, out


@pytest.mark.parametrize("file", [name for name in TREE if "exercises" in name])
def test_a_lesson_has_an_exercise(root, file):
    (root / file).unlink()
    assert check_lessons.check(root / "lessons" / "01_toy.md")[0] == [f"1: has no {file}"]


def test_a_tree_without_lessons_is_refused(root, capsys):
    (root / "lessons" / "01_toy.md").unlink()
    assert check_lessons.main([]) == 1 and "want at least one" in capsys.readouterr().out
