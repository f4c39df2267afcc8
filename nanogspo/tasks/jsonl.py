"""SFT data from a JSONL file: one JSON object a line, in any of three forms.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "2+2=", "completion": "4"}                 the prompt may be a list of messages
    {"title": ..., "description": ..., "input_format": ..., "output_format": ..., "solution": ...}

A tokenizer with a chat template turns prompt and completion into a user and an assistant turn; one without (a base
model) reads them as plain text with the end-of-text token after the completion. Loss falls on what the assistant wrote
and nowhere else; in a prompt/completion row on the completion alone, even if the prompt holds earlier assistant turns.

A bad row is an error that names its line: a data set that is 1 % broken trains silently worse, and nobody looks again.
Rows that are too long are not cut (half an answer teaches the model to stop anywhere) but left out and handed back by
line number, so that the caller can say how many.

Reading order: load_jsonl, _encode, one reader per form.       Tests: tests/test_tasks.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nanogspo import packing
from nanogspo.tokenizer import Tokenizer, conversation_examples

ROLES = ("system", "user", "assistant", "tool")
FORMS = '{"messages"}, {"prompt", "completion"}, or {"solution"} with title, description, input_format, output_format'
FIELDS = {  # a programming problem: field -> its heading in the user turn, in the order they are read
    "title": "Title",
    "description": "Description",
    "input_format": "Input format",
    "output_format": "Output format",
}


@dataclass(frozen=True)
class Example(packing.Example):
    """A sequence to train on, and the line of the file it came from, counted from 1."""

    line: int


def load_jsonl(
    path: str | Path, tokenizer: Tokenizer, *, max_length: int, template_kwargs: dict | None = None
) -> tuple[list[Example], list[int]]:
    """Read, check and tokenize a whole file.

    path             UTF-8 JSONL; blank lines are skipped
    tokenizer        decides between chat turns and plain text by its has_chat_template
    max_length       tokens; a longer sequence is left out
    template_kwargs  passed on to the chat template, e.g. {"enable_thinking": False}
    returns          the examples in file order (a conversation may give several: some templates rewrite earlier turns),
                     and the lines that lost a sequence because it was too long

    Raises ValueError "FILE:LINE: got ..., want ..., do ..." for the first bad row, or when nothing is left to train on.
    """
    examples, too_long, rows = [], [], 0
    for line, raw in enumerate(_read_lines(path), start=1):
        if not raw.strip():
            continue
        rows += 1
        try:
            sequences = _encode(_parse(raw), tokenizer, template_kwargs or {})
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if not all(any(mask[1:]) for _, mask in sequences):
            raise ValueError(f"{path}:{line}: got no token to learn, want an answer; the chat template left it out")
        fitting = [Example(tokens, mask, line) for tokens, mask in sequences if len(tokens) <= max_length]
        examples += fitting
        if len(fitting) < len(sequences):
            too_long.append(line)
    if rows == 0:
        raise ValueError(f"{path}: got an empty file, want one JSON object per line; write rows like {FORMS}")
    if not examples:
        raise ValueError(f"{path}: got {rows} rows, all longer than {max_length} tokens; raise the maximal length")
    return examples, too_long


def _read_lines(path: str | Path) -> list[bytes]:
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors start with a byte mark
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror.lower()}, want a JSONL file; check the path") from error


def _parse(raw: bytes) -> dict:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"0x{raw[error.start]:02x}"
        raise ValueError(f"got byte {byte} at column {error.start + 1}, want UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
        raise ValueError(f"got broken JSON ({reason}), want one whole object per line; fix the line") from error
    except RecursionError as error:
        raise ValueError("got JSON nested a thousand deep, want a flat object; fix the line") from error
    if not isinstance(row, dict):
        raise ValueError(f"got a JSON {_kind(row)}, want an object; write rows like {FORMS}")
    return row


def _encode(row: dict, tokenizer: Tokenizer, template_kwargs: dict) -> list[tuple[list[int], list[bool]]]:
    """One row -> its sequences, each (tokens, loss_mask)."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if not any(m["role"] == "assistant" for m in messages):
            raise ValueError('got no assistant turn, want one to learn from; add {"role": "assistant", ...}')
        return _encode_chat(messages, tokenizer, template_kwargs)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], _text(row["completion"], "completion")
        if isinstance(prompt, list):
            answer = {"role": "assistant", "content": completion}
            sequences = _encode_chat([*_messages(prompt, "prompt"), answer], tokenizer, template_kwargs)
            return [_last_answer_only(*sequences[-1])]
        return _encode_pair(_text(prompt, "prompt"), completion, tokenizer, template_kwargs)
    if "solution" in row:
        given = [name for name in FIELDS if row.get(name) not in (None, "")]
        if not given:
            raise ValueError(f"got a solution without a problem, want one of {', '.join(FIELDS)}; add the statement")
        parts = [f"## {FIELDS[name]}\n{_text(row[name], name)}" for name in given]
        if not tokenizer.has_chat_template:
            parts.append("## Solution\n")  # nothing else would tell a base model where the problem ends
        return _encode_pair("\n\n".join(parts), _text(row["solution"], "solution"), tokenizer, template_kwargs)
    raise ValueError(f"got a row with {', '.join(map(repr, row)) or 'no keys'}, want {FORMS}; rename the keys")


def _encode_pair(prompt: str, completion: str, tokenizer: Tokenizer, template_kwargs: dict):
    if tokenizer.has_chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat(turns, tokenizer, template_kwargs)
    if not tokenizer.eos_ids:
        raise ValueError("got a tokenizer without an end token, want one that closes the answer; set its eos_token")
    # Tokenized apart: a token that spans the seam would put part of the answer into the prompt, and in a rollout the
    # prompt is always tokenized alone.
    given = tokenizer.encode(prompt)
    written = [*tokenizer.encode_plain(completion), min(tokenizer.eos_ids)]
    return [(given + written, [False] * len(given) + [True] * len(written))]


def _encode_chat(messages: list[dict], tokenizer: Tokenizer, template_kwargs: dict):
    if not tokenizer.has_chat_template:
        raise ValueError(
            "got chat messages for a tokenizer without a chat template, want prompt and completion as plain text;"
            " use an instruct model, or rewrite the rows"
        )
    return conversation_examples(tokenizer, messages, **template_kwargs)


def _last_answer_only(tokens: list[int], loss_mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Keeps the last unbroken run of True: earlier assistant turns of a prompt are given, not learned."""
    end = len(loss_mask) - loss_mask[::-1].index(True)
    start = next((t + 1 for t in range(end - 1, -1, -1) if not loss_mask[t]), 0)
    return tokens, [start <= t < end for t in range(len(tokens))]


def _messages(value: object, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"got {_kind(value)} for {name}, want a non-empty list of messages; {_MESSAGE}")
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"got a JSON {_kind(message)} for {where}, want an object; {_MESSAGE}")
        if message.get("role") not in ROLES:
            raise ValueError(f"got role {message.get('role')!r} in {where}, want one of {', '.join(ROLES)}; {_MESSAGE}")
        if message["role"] == "assistant" or not isinstance(message.get("content"), str):
            _text(message.get("content"), f"{where}.content")
    return value


_MESSAGE = 'write {"role": "user", "content": "..."}'


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {_kind(value)} for {name}, want a string; quote it")
    if not value.strip():
        raise ValueError(f"got an empty {name}, want text; fill it in or delete the row")
    return value


def _kind(value: object) -> str:
    """What JSON calls the type of a Python value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]
