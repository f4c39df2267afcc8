"""Conversations with a customer who wants something, from scenarios in a YAML file.

    --task customer_service                     or technical_support, sales: the files in conversations/
    --task conversation:FILE.yaml               your own scenarios

    agent: You are a support agent of a small online shop. ...        the system message
    turns: 4                                                          the customer's patience, in turns of the model
    customer: {model: NAME, url: ADDRESS}                             optional: a model plays the customer (remote.py)
    scenarios:
      late_parcel:
        values: {order: [A1204, B7731], days: [6, 9]}                 each combination is a problem
        opening: My order {order} is {days} days late.                or a list of wordings: more problems
        goals: {apologises: sorry|apolog, names it: "{order}"}        what the model is to say, in whatever turn
        faults: {promises the moon: free forever}                     what it must not say; each takes a goal's share
        replies: {order number: "It is {order}."}                     the customer's words, by what the model said last
        otherwise: ["Well?", I am still waiting.]                     the customer's words where no reply fits, in order
        wants: your parcel, or your money back                        what a model that plays the customer is told

Patterns are regular expressions, searched without regard to case. {name} in any text is a value of the problem, and in
a pattern it stands for exactly these characters.

An answer earns 1 / goals when it first reaches one, and loses as much at its first fault of a kind. The conversation
ends when all goals are reached or patience is at its end. Each goal and fault is a metric, environment/NAME.

Patterns are easy to please: a model that says all the words in its first turn gets everything. Read samples.jsonl, and
add a judge (--reward judge:...) before you believe a curve.        Tests: tests/test_conversation.py
"""

import functools
import itertools
import re
from pathlib import Path

import yaml

from nanogspo.config import CONVERSATIONS
from nanogspo.inputs import named, read_text, shown, some
from nanogspo.tasks.prompts import PromptRows
from nanogspo.tasks.remote import Remote

SHIPPED = CONVERSATIONS[1:]  # files beside this one
EARN = {"goals": 1.0, "faults": -1.0}
LISTS = ("opening", "otherwise")
TOP = {"agent": str, "turns": int, "customer": dict, "scenarios": dict}
KEYS = {"values": dict, "goals": dict, "faults": dict, "replies": dict, "wants": str} | dict.fromkeys(LISTS, list)
PLAYED = (
    "You play a customer who talks to a support agent. You want this: {wants}. Answer the agent in one or two "
    "sentences, in the first person. Say nothing that the agent would say."
)


