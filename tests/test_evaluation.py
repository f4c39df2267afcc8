"""nanogspo/evaluation.py: held-out rows scored and answered. Right answers to problems: tests/test_train.py.

Run: python -m pytest tests/test_evaluation.py
"""

import math
from types import SimpleNamespace

import pytest
import torch

from nanogspo import lora, tiny
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.evaluation import EXAM_STREAM, examine, held_out_loss, sample_answers
from nanogspo.packing import Example
from nanogspo.rollout import generate
from nanogspo.tasks.base import Problem

TOKENIZER, _ = tiny.build("0123456789+=", seed=0)
CONFIG = TrainConfig(device="cpu", max_new_tokens=3, micro_batch_tokens=7)


def rows(count=6):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, 14, (n,), generator=g).tolist()  # noqa: E731
    return [Example.answered(draw(1 + i % 4), draw(1 + (i * 2) % 5)) for i in range(count)]


def test_held_out_loss_is_the_mean_over_tokens():
    """One row at a time against the model's own log-softmax; cut into micro-batches the sums are the same. Dropout is
    off, no gradient is kept, and the model is in training mode again."""
    _, model = tiny.build("0123456789+=", seed=0)
    lora.add_lora(model, r=4, alpha=8, targets=["q_proj"], dropout=0.5, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.5)
    logps, right = [], []
    with torch.no_grad():
        model.eval()
        for e in rows():
            z = model.logits(model(torch.tensor([e.tokens])))[0]  # (T, V)
            for t in range(1, len(e.tokens)):
                if e.loss_mask[t]:
                    logps.append(z[t - 1].log_softmax(-1)[e.tokens[t]].item())
                    right.append(z[t - 1].argmax().item() == e.tokens[t])
    model.train()
    loss, accuracy = held_out_loss(model, rows(), CONFIG)
    assert loss == pytest.approx(-sum(logps) / len(logps), rel=1e-5)  # fp32 log-probs, in another order
    assert accuracy == sum(right) / len(right)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_stopped_it_measures_nothing():
    _, model = tiny.build("0123456789+=", seed=0)
    assert all(math.isnan(x) for x in held_out_loss(model, rows(), CONFIG, stop=True))
    on_step = lambda complete, tokens: steps.append(tokens) or True  # noqa: E731
    steps = []
    sample_answers(model, Chat(TOKENIZER, {}), rows(), CONFIG, on_step)
    assert steps == [1]


def test_answers_stand_beside_what_was_asked_for():
    """Greedy, to what comes before the first scored token; prompts that leave no room are passed over."""
    _, model = tiny.build("0123456789+=", seed=0)
    room = model.config.max_positions - CONFIG.max_new_tokens
    conversation = Example([3, 4, 5, 6, 7, 8], [False, False, True, True, False, True])
    examples = [Example.answered([5] * (room + 1), [6]), conversation, *rows(4)]
    got = sample_answers(model, Chat(TOKENIZER, {}), examples, CONFIG)
    assert len(got) == 3
    for row, e in zip(got, examples[1:4], strict=True):
        start = e.loss_mask.index(True)
        [answer] = generate(model, [e.tokens[:start]], max_new_tokens=3, temperature=0.0, eos_ids=TOKENIZER.eos_ids)
        reference = e.tokens[start:4] if e is conversation else e.tokens[start:]
        assert row == {
            "prompt": TOKENIZER.decode(e.tokens[:start], skip_special_tokens=False),
            "answer": TOKENIZER.decode(answer.tokens),
            "reward": None,
            "reference": TOKENIZER.decode(reference),
            "truncated": not answer.finished,
            "length": len(answer.tokens),
        }
    assert sample_answers(model, Chat(TOKENIZER, {}), examples[:1], CONFIG) == []


@pytest.mark.parametrize("environment, rows", [("", 84 // 12), ("own.py:E", 8)])
def test_an_exam_has_problems_of_its_own_and_no_more_rows_than_a_rollout(environment, rows):
    """Prompts of 3 tokens and answers of 10: 12 slots a row, and a rollout of 4 x 2 has 4 x 3 + 8 x 9 = 84."""
    asked = []

    def answers(problems, G, temperature, first, on_step, most=0):
        asked.append((G, temperature, first, most))
        return [None] * G * len(problems), {}

    config = TrainConfig(
        prompts_per_rollout=4, group_size=2, max_new_tokens=10, eval_samples=5, environment=environment
    )
    judged = SimpleNamespace(facts={})
    sampler = SimpleNamespace(
        config=config, chat=SimpleNamespace(prompt=lambda p: [1, 2, 3]), answers=answers, rewards=None,
        environments=None, judge=lambda problems, samples, step: (judged, [1.0], [True] * len(samples)),
    )  # fmt: skip
    right, facts = examine(sampler, [Problem("?", [], "")] * 3, print)
    assert right == 3 and facts["eval_pass_at_5"] == 1
    assert asked == [(1, 0.0, EXAM_STREAM, rows), (5, 1.0, EXAM_STREAM, rows)]
