"""Other programs' flags and what they are called here, for the line that a wrong flag or YAML field ends in.

    python train.py --num-generations 16
    train.py: unknown flag --num-generations 16; here it is --group-size 16

words.yaml holds them, read into TABLE. README.md shows it; a test keeps both equal.
Nothing is translated in silence: a word that means nearly the same thing would change a run without a trace.

Reading order: words.yaml, translate, explain, explain_flags.      Tests: tests/test_words.py
"""

import re
import shlex
from collections.abc import Container, Sequence
from pathlib import Path

import yaml

# Their names -> [who has them, our flags, what differs]; words.yaml has it, and says what the columns hold
TABLE: dict[str, list] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
WORDS = {name: entry for names, entry in TABLE.items() for name in names.split()}
TRUTH = {"": "true", "1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}


def translate(name: str, values: Sequence[str], fields: Container[str]) -> tuple[str, str] | None:
    """(our flags, "" where none takes the value; what differs, or what to do) for a flag or field of another program.

    None where `name` is no word of theirs, or where `fields`, this program's, lack what it is called here. All
    spellings are read: --use-4bit, use_4bit, and actor_rollout_ref.rollout.n by its end.
    """
    parts = name.lstrip("-+").replace("-", "_").split(".")
    entry = WORDS.get(".".join(parts[-2:])) or WORDS.get(parts[-1])
    if not entry or not all(field in fields for field in fields_of(entry)):
        return None
    (_, ours, remark), value = entry, ",".join(values)
    default = "", "leave it out: so it is here by default"
    if isinstance(ours, dict):
        said = TRUTH.get(value.lower(), value.lower()) if "true" in ours else value.lower()
        if said not in ours and "*" not in ours and said not in ("none", "null"):
            return "", "here there is " + ", ".join(dict.fromkeys(filter(None, ours.values())))
        ours = ours.get(said) or ours.get("*" * (said not in ours), "")
        if not ours:
            return default
    elif ours and value.lower() in ("none", "null"):
        return default
    each = values if ours.startswith("--reward ") else [value] if value else []  # a reward has a flag of its own
    return " ".join(ours.replace("{}", shlex.quote(v)) for v in each) or ours.replace("{}", "VALUE"), remark


def fields_of(entry: Sequence) -> list[str]:
    """Our fields that an entry names: those of its flags, or of its remark where no flag takes the value."""
    _, ours, remark = entry
    flags = " ".join(ours.values()) if isinstance(ours, dict) else ours
    return [f.replace("-", "_") for f in dict.fromkeys(re.findall(r"--(?:no-)?([a-z][a-z-]+)", flags or remark))]


def explain(name: str, values: Sequence[str], fields: Container[str], *, yaml: bool = False) -> str:
    """The end of an error line about `name`; "" where translate knows nothing. yaml: our flags as lines of a file."""
    found = translate(name, values, fields)
    if not found:
        return ""
    ours, remark = found
    if not ours:
        return f"; {remark}"
    return f"; here it is {in_yaml(ours) if yaml else ours}" + (f" ({remark})" if remark else "")


def in_yaml(flags: str) -> str:
    """--reward a --reward b --no-divide-by-std -> reward: [a, b], divide_by_std: false"""
    values: dict[str, list[str]] = {}
    for token in shlex.split(flags):
        if token.startswith("--"):
            no, field = token.startswith("--no-"), token.removeprefix("--no-").removeprefix("--").replace("-", "_")
            values.setdefault(field, ["false"] if no else [])
        else:
            values[field].append(token)
    return ", ".join(f"{f}: {'[' + ', '.join(v) + ']' if len(v) > 1 else (*v, 'true')[0]}" for f, v in values.items())


def explain_flags(unknown: Sequence[str], argv: Sequence[str], fields: Container[str]) -> str:
    """The line about the first unknown argument of a command, "" where translate knows nothing about it. The others
    that it knows follow without their remarks, so that a pasted command is corrected in one go."""
    line = ""
    for argument in unknown:
        name, equals, value = argument.partition("=")
        after = argv[argv.index(argument) + 1 :]
        stop = next((i for i, word in enumerate(after) if word.startswith("--")), len(after))
        values = [value] if equals else after[:stop]
        found = translate(name, values, fields)
        if not line and not found:
            return ""
        if not line:
            line = f"unknown flag {shlex.join([argument, *([] if equals else values)])}" + explain(name, values, fields)
        elif found and found[0]:
            line += f"; {name} is {found[0]}"
    return line
