"""nanogspo/tasks/gsm8k.py: strict and lenient answers, and which rows are held out.

Run: python -m pytest tests/test_gsm8k.py
"""

import json
from dataclasses import replace

import pytest

from nanogspo import policy
from nanogspo.config import TrainConfig
from nanogspo.data import read_data
from nanogspo.tasks import get_task
from nanogspo.tasks.base import Problem
from nanogspo.tasks.gsm8k import Gsm8k, strict

ROWS = [
    {"question": f"{n} eggs and 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1:,}"}
    for n in range(980, 1030)
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gsm8k") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("text", "exact", "lenient"),
    [
        ("7 - 1\n#### 6 eggs", 1, 1),
        ("#### 5\n#### 6", 1, 1),
        ("#### 6\nThat was 2 of 3.", 1, 0),
        ("#### 5\nor 6", 0, 1),
        (r"so \boxed{6}, 100 % sure", 1, 0),
        ("#### 6, not 5", 1, 0),
        ("7 - 1 is\n**6**.\n", 1, 1),
        ("$6.00", 1, 1),
        ("2 of them. The answer is 6.", 1, 1),
        ("Final answer: $6", 1, 1),
        ("She has 6.", 0, 1),
        ("There are 7 - 1 = 6 eggs", 0, 1),
        ("6\nI hope", 0, 1),
        ("16", 0, 0),
        ("#### six", 0, 0),
        ("", 0, 0),
    ],
)
def test_strict_and_lenient(path, text, exact, lenient):
    task, problem = Gsm8k(path), Problem("", [], "7-1\n#### 6")
    assert (task.exact(problem, text), task.metrics(problem, text)) == (exact, {"lenient": lenient})
    assert task.reward(problem, text) == (1 if exact else 0.5 * lenient)


def test_rows_become_problems(path):
    task = get_task(f"gsm8k:{path}")
    train, held = [task.train_problem(n, 3) for n in range(45)], task.held_out(5)
    assert sorted(p.row["question"] for p in train + held) == sorted(row["question"] for row in ROWS)
    for problem in train + held:
        assert task.exact(problem, problem.answer) and "<<" not in problem.answer and "+1=" in problem.answer
        assert problem.messages[0]["content"].startswith(problem.row["question"] + "\n") and "####" in problem.text
        assert problem.row["question"] in problem.text and set(problem.text + problem.answer) <= set(task.characters)
        assert strict(problem.answer) == f"{int(problem.row['question'].split()[0]) + 1}"
    with pytest.raises(ValueError, match="want at most the 5 of gsm8k"):
        task.held_out(6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "got null for answer, want a string"),
        ({"question": "q", "answer": "4"}, 'got an answer without "#### "'),
        ({"prompt": "q", "answer": "#### 4"}, "got null for question"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {message}"):
        Gsm8k(path)


def test_it_has_no_size(path):
    with pytest.raises(ValueError, match="got size 2 for gsm8k:.*, which has none; leave --task-size out"):
        get_task(f"gsm8k:{path}", 2)


@pytest.mark.parametrize(("asked", "held_out"), [(200, 5), (3, 3), (0, 0)])
def test_eval_size_says_how_many_of_the_held_out_tenth_are_asked(path, asked, held_out):
    task = get_task(f"gsm8k:{path}")
    config = TrainConfig(eval_size=asked, max_new_tokens=64, dtype="fp32", device="cpu")
    config, tokenizer, outline = policy.describe(config, task)
    config, data = read_data(config, task, tokenizer, replace(outline.config, max_positions=512))
    assert len(data.problems) == config.eval_size == held_out
