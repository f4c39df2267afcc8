"""nanogspo/episodes.py and tasks/environments.py: what is sampled is what is trained on, and environments may fail.

Run: python -m pytest tests/test_episodes.py      Qwen3's own template: REAL_TOKENIZERS, see tests/test_tokenizer.py
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nanogspo import episodes, families
from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.episodes import assistant_message, probe, reencoded, sample_episodes
from nanogspo.experience import experience
from nanogspo.model import Transformer
from nanogspo.packing import Example, score
from nanogspo.rollout import Answer, draw_uniforms, generate
from nanogspo.run.environments import OwnEnvironments
from nanogspo.tokenizer import Tokenizer, load_tokenizer

# As Qwen3's: an empty chain of thought in the generation prompt and in the last turn, dropped from earlier ones
TEMPLATE = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


@functools.cache
def small_tokenizer(template=TEMPLATE):
    """Byte-level BPE of 70 merges: many texts have more than one spelling in ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet)
    backend.train_from_iterator(
        ['user assistant {"name": "calculate", "arguments": {"expression": "12 * 30"}}'], trainer
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    backend.add_tokens([AddedToken(name, normalized=False) for name in names])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(config)}
    return Tokenizer({name: text.encode() for name, text in files.items()}, "a test")


CHAT = Chat(small_tokenizer(), {"enable_thinking": False})
QWEN3 = Path(os.environ.get("REAL_TOKENIZERS", ""), "qwen3")
chats = [pytest.param(CHAT, id="small")]
if os.environ.get("REAL_TOKENIZERS"):
    chats.append(pytest.param(Chat(load_tokenizer(QWEN3), {"enable_thinking": False}), id="qwen3"))


