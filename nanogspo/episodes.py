"""Episodes: conversations of several turns with an environment, sampled for all prompts and answers at once.

    tokens      p p p p | a a a E | b b b b b | a a E | b b b | a a a a E          E: the stop token that was sampled
    loss_mask   . . . .   1 1 1 1   . . . . .   1 1 1   . . .   1 1 1 1 1

p, the prompt: what the chat template makes of the messages of `reset`. a, a turn: as it was sampled, never encoded
anew. b, a bridge: what the template prints between two turns, made by rendering the conversation with a placeholder
for the turn and encoding what follows the placeholder's stop token. It holds the environment's messages (tool results,
a customer's words) and the next generation prompt; nothing of it is scored.

A turn's prompts are prefilled anew for the whole batch, because keeping the keys of earlier turns would take a cache
that grows in the middle. Cost: LOG.md. Each answer has its own random numbers for every turn, so an
episode depends on nothing but the weights, its row and its number.

Reading order: sample_episodes, Episode, bridge, reencoded.
Lesson: lessons/15_several_turns.md      Tests: tests/test_episodes.py
"""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable

from torch import Tensor

from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.families import ModelConfig
from nanogspo.model import Transformer
from nanogspo.rollout import Answer, generate
from nanogspo.tasks.rewards import Mean

PLACEHOLDER = "PLACEHOLDER-OF-A-SAMPLED-TURN"
TOOL_CALL = re.compile(r"\n?<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Qwen, Hermes, SmolLM


@dataclasses.dataclass
class Episode:
    """One answer's conversation. It abstains (reward nan) if no step gave a reward, or the environment failed."""

    number: int  # of its prompt, in the run
    answer: int  # 0 .. G - 1
    row: dict
    run_seed: int
    messages: list[dict] = dataclasses.field(default_factory=list)  # the whole conversation, the last words too
    tokens: list[int] = dataclasses.field(default_factory=list)
    loss_mask: list[bool] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)  # of sampled tokens
    experts: list[Tensor] = dataclasses.field(default_factory=list)  # likewise, a tensor a turn: rollout.Answer
    history: list[dict] = dataclasses.field(default_factory=list)  # the assistant's messages
    rewards: list[float] = dataclasses.field(default_factory=list)  # of the steps that gave one
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # of the rewards that were dicts
    tools: list[dict] | None = None
    truncated_reward: float | None = None
    done: bool = False  # the environment has ended it
    failed: str = ""  # what went wrong in the environment
    reencoded: str = ""  # see `reencoded`

    @property
    def reward(self) -> float:
        return sum(self.rewards) if self.rewards and not self.failed else math.nan

    @property
    def truncated(self) -> bool:
        return not self.done and not self.failed

    @property
    def text(self) -> str:
        """What the assistant said last."""
        return self.history[-1]["content"]

    def request(self, first_prompt: int) -> dict:
        # the same for all answers to a prompt; a str seed goes through SHA-512
        seed = random.Random(f"{self.run_seed}-{self.number}").getrandbits(31)
        where = [first_prompt, self.number, self.answer]
        return {"id": where, "row": self.row, "seed": seed, "history": self.history}

    def add(self, tokens: list[int], scored: bool) -> None:
        self.tokens += tokens
        self.loss_mask += [scored] * len(tokens)

    def said(self, answer: Answer, text: str) -> None:
        """The model's turn."""
        self.add(answer.tokens, True)
        self.logp += answer.logp
        self.experts += [] if answer.experts is None else [answer.experts]
        self.history.append(assistant_message(text))
        self.messages.append(self.history[-1])

    def replied(self, reply: dict) -> None:
        """The environment's turn, or its reset."""
        self.failed = reply.get("failed", "")
        if not self.failed:
            self.messages += reply["messages"]
            self.tools, self.truncated_reward = reply["tools"], reply["truncated_reward"]
            self.rewards += [reply["reward"]] * (reply["reward"] is not None)
            self.done = reply["done"]
            for name, value in reply["parts"].items():
                self.parts[name] = self.parts.get(name, 0.0) + value


