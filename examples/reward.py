"""A reward of your own: half for the right number, half for a short answer. From an empty folder to a first rollout:

    {"prompt": "What is 47+38?", "answer": "85"}          rows.jsonl, one row a line

    python train.py --model Qwen/Qwen3-0.6B --data rows.jsonl --reward examples/reward.py:right_and_short

`row` has every column of the row. Each part is a metric of its own (reward/right_and_short/right); the sum is trained
on. None instead of a number says "no opinion": the answer is then judged by the other rewards alone, or left out.
"""

import re


def right_and_short(answer: str, row: dict) -> dict[str, float] | None:
    if "answer" not in row:
        return None
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    right = bool(numbers) and float(numbers[-1]) == float(row["answer"])
    return {"right": 0.5 * right, "short": 0.5 * (len(answer) <= 40)}
