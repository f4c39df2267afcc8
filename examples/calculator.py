"""An environment of several turns: the model is asked for a product and may call a calculator before it answers.

python train.py --model Qwen/Qwen3-0.6B --environment examples/calculator.py:Calculator --max-turns 4
"""

import ast
import operator
import random

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg}


def calculate(node):
    """The value of numbers, + - * and brackets; anything else raises."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
    return OPERATORS[type(node.op)](*map(calculate, parts))


class Calculator:
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    function = {"name": "calculate", "description": "Work out a sum or product.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    truncated_reward = 0.0  # for an episode that --max-turns or a token limit cuts off

    def reset(self, row, seed):
        draw = random.Random(seed)
        self.a, self.b = row.get("a") or draw.randint(100, 999), row.get("b") or draw.randint(100, 999)
        return [{"role": "user", "content": f"What is {self.a} * {self.b}? Reply with the number alone."}]

    def step(self, message):
        calls = message.get("tool_calls")
        if not calls:  # an answer: the end
            return [], True, float(message["content"].strip().replace(",", "") == str(self.a * self.b))
        return [{"role": "tool", "content": self.call(call["function"])} for call in calls], False, None

    def call(self, function):
        try:
            return str(calculate(ast.parse(function["arguments"]["expression"], mode="eval").body))
        except Exception as error:  # what the model wrote is no sum: it reads why
            return f"error: {error}"[:200]
