"""Environments: what a model talks to over several turns, and how one turn of many episodes is played.

    class Environment:                                                a class in the user's FILE.py
        tools = [...]                                                 optional: JSON schemas, for the chat template
        truncated_reward = 0.0                                        optional: what an episode earns that a limit ends
        def reset(self, row, seed) -> messages                        the conversation up to the model's first turn
        def step(self, message) -> (messages, done, reward | None)    after each of its turns

A request names an episode by everything that decides it: the row, the seed and what the model has said so far. So a
worker process that was killed can be replaced: the new one replays the episode, step by step. While none is, each
episode has an object that lives from turn to turn.

    request   {"id": [rollout, prompt, answer], "row": {...}, "seed": 1, "history": [assistant messages]}
    reply     {"messages": [...], "done": bool, "reward": float | None, "tools": [...] | None, "truncated_reward": ...}
              or {"failed": "step: ZeroDivisionError: division by zero"}

reset and step must depend on nothing else: all episodes of a group begin with the same messages.

Tests: tests/test_episodes.py
"""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

SLOW = 1.0  # seconds of one call in this process, from which a warning is due


class Environment(Protocol):
    def reset(self, row: dict, seed: int) -> list[dict]: ...

    def step(self, message: dict) -> tuple[list[dict], bool, float | None]: ...


class Environments:
    """Plays the episodes of a rollout in this process. given: a class, or an object that is copied for each episode."""

    def __init__(self, given: type[Environment] | Environment):
        self.make = given if isinstance(given, type) else lambda: copy.deepcopy(given)
        self.live: dict = {}
        self.warned = False

    def __call__(self, requests: Sequence[dict]) -> list[dict]:
        """A reply for each request: to its reset where the history is empty, else to its last message."""
        began = time.monotonic()
        replies = [play(self.make, self.live, copy.deepcopy(request)) for request in requests]
        seconds = (time.monotonic() - began) / max(1, len(requests))
        if seconds > SLOW and not self.warned:
            self.warned = True
            print(f"the environment takes {seconds:.1f} s a call; as FILE.py:Class its calls run side by side")
        return replies


def play(make: Callable[[], Environment], live: dict, request: dict) -> dict:
    """One reply. live: the environments at work, by episode, each with the number of its steps."""
    episode, history, where = tuple(request["id"]), request["history"], "reset"
    environment, steps = live.pop(episode, (None, 0))
    try:
        if environment is None or steps != len(history) - 1:  # a new episode, or one whose worker was replaced
            for other in [other for other in live if other[0] != episode[0]]:
                del live[other]  # of an earlier rollout
            environment = make()
            reply = _reply(environment, (environment.reset(request["row"], request["seed"]), False, None))
            for message in history[:-1]:
                environment.step(message)
        if history:
            where = "step"
            reply = _reply(environment, environment.step(history[-1]))
    except (Exception, SystemExit) as error:  # somebody else's program: it may fail in any way
        return {"failed": f"{where}: {type(error).__name__}: {' '.join(str(error)[:1000].split())[:200]}"}
    if not reply["done"]:
        live[episode] = environment, len(history)
    return reply


def _reply(environment: Environment, given: tuple) -> dict:
    """What an environment gave, checked. ValueError says what it is instead."""
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise ValueError(f"got {str(given)[:80]}, want (messages, done, reward)")
    messages, done, reward = given
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(f'got messages {str(messages)[:80]}, want a list of {{"role": ..., "content": ...}}')
    if not messages and not done:
        raise ValueError("got no messages and not done, want what the model is to answer")
    extra = {"tools": getattr(environment, "tools", None)}
    extra["truncated_reward"] = getattr(environment, "truncated_reward", None)
    for value in (reward, extra["truncated_reward"]):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"got reward {value}, want a finite number or None")
    reward = None if reward is None else float(reward)
    return json.loads(json.dumps({"messages": messages, "done": bool(done), "reward": reward, **extra}))