def sample_episodes(
    model: Transformer,
    chat: Chat,
    environments: Callable[[list[dict]], list[dict]],
    rows: list[dict],
    config: TrainConfig,
    *,
    first_prompt: int,
    every: int = 1,
    on_step: Callable[[int, int], bool] | None = None,
) -> list[Episode] | None:
    """config.group_size episodes for each row, prompt-major. None when on_step ended the sampling.

    environments          plays one turn of many episodes: run/environments.py
    first_prompt          number of the first row, as in rollout.generate; on_step also
    every                 from one row to the next the number rises by so many: other processes have those between
    max_turns             of the model in an episode
    max_new_tokens        of a turn; one that is cut there ends its episode
    max_episode_tokens    prompt and messages included: another turn is sampled only if it has room in full
    """
    G, stopped = config.group_size, False
    episodes = [Episode(first_prompt + n // G * every, n % G, rows[n // G], config.seed) for n in range(G * len(rows))]
    room = turn_room(model.config, config)
    begin(episodes, chat, environments, first_prompt, room)
    running = episodes

    def watch(complete: int, length: int) -> bool:
        nonlocal stopped
        stopped = bool(on_step and on_step(len(episodes) - len(running) + complete, length))
        return stopped

    for turn in range(config.max_turns):
        prompts = [e.tokens for e in (running if turn else running[::G])]
        answers = generate(
            model,
            prompts,
            group_size=1 if turn else G,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            eos_ids=chat.tokenizer.eos_ids,
            seed=config.seed,
            first_prompt=first_prompt,
            streams=[(e.number, e.answer if turn else 0, turn) for e in running[:: 1 if turn else G]],
            max_rows=config.rollout_rows,
            on_step=watch,
        )
        if stopped:
            return None
        for e, answer in zip(running, answers, strict=True):
            e.said(answer, chat.tokenizer.decode(answer.tokens))
        asked = [e for e, answer in zip(running, answers, strict=True) if answer.finished and not e.failed]
        for e, reply in zip(asked, environments([e.request(first_prompt) for e in asked]), strict=True):
            e.replied(reply)
            if e.truncated and turn + 1 < config.max_turns:
                go_on(e, chat, reply["messages"], room)
        running = [e for e in asked if not e.loss_mask[-1]]  # those that have got a bridge
        if not running:
            break
    for e in episodes:
        if e.truncated and e.truncated_reward is not None:
            e.rewards.append(e.truncated_reward)
        e.reencoded = "" if e.failed else reencoded(chat, e)
    return episodes


def episode_facts(episodes: list[Episode]) -> dict[str, float]:
    """What metrics.jsonl says about a rollout of episodes."""
    kinds = [e.reencoded for e in episodes]
    parts = [e.parts for e in episodes if not e.failed]
    names = {name: None for own in parts for name in own}
    return {f"environment/{name}": Mean.of([own.get(name, 0.0) for own in parts]) for name in names} | {
        "turns": Mean.of([len(e.history) for e in episodes]),
        "environment_failed": sum(bool(e.failed) for e in episodes),
        "reencoded_diff_frac": Mean.of([kind in ("turns", "elsewhere") for kind in kinds]),
        "thinking_dropped_frac": Mean.of([kind == "thinking" for kind in kinds]),
    }


def turn_room(model: ModelConfig, config: TrainConfig) -> int:
    """The most tokens an episode may have when a turn begins."""
    return min(config.max_episode_tokens, model.max_positions) - config.max_new_tokens


def begin(episodes: list[Episode], chat: Chat, environments: Callable, first_prompt: int, room: int) -> None:
    """Reset, and the prompts. An episode that cannot begin has the prompt of its group, or an empty question where none
    can: it is sampled like every other one, so that a rollout keeps its shape, and abstains."""
    for e, reply in zip(episodes, environments([e.request(first_prompt) for e in episodes]), strict=True):
        e.replied(reply)
    empty = chat.tokenizer.chat([{"role": "user", "content": ""}], **chat.template_kwargs)
    for _, group in itertools.groupby(episodes, key=lambda e: e.number):
        group = list(group)
        tokens, why, first = empty, "", next((e for e in group if not e.failed), None)
        if first:
            try:
                tokens = prompt_of(chat, first, room)
            except ValueError as error:
                why = str(error)
        for e in group:
            if not e.failed and (e.messages, e.tools) != (first.messages, first.tools):
                e.failed = "reset: messages other than its group's, want those that row and seed decide"
            e.failed = e.failed or why
            e.add(tokens, False)


def go_on(e: Episode, chat: Chat, new: list[dict], room: int) -> None:
    """Add the bridge to another turn, if it has room."""
    try:
        tokens = bridge(chat, e, new)
    except ValueError as error:  # the template does not take these messages
        e.failed = str(error)
        return
    if len(e.tokens) + len(tokens) <= room:
        e.add(tokens, False)


def template_variables(chat: Chat, e: Episode) -> dict:
    return chat.template_kwargs | ({"tools": e.tools} if e.tools else {})


def prompt_of(chat: Chat, e: Episode, room: int) -> list[int]:
    if e.tools and not chat.tokenizer.spells("tools"):
        want = "want a model whose template does, such as Qwen/Qwen3-0.6B, or an environment without `tools`"
        raise ValueError(f"got an environment with tools, which the chat template does not read; {want}")
    tokens = chat.tokenizer.chat(e.messages, **template_variables(chat, e))
    if len(tokens) > room:
        raise ValueError(f"got a prompt of {len(tokens)} tokens, want at most {room}, which leaves room for a turn")
    return tokens


def bridge(chat: Chat, e: Episode, new: list[dict]) -> list[int]:
    """Token ids between the stop token of the turn just sampled and the first token of the next one."""
    before = e.messages[: len(e.messages) - len(new) - 1]
    turns = [*before, {"role": "assistant", "content": PLACEHOLDER}, *new]
    after = chat.tokenizer.render(turns, **template_variables(chat, e)).partition(PLACEHOLDER)[2]
    tokens = chat.tokenizer.encode_continuation(after)
    stop = next((n for n, token in enumerate(tokens) if token in chat.tokenizer.eos_ids), None)
    if stop is None:
        raise ValueError(f"got a template that ends a turn in {after[:20]!r}, want a stop token there")
    return tokens[stop + 1 :]  # that stop token was sampled


def assistant_message(text: str) -> dict:
    """A turn as a message: `content`, and where the text has them `reasoning_content` and `tool_calls`.

    The names are those of transformers' chat templates. A call that is not a JSON object with a name, and arguments in
    an object, stays in the content: the environment sees what the model wrote.
    """
    thought, closed, content = text.rpartition("</think>")
    message = {"role": "assistant"}
    if closed:
        message["reasoning_content"] = thought.rpartition("<think>")[2].strip("\n")
        content = content.lstrip("\n")
    calls = []

    def take(match: re.Match) -> str:
        try:
            call = json.loads(match[1])
        except (ValueError, RecursionError):
            return match[0]
        if not isinstance(call.get("name"), str) or not isinstance(call.setdefault("arguments", {}), dict):
            return match[0]
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}})
        return ""

    message["content"] = TOOL_CALL.sub(take, content)
    return message | ({"tool_calls": calls} if calls else {})


