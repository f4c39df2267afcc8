"""SFT data: the rows of a file or a data set (rows.py), in any of five forms.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"prompt": "2+2=", "completion": "4"}                 the prompt may be a list of messages
    {"title": ..., "description": ..., "input_format": ..., "output_format": ..., "solution": ...}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}      (ShareGPT)
    {"instruction": "Add.", "input": "2+2", "output": "4", "history": [["Hi", "Hello"]]}          (Alpaca)

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
line number (rows.py: where there are no lines, the row's place), so that the caller can say how many.

Reading order: load_jsonl, _encode, forms.py.       Tests: tests/test_tasks.py, tests/test_forms.py
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanogspo import packing
from nanogspo.inputs import kind, named
from nanogspo.tasks import forms
from nanogspo.tasks.forms import (
    FIELDS,
    asked_in,
    filled,
    messages_of,
    problem_of,
    refuse_foreign,
    tools_of,
    with_system,
)
from nanogspo.tasks.rows import read_rows
from nanogspo.tokenizer import Tokenizer, conversation_examples

FORMS = (
    '{"messages"}, {"prompt", "completion"}, {"conversations"}, {"instruction", "output"}, or {"solution"} with title, '
    "description, input_format, output_format"
)
SAID = ("messages", "prompt", "completion", "solution", *FIELDS)  # an id beside them makes no other row
TEMPLATE_KEYS = ("tools", "system", "chat_template_kwargs")
# arguments of Python functions between here and the template, and of transformers' apply_chat_template
RESERVED = frozenset(
    """self tokenizer messages learn tools documents add_generation_prompt continue_final_message chat_template tokenize
    padding truncation max_length""".split()
)


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
    """Read, check and tokenize all rows.

    path             what read_rows takes
    tokenizer        decides between chat turns and plain text by its has_chat_template
    max_length       tokens; a longer sequence is left out
    template_kwargs  passed on to the chat template, e.g. {"enable_thinking": False}
    notify           is given the notice about keys without effect, if there are any
    returns          the examples in file order (a conversation may give several: some templates rewrite earlier turns),
                     and the lines that lost a sequence because it was too long

    Raises ValueError "FILE:LINE: got ..., want ..., do ..." for the first bad row, or when nothing is left to train on.
    """
    examples, too_long, rows, notes = [], [], 0, Counter()
    for where, row in read_rows(path):
        line = int(re.sub(r"\D", "", where[len(str(path)) :]))
        rows += 1
        with named(where):
            row = {key: value for key, value in row.items() if value is not None}
            row = forms.standard(row, chat=tokenizer.has_chat_template)
            sequences = _encode(row, tokenizer, template_kwargs or {}, notes)
            if not all(any(mask[1:]) for _, mask in sequences):
                raise ValueError("got no token to learn, want an answer; the chat template left it out")
        said = hashlib.sha256(json.dumps({k: row[k] for k in SAID if k in row}, sort_keys=True).encode()).hexdigest()
        fitting = [Example(tokens, mask, line, said) for tokens, mask in sequences if len(tokens) <= max_length]
        examples += fitting
        if len(fitting) < len(sequences):
            too_long.append(line)
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
    refuse_foreign(row, "the row")
    used = {*TEMPLATE_KEYS}
    if "messages" in row:
        used |= {"messages"}
        messages, learn = messages_of(row["messages"], "messages", learnable=True)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError('got no assistant turn, want one to learn from; add {"role": "assistant", ...}')
        if not learn:
            raise ValueError("got weight 0 or train false in every assistant turn, want one to learn; drop the row")
    elif pair or "solution" in row:
        used |= {"prompt", "completion"} if pair else {"solution", *FIELDS}
        chat = tokenizer.has_chat_template
        prompt, completion = (row["prompt"], row["completion"]) if pair else problem_of(row, chat=chat)
        completion = filled(completion, "completion" if pair else "solution")
        messages = asked_in(prompt)
        messages, learn = [*messages, {"role": "assistant", "content": completion}], [len(messages)]
    else:
        raise ValueError(f"got a row with {', '.join(map(repr, row)) or 'no keys'}, want {FORMS}; rename the keys")
    notes.update(f"{key!r} is not used" for key in row if key not in used)
    if not tokenizer.has_chat_template:
        return _encode_text(row, messages, tokenizer)
    return _encode_chat(row, messages, learn, tokenizer, template_kwargs, notes)


def _encode_text(row: dict, messages: list[dict], tokenizer: Tokenizer) -> list:
    """Plain text for a base model: prompt, completion, end."""
    given = [key for key in TEMPLATE_KEYS if row.get(key)]
    if "messages" in row or isinstance(row.get("prompt"), list) or given:
        got = f"got {given[0] if given else 'chat messages'} for a tokenizer without a chat template"
        want = "want prompt and completion as plain text; use an instruct model, or rewrite the rows"
        raise ValueError(f"{got}, {want}")
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
    turns, messages = len(messages), with_system(messages, row.get("system", ""))
    learn = [turn + len(messages) - turns for turn in learn]
    tools, given = tools_of(row), row.get("chat_template_kwargs", {})
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