@functools.cache
def tiny_model():
    raw = {"model_type": "qwen3", "vocab_size": CHAT.tokenizer.vocab_size, "hidden_size": 32}
    raw |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    raw |= {"head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return Transformer(families.model_config(raw)).init_weights(0, 0.02)


# For a model without training: 8 more stop tokens, bytes that no ASCII text has, so that one turn in six is cut off
RANDOM_STOPS = {"generation_config.json": json.dumps({"eos_token_id": list(range(248, 256))}).encode()}
RANDOM = Chat(Tokenizer({**CHAT.tokenizer.files, **RANDOM_STOPS}, "a test"), {"enable_thinking": False})
CONFIG = TrainConfig(group_size=2, max_new_tokens=40, max_turns=3, max_episode_tokens=2000, seed=5)


class Asks:
    """Asks row["turns"] times; a reward at each turn, from the number of characters."""

    truncated_reward = -1.0

    def reset(self, row, seed):
        self.row, self.turns = row, 0
        if row.get("reset"):
            raise RuntimeError("no\nmore " + "x" * 999)
        return [{"role": "system", "content": f"seed {seed}"}, {"role": "user", "content": row["ask"]}]

    def step(self, message):
        self.turns += 1
        if self.turns == self.row.get("raise"):
            raise ZeroDivisionError("division by zero")
        if self.turns == self.row.get("odd"):
            return self.row["reply"]
        done = self.turns == self.row.get("turns", 2)
        return [{"role": "user", "content": f"turn {self.turns}"}], done, float(len(message["content"]))


def scripted(monkeypatch, *turns, chat=CHAT):
    """generate gives these texts, turn by turn; one that ends in … is cut off there."""
    seen = []

    def fake(model, prompts, *, group_size=1, **how):
        text = turns[len(seen)]
        tokens = chat.tokenizer.encode_plain(text.removesuffix("…"))
        stop = [] if text.endswith("…") else [chat.tokenizer.encode_plain("<|im_end|>")[0]]
        seen.append((copy.deepcopy(prompts), group_size, how))
        tokens = tokens + stop
        return [
            Answer(p, tokens, [-0.5] * len(tokens), bool(stop)) for p in range(len(prompts)) for _ in range(group_size)
        ]

    monkeypatch.setattr(episodes, "generate", fake)
    return seen


def sample(rows, environment=Asks, chat=CHAT, first_prompt=0, on_step=None, **limits):
    config = dataclasses.replace(CONFIG, **limits)
    how = {"first_prompt": first_prompt, "on_step": on_step}
    return sample_episodes(tiny_model(), chat, OwnEnvironments(environment), rows, config, **how)


def calculator():
    path = Path(__file__).parent.parent / "examples" / "calculator.py"
    spec = importlib.util.spec_from_file_location("calculator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "12 * 30"}}\n</tool_call>'


@pytest.mark.parametrize("chat", chats)
def test_a_conversation_with_a_tool_token_by_token(monkeypatch, chat):
    """The ids are those of the template for the whole conversation, and sampled ones are scored, no others."""
    tokenizer, example = chat.tokenizer, calculator()
    seen = scripted(monkeypatch, "Well.\n" + CALL, "360", chat=chat)
    first, second = sample([{"a": 12, "b": 30}], example.Calculator, chat)
    assert first.reward == 1.0 and first.done and not first.failed and not first.truncated
    assert (first.messages, first.tokens) == (second.messages, second.tokens)
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": "12 * 30"}}}
    assert first.messages[1:] == [
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "content": "360"},
        {"role": "assistant", "content": "360"},
    ]
    variables = {"tools": example.Calculator.tools, "enable_thinking": False}
    prompt = tokenizer.chat(first.messages[:1], **variables)
    text = tokenizer.decode(first.tokens, skip_special_tokens=False)
    assert text == tokenizer.decode(prompt, skip_special_tokens=False) + "Well.\n" + CALL + (
        tokenizer.render(first.messages[:3], **variables).rpartition(CALL)[2] + "360<|im_end|>"
    )
    stretches = [tokenizer.decode([t for t, m in zip(first.tokens, first.loss_mask, strict=True) if m])]
    assert stretches == ["Well.\n" + CALL + "360"]
    assert first.tokens[: len(prompt)] == prompt and sum(first.loss_mask) == len(first.logp)
    (prompts, G, how), (later, one, streams) = seen
    assert (prompts, G, how["first_prompt"]) == ([prompt], 2, 0)
    assert one == 1 and streams["streams"] == [(0, 0, 1), (0, 1, 1)]
    start = len(first.tokens) - len(tokenizer.encode_plain("360<|im_end|>"))
    assert later == [first.tokens[:start]] * 2
    assert {e.reencoded for e in (first, second)} == {"thinking"}  # the empty one of the generation prompt


@pytest.mark.parametrize("chat", chats)
def test_reencoding_says_what_differs(monkeypatch, chat):
    thinks = Chat(chat.tokenizer, {})
    cases = {
        ("ab", "cd"): "same",
        ("<think>\nwhy\n</think>\n\nab", "<think>\nso\n</think>\n\ncd"): "thinking",
        ("ab", '<tool_call>{"name": "f"}</tool_call>'): "turns",
    }
    for turns, found in cases.items():
        scripted(monkeypatch, *turns, chat=chat)
        (e, _) = sample([{"ask": "x"}], chat=thinks if found == "thinking" else without_thinking(chat))
        assert e.reencoded == found, turns
    e.tokens[3] += 1
    assert reencoded(thinks, e) == "elsewhere"


def without_thinking(chat):
    """A template that prints messages and nothing else."""
    tokenizer = copy.copy(chat.tokenizer)
    tokenizer.templates = {"default": TEMPLATE.replace("m.role == 'assistant' and loop.last", "false")}
    return Chat(tokenizer, {})


def test_what_is_sampled_is_trained_on_and_the_first_ratio_is_one(monkeypatch):
    """Ids are never encoded anew: here the sampled ones are no spelling that the tokenizer would choose."""
    model, drawn = tiny_model(), []

    def kept(*args, **how):
        drawn.append(generate(*args, **how))
        return drawn[-1]

    monkeypatch.setattr(episodes, "generate", kept)
    found = sample([{"ask": "a"}, {"ask": "b", "turns": 3}, {"ask": "c"}], chat=RANDOM, group_size=4)
    assert len(drawn) == 3 and 1 <= len(drawn[2]) < len(drawn[1]) < 12
    sampled = {(e.number, e.answer): [t for t, m in zip(e.tokens, e.loss_mask, strict=True) if m] for e in found}
    first = {(i // 4, i % 4): answer.tokens for i, answer in enumerate(drawn[0])}
    assert all(tokens[: len(first[key])] == first[key] for key, tokens in sampled.items())
    assert sum(map(len, sampled.values())) == sum(len(a.tokens) for answers in drawn for a in answers)
    assert sum(len(e.history) for e in found) == sum(map(len, drawn))
    assert "turns" in {e.reencoded for e in found} and "elsewhere" not in {e.reencoded for e in found}
    rows = [Example(e.tokens, e.loss_mask) for e in found]
    A = torch.arange(1.0, 13.0)
    rollout = experience(model, rows, A, updates=2, max_tokens=700, temperature=1.0, device="cpu")
    for batches, old in zip(rollout.minibatches, rollout.old_logp, strict=True):
        for batch, logp in zip(batches, old, strict=True):
            assert torch.equal(score(model, batch)[0].detach(), logp)
            drawn_logp = [lp for i in batch.index.tolist() for lp in found[i].logp]
            assert logp.tolist() == pytest.approx(drawn_logp, abs=1e-4)  # scored in the place where it was drawn


def said(found):
    return [(e.tokens, e.messages, e.rewards, e.reencoded) for e in found]


def test_an_episode_depends_on_its_row_and_number_only():
    rows = [{"ask": "a"}, {"ask": "b", "turns": 3}, {"ask": "c"}]
    together = sample(rows, chat=RANDOM, first_prompt=7)
    assert max(len(e.history) for e in together) > 1
    alone = sample(rows[1:2], chat=RANDOM, first_prompt=8)
    assert said(alone) == said(together[2:4]) and alone[0].tokens != alone[1].tokens
    assert said(sample(rows, chat=RANDOM, first_prompt=7, rollout_rows=2)) == said(together)
    failing = sample([{"ask": "a", "raise": 1}, *rows[1:]], chat=RANDOM, first_prompt=7)
    assert said(failing[2:]) == said(together[2:])
    seeds = [e.request(7)["seed"] for e in (alone[0], together[3], together[0])]
    assert seeds[0] == seeds[1] != seeds[2]
    assert sample(rows, chat=RANDOM, on_step=lambda done, length: True) is None


def test_progress_counts_all_episodes():
    said = []
    sample([{"ask": "a"}], chat=RANDOM, group_size=6, on_step=lambda *step: said.append(step))
    assert all(0 <= complete <= 6 for complete, _ in said) and said[-1][0] == 6


def test_uniforms_of_turns_are_streams_of_their_own():
    """A first turn draws as always; later ones by answer and turn, whatever else is drawn."""
    first = draw_uniforms(3, 4, 5, 2)
    assert torch.equal(draw_uniforms(3, 4, 5, 2, 0, 0), first)
    streams = [draw_uniforms(3, 4, 8, 1, answer, turn) for answer in (0, 1) for turn in (1, 2)]
    numbers = torch.cat([first.flatten(), *(s.flatten() for s in streams)])
    assert len(numbers.unique()) == len(numbers)
    assert torch.equal(draw_uniforms(3, 4, 5, 1, 1, 2), streams[3][:5])


BAD = [{"role": "user"}]
FAILURES = [
    ({"reset": True}, "reset: RuntimeError: no more xxx", 1),
    ({"raise": 1}, "step: ZeroDivisionError: division by zero", 1),
    ({"raise": 2}, "step: ZeroDivisionError: division by zero", 2),
    ({"odd": 1, "reply": 3}, "step: ValueError: got 3, want (messages, done, reward)", 1),
    ({"odd": 1, "reply": (BAD, False, None)}, "step: ValueError: got messages [{'role': 'user'}], want a list", 1),
    ({"odd": 1, "reply": ([], False, None)}, "step: ValueError: got no messages and not done", 1),
    ({"odd": 1, "reply": ([], True, math.nan)}, "step: ValueError: got reward nan, want a finite number", 1),
    ({"odd": 1, "reply": ([], True, "1")}, "step: TypeError: must be real number", 1),
    ({"odd": 1, "reply": ([{"role": "user", "content": "\ud800"}], False, 1)}, "got text with ['\\ud800']", 1),
    ({"ask": "long " * 500}, "got a prompt of ", 1),
]


@pytest.mark.parametrize(("row", "reason", "turns"), FAILURES)
def test_an_environment_that_fails_ends_its_episode_only(monkeypatch, row, reason, turns):
    scripted(monkeypatch, "ab", "cde")
    *failed, good, _ = sample([{"ask": "x"} | row, {"ask": "y"}])
    for e in failed:
        assert e.failed.startswith(reason) and len(e.failed) < 350 and "\n" not in e.failed
        assert math.isnan(e.reward) and not e.truncated and len(e.history) == turns
        assert sum(e.loss_mask) == len(e.logp) > 0 and not e.loss_mask[0]
    assert (good.reward, good.failed, good.messages[-1]["content"]) == (5.0, "", "turn 2")


def test_one_reset_that_fails_leaves_its_group(monkeypatch):
    """The others of the group are asked; an episode that was not reset reads the same prompt, and abstains."""
    scripted(monkeypatch, "ab", "cde")
    made = []

    class Once(Asks):
        def reset(self, row, seed):
            made.append(self)
            if len(made) == 1:
                raise ValueError("not yet")
            messages = super().reset(row, seed)
            return messages if len(made) < 3 else [{"role": "user", "content": "another"}]

    first, second, third = sample([{"ask": "x"}], Once, group_size=3)
    assert first.failed.startswith("reset: ValueError: not yet (test_episodes.py:") and not second.failed
    assert third.failed.startswith("reset: messages other than")
    prompt = second.tokens[: second.loss_mask.index(True)]
    for e in (first, third):
        assert e.tokens[: len(prompt)] == prompt and e.loss_mask.index(True) == len(prompt)


def test_limits_end_an_episode(monkeypatch):
    """A turn without its stop token, the turns, and the tokens, which must leave room for a whole turn."""
    seen = scripted(monkeypatch, "ab", "cde…", "f")
    (e, _) = sample([{"ask": "x", "turns": 9}])
    assert (len(seen), e.truncated, e.rewards, e.reward) == (2, True, [2.0, -1.0], 1.0)
    assert e.messages[-1] == {"role": "assistant", "content": "cde"} and e.loss_mask[-1]
    assert e.reencoded == "thinking"

    seen = scripted(monkeypatch, "ab", "cde", "f")
    (e, _) = sample([{"ask": "x", "turns": 9}], max_turns=2)
    assert (len(seen), e.truncated, e.rewards) == (2, True, [2.0, 3.0, -1.0])
    assert e.messages[-1]["content"] == "turn 2" and e.loss_mask[-1]

    whole = len(seen[1][0][0])  # tokens before the second turn
    for room, turns in ((whole, 2), (whole - 1, 1)):
        seen = scripted(monkeypatch, "ab", "cde", "f")
        (e, _) = sample([{"ask": "x", "turns": 9}], max_episode_tokens=room + 40, max_turns=2)
        assert (len(seen), len(e.history), e.truncated) == (turns, turns, True)

    class Silent(Asks):
        truncated_reward = None

        def step(self, message):
            return *super().step(message)[:2], None

    scripted(monkeypatch, "ab", "cde")
    (e, _) = sample([{"ask": "x", "turns": 9}], Silent, max_turns=1)
    assert e.truncated and math.isnan(e.reward) and not e.failed
    assert (e.text, len(e.history)) == ("ab", 1)


def test_every_turn_has_random_numbers_of_its_own(monkeypatch):
    seen = scripted(monkeypatch, "a", "b", "c")
    sample([{"ask": "x", "turns": 3}, {"ask": "y"}], first_prompt=4)
    assert [how["streams"] for *_, how in seen] == [
        [(4, 0, 0), (5, 0, 0)],  # a first turn draws for all answers of a prompt
        [(4, 0, 1), (4, 1, 1), (5, 0, 1), (5, 1, 1)],
        [(4, 0, 2), (4, 1, 2)],
    ]


def test_another_stop_token_stands_for_the_templates(monkeypatch):
    """Qwen may end a turn with <|endoftext|>: it is kept as sampled, and the bridge follows."""
    files = {**CHAT.tokenizer.files, "generation_config.json": json.dumps({"eos_token_id": 70}).encode()}
    tokenizer = Tokenizer(files, "a test")
    monkeypatch.setattr(episodes, "generate", lambda *_, **how: [Answer(0, [80, 70], [0.0, 0.0], True)])
    (e,) = sample([{"ask": "x"}], chat=Chat(tokenizer, {}), group_size=1)
    text = tokenizer.decode([70, 80], skip_special_tokens=False)
    assert tokenizer.decode(e.tokens, skip_special_tokens=False).count("<|im_end|>") == 3  # system, user, user
    assert text and e.reencoded == "turns" and e.tokens[-2:] == [80, 70]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("four", {"content": "four"}),
        ("<think>\n2 and 2\n</think>\n\nfour", {"reasoning_content": "2 and 2", "content": "four"}),
        ("2 and 2\n</think>\n\nfour", {"reasoning_content": "2 and 2", "content": "four"}),
        ("<think>\n2 and", {"content": "<think>\n2 and"}),
        ("<tool_call>{oh}</tool_call>", {"content": "<tool_call>{oh}</tool_call>"}),
        ('<tool_call>{"name": 1}</tool_call>', {"content": '<tool_call>{"name": 1}</tool_call>'}),
        (
            '<tool_call>{"name": "f", "arguments": 1}</tool_call>',
            {"content": '<tool_call>{"name": "f", "arguments": 1}</tool_call>'},
        ),
        (
            "<tool_call>" + '{"a":' * 9999 + "}</tool_call>",
            {"content": "<tool_call>" + '{"a":' * 9999 + "}</tool_call>"},
        ),
    ],
)
def test_a_turn_as_a_message(text, message):
    assert assistant_message(text) == {"role": "assistant"} | message


def test_several_calls_are_taken_out_of_the_content():
    message = assistant_message('Go.\n<tool_call>{"name": "f", "arguments": {"x": {"y": 1}}}</tool_call>\n' + CALL)
    assert message["content"] == "Go."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": {"x": {"y": 1}}},
        {"name": "calculate", "arguments": {"expression": "12 * 30"}},
    ]