def reencoded(chat: Chat, e: Episode) -> str:
    """How the ids differ that the template makes of the whole conversation, the worst of all places.

    same        not at all
    thinking    it drops a chain of thought from a turn, or the empty one that it puts into a generation prompt
    turns       what the model said is spelled or cut into tokens otherwise
    elsewhere   something else, which the model was not given as the template has it
    """
    encode, asked = chat.tokenizer.encode_plain, template_variables(chat, e)
    spell = lambda ids: "".join(chr(0xE000 + i) for i in ids)  # noqa: E731     a character a token: a str can search
    last = max(n for n, message in enumerate(e.messages) if message is e.history[-1])
    try:
        again = spell(chat.tokenizer.chat(e.messages[: last + 1], **asked, add_generation_prompt=False))
        past = chat.tokenizer.render(e.messages[:last], **asked, add_generation_prompt=False)
        _, begun, opened = chat.tokenizer.render(e.messages[:last], **asked).removeprefix(past).partition("<think>")
    except ValueError:  # a template may refuse what the model said
        return "turns"
    opened, close = spell(encode(begun + opened)), spell(encode("</think>\n\n"))
    stretches = itertools.groupby(zip(e.loss_mask, e.tokens, strict=True), key=lambda pair: pair[0])
    pieces = [spell(token for _, token in pairs) for _, pairs in stretches]
    fixed = [piece.removesuffix(opened) for piece in pieces[::2]]  # a thought that the prompt opens is of the turn
    turns = [b.removeprefix(a) + c for a, b, c in zip(fixed, pieces[::2], pieces[1::2], strict=True)]
    if not again.startswith(fixed[0]):
        return "elsewhere"
    found, at = set(), len(fixed[0])
    for turn, after in zip(turns, [*fixed[1:], None], strict=True):
        end = len(again) if after is None else again.find(after, at)
        if end < 0:
            return "elsewhere"
        matches = str.startswith if after is None else str.__eq__  # the template goes on after the last turn
        kept = turn.rpartition(close)[2]  # without its chain of thought
        part = again[at:end]
        found.add("same" if matches(part, turn) else "thinking" if matches(part, kept) else "turns")
        at = end + len(after or "")
    return max(found, key=["same", "thinking", "turns"].index)


def probe(model: ModelConfig, chat: Chat, environments: Callable, row: dict, config: TrainConfig) -> int:
    """Tokens of the first row's prompt. ValueError where the environment or the chat template does not take it."""
    if not chat.tokenizer.has_chat_template:
        want = "want an instruct model; change --model"
        raise ValueError(f"got --environment with a model without a chat template, {want}")
    begin([episode := Episode(0, 0, row, config.seed)], chat, environments, -1, turn_room(model, config))
    if episode.failed:
        raise ValueError(f"the environment cannot begin: {episode.failed}")
    return len(episode.tokens)
