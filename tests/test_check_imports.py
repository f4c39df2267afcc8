"""tools/check_imports.py and tools/code_lines.py.

Run: python -m pytest tests/test_check_imports.py
"""

import check_imports
import pytest
from check_imports import cycles, main
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
    assert "     4  nanogspo/model.py" in out and "    13  lines of code, of at most 9500" in out and "cycle" not in out


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
        ("sample.py", "import train\n", "sample.py:1: imports train"),
        ("nanogspo/config.py", "from tests.oracles import x\n", "nanogspo/config.py:1: imports tests.oracles"),
    ],
)
def test_the_wrong_way_round(tree, capsys, file, text, line):
    assert main(tree(**{file: text})) == 1
    assert f"FAIL {line}, want train, sample -> nanogspo -> kernels" in capsys.readouterr().out


def test_a_new_cycle_and_a_hidden_one(tree, capsys):
    root = tree(
        **{
            "nanogspo/config.py": "def f():\n    if f:\n        from nanogspo import chat\n",
            "nanogspo/chat.py": "from . import model\n",
        }
    )
    assert main(root) == 1
    out = capsys.readouterr().out
    assert "line 3 imports nanogspo.chat inside a function" in out
    assert "FAIL a cycle of imports: nanogspo.chat nanogspo.config nanogspo.model; move" in out


def test_a_known_cycle_passes(tree, capsys, monkeypatch):
    known = {"nanogspo/model.py": "import nanogspo.chat\n", "nanogspo/chat.py": "def f():\n    import nanogspo.model\n"}
    root = tree(**known)
    assert main(root) == 1
    monkeypatch.setattr(check_imports, "KNOWN_CYCLES", [{"nanogspo.model", "nanogspo.chat"}])
    assert main(root) == 0 and "cycle, known: nanogspo.chat nanogspo.model" in capsys.readouterr().out


def test_two_cycles_are_two():
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"a"}}
    assert cycles(graph) == [{"a", "b"}, {"c", "d"}]


def test_the_line_budget(tree, capsys):
    assert main(tree(), budget=12) == 1 and "FAIL 13 lines of code, want at most 12" in capsys.readouterr().out
