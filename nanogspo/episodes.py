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

Reading order: sample_episodes, Episode, bridge, reencoded.      Tests: tests/test_episodes.py
"""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Callable

from nanogspo.chat import Chat
from nanogspo.model import Transformer
from nanogspo.rollout import Answer, generate

KINDS = ["same", "thinking", "turns", "elsewhere"]  # see `reencoded`
PLACEHOLDER = "PLACEHOLDER-OF-A-SAMPLED-TURN"
TOOL_CALL = re.compile(r"\n?<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)  # Qwen, Hermes, SmolLM


@dataclasses.dataclass
class Episode:
    """One answer's conversation. It abstains (reward nan) if no step gave a reward, or the environment failed."""

    number: int  # of its prompt, in the run
    answer: int  # 0 .. G - 1
    row: dict
    seed: int  # for reset: the same for all answers to a prompt
    messages: list[dict] = dataclasses.field(default_factory=list)  # the whole conversation, the last words too
    tokens: list[int] = dataclasses.field(default_factory=list)
    loss_mask: list[bool] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)  # of sampled tokens
    history: list[dict] = dataclasses.field(default_factory=list)  # the assistant's messages
    rewards: list[float] = dataclasses.field(default_factory=list)  # of the steps that gave one
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
        where = [first_prompt, self.number, self.answer]
        return {"id": where, "row": self.row, "seed": self.seed, "history": self.history}

    def add(self, tokens: list[int], scored: bool) -> None:
        self.tokens += tokens
        self.loss_mask += [scored] * len(tokens)

    def said(self, answer: Answer, text: str) -> None:
        """The model's turn."""
        self.add(answer.tokens, True)
        self.logp += answer.logp
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


def sample_episodes(
    model: Transformer,
    chat: Chat,
    environments: Callable[[list[dict]], list[dict]],
    rows: list[dict],
    *,
    group_size: int,
    max_new_tokens: int,
    max_turns: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    first_prompt: int = 0,
    max_rows: int = 0,
    on_step: Callable[[int, int], bool] | None = None,
) -> list[Episode] | None:
    """group_size episodes for each row, prompt-major. None when on_step ended the sampling.

    environments     plays one turn of many episodes: tasks/environments.py
    max_new_tokens   of a turn. One that is cut there ends its episode
    max_turns        of the model in an episode
    max_tokens       of an episode, prompt and messages included: the next turn is sampled if it has room in full
    The rest         as in rollout.generate
    """
    episodes = [
        Episode(first_prompt + p, g, row, reset_seed(seed, first_prompt + p))
        for p, row in enumerate(rows)
        for g in range(group_size)
    ]
    room, stopped = max_tokens - max_new_tokens, False
    begin(episodes, chat, environments, first_prompt, room)

    def watch(complete: int, length: int) -> bool:
        nonlocal stopped
        stopped = bool(on_step and on_step(len(episodes) - len(running) + complete, length))
        return stopped

    running = episodes
    for turn in range(max_turns):
        how = {"group_size": group_size, "first_prompt": first_prompt}
        if turn:
            how = {"streams": [(e.number, e.answer, turn) for e in running]}
        answers = generate(
            model,
            [e.tokens for e in (running if turn else episodes[::group_size])],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=chat.tokenizer.eos_ids,
            seed=seed,
            max_rows=max_rows,
            on_step=watch,
            **how,
        )
        if stopped:
            return None
        for e, answer in zip(running, answers, strict=True):
            e.said(answer, chat.tokenizer.decode(answer.tokens))
        asked = [e for e, answer in zip(running, answers, strict=True) if answer.finished and not e.failed]
        for e, reply in zip(asked, environments([e.request(first_prompt) for e in asked]), strict=True):
            go_on(e, reply, chat, room, last=turn + 1 == max_turns)
        running = [e for e in asked if not e.loss_mask[-1]]  # a bridge has been added
        if not running:
            break
    for e in episodes:
        if e.truncated and e.truncated_reward is not None:
            e.rewards.append(e.truncated_reward)
        e.reencoded = "" if e.failed else reencoded(chat, e)
    return episodes


def reset_seed(seed: int, prompt: int) -> int:
    return random.Random(f"{seed}-{prompt}").getrandbits(31)  # a str seed goes through SHA-512


