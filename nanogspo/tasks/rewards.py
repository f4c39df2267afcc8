"""What a reward is: a function of an answer and its row, found by its file or by its name. Imports no torch.

    FILE.py:function[=WEIGHT]            a function of your own
    name[:argument][=WEIGHT]             exact numeric math regex format length similarity keywords judge, see NAMED

A trailing =NUMBER is always the weight: a pattern that ends in one is written with a weight behind it, regex:x=1=1.
A function has one of two forms, told apart by its parameters. Both may be `async def`.

    f(answer, row)                       one answer and all columns of its row
    f(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)
                                         TRL's, for the answers to one prompt: a list for each parameter; without
                                         **kwargs it gets those that it names. If the prompt is messages, a completion
                                         is messages too: [{"role": "assistant", "content": answer}]

An answer is all that was sampled, as text without special tokens; of an episode, the last turn. Of the rewards by name
only `format` sees a chain of thought: the others read what is behind </think>. A task's own reward does, too.

An answer's value is a number, None (no opinion), or a dict of numbers: their sum counts, and each is a metric.

This file is imported by the processes that rewards run in (run/worker.py), which is why it stays light; run/rewards.py
starts them. Reading order: Group, parse, Reward, serve, then the rewards by name.
Lesson: lessons/14_rewards.md      Tests: tests/test_rewards.py
"""

import asyncio
import difflib
import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from nanogspo.inputs import explained, import_file, optional, read_text, shown, some
from nanogspo.tasks.addition import last_number
from nanogspo.tasks.remote import Remote

BATCH = {"prompts", "completions", "completion_ids"}  # one of them, and it is TRL's form
FORMS = "f(answer, row), or some of TRL's prompts, completions, completion_ids, trainer_state, **columns"
STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
STATE = {"epoch": 0.0, "max_steps": 0, "log_history": []}  # of TRL's trainer_state, where the caller says nothing
REFERENCES = ("answer", "solution", "ground_truth", "completion")  # the first that a row has is its right answer


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    prompt: str | list[dict]  # as the row has it: text, or messages
    row: dict  # every column
    answers: list[str]
    ids: list[list[int]]  # token ids of the answers


class Mean(float):
    """The mean of `count` numbers. Those of several processes or rounds make one again: Mean.of(means)."""

    count = 1

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Mean":
        counts = [getattr(number, "count", 1) for number in numbers]
        mean = cls(sum(number * count for number, count in zip(numbers, counts, strict=True)) / sum(counts))
        mean.count = sum(counts)
        return mean


@dataclass(frozen=True)
class Scores:
    """What K rewards say of N answers."""

    values: list[list[float]]  # [N][K], nan where a reward abstained
    weights: list[float]  # [K]
    facts: dict[str, float]  # Means: reward/NAME, reward/NAME/KEY, log_metric's; counts: reward/NAME/failed and so on
    # one an answer, for samples.jsonl: {"rewards": {NAME: value}, "failed": why, log_extra's columns}
    notes: list[dict]

    def beside(self, values: list[float]) -> "Scores":
        """With one more column, of weight 1."""
        table = [[*row, value] for row, value in zip(self.values, values, strict=True)]
        return replace(self, values=table, weights=[*self.weights, 1.0])

    def fraction(self, total: float) -> float:
        """A total over what an answer gets to which every reward gives a 1, but for rounding."""
        return round(total / (sum(w for w in self.weights if w > 0) or 1.0), 9)


class Spec(NamedTuple):
    """One --reward."""

    name: str  # for metrics
    file: str  # "" for a reward by name
    argument: str
    weight: float


def parse(text: str) -> Spec:
    """Read FILE.py:function[=WEIGHT] or name[:argument][=WEIGHT]. Raises ValueError for a name that is no reward."""
    source, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:  # no weight: an equals sign of a pattern, or none at all
        source, weight = text, 1.0
    if not source or not math.isfinite(weight):
        raise ValueError(f"got --reward {shown(text)}, want a reward and a finite weight, as in exact=0.5")
    if found := re.fullmatch(r"(.+\.py):(\w+)", source):  # C:\my\reward.py:function has two colons
        return Spec(found[2], found[1], "", weight)
    name, _, argument = source.partition(":")
    if name not in NAMED:
        raise ValueError(f"got reward {shown(text)}, want FILE.py:function or one of {', '.join(NAMED)}")
    return Spec(name, "", argument, weight)