class Conversations(PromptRows):
    """The task: a problem is a scenario with values; a tenth of the problems, at least one, is held out."""

    def __init__(self, source: str):
        file = Path(__file__).parent / "conversations" / f"{source}.yaml" if source in SHIPPED else Path(source)
        rows = problems(str(file))
        super().__init__(rows, name=source, held_out=max(1, len(rows) // 10))


def problems(file: str) -> list[tuple[str, dict]]:
    """(where, row) of every problem; a row has `prompt`, the messages up to the model's first turn, and `scenario`."""
    text = read_text(file, "scenarios in YAML")
    try:
        given = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "nested too deeply"
        where = f"{file}:{mark.line + 1}" if mark else file
        raise ValueError(f"{where}: not YAML ({problem}), want scenarios; mend it") from None
    rows = []
    with named(file):
        checked(given, TOP, needs=("agent", "scenarios"))
        common = {"turns": given.get("turns", 4), "customer": given.get("customer")}
        for name, scenario in given["scenarios"].items():
            with named(name):
                if isinstance(scenario, dict):  # one text stands for a list of one
                    scenario = {k: [v] if k in LISTS and isinstance(v, str) else v for k, v in scenario.items()}
                checked(scenario, KEYS, needs=("opening", "goals", "otherwise"))
                rows += [(f"{file}: {name}", row) for row in spread(scenario, given["agent"], common)]
    return rows


def checked(given: object, kinds: dict[str, type], needs: tuple[str, ...]) -> None:
    """ValueError unless it is a mapping with these keys, each of its kind and filled."""
    if not isinstance(given, dict):
        raise ValueError(f"got {shown(given)}, want a mapping with {', '.join(needs)}")
    if unknown := given.keys() - kinds.keys():
        raise ValueError(f"got {some(sorted(map(str, unknown)))}, want only {', '.join(kinds)}")
    for key in (*needs, *given):
        value = given.get(key)
        if not isinstance(value, kinds[key]) or not value or (kinds[key] is int and value < 1):
            raise ValueError(f"got {key}: {shown(value)}, want a filled {kinds[key].__name__}")


def spread(scenario: dict, agent: str, common: dict) -> list[dict]:
    """The rows of one scenario: every opening with every combination of values."""
    values = {key: value if isinstance(value, list) else [value] for key, value in scenario.get("values", {}).items()}
    rows = []
    for opening, *chosen in itertools.product(scenario["opening"], *values.values()):
        known = {key: str(value) for key, value in zip(values, chosen, strict=True)}
        exactly = {key: re.escape(value) for key, value in known.items()}  # in a pattern
        script = {kind: {k: pattern(p, exactly) for k, p in scenario.get(kind, {}).items()} for kind in EARN}
        replies = scenario.get("replies", {}).items()
        script["replies"] = [[pattern(p, exactly), fill(words, known)] for p, words in replies]
        script["otherwise"] = [fill(words, known) for words in scenario["otherwise"]]
        script["wants"] = fill(scenario.get("wants", opening), known)
        turns = ("system", fill(agent, known)), ("user", fill(opening, known))
        messages = [{"role": role, "content": text.strip()} for role, text in turns]
        rows.append({"prompt": messages, "scenario": script | common})
    return rows


def fill(text: object, known: dict[str, str]) -> str:
    """{name} is replaced where the name is known: a regular expression may have other braces."""
    return re.sub(r"\{(\w+)\}", lambda found: known.get(found[1], found[0]), str(text))


def pattern(text: object, known: dict[str, str]) -> str:
    filled = fill(text, known)
    try:
        re.compile(filled)
    except re.error as error:
        raise ValueError(f"got the pattern {shown(filled)} ({error}), want a regular expression") from error
    return filled


class Conversation:
    """The environment: the customer's side, and the reward."""

    truncated_reward = 0.0  # what was earned by then stays

    def reset(self, row: dict, seed: int) -> list[dict]:
        if "scenario" not in row:
            raise ValueError("got a row without a scenario, want problems of a conversation task and of no other")
        self.scenario, self.messages, self.turns, self.found = row["scenario"], row["prompt"], 0, set()
        customer = self.scenario["customer"]
        self.ask = remote(tuple(customer.items())) if customer else None
        return row["prompt"]

    def step(self, message: dict) -> tuple[list[dict], bool, dict[str, float]]:
        scenario, text, earned = self.scenario, message["content"], {}
        self.messages, self.turns = [*self.messages, {"role": "assistant", "content": text}], self.turns + 1
        for kind, sign in EARN.items():
            new = [name for name, p in scenario[kind].items() if name not in self.found and seen(p, text)]
            earned |= dict.fromkeys(new, sign / len(scenario["goals"]))
            self.found |= {*new}
        if scenario["goals"].keys() <= self.found or self.turns == scenario["turns"]:
            return [], True, earned
        self.messages = [*self.messages, {"role": "user", "content": self.next_words(text)}]
        return self.messages[-1:], False, earned

    def next_words(self, text: str) -> str:
        scenario = self.scenario
        if self.ask:
            roles = {"assistant": "user", "user": "assistant"}  # to the customer the agent is the one who asks
            heard = [{"role": roles[m["role"]], "content": m["content"]} for m in self.messages if m["role"] in roles]
            return self.ask([{"role": "system", "content": PLAYED.format(wants=scenario["wants"])}, *heard])
        fitting = [words for p, words in scenario["replies"] if seen(p, text)]
        return fitting[0] if fitting else scenario["otherwise"][min(self.turns, len(scenario["otherwise"])) - 1]


@functools.cache
def remote(options: tuple) -> Remote:
    """One for all conversations of a process."""
    return Remote(dict(options), "customer")


def seen(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None
