"""Environments: what a model talks to over several turns, and how one turn of many episodes is played.

    class Environment:                                                a class in the user's FILE.py
        tools = [...]                                                 optional: JSON schemas, for the chat template
        truncated_reward = 0.0                                        optional: what an episode earns that a limit ends
        def reset(self, row, seed) -> messages                        the conversation up to the model's first turn
        def step(self, message) -> (messages, done, reward)           after each of its turns

A reward is a number, None, or a dict of numbers: their sum counts, and each is a metric, environment/NAME: its mean
over the episodes that did not fail, 0 in those without it.

A request names an episode by everything that decides it: the row, the seed and what the model has said so far. So a
worker process that was killed can be replaced: the new one replays the episode, step by step. While none is, each
episode has an object that lives from turn to turn.

    request   {"id": [rollout, prompt, answer], "row": {...}, "seed": 1, "history": [assistant messages]}
    reply     {"messages": [...], "done": bool, "reward": float | None, "parts": {NAME: float}, "tools": [...] | None,
               "truncated_reward": ...}
              or {"failed": "step: ZeroDivisionError: division by zero"}

reset and step must depend on nothing else: all episodes of a group begin with the same messages.

This file is imported by the processes that environments run in, so it stays light; run/environments.py starts them.
Tests: tests/test_environments.py
"""

import json
import math
import sys
from collections.abc import Callable
from typing import Protocol

from nanogspo.inputs import explained
from nanogspo.tasks.conversation import Conversation
from nanogspo.tasks.rewards import own

SHIPPED = {"conversation": Conversation}  # the others are classes in users' files


class Environment(Protocol):
    def reset(self, row: dict, seed: int) -> list[dict]: ...

    def step(self, message: dict) -> tuple[list[dict], bool, float | dict[str, float] | None]: ...


def serve(source: str) -> tuple[None, Callable[[dict], dict]]:
    """For run/worker.py. source: FILE.py:Class"""
    file, _, name = source.rpartition(":")
    make, live = SHIPPED.get(source) or own(file, name, "--environment"), {}
    if not (hasattr(make, "reset") and hasattr(make, "step")):
        raise ValueError(f"{source}: got no class with reset and step, want reset(row, seed) and step(message)")
    return None, lambda request: play(make, live, request)


def play(make: Callable[[], Environment], live: dict, request: dict) -> dict:
    """The reply to a request. live: the environments at work, by episode, each with the number of its steps."""
    episode, history, environment, reply = tuple(request["id"]), request["history"], None, None
    try:
        environment, steps = live.pop(episode, (None, 0))
        if environment is None or steps != len(history) - 1:  # a new episode, or one whose process was replaced
            for other in [other for other in live if other[0] != episode[0]]:
                del live[other]  # of an earlier rollout
            environment = make()
            reply = environment.reset(request["row"], request["seed"]), False, None
            for message in history[:-1]:
                environment.step(message)
        reply = _checked(environment, environment.step(history[-1]) if history else reply)
    except (Exception, SystemExit) as error:  # somebody else's program: it may fail in any way
        file = getattr(sys.modules.get(type(environment).__module__), "__file__", "")
        return {"failed": f"{'step' if history else 'reset'}: {explained(error, file)}"}
    if not reply["done"]:
        live[episode] = environment, len(history)
    return reply


def _checked(environment: Environment, given: tuple) -> dict:
    """What an environment gave. ValueError says what it is instead."""
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise ValueError(f"got {str(given)[:80]}, want (messages, done, reward)")
    messages, done, reward = given
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(f'got messages {str(messages)[:80]}, want a list of {{"role": ..., "content": ...}}')
    if not messages and not done:
        raise ValueError("got no messages and not done, want what the model is to answer")
    optional = {name: getattr(environment, name, None) for name in ("tools", "truncated_reward")}
    parts = {str(k): float(v) for k, v in reward.items()} if isinstance(reward, dict) else {}
    reward = sum(parts.values()) if isinstance(reward, dict) else reward
    for value in (reward, optional["truncated_reward"]):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"got reward {value}, want a finite number or None")
    reward = None if reward is None else float(reward)
    reply = {"messages": messages, "done": bool(done), "reward": reward, "parts": parts, **optional}
    return json.loads(json.dumps(reply))
