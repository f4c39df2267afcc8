"""SFT data from a JSONL file: one JSON object a line, in any of three forms.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "2+2=", "completion": "4"}                 the prompt may be a list of messages
    {"title": ..., "description": ..., "input_format": ..., "output_format": ..., "solution": ...}

A tokenizer with a chat template turns prompt and completion into a user and an assistant turn; one without (a base
model) reads them as plain text with the end-of-text token after the completion. Loss falls on what the assistant wrote
and nowhere else; in a prompt/completion row on the completion alone, even if the prompt holds earlier assistant turns.

Beside these, with a chat template:

    "tools": [{...}]                  for the template; a JSON string of such a list too       (TRL)
    "chat_template_kwargs": {...}     more template variables; they go before the run's own    (TRL)
    "system": "..."                   a first turn, unless the messages have it                (axolotl)
    {"role": "assistant", "content": "...", "weight": 0}  or  "train": false      context, not learned (OpenAI; axolotl)

Keys that other programs train by and this one does not (images, labels, chosen, loss_scale, ...) are errors where they
are set. Any other key is without effect, and one notice counts and names them. null is no value, as in `datasets`.

A bad row is an error that names its line: a data set that is 1 % broken trains silently worse, and nobody looks again.
Rows that are too long are not cut (half an answer teaches the model to stop anywhere) but left out and handed back by
line number, so that the caller can say how many.

Reading order: load_jsonl, _encode, one reader per form.       Tests: tests/test_tasks.py
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanogspo import packing
from nanogspo.inputs import json_of, kind, read_bytes
from nanogspo.tokenizer import Tokenizer, conversation_examples

ROLES = ("system", "user", "assistant", "tool")
FORMS = '{"messages"}, {"prompt", "completion"}, or {"solution"} with title, description, input_format, output_format'
FIELDS = {  # a programming problem: field -> its heading in the user turn, in the order they are read
    "title": "Title",
    "description": "Description",
    "input_format": "Input format",
    "output_format": "Output format",
}
SAID = ("messages", "prompt", "completion", "solution", *FIELDS)  # an id beside them makes no other row
TEMPLATE_KEYS = ("tools", "system", "chat_template_kwargs")
# Names that TRL, axolotl, ms-swift or OpenAI train by, of a row and of a message. A weight of 1 is neutral.
FOREIGN = {
    *(
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
        "documents",
        "functions",
        "history",
        "chosen",
        "rejected",
    ),
    *("input_ids", "labels", "completion_mask", "assistant_masks", "loss", "loss_mask", "loss_scale", "train_detail"),
    *("mask", "masked", "prefix"),
}
# arguments of Python functions between here and the template, and of transformers' apply_chat_template
RESERVED = {
    *(
        "self",
        "tokenizer",
        "messages",
        "learn",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
    ),
    *("chat_template", "tokenize", "padding", "truncation", "max_length"),
}


@dataclass(frozen=True)
class Example(packing.Example):
    """A sequence to train on, and the line of the file it came from, counted from 1."""

    line: int
    row: str = field(default="", compare=False)  # a hash of what the row says, wherever it is in the file


def load_jsonl(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    template_kwargs: dict | None = None,
    notify: Callable[[str], None] = print,
) -> tuple[list[Example], list[int]]:
    """Read, check and tokenize a whole file.

    path             UTF-8 JSONL; blank lines are skipped
    tokenizer        decides between chat turns and plain text by its has_chat_template
    max_length       tokens; a longer sequence is left out
    template_kwargs  passed on to the chat template, e.g. {"enable_thinking": False}
    notify           is given the notice about keys without effect, if there are any
    returns          the examples in file order (a conversation may give several: some templates rewrite earlier turns),
                     and the lines that lost a sequence because it was too long

    Raises ValueError "FILE:LINE: got ..., want ..., do ..." for the first bad row, or when nothing is left to train on.
    """
    examples, too_long, rows, notes = [], [], 0, Counter()
    for line, raw in enumerate(read_bytes(path, "a JSONL file").split(b"\n"), start=1):
        if not raw.removeprefix(b"\xef\xbb\xbf").strip():
            continue
        rows += 1
        try:
            row = json_of(raw, "one whole object per line; fix the line")
            if not isinstance(row, dict):
                raise ValueError(f"got a JSON {kind(row)}, want an object; write rows like {FORMS}")
            row = {key: value for key, value in row.items() if value is not None}
            sequences = _encode(row, tokenizer, template_kwargs or {}, notes)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
        if not all(any(mask[1:]) for _, mask in sequences):
            raise ValueError(f"{path}:{line}: got no token to learn, want an answer; the chat template left it out")
        said = hashlib.sha256(json.dumps({k: row[k] for k in SAID if k in row}, sort_keys=True).encode()).hexdigest()
        fitting = [Example(tokens, mask, line, said) for tokens, mask in sequences if len(tokens) <= max_length]
        examples += fitting
        if len(fitting) < len(sequences):
            too_long.append(line)
    if rows == 0:
        raise ValueError(f"{path}: got an empty file, want one JSON object per line; write rows like {FORMS}")
    if not examples:
        advice = "raise --max-length up to the model's max_position_embeddings, or shorten them"
        raise ValueError(f"{path}: got {rows} rows, all longer than {max_length} tokens; {advice}")
    if notes:
        some = [f"{note} ({count})" for note, count in notes.most_common(8)]
        notify(f"{path}, {rows} rows: " + "; ".join(some) + ("; ..." if len(notes) > 8 else ""))
    return examples, too_long


def _encode(row: dict, tokenizer: Tokenizer, template_kwargs: dict, notes: Counter) -> list:
    """One row -> its sequences, each (tokens, loss_mask). Keys without effect are counted in notes."""
    pair = "prompt" in row and "completion" in row
    if "messages" in row and pair:
        raise ValueError("got messages and prompt with completion, want one form of the row; drop the other")
    _refuse_foreign(row, "the row")
    used = {*TEMPLATE_KEYS}
    if "messages" in row:
        used |= {"messages"}
        messages, learn = _messages(row["messages"], "messages", learnable=True)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError('got no assistant turn, want one to learn from; add {"role": "assistant", ...}')
        if not learn:
            raise ValueError("got weight 0 or train false in every assistant turn, want one to learn; drop the row")
    elif pair or "solution" in row:
        used |= {"prompt", "completion"} if pair else {"solution", *FIELDS}
        prompt, completion = (row["prompt"], row["completion"]) if pair else _problem(row, tokenizer)
        completion = _text(completion, "completion" if pair else "solution")
        if isinstance(prompt, list):
            messages, _ = _messages(prompt, "prompt", learnable=False)
        else:
            messages = [{"role": "user", "content": _text(prompt, "prompt")}]
        messages, learn = [*messages, {"role": "assistant", "content": completion}], [len(messages)]
    else:
        raise ValueError(f"got a row with {', '.join(map(repr, row)) or 'no keys'}, want {FORMS}; rename the keys")
    notes.update(f"{key!r} is not used" for key in row if key not in used)
    if not tokenizer.has_chat_template:
        return _encode_text(row, messages, tokenizer)
    return _encode_chat(row, messages, learn, tokenizer, template_kwargs, notes)


def _problem(row: dict, tokenizer: Tokenizer) -> tuple[str, object]:
    """(prompt, completion) of a programming problem."""
    given = [name for name in FIELDS if row.get(name, "") != ""]
    if not given:
        raise ValueError(f"got a solution without a problem, want one of {', '.join(FIELDS)}; add the statement")
    parts = [f"## {FIELDS[name]}\n{_text(row[name], name)}" for name in given]
    if not tokenizer.has_chat_template:
        parts.append("## Solution\n")  # nothing else would tell a base model where the problem ends
    return "\n\n".join(parts), row["solution"]


def _encode_text(row: dict, messages: list[dict], tokenizer: Tokenizer) -> list:
    """Plain text for a base model: prompt, completion, end."""
    given = [key for key in TEMPLATE_KEYS if row.get(key)]
    if "messages" in row or isinstance(row.get("prompt"), list) or given:
        raise ValueError(
            f"got {given[0] if given else 'chat messages'} for a tokenizer without a chat template,"
            " want prompt and completion as plain text; use an instruct model, or rewrite the rows"
        )
    if not tokenizer.eos_ids:
        raise ValueError("got a tokenizer without an end token, want one that closes the answer; set its eos_token")
    # Tokenized apart: a token that spans the seam would put part of the answer into the prompt, and in a rollout the
    # prompt is always tokenized alone.
    prompt, completion = tokenizer.encode(messages[0]["content"]), messages[1]["content"]
    written = [*tokenizer.encode_continuation(completion), min(tokenizer.eos_ids)]
    return [(prompt + written, [False] * len(prompt) + [True] * len(written))]


def _encode_chat(
    row: dict, messages: list[dict], learn: list[int], tokenizer: Tokenizer, template_kwargs: dict, notes: Counter
) -> list:
    system = row.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"got {kind(system)} for system, want a string; quote it")
    if system and messages[0]["role"] != "system":
        messages, learn = [{"role": "system", "content": system}, *messages], [turn + 1 for turn in learn]
    elif system and messages[0]["content"] != system:
        raise ValueError("got a system that differs from the system turn in the messages, want one; drop the other")

    tools, given = _tools(row.get("tools")), row.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or given.keys() & RESERVED:
        names = ", ".join(sorted(given.keys() & RESERVED)) if isinstance(given, dict) else kind(given)
        raise ValueError(f"got {names} in chat_template_kwargs, want an object of variables of the template; mend it")
    for key in ("tools", "tool_calls", "function_call"):
        if (tools if key == "tools" else any(message.get(key) for message in messages)) and not tokenizer.spells(key):
            raise ValueError(f"got {key}, which the chat template does not read, want a model trained for them")
    notes.update(f"{key} is set by the row" for key in given if template_kwargs.get(key, given[key]) != given[key])
    keys = {key: None for message in messages for key, value in message.items() if value is not None}
    unread = [key for key in keys | given if key not in ("role", "content") and not tokenizer.spells(key)]
    notes.update(f"{key!r} is not read by the chat template" for key in unread)
    variables = template_kwargs | given | ({"tools": tools} if tools else {})
    return conversation_examples(tokenizer, messages, learn, **variables)


def _tools(value: object) -> list[dict]:
    if isinstance(value, str) and value:
        value = json_of(value.encode(errors="surrogatepass"), "a JSON list of tools in a string; mend it")
    if not isinstance(value or [], list) or not all(isinstance(tool, dict) for tool in value or []):
        raise ValueError(f"got {kind(value)} for tools, want a list of objects, or that list as JSON; mend it")
    return value or []


def _messages(value: object, name: str, *, learnable: bool) -> tuple[list[dict], list[int]]:
    """The messages without the keys that say what to learn, and the places of those to learn."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"got {kind(value)} for {name}, want a non-empty list of messages; {_MESSAGE}")
    messages, learn = [], []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(f"got a JSON {kind(message)} for {where}, want an object; {_MESSAGE}")
        if message.get("role") not in ROLES:
            raise ValueError(f"got role {message.get('role')!r} in {where}, want one of {', '.join(ROLES)}; {_MESSAGE}")
        assistant, content = message["role"] == "assistant", message.get("content")
        if not (assistant and message.get("tool_calls") and content in (None, "")):
            if assistant or not isinstance(content, str):
                _text(content, f"{where}.content")
        _refuse_foreign(message, where)
        if _learned(message, where, learnable and assistant):
            learn.append(i)
        messages.append({key: part for key, part in message.items() if key not in ("weight", "train")})
    return messages, learn


