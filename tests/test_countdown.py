"""nanogspo/tasks/countdown.py: what counts as an equation, and questions that have one.

Run: python -m pytest tests/test_countdown.py
"""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.tasks import get_task
from nanogspo.tasks.base import Problem, is_held_out
from nanogspo.tasks.countdown import Countdown, evaluate

TASK = Countdown()
ASKED = Problem("", [], "", {"numbers": [25, 3, 7, 3], "target": 79})


@given(n=st.integers(0, 10**6), seed=st.integers(0, 2**31), size=st.integers(3, 6))
def test_every_question_has_an_answer(n, seed, size):
    task = Countdown(size)
    problem = task.train_problem(n, seed)
    assert task.exact(problem, problem.answer) and task.reward(problem, problem.answer) == pytest.approx(1.1)
    numbers, target = problem.row["numbers"], problem.row["target"]
    assert 3 <= len(numbers) <= size and 10 <= target <= 99 and type(target) is int
    assert f"{numbers}, create an equation that equals {target}." in problem.messages[0]["content"]
    assert problem.messages[0]["content"] in problem.text
    assert set(problem.text + problem.answer) <= set(task.characters)
    assert task.train_problem(n, seed) == problem != task.train_problem(n, seed + 1)


def test_sides_do_not_depend_on_the_order_of_the_numbers():
    def questions(problems):
        return {(*sorted(p.row["numbers"]), p.row["target"]) for p in problems}

    held = TASK.held_out(60)
    assert len(questions(held)) == 60 and TASK.held_out(20) == held[:20]
    train = questions(TASK.train_problem(n, 0) for n in range(300))
    assert not train & questions(held) and len(train) > 290
    assert all(is_held_out(f"{numbers}={target}") for *numbers, target in questions(held))
    assert not any(is_held_out(f"{numbers}={target}") for *numbers, target in train)
    assert {len(p.row["numbers"]) for p in held} == {3, 4}
    assert {sign for p in held for sign in p.answer if sign in "+-*"} == {"+", "-", "*"}


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("25*3+7-3", True),
        (" (7 + 25 * 3) - 3 ", True),
        ("-3+7+3*25", True),
        ("3*25+4", False),  # another number
        ("25*3+7-3+25-25", False),  # one twice
        ("25*3+7-3*3/3", False),
        ("25+7+3", False),
        ("25*3+7-3 = 79", False),
        ("79", False),
        ("", False),
    ],
)
def test_every_number_is_used_once(expression, right):
    assert TASK.exact(ASKED, f"<answer>{expression}</answer>") == right
    assert TASK.reward(ASKED, f"<answer>{expression}</answer>") == pytest.approx(0.1 + right)


RIGHT = "<answer>25*3+7-3</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (f"<think>\nhm\n</think>\n{RIGHT}\n", 1.1),
        (f"\n{RIGHT}", 1.1),  # what is left of it once the thinking is dropped
        (f"<think>hm {RIGHT}", 1.0),  # never finished
        (f"It is {RIGHT}", 1.0),
        (f"{RIGHT} I hope", 1.0),
        (f"<answer>1</answer> no, {RIGHT}", 1.0),
        (f"{RIGHT}<answer>1</answer>", 0.0),
        ("<think>25*3+7-3</think>79", 0.0),
        ("<answer>25*3+7-3", 0.0),
        ("", 0.0),
    ],
)
def test_form_and_equation_pay_apart(text, reward):
    assert TASK.reward(ASKED, text) == pytest.approx(reward)


TERMS = st.recursive(
    st.integers(0, 99).map(str),
    lambda terms: (
        st.tuples(terms, st.sampled_from("+-*/"), terms).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | terms.map(lambda t: f"(-{t})")
    ),
    max_leaves=8,
)


@given(TERMS)
def test_evaluates_as_python_does_in_fractions(text):
    numbers = [int(part) for part in text.translate(str.maketrans("+-*/()", " " * 6)).split()]
    spelt = " ".join(f"Fraction({part})" if part.isdigit() else part for part in split(text))
    try:
        want = eval(spelt, {"Fraction": Fraction})
    except ZeroDivisionError:
        assert evaluate(text) == (None, [])
    else:
        value, used = evaluate(text)
        assert value == want and sorted(used) == sorted(numbers)


def split(text):
    for sign in "+-*/()":
        text = text.replace(sign, f" {sign} ")
    return text.split()


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9", "7//2", "1/0", "3(4)", "*3", "()", "3,4", "+3", "1.5", "a", "1_0", "007", "3 4", "(",
        "__import__('os')", "1+" * 100 + "1", "(" * 199 + "1", "1\n+1", "²", "0x1", "1e3",
    ],
)  # fmt: skip
def test_nothing_else_is_an_expression(text):
    assert evaluate(text) == (None, [])


def test_sizes():
    assert isinstance(get_task("countdown", 3), Countdown) and get_task("countdown").size == 4
    for size in (2, 7):
        with pytest.raises(ValueError, match=f"got size {size} for countdown, want 3 to 6 numbers"):
            get_task("countdown", size)
    with pytest.raises(ValueError, match="got 10001 held-out problems, want 1 to 10000 for countdown"):
        TASK.held_out(10_001)
