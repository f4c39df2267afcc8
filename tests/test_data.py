"""nanogspo/data.py: what is drawn for which purpose, and what has no room. Rows of files: tests/test_train.py.

Run: python -m pytest tests/test_data.py
"""

import pytest

from nanogspo import tiny
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.data import Data
from nanogspo.families import model_config
from nanogspo.tasks import get_task

TASK = get_task("addition", 2)
TOKENIZER, RAW = tiny.describe(TASK.characters)


def data(positions=1024, **changes):
    config = TrainConfig(**{"max_new_tokens": 4, "eval_size": 3, "seed": 5, **changes})
    model = model_config({**RAW, "max_position_embeddings": positions})
    return Data.from_task(config, TASK, Chat(TOKENIZER, {}), model)


def test_warm_up_and_probe_draw_other_problems_than_rl():
    """Three streams of one seed; what is held out is none of them, and serves as the example at the end."""
    one = data()
    rl = [TASK.train_problem(n, 5).text for n in range(8)]
    warm_up = [TOKENIZER.decode(one.sft_example(n).tokens) for n in range(8)]
    probe = [problem.text for problem in one.probe(8)]
    assert len(probe) == 8 and rl != probe
    assert not any(text.startswith(first) for texts in (rl, probe) for text, first in zip(warm_up, texts, strict=True))
    assert one.problems == TASK.held_out(3) and one.example_prompt() == one.problems[0].text
    assert data(eval_size=0).problems == [] and data(eval_size=0).example_prompt() == rl[0]


def test_prompts_and_answers_need_room():
    assert data(positions=10).longest_prompt == 6  # "47+38=" and four tokens
    with pytest.raises(ValueError, match=r"prompts of 6 tokens \+ --max-new-tokens 4, want at most 9 together"):
        data(positions=9)
    with pytest.raises(ValueError, match="--max-new-tokens 3 for answers of up to 4 tokens; want at least 4"):
        data(max_new_tokens=3)