def load(text: str) -> "Reward":
    """The reward of a text. Raises ValueError if a file cannot be imported, or a signature fits no form."""
    name, file, argument, _ = parse(text)
    function = own(file, name, "--reward") if file else NAMED[name](argument)
    if file or name == "format":
        return Reward(function, f"{file}:{name}")
    return Reward(functools.wraps(function)(lambda answer, row: function(answer.rpartition("</think>")[2], row)))


def own(file: str, name: str, flag: str) -> Callable:
    """What a user's file calls by this name, a function or a class. ValueError: it cannot be imported, or has none."""
    module = _imported(file, flag)
    if not callable(found := getattr(module, name, None)):
        names = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ValueError(f"{file}: got no function or class {name}, want one of {some(names) or 'its own'}")
    return found


_imported = functools.cache(import_file)  # once, however many of its functions are rewards


class Reward:
    """A function, and which form it has. Raises ValueError for a signature that fits neither."""

    def __init__(self, function: Callable, where: str = ""):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        code = getattr(inspect.unwrap(function), "__code__", getattr(type(function).__call__, "__code__", None))
        self.file = code.co_filename if code else ""
        self.waits = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
        try:
            signature = inspect.signature(function)
            self.parameters = signature.parameters
            self.batch = bool(BATCH & self.parameters.keys())
            if not self.batch:
                signature.bind("", {})
        except (TypeError, ValueError) as error:
            takes = some(getattr(self, "parameters", ())) or "no arguments"
            raise ValueError(f"{where or self.name}: got a function of {takes}, want {FORMS}") from error

    def __call__(self, group: Group, state: dict) -> dict:
        """{"values": one an answer, "extra": log_extra's columns, "metrics": log_metric's pairs}, or {"error": why}."""
        extra, metrics = {}, []

        def log_extra(column: str, values: list) -> None:
            extra[str(column)] = _as_many(values, group, f"log_extra({column!r})")

        def log_metric(name: str, value: float) -> None:
            metrics.append((str(name), float(value)))

        try:
            if self.batch:
                own = {"log_extra": log_extra, "log_metric": log_metric}
                own["trainer_state"] = SimpleNamespace(**(STATE | state))
                values = _as_many(_finished(self.function(**self._arguments(group, own))), group, "the list of rewards")
            else:
                values = [_finished(self.function(answer, group.row)) for answer in group.answers]
            return {"values": [_value(value) for value in values], "extra": extra, "metrics": metrics}
        except (Exception, SystemExit) as error:
            return {"error": explained(error, self.file)}

    def _arguments(self, group: Group, own: dict) -> dict:
        """What TRL's GRPOTrainer._calculate_rewards hands over; without **kwargs in the function, what it names."""
        G, chat = len(group.answers), isinstance(group.prompt, list)
        completions = [[{"role": "assistant", "content": text}] if chat else text for text in group.answers]
        columns = {k: [v] * G for k, v in group.row.items() if k not in ("prompt", "completion", "completion_ids")}
        own |= {"prompts": [group.prompt] * G, "completions": completions, "completion_ids": group.ids}
        offered, takes = columns | own, self.parameters.values()
        missing = [p.name for p in takes if p.default is p.empty and p.kind not in STARRED and p.name not in offered]
        if missing:
            raise ValueError(f"no column for the parameter {some(missing)}; the row has {some(group.row) or 'none'}")
        takes_all = any(p.kind == p.VAR_KEYWORD for p in takes)
        return {name: value for name, value in offered.items() if takes_all or name in self.parameters}


def _as_many(values: Any, group: Group, what: str) -> list:
    values = list(values)
    if len(values) != len(group.answers):
        raise ValueError(f"got {len(values)} values in {what}, want {len(group.answers)}, one for each completion")
    return values


def _value(value: Any, part: bool = False) -> float | dict | None:
    """Numbers of numpy and torch as well; nan and infinity pass, and are counted by run/rewards.py."""
    if isinstance(value, dict) and not part:
        return {str(key): _value(number, part=True) for key, number in value.items()}
    if isinstance(value, str | dict | list | tuple):
        raise TypeError(f"got {shown(value)}, want a number, None or a dict of numbers")
    return None if value is None else float(value)


@functools.cache
def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls, since what a function keeps (a session, a semaphore) belongs to a loop. It has its own thread,
    because a notebook's thread has a running loop already. Calls come from several threads, the first ones at once."""
    with MAKING:
        return _new_loop()


MAKING = threading.Lock()


