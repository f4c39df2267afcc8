"""Countdown: make an equation of given numbers. The task that TinyZero showed a small model learning to think with.

    Using the numbers [3, 25, 7], create an equation that equals 82. ...   ->   <answer>25 * 3 + 7</answer>

    reward = 0.1 * form + 1 * right                                                                     (1)

form   after the thinking there is nothing but <answer>...</answer>
right  the last <answer> holds an expression of + - * / and brackets that uses every number once and equals the target

An expression is read by `ast` and computed in fractions: nothing is executed, 9**9**9 is refused unread and 1/3*3 is 1.
Questions are made from an expression, so each has a solution; sums and differences twice as often as the others, which
mostly miss the targets, 10 to 99. A question belongs to a side by its numbers, whatever their order, and its target.

Source: TinyZero (github.com/Jiayi-Pan/TinyZero) and GRPO-Zero, prompt and reward; theirs allow an error of 1e-5. What
is left out: their prompt for base models ends in "<think>".      Tests: tests/test_countdown.py
"""

import ast
import operator
import random
import re
import string
from fractions import Fraction

from nanogspo.tasks.base import Problem, first_distinct, is_held_out, refuse_count

ANSWER = re.compile(r"<answer>([^<>]*)</answer>")
FORM = re.compile(rf"\s*{ANSWER.pattern}\s*")
EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,200}")  # short, because brackets cost the parser stack
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Countdown:
    name = "countdown"
    characters = string.ascii_letters + string.digits + " \n<>[](){}+-*/=.,:"

    def __init__(self, size: int = 4):
        """size  most numbers of a question; every count from 3 to size is equally likely"""
        if not 3 <= size <= 6:
            raise ValueError(f"got size {size} for countdown, want 3 to 6 numbers; try 4")
        self.size = size

    def train_problem(self, n: int, seed: int) -> Problem:
        return self._draw(f"{seed}/{n}", held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        refuse_count(count, 10_000, "countdown")  # of three numbers alone there are 100,000 held-out questions
        return first_distinct(lambda n: self._draw(f"held-out/{n}", held_out=True), count, lambda p: _key(**p.row))

    def reward(self, problem: Problem, answer_text: str) -> float:
        """Equation (1). Whether the thinking is still in the text or was dropped before makes no difference."""
        form = FORM.fullmatch(answer_text.rpartition("</think>")[2]) is not None
        return 0.1 * form + self.exact(problem, answer_text)

    def exact(self, problem: Problem, answer_text: str) -> bool:
        answers = ANSWER.findall(answer_text)
        value, used = evaluate(answers[-1]) if answers else (None, [])
        return value == problem.row["target"] and sorted(used) == sorted(problem.row["numbers"])

    def _draw(self, stream: str, *, held_out: bool) -> Problem:
        dice = random.Random(stream)
        while True:
            numbers = [dice.randint(1, 99) for _ in range(dice.randint(3, self.size))]
            terms = [*map(str, numbers)]
            while len(terms) > 1:
                joined = f"({terms.pop()} {dice.choice('++--*/')} {terms.pop()})"
                terms.insert(dice.randrange(len(terms) + 1), joined)
            target, _ = evaluate(terms[0])
            if target in range(10, 100) and is_held_out(_key(numbers, int(target))) == held_out:
                return _problem(numbers, int(target), terms[0][1:-1])


def evaluate(text: str) -> tuple[Fraction | None, list[int]]:
    """(value, the numbers in it) of an expression; (None, []) if it is none, or divides by 0."""
    used = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        used.append(int(node.value))
        return Fraction(node.value)

    try:
        if EXPRESSION.fullmatch(text):
            return value(ast.parse(text.strip(), mode="eval").body), used
    except (SyntaxError, KeyError, AttributeError, TypeError, ZeroDivisionError):  # KeyError: ** and //
        pass
    return None, []


def _key(numbers: list[int], target: int) -> str:
    return f"{sorted(numbers)}={target}"


def _problem(numbers: list[int], target: int, solution: str) -> Problem:
    request = (
        f"Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. "
        "And return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
    )
    answer = f"<think>\n{solution} = {target}\n</think>\n<answer>{solution}</answer>"
    row = {"numbers": numbers, "target": target}
    return Problem(f"User: {request}\nAssistant: ", [{"role": "user", "content": request}], answer, row)
