"""tools/check_imports.py and tools/code_lines.py.

Run: python -m pytest tests/test_check_imports.py
"""

import pytest
from check_imports import BUDGET, cycles, functions, main, row_of
from code_lines import code_lines


def test_what_counts_as_code():
    text = '''"""A module
# of many lines."""

X = 1  # a comment


class A:
    """A class."""

    text = """not
    # a docstring"""

    def f(self):
        """Does it.

        Returns: 1
        """
        # a line of its own
        if self:
            "a string, which does nothing"
        return "#"


def g(): "on one line"
'''
    assert code_lines(text) == [
        "X = 1",
        "class A:",
        '    text = """not',
        '    # a docstring"""',
        "    def f(self):",
        "        if self:",
        '            "a string, which does nothing"',
        '        return "#"',
        'def g(): "on one line"',
    ]


@pytest.fixture
def tree(tmp_path):
    files = {
        "train.py": "import sys\nimport nanogspo.config as c\nfrom nanogspo import model\n",
        "sample.py": "from nanogspo.model import f\n",
        "kernels/__init__.py": "",
        "kernels/backend.py": "import torch\n",
        "kernels/attention.py": "from kernels import backend\n",
        "nanogspo/__init__.py": "",
        "nanogspo/config.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import train\n",
        "nanogspo/model.py": "from kernels.attention import attention\nfrom .config import x\n\n\ndef f():\n    pass\n",
    }

    def write(**changes):
        for name, text in {**files, **changes}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_the_right_way_round(tree, capsys):
    assert main(tree()) == 0
    out = capsys.readouterr().out
    assert (
        "     4  nanogspo/model.py" in out
        and f"    13  lines of code, of at most {BUDGET}" in out
        and "cycle" not in out
    )
    assert "     1  functions: median 2 lines, longest 2" in out


@pytest.mark.parametrize(
    "file, text, line",
    [
        (
            "kernels/backend.py",
            "import torch\n\nfrom nanogspo import model\n",
            "kernels/backend.py:3: imports nanogspo.model",
        ),
        ("kernels/backend.py", "def f():\n    import nanogspo.model\n", "kernels/backend.py:2: imports nanogspo.model"),
        ("nanogspo/config.py", "import train\n", "nanogspo/config.py:1: imports train"),
        ("nanogspo/config.py", "from nanogspo import model\n", "nanogspo/config.py:1: imports nanogspo.model"),
        ("nanogspo/words.py", "from nanogspo import config\n", "nanogspo/words.py:1: imports nanogspo.config"),
        ("sample.py", "import train\n", "sample.py:1: imports train"),
        ("train.py", "import sample\n", "train.py:1: imports sample"),
        ("nanogspo/config.py", "from tests.oracles import x\n", "nanogspo/config.py:1: imports tests.oracles"),
    ],
)
def test_the_wrong_way_round(tree, capsys, file, text, line):
    assert main(tree(**{file: text})) == 1
    assert f"FAIL {line}, want only what ORDER has above {file[:-3].replace('/', '.')}" in capsys.readouterr().out


def test_a_package_has_one_row_and_its_files_may_have_their_own():
    assert row_of("kernels.attention") == row_of("kernels") == 0
    assert row_of("nanogspo.tasks.base") < row_of("nanogspo.model") < row_of("nanogspo.tasks.jsonl")
    assert row_of("nanogspo") == row_of("torch") == -1


def test_a_file_without_a_row(tree, capsys):
    assert main(tree(**{"nanogspo/new.py": "x = 1\n"})) == 1
    assert "FAIL nanogspo/new.py: has no row in ORDER" in capsys.readouterr().out


def test_an_import_inside_a_function(tree, capsys):
    text = "class A:\n    def f():\n        if f:\n            from nanogspo import config\n"
    assert main(tree(**{"nanogspo/model.py": text})) == 1
    want = "FAIL nanogspo/model.py:4: imports nanogspo.config inside a function, want it at the top of the file"
    assert want in capsys.readouterr().out


def test_a_cycle_among_the_files_of_one_row(tree, capsys):
    assert main(tree(**{"kernels/backend.py": "import kernels.attention\n"})) == 1
    assert "FAIL a cycle of imports: kernels.attention kernels.backend; move" in capsys.readouterr().out


def test_two_cycles_are_two():
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"a"}}
    assert cycles(graph) == [{"a", "b"}, {"c", "d"}]


def test_the_line_budget(tree, capsys):
    assert main(tree(), budget=12) == 1 and "FAIL 13 lines of code, want at most 12" in capsys.readouterr().out


def test_a_file_and_a_function_have_limits_too(tree, capsys):
    assert main(tree(), limits={"train.py": 3, "sample.py": 1}) == 0
    assert main(tree(), limits={"train.py": 2}) == 1
    assert "FAIL train.py: 3 lines of code, want at most 2" in capsys.readouterr().out
    assert main(tree(), longest=1) == 1
    want = "FAIL nanogspo/model.py: f has 2 lines of code, want at most 1; name its parts"
    assert want in capsys.readouterr().out


def test_the_lines_of_functions():
    text = """
class A:
    @property
    def f(self):
        "A docstring."
        # a comment
        def g():
            return 1

        return g


def f(): pass
"""
    assert functions(text) == {"f": 4, "g": 2}
