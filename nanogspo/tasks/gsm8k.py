"""GSM8K: word problems of grade school, with an answer that ends in "#### 72".

    --task gsm8k                     hf:openai/gsm8k:main, through `datasets`
    --task gsm8k:train.jsonl         or any rows of {"question", "answer"} that rows.py reads

`exact` is strict: the number after the last #### or in the last \\boxed{}, else a last line that is only a number, or
that says "answer is" or "answer:" and one. `metrics` adds `lenient`: the last number anywhere, as
lm-evaluation-harness's flexible-extract. Their difference is form, not arithmetic. The reward is 1 for exact,
0.5 for lenient alone.

A tenth of the rows is held out by a hash of the question, so a run on the train split is measured without the test
split. The calculator notes of the reference answers (<<48/2=24>>) are taken out.      Tests: tests/test_gsm8k.py
"""

import re

from nanogspo.inputs import named
from nanogspo.tasks.addition import last_number
from nanogspo.tasks.base import Problem
from nanogspo.tasks.forms import filled
from nanogspo.tasks.prompts import PromptRows
from nanogspo.tasks.rows import read_rows

INSTRUCTION = 'Solve the problem step by step. End with a line of "#### " and the number.'
MARKED = re.compile(r"####[ $*]*([-−]?[0-9][0-9,.]*)|\\boxed\{([^{}]*)\}")
LAST_LINE = re.compile(r"(?:.*\banswer(?: is|:))?[\s*$€£]*([-−]?[0-9][0-9,]*(?:\.[0-9]+)?)[\s*$%.]*", re.IGNORECASE)


class Gsm8k(PromptRows):
    def __init__(self, source: str = ""):
        rows = [(where, _row(where, row)) for where, row in read_rows(source or "hf:openai/gsm8k:main")]
        super().__init__(rows, name="gsm8k", held_out=len(rows) // 10)

    def reward(self, problem: Problem, answer_text: str) -> float:
        return 1.0 if self.exact(problem, answer_text) else 0.5 * self.metrics(problem, answer_text)["lenient"]

    def exact(self, problem: Problem, answer_text: str) -> bool:
        return strict(answer_text) == strict(problem.answer)

    def metrics(self, problem: Problem, answer_text: str) -> dict[str, float]:
        return {"lenient": float(last_number(answer_text) == strict(problem.answer))}


def _row(where: str, row: dict) -> dict:
    with named(where):
        question, answer = filled(row.get("question"), "question"), filled(row.get("answer"), "answer")
        if "####" not in answer:
            raise ValueError('got an answer without "#### " and a number, want one at its end; mend the row')
    return {**row, "prompt": f"{question}\n\n{INSTRUCTION}\n", "answer": re.sub(r"<<.*?>>", "", answer)}


def strict(text: str) -> str:
    """The number that the text says is its answer; "none" where it says none."""
    marked = MARKED.findall(text)
    if marked:
        return last_number("".join(marked[-1])) or "none"
    found = LAST_LINE.fullmatch(text.strip().rpartition("\n")[2])
    return last_number(found[1]) if found else "none"