def _learned(message: dict, where: str, learnable: bool) -> bool:
    """What weight and train say of a message; without them, whether it is one to learn."""
    said = [(key, message[key]) for key in ("weight", "train") if message.get(key) is not None]
    for key, value in said:
        if isinstance(value, bool) != (key == "train") or value not in (0, 1):
            raise ValueError(f"got {key} {value!r} in {where}, want {'true or false' if key == 'train' else '0 or 1'}")
        if value and not learnable:
            raise ValueError(f"got {key} {value!r} in {where}, want only answers learned; set it to {type(value)(0)!r}")
    if len({bool(value) for _, value in said}) > 1:
        raise ValueError(f"got weight and train that contradict each other in {where}, want one; drop the other")
    return bool(said[0][1]) if said else learnable


def _refuse_foreign(holder: dict, where: str) -> None:
    """Keys that change the training elsewhere, where they are set. `weight` and `train` are a message's own."""
    found = [key for key in holder if key in FOREIGN and holder[key] not in (None, "", [], {})]
    if where == "the row":
        found += [key for key in ("weight", "train") if holder.get(key, 1) not in (None, 1)]
    if found:
        raise ValueError(f"got {found[0]} in {where}, which is not supported here, want none; drop the key or the row")


_MESSAGE = 'write {"role": "user", "content": "..."}'


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {kind(value)} for {name}, want a string; quote it")
    if not value.strip():
        raise ValueError(f"got an empty {name}, want text; fill it in or delete the row")
    return value
