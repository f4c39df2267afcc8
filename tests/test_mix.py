"""tasks/mix.py: several tasks by their shares, and what an own task may leave out; tasks/__init__.build_task."""

from collections import Counter

import pytest

from nanogspo.tasks import build_task
from nanogspo.tasks.addition import Addition
from nanogspo.tasks.base import Problem
from nanogspo.tasks.mix import Mix, is_right
from nanogspo.tasks.reverse import Reverse

OWN = """
from nanogspo.tasks.base import Problem, Task
from nanogspo.tasks.reverse import Reverse  # imported, so not the file's own
import helper_beside

class Double:
    def __init__(self, size=3):
        self.size = size
    def train_problem(self, n, seed):
        return Problem(f"{n}*2=", [{"role": "user", "content": f"{n}*2"}], str(2 * n))
    def held_out(self, count):
        return [self.train_problem(-n, 0) for n in range(count)]
    def reward(self, problem, answer_text):
        return float(answer_text == problem.answer) * helper_beside.WORTH
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "double.py").write_text(OWN)
    (tmp_path / "helper_beside.py").write_text("WORTH = 1")
    return str(tmp_path / "double.py")


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.3), (9, 1), (1, 1, 1), (0.01, 0.98, 0.01)])
def test_each_task_has_its_share_after_every_number_of_problems(shares):
    tasks = [Addition(2), Reverse(5), Addition(1)][: len(shares)]
    if len(shares) == 3:
        tasks[2].name = "small"
    mix, counts = Mix(tasks, shares), Counter()
    for n in range(300):
        counts[mix.train_problem(n, 0).task] += 1
        for task, share in zip(tasks, shares, strict=True):
            assert abs(counts[task.name] - share / sum(shares) * (n + 1)) <= 1  # K tasks: less than one problem off
    assert sum(counts.values()) == 300


def test_problems_of_a_task_come_in_its_own_order_wherever_one_starts():
    mix, again = Mix([Addition(2), Reverse(5)], [2, 1]), Mix([Addition(2), Reverse(5)], [2, 1])
    drawn = [mix.train_problem(n, 7) for n in range(60)]
    for task in (Addition(2), Reverse(5)):
        mine = [problem for problem in drawn if problem.task == task.name]
        assert [p.text for p in mine] == [task.train_problem(n, 7).text for n in range(len(mine))] and len(mine) > 15
    assert again.train_problem(45, 7) == drawn[45]  # as a resumed run asks


def test_held_out_problems_and_rewards_go_to_their_own_task():
    mix = Mix([Addition(2), Reverse(5)], [3, 1])
    held = mix.held_out(5)
    assert [problem.task for problem in held] == ["addition"] * 3 + ["reverse"] * 2
    assert [p.text for p in held[:3]] == [p.text for p in Addition(2).held_out(3)]
    assert [problem.task for problem in mix.held_out(1)] == ["addition"]
    wrong = held[0].answer[:-1] + "x"
    assert mix.reward(held[0], held[0].answer) == 1 and mix.reward(held[4], "") == Reverse(5).reward(held[4], "") == 0
    assert is_right(mix, held[4], held[4].answer, 0.0) and not is_right(mix, held[0], wrong, 1.0)
    assert set(mix.characters) == set(Addition.characters + Reverse.characters)


def test_a_task_without_exact_counts_full_rewards(own):
    task = build_task((own,))
    problem = task.train_problem(3, 0)
    assert task.name == "double" and task.size == 3
    assert is_right(task, problem, "6", 1.0) and not is_right(task, problem, "6", 0.99)
    assert not is_right(task, problem, "6", float("nan"))
    assert build_task((own + ":Double",), 5).size == 5
    mix = build_task((f"{own}=0.25", "addition=0.75"))
    assert mix.shares == {"double": 0.25, "addition": 0.75}
    assert [mix.train_problem(n, 0).task for n in range(4)].count("double") == 1


@pytest.mark.parametrize(
    "names, words",
    [
        (("addition=0",), "got --task addition=0, want a share of more than 0"),
        (("addition", "addition"), "got tasks addition, addition, want each name once"),
        (("nowhere.py",), "got --task nowhere.py, which is no file here"),
        (("soup",), "got task 'soup', want one of addition"),
        (("OWN:Reverse",), "'Reverse', which is none of them, want a class with train_problem, held_out, reward"),
        (("OWN:Missing",), "(there is Double)"),
    ],
)
def test_wrong_tasks_are_refused(own, names, words):
    with pytest.raises(ValueError) as e:
        build_task([name.replace("OWN", own) for name in names])
    assert words in str(e.value)


@pytest.mark.parametrize("text, words", [("1 / 0", "ZeroDivisionError"), ("x = (", "SyntaxError"), ("", "0 of them")])
def test_a_file_that_cannot_be_a_task(tmp_path, text, words):
    (tmp_path / "broken.py").write_text("import os\n" + text)
    with pytest.raises(ValueError, match=words) as e:
        build_task((str(tmp_path / "broken.py"),))
    assert "broken.py" in str(e.value) and "\n" not in str(e.value)


def test_a_problem_has_no_row_and_no_task_of_its_own():
    assert Problem("a", [], "b").row == {} and Problem("a", [], "b").task == ""