def test_the_calculator_works_out_sums_and_nothing_else():
    environment = calculator().Calculator()
    said = environment.reset({}, 3)
    assert said == calculator().Calculator().reset({}, 3) != calculator().Calculator().reset({}, 4)

    def call(expression):
        function = {"name": "calculate", "arguments": {"expression": expression}}
        reply, done, reward = environment.step({"content": "", "tool_calls": [{"function": function}]})
        assert (len(reply), reply[0]["role"], done, reward) == (1, "tool", False, None)
        return reply[0]["content"]

    assert call("-(2 + 3) * 4.5") == "-22.5"
    for strange in ("9 ** 9 ** 9", "__import__('os')", "1 +", "'a' * 9", 5, "(" * 9999, "9" * 5000):
        assert call(strange).startswith("error: "), strange
    right = str(environment.a * environment.b)
    assert environment.step({"content": f" {right}\n"}) == ([], True, 1.0)
    assert environment.step({"content": right + "1"}) == ([], True, 0.0)


def test_the_first_row_is_tried(monkeypatch):
    def tried(environment, row, chat=CHAT, room=500):
        config = dataclasses.replace(CONFIG, max_episode_tokens=room + 40)
        return probe(tiny_model().config, chat, OwnEnvironments(environment), row, config)

    scripted(monkeypatch, "ab…")
    e, *_ = sample([{"ask": "x"}])
    length = tried(Asks, {"ask": "x"})
    assert length == e.loss_mask.index(True)
    with pytest.raises(ValueError, match="cannot begin: reset: RuntimeError: no more"):
        tried(Asks, {"reset": True})
    with pytest.raises(ValueError, match=f"got a prompt of {length} tokens, want at most {length - 1}"):
        tried(Asks, {"ask": "x"}, room=length - 1)
    plain = Chat(small_tokenizer("{{ messages[0].content }}<|im_end|>"), {})
    with pytest.raises(ValueError, match="environment with tools, which the chat template does not read"):
        tried(calculator().Calculator, {}, plain)
    with pytest.raises(ValueError, match="without a chat template, want an instruct model"):
        tried(Asks, {"ask": "x"}, Chat(small_tokenizer(None), {}))
    with pytest.raises(ValueError, match="that ends a turn in"):
        episodes.bridge(Chat(small_tokenizer("{{ messages[0].content }}"), {}), e, [])
