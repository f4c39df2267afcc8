"""Conversations with a customer who wants something, from scenarios in a YAML file.

    --task customer_service                     or technical_support, sales: the files in conversations/
    --task conversation:FILE.yaml               your own scenarios

    agent: You are a support agent of a small online shop. ...        the system message
    turns: 4                                                          the customer's patience, if --max-turns allows
    customer: {model: NAME, url: ADDRESS}                             optional: a model plays the customer (remote.py)
    scenarios:
      late_parcel:
        values: {order: [A1204, B7731], days: [6, 9]}                 each combination is a problem
        opening: My order {order} is {days} days late.                or a list of wordings: more problems
        goals: {apologises: sorry|apolog, names it: "{order}"}        what the model is to say, in whatever turn
        faults: {promises the moon: free forever}                     what it must not say; each takes a goal's share
        replies: {order number: "It is {order}."}                     the customer's words, by what the model said last
        otherwise: ["Well?", I am still waiting.]                     where none fits: after turn 1, turn 2, and so on
        wants: your parcel, or your money back                        what a model that plays the customer is told

Patterns are regular expressions, searched without regard to case. {name} in any text is a value of the problem, and in
a pattern it stands for exactly these characters. All is read as it is written: no is no, 007 is 007.

An answer earns 1 / goals when it first reaches one, and loses as much at its first fault of a kind. The conversation
ends when all goals are reached or patience is at its end. Each goal and fault is a metric, environment/NAME: what it
earned, on average over all episodes.

Patterns are easy to please: a model that says all the words in its first turn gets everything. Read samples.jsonl, and
add a judge (--reward judge:...) before you believe a curve.        Tests: tests/test_conversation.py
"""

import functools
import itertools
import math
import re
from pathlib import Path

import yaml

from nanogspo.config import CONVERSATIONS
from nanogspo.inputs import named, read_text, shown, some
from nanogspo.tasks.prompts import PromptRows
from nanogspo.tasks.remote import Remote

SHIPPED = CONVERSATIONS[1:]  # files beside this one
EARN = {"goals": 1.0, "faults": -1.0}
FLAGS = re.IGNORECASE | re.DOTALL
WORD = r"[^\W\d]\w*"  # a value's name: {2} and {2,3} are a pattern's own braces
MOST = 10_000  # problems of a scenario: openings times values times values
TEXT, TEXTS, MAPPING, EACH = "a text", "a text or a list of texts", "a mapping", "names, each with "
TOP = {"agent": TEXT, "turns": TEXT, "customer": EACH + TEXT, "scenarios": EACH + MAPPING}
SCENARIO = {"values": EACH + TEXTS, "wants": TEXT} | dict.fromkeys(("opening", "otherwise"), TEXTS)
SCENARIO |= dict.fromkeys(("goals", "faults", "replies"), EACH + TEXT)
PLAYED = (
    "You play a customer who talks to an agent of a company. You want this: {wants}\nAnswer the agent in one or two "
    "sentences, in the first person. Say nothing that the agent would say."
)


