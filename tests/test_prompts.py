"""nanogspo/tasks/prompts.py: which side a prompt is on, in which order it comes, and what is left out.

Run: python -m pytest tests/test_prompts.py
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.tasks.base import Problem
from nanogspo.tasks.prompts import PromptRows


def task(*rows, **options):
    return PromptRows([(f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1)], **options)


def rows(*numbers):
    return [{"prompt": f"{n}+1=", "answer": f"{n + 1}", "level": i} for i, n in enumerate(numbers)]


def user(text):
    return {"role": "user", "content": text}


def drawn(one, count, seed=0):
    return [one.train_problem(n, seed) for n in range(count)]


@given(
    numbers=st.lists(st.integers(0, 12), min_size=2, max_size=30),
    count=st.integers(0, 6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_sides_and_epochs(numbers, count, order, seed):
    """So many different prompts are held out, each once, whatever the order; an epoch shows every other row once."""
    count = min(count, len(set(numbers)) - 1)
    one = task(*rows(*numbers), held_out=count)
    held = [p.text for p in one.held_out()]
    assert len(held) == len(set(held)) == count and one.held_out(count)[:1] == one.held_out(1 if count else 0)
    left = [row for row in rows(*numbers) if row["prompt"] not in held]
    assert one.repeats == len(numbers) - len(left) - count
    for epoch in range(2):
        shown = [one.train_problem(epoch * len(left) + n, seed).row for n in range(len(left))]
        assert sorted(shown, key=lambda row: row["level"]) == left
    order.shuffle(numbers)
    assert {p.text for p in task(*rows(*numbers), held_out=count).held_out()} == set(held)


def test_orders_differ_between_epochs_and_seeds():
    one = task(*rows(*range(50)))
    levels = [[p.row["level"] for p in drawn(one, 100, seed)] for seed in (0, 1)]
    assert levels[0] != levels[1] and levels[0][:50] != levels[0][50:] and drawn(one, 9) == drawn(one, 9)


@pytest.mark.parametrize(("count", "held"), [(199, 0), (200, 20), (2500, 200)])
def test_a_tenth_is_held_out_by_default(count, held):
    one = task(*rows(*range(count)))
    assert len(one.held_out()) == held and one.repeats == 0
    with pytest.raises(ValueError, match=f"got {held + 1} held-out .* most the {held} of data; lower --eval-size"):
        one.held_out(held + 1)


def test_a_prompt_is_on_one_side_in_all_its_forms():
    """As text, as messages, and under any system turn."""
    forms = [
        {"prompt": "q"},
        {"prompt": [user("q")]},
        {"prompt": "q", "system": "s"},
        {"prompt": [{"role": "system", "content": "t"}, user("q")]},
    ]
    others = rows(*range(20))
    sides = {n: task(*forms, *others, held_out=n) for n in range(21)}
    for one in sides.values():
        held = sum(p.messages[-1]["content"] == "q" for p in one.held_out())
        train = sum(p.messages[-1]["content"] == "q" for p in drawn(one, 24 - one.repeats - len(one.held_out())))
        assert (held, train) in ((0, 4), (1, 0))
    assert {len(one.held_out()) for one in sides.values()} == {*range(21)}


def test_what_a_row_becomes():
    """Text is for base models, messages for others; columns stay as they are, and the first text names the answer."""
    row = {"prompt": "q", "answer": 4, "solution": "four", "completion": "no", "tags": [None]}
    assert drawn(task(row), 1) == [Problem("q", [user("q")], "four", row)]
    row = {"prompt": [user([{"type": "text", "text": "q"}])], "system": None}
    assert drawn(task(row, system="be brief"), 1) == [
        Problem("", [{"role": "system", "content": "be brief"}, *row["prompt"]], "", row)
    ]
    assert task({"prompt": "ab", "answer": "c"}, {"prompt": [user("d")]}).characters == "abcd"
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        (problem,) = drawn(task({"prompt": "q", "tools": tools}), 1)
        assert problem.tools == [{"name": "f"}] and problem.row["tools"] == tools


@pytest.mark.parametrize(
    ("row", "system"),
    [
        ({"prompt": "q"}, "ours"),
        ({"prompt": "q", "system": "own"}, "own"),
        ({"prompt": [{"role": "system", "content": "own"}, user("q")]}, "own"),
        ({"prompt": [{"role": "system", "content": "own"}, user("q")], "system": "own"}, "own"),
        ({"prompt": "q", "system": ""}, "ours"),
    ],
)
def test_a_row_keeps_its_own_system_turn(row, system):
    assert task(row, system="ours").train_problem(0, 0).messages == [{"role": "system", "content": system}, user("q")]


def test_long_prompts_are_left_out_and_counted():
    """Before the sides are chosen: the held-out set is as large as asked for."""
    numbers = random.Random(0).sample(range(100), 60)

    def too_long(problem):
        return len(problem.text) > 4

    one = task(*rows(*numbers, 3, 3), held_out=2)
    one.leave_out(too_long)
    assert one.left_out == 62 - sum(n < 10 for n in [*numbers, 3, 3]) and len(one.held_out()) == 2
    assert all(len(p.text) == 4 for p in one.held_out() + drawn(one, 20))
    with pytest.raises(ValueError, match="got 2 prompts, all too long, want some .*--max-prompt-tokens"):
        task(*rows(10, 11)).leave_out(too_long)


def test_the_reward_without_a_reward_function():
    one = task({"prompt": "q", "answer": "four\n"})
    problem = one.train_problem(0, 0)
    assert [one.reward(problem, text) for text in (" four", "Four", "", "it is four")] == [1, 0, 0, 0]
    assert one.reward(Problem("q", [], ""), "") == 0 and not hasattr(one, "exact")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "id": 1}, "got a row with 'question', 'id', want a prompt; rename the keys"),
        ({}, "got a row with no keys, want a prompt"),
        ({"prompt": " "}, "got an empty prompt, want text"),
        ({"prompt": 4}, "got number for prompt, want a string"),
        ({"prompt": []}, "got list for prompt, want a non-empty list of messages"),
        ({"prompt": [user("q"), {"role": "assistant", "content": "a"}]}, "a prompt that ends in a turn of assistant"),
        ({"prompt": [{"role": "system", "content": "s"}]}, "got a prompt that ends in a turn of system"),
        ({"prompt": "q", "system": ["s"]}, "got list for system, want a string"),
        ({"prompt": "q", "tools": ["s"]}, "got list for tools, want a list of objects"),
        ({"prompt": [{"role": "system", "content": "s"}, user("q")], "system": "t"}, "got a system that differs"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(ValueError, match=message) as error:
        task({"prompt": "q"}, row)
    assert str(error.value).startswith("rows.jsonl:2: got ") and "\n" not in str(error.value)


def test_a_prompt_that_the_template_refuses_is_named():
    def too_long(problem):
        raise ValueError("got messages, want others")

    with pytest.raises(ValueError, match="^rows.jsonl:1: got messages"):
        task({"prompt": "q"}).leave_out(too_long)
    with pytest.raises(ValueError, match="got --eval-size 2 with 2 different rows, want fewer"):
        task(*rows(1, 2, 2), held_out=2)