def begin(episodes: list[Episode], chat: Chat, environments: Callable, first_prompt: int, room: int) -> None:
    """Reset, and the prompts. An episode that cannot begin has the prompt of its group, or an empty question where none
    can: it is sampled like every other one, so that a rollout keeps its shape, and abstains."""
    firsts: dict[int, Episode] = {}
    for e, reply in zip(episodes, environments([e.request(first_prompt) for e in episodes]), strict=True):
        e.replied(reply)
        if not e.failed and e.number in firsts:
            if (e.messages, e.tools) != (firsts[e.number].messages, firsts[e.number].tools):
                e.failed = "reset: messages that differ from its group's, want those that row and seed decide"
        elif not e.failed:
            try:
                e.add(prompt_of(chat, e), False)
            except ValueError as error:
                e.failed = str(error)
            if len(e.tokens) > room:
                e.failed = f"reset: got a prompt of {len(e.tokens)} tokens, want at most {max(room, 0)}: a turn's room"
            if not e.failed:
                firsts[e.number] = e
    empty = chat.tokenizer.chat([{"role": "user", "content": ""}], **chat.template_kwargs)
    for e in episodes:
        first = firsts.get(e.number, e)
        e.tokens = list(empty if first.failed else first.tokens)
        e.loss_mask = [False] * len(e.tokens)


def go_on(e: Episode, reply: dict, chat: Chat, room: int, last: bool) -> None:
    """Take the environment's reply; if there is to be another turn, add the bridge to it."""
    e.replied(reply)
    if e.failed or e.done or last:
        return
    try:
        tokens = bridge(chat, e, reply["messages"])
    except ValueError as error:  # the template does not take these messages
        e.failed = str(error)
        return
    if len(e.tokens) + len(tokens) <= room:
        e.add(tokens, False)


def template_variables(chat: Chat, e: Episode) -> dict:
    return chat.template_kwargs | ({"tools": e.tools} if e.tools else {})


def prompt_of(chat: Chat, e: Episode) -> list[int]:
    if e.tools and not chat.tokenizer.spells("tools"):
        raise ValueError("got an environment with tools, which the chat template does not read, want another model")
    return chat.tokenizer.chat(e.messages, **template_variables(chat, e))


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
    variables = template_variables(chat, e) | {"add_generation_prompt": False}
    last = max(n for n, message in enumerate(e.messages) if message is e.history[-1])
    try:
        again = chat.tokenizer.chat(e.messages[: last + 1], **variables)
        closed = chat.tokenizer.render(e.messages[:last], **variables)
        opened = chat.tokenizer.render(e.messages[:last], **template_variables(chat, e)).removeprefix(closed)
    except ValueError:  # a template may refuse what the model said
        return "turns"
    _, begun, thought = opened.partition("<think>")
    opened = chat.tokenizer.encode_plain(begun + thought)  # it belongs to the turn, not to what stands before
    found, at, turn = "same", 0, []
    stretches = itertools.groupby(zip(e.loss_mask, e.tokens, strict=True), key=lambda pair: pair[0])
    for scored, pairs in stretches:
        tokens = [token for _, token in pairs]
        if scored:
            turn += tokens
            continue
        cut = len(tokens) - len(opened) * (tokens[len(tokens) - len(opened) :] == opened)
        start = _find(again, tokens[:cut], at)
        if start is None or (start and not at):
            return "elsewhere"
        found = max(found, _compare(chat, turn, again[at:start]), key=KINDS.index)
        at, turn = start + cut, tokens[cut:]
    end = max((n for n, token in enumerate(again) if token in chat.tokenizer.eos_ids), default=len(again)) + 1
    end -= turn[-1] not in chat.tokenizer.eos_ids  # cut off, so it has no stop token
    return max(found, _compare(chat, turn, again[at:end]), key=KINDS.index)


def _compare(chat: Chat, turn: list[int], again: list[int]) -> str:
    close = chat.tokenizer.encode_plain("</think>\n\n")
    after = next((n for n in range(len(turn), 0, -1) if turn[n - len(close) : n] == close), 0)
    return "same" if turn == again else "thinking" if turn[after:] == again else "turns"


def _find(tokens: list[int], part: list[int], at: int) -> int | None:
    """Where part begins in tokens, from `at` on."""
    return next((n for n in range(at, len(tokens)) if tokens[n : n + len(part)] == part), None)


def probe(chat: Chat, environments: Callable, row: dict, seed: int, room: int) -> int:
    """Tokens of the first row's prompt. ValueError where the environment or the chat template does not take it."""
    if not chat.tokenizer.has_chat_template:
        raise ValueError(
            "got --environment with a model without a chat template, want an instruct model: change --model"
        )
    episode = Episode(0, 0, row, reset_seed(seed, 0))
    begin([episode], chat, environments, -1, room)
    if episode.failed:
        raise ValueError(f"the environment cannot begin with the first row: {episode.failed}")
    return len(episode.tokens)