class Conversations(PromptRows):
    """The task: a problem is a scenario with values; a tenth of the openings, at least one, is held out."""

    def __init__(self, source: str):
        if not source:
            raise ValueError(f"got conversation without a file, want conversation:FILE.yaml, or {', '.join(SHIPPED)}")
        file = Path(__file__).parent / "conversations" / f"{source}.yaml" if source in SHIPPED else Path(source)
        rows = problems(str(file))
        openings = {row["prompt"][-1]["content"] for _, row in rows}
        if len(openings) < 2:
            raise ValueError(f"{file}: got a single opening, want two or more: one is held out; add another wording")
        super().__init__(rows, name=source, held_out=max(1, len(openings) // 10))


class AsWritten(yaml.BaseLoader):
    """Every value is the text that stands there, and a name that comes twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key.value} twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def problems(file: str) -> list[tuple[str, dict]]:
    """(where, row) of every problem; a row has `prompt`, the messages up to the model's first turn, and `scenario`."""
    text = read_text(file, "scenarios in YAML")
    try:
        given = yaml.load(text, AsWritten)
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where, problem = f"{file}:{mark.line + 1}" if mark else file, problem or str(error).splitlines()[0]
        raise ValueError(f"{where}: not YAML ({problem}), want scenarios; mend it") from None
    rows = []
    with named(file):
        checked(given, TOP, needs=("agent", "scenarios"))
        if not re.fullmatch("[1-9][0-9]{0,8}", turns := given.get("turns", "4")):
            raise ValueError(f"got turns: {shown(turns)}, want a number from 1")
        common = {"turns": int(turns), "customer": given.get("customer")}
        for name, scenario in given["scenarios"].items():
            with named(name):
                checked(scenario, SCENARIO, needs=("opening", "goals", "otherwise"))
                rows += [(f"{file}: {name}", row) for row in spread(scenario, given["agent"], common)]
    return rows


def checked(given: object, forms: dict[str, str], needs: tuple[str, ...]) -> None:
    """ValueError unless it is a mapping with these keys, each of its form, those of `needs` filled."""
    if not isinstance(given, dict):
        raise ValueError(f"got {shown(given)}, want a mapping with {', '.join(needs)}")
    if unknown := given.keys() - forms.keys():
        raise ValueError(f"got {some(sorted(unknown))}, want only {', '.join(forms)}")
    for key in (*needs, *given):
        value = given.get(key)
        if not fits(value, forms[key]) or (key in needs and not value):
            raise ValueError(f"got {key}: {shown(value)}, want {forms[key]}")


def fits(value: object, form: str) -> bool:
    """No text is blank, and no list empty."""
    if form.startswith(EACH):
        return isinstance(value, dict) and all(fits(part, form.removeprefix(EACH)) for part in value.values())
    if form == TEXTS and isinstance(value, list):
        return value != [] and all(fits(part, TEXT) for part in value)
    return isinstance(value, dict) if form == MAPPING else isinstance(value, str) and value.strip() != ""


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def spread(scenario: dict, agent: str, common: dict) -> list[dict]:
    """The rows of one scenario: every opening with every combination of values."""
    values = {name: listed(value) for name, value in scenario.get("values", {}).items()}
    if wrong := [name for name in values if not re.fullmatch(WORD, name)]:
        raise ValueError(f"got values for {some(wrong)}, want names of letters, digits and _")
    if both := scenario["goals"].keys() & scenario.get("faults", {}).keys():
        raise ValueError(f"got {some(sorted(both))} as a goal and as a fault, want different names")
    openings, rows = listed(scenario["opening"]), []
    if (count := math.prod(map(len, (openings, *values.values())))) > MOST:
        raise ValueError(f"got {count:,} problems (openings times values), want at most {MOST:,}; leave some out")
    for opening, *chosen in itertools.product(openings, *values.values()):
        known = dict(zip(values, chosen, strict=True))
        exactly = {key: re.escape(value) for key, value in known.items()}  # in a pattern
        script = {kind: {k: pattern(p, exactly) for k, p in scenario.get(kind, {}).items()} for kind in EARN}
        replies = scenario.get("replies", {}).items()
        script["replies"] = [[pattern(p, exactly), fill(words, known)] for p, words in replies]
        script["otherwise"] = [fill(words, known) for words in listed(scenario["otherwise"])]
        script["wants"] = fill(scenario.get("wants", opening), known)
        turns = ("system", fill(agent, known)), ("user", fill(opening, known))
        messages = [{"role": role, "content": text.strip()} for role, text in turns]
        rows.append({"prompt": messages, "scenario": script | common})
    return rows


def fill(text: str, known: dict[str, str]) -> str:
    """{name} is replaced by its value; ValueError where there is none."""
    try:
        return re.sub(rf"\{{({WORD})\}}", lambda found: known[found[1]], text)
    except KeyError as error:
        have = f"one of {', '.join(known)}" if known else "no name"
        raise ValueError(f"got {{{error.args[0]}}} in {shown(text)}, want {have}; add it to values") from error


def pattern(text: str, known: dict[str, str]) -> str:
    filled = fill(text, known)
    try:
        re.compile(filled, FLAGS)
    except (re.error, OverflowError, RecursionError) as error:
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
        self.ask = None if customer is None else remote(tuple(customer.items()))
        return row["prompt"]

    def step(self, message: dict) -> tuple[list[dict], bool, dict[str, float]]:
        scenario, text, earned = self.scenario, message["content"], {}
        self.messages, self.turns = [*self.messages, {"role": "assistant", "content": text}], self.turns + 1
        for kind, sign in EARN.items():
            new = {name for name, p in scenario[kind].items() if name not in self.found and seen(p, text)}
            share = sign / len(scenario["goals"])
            earned |= {name: share if name in new else 0.0 for name in scenario[kind]}  # a metric of 0 is one, too
            self.found |= new
        if scenario["goals"].keys() <= self.found or self.turns == scenario["turns"]:
            return [], True, earned
        self.messages = [*self.messages, {"role": "user", "content": self.next_words(text)}]
        return self.messages[-1:], False, earned

    def next_words(self, text: str) -> str:
        scenario = self.scenario
        if self.ask:
            roles = {"assistant": "user", "user": "assistant"}  # to the customer the agent is the one who asks
            heard = [{"role": roles[m["role"]], "content": m["content"]} for m in self.messages if m["role"] in roles]
            told = self.ask([{"role": "system", "content": PLAYED.format(wants=scenario["wants"])}, *heard])
            return told.rpartition("</think>")[2].strip()
        fitting = [words for p, words in scenario["replies"] if seen(p, text)]
        return fitting[0] if fitting else scenario["otherwise"][min(self.turns, len(scenario["otherwise"])) - 1]


@functools.cache
def remote(options: tuple) -> Remote:
    """One for all conversations of a process. A word first: at a wrong address a run ends before it begins, and
    does not go on with episodes that all fail."""
    customer = Remote(dict(options), "customer")
    customer([{"role": "user", "content": "Hello"}])
    return customer


def seen(pattern: str, text: str) -> bool:
    return re.search(pattern, text, FLAGS) is not None