def _finished(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return asyncio.run_coroutine_threadsafe(wait(), _loop()).result() if inspect.isawaitable(value) else value


def serve(texts: list[str]) -> tuple[dict[str, bool], Callable[[dict], dict]]:
    """For run/worker.py: which of the rewards have TRL's form, and what answers a message."""
    rewards = {text: load(text) for text in texts}

    def answer(message: dict) -> dict:
        return rewards[message["reward"]](Group(**message["group"]), message["state"])

    return {text: reward.batch for text, reward in rewards.items()}, answer


# ---- rewards by name: each takes the text behind the colon and gives f(answer, row)


def reference(row: dict, column: str = "") -> str:
    """The right answer as text: of this column, else of the first of REFERENCES that the row has."""
    found = [row[name] for name in ([column] if column else REFERENCES) if row.get(name) is not None]
    if not found:
        raise ValueError(f"no column {column or ' or '.join(REFERENCES)} in the row, which has {some(row)}")
    return str(found[0][-1]["content"] if isinstance(found[0], list) else found[0])


def _exact(column: str) -> Callable:
    return lambda answer, row: answer.strip() == reference(row, column).strip()


def _numeric(column: str) -> Callable:
    def numeric(answer: str, row: dict) -> bool | None:
        want, got = last_number(reference(row, column)), last_number(answer) or "nan"
        return math.isclose(float(got), float(want), rel_tol=1e-6, abs_tol=1e-9) if want else None

    return numeric


def _math(column: str) -> Callable:
    verify = optional("math_verify", "--reward math")

    def equal(answer: str, row: dict) -> bool | None:
        text = reference(row, column)
        want = verify.parse(text) or verify.parse(f"${text}$")  # LaTeX is read between dollars only
        return verify.verify(want, verify.parse(answer)) if want else None

    return equal


def _regex(pattern: str) -> Callable:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got the pattern {shown(pattern)} ({error}), want a regular expression") from error
    return lambda answer, row: compiled.search(answer) is not None


def _format(tags: str) -> Callable:
    names = (tags or "think,answer").split(",")
    whole = re.compile(r"\s*" + r"\s*".join(f"<{t}>(?:(?!</?{t}>).)*</{t}>" for t in names) + r"\s*", re.DOTALL)
    return lambda answer, row: whole.fullmatch(answer) is not None


def _length(most: str) -> Callable:
    if not most.isdecimal() or int(most) == 0:
        raise ValueError(f"got length:{most}, want a number of characters; try length:500")
    return lambda answer, row: min(1.0, max(0.0, 2 - len(answer) / int(most)))


def _similarity(column: str) -> Callable:
    # without autojunk, which takes no notice of frequent characters from 200 on
    return lambda answer, row: difflib.SequenceMatcher(None, answer, reference(row, column), autojunk=False).ratio()


def _keywords(listed: str) -> Callable:
    words = [word.strip() for word in listed.split(",") if word.strip()]
    if not words:
        raise ValueError("got keywords without words, want keywords:refund,apology")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]
    return lambda answer, row: sum(bool(pattern.search(answer)) for pattern in patterns) / len(patterns)


def _judge(argument: str) -> Callable:
    """judge:PROMPTFILE[,model=NAME][,url=ADDRESS][,cache=FOLDER]: the last number of another model's reply.

    The file is the request, with {prompt}, {answer}, {reference} and any {column} in it. The rest is remote.py's.
    """
    file, *rest = argument.split(",")
    template = read_text(file, "the prompt for the judge")
    ask = Remote(dict(option.partition("=")[::2] for option in rest), f"--reward judge:{file}")

    def judge(answer: str, row: dict) -> float | None:
        known = row | {"answer": answer}
        if "{reference}" in template:
            known["reference"] = reference(row)
        request = re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), template)
        number = last_number(ask([{"role": "user", "content": request}]))
        return float(number) if number else None

    return judge


NAMED: dict[str, Callable[[str], Callable]] = {
    "exact": _exact,  # 1 if the answer is the reference, but for blanks around it; exact:COLUMN
    "numeric": _numeric,  # 1 if its last number is the reference's last; None where that has none; numeric:COLUMN
    "math": _math,  # 1 if math-verify finds them equal; None where it cannot read the reference; math:COLUMN
    "regex": _regex,  # 1 if the pattern is found somewhere
    "format": _format,  # 1 if it is <think>...</think> <answer>...</answer> and nothing else; format:TAG,TAG
    "length": _length,  # length:N  1 up to N characters, then less, 0 from 2 N on
    "similarity": _similarity,  # 0 to 1, difflib's ratio of answer and reference; similarity:COLUMN
    "keywords": _keywords,  # keywords:a,b  the fraction of these words that it has, in whatever case
    "judge": _judge,
}
