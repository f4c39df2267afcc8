"""What a row says, whatever program it was written for: the forms of ShareGPT and Alpaca become `messages`, or `prompt`
and `completion`; messages are checked, and the keys that say what to learn are read off them.

    conversations   turns of {"from", "value"}: human, gpt, system, observation; function_call holds the calls as JSON
    instruction     with input under it, asked for output; history is earlier pairs of question and answer, which are
                    learned too, as LLaMA-Factory does by default
    content         text, or a list of {"type": "text", "text": "..."}: `Tokenizer.render` says how it is printed

Tests: tests/test_forms.py, tests/test_tasks.py
"""

from nanogspo.inputs import json_of, kind, shown

ROLES = ("system", "user", "assistant", "tool")
FIELDS = {  # a programming problem: field -> its heading in the user turn, in the order they are read
    "title": "Title",
    "description": "Description",
    "input_format": "Input format",
    "output_format": "Output format",
}
# Names that TRL, axolotl, ms-swift or OpenAI train by, of a row and of a message. A weight of 1 is neutral.
FOREIGN = frozenset(
    """image images video videos audio audios documents functions history chosen rejected input_ids labels
    completion_mask assistant_masks loss loss_mask loss_scale train_detail mask masked prefix""".split()
)
SPEAKERS = {
    **{"human": "user", "user": "user", "system": "system"},
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


def standard(row: dict, *, chat: bool) -> dict:
    """A ShareGPT or Alpaca row as {"messages"} or {"prompt", "completion"}, its other keys kept; others as they are.
    chat: whether the tokenizer has a chat template; without one, Alpaca's headings tell where the answer begins."""
    if "messages" in row or "solution" in row or {"prompt", "completion"} <= row.keys():
        return row
    if "conversations" in row:
        turns, rest = row["conversations"], {key: value for key, value in row.items() if key != "conversations"}
        return rest | {"messages": list(map(_turn, turns, range(len(turns)))) if isinstance(turns, list) else turns}
    return _alpaca(row, chat) if {"instruction", "output"} <= row.keys() else row


def _turn(turn: object, i: int) -> object:
    """A ShareGPT turn as a message. What is none is left to messages_of."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        line = f"got from {shown(speaker)} in conversations[{i}], want one of {', '.join(SPEAKERS)}"
        raise ValueError(f"{line}; rename it")
    more = {key: part for key, part in turn.items() if key not in ("from", "value")}
    message = {"role": SPEAKERS[speaker], "content": value, **more}
    if speaker == "function_call":
        want = 'a JSON object {"name", "arguments"}, or a list of them; mend the call'
        calls = json_of(filled(value, f"conversations[{i}].value").encode(errors="surrogatepass"), want)
        calls = calls if isinstance(calls, list) else [calls]
        if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            raise ValueError(f"got {shown(value)} in conversations[{i}], want {want}")
        message |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return message


def _alpaca(row: dict, chat: bool) -> dict:
    rest = {key: value for key, value in row.items() if key not in ("instruction", "input", "output", "history")}
    given = [filled(row[key], key) for key in ("instruction", "input") if row.get(key, "") != ""]
    if not given:
        raise ValueError("got an empty instruction and no input, want text; fill it in or delete the row")
    answer, history = filled(row["output"], "output"), row.get("history") or []
    if not chat:
        headings = ("### Instruction:", "### Input:")
        asked = [f"{heading}\n{text}" for heading, text in zip(headings, given, strict=False)]
        given = ["\n\n".join([*asked, "### Response:\n"])]
    if not history:
        return rest | {"prompt": "\n".join(given), "completion": answer}
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"got {shown(history)} for history, want a list of [question, answer]; mend it")
    pairs = [*history, ["\n".join(given), answer]]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return rest | {"messages": turns}


def problem_of(row: dict, *, chat: bool) -> tuple[str, object]:
    """(prompt, completion) of a programming problem."""
    given = [name for name in FIELDS if row.get(name, "") != ""]
    if not given:
        raise ValueError(f"got a solution without a problem, want one of {', '.join(FIELDS)}; add the statement")
    parts = [f"## {FIELDS[name]}\n{filled(row[name], name)}" for name in given]
    if not chat:
        parts.append("## Solution\n")  # nothing else would tell a base model where the problem ends
    return "\n\n".join(parts), row["solution"]


def messages_of(value: object, name: str, *, learnable: bool) -> tuple[list[dict], list[int]]:
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
        if isinstance(content, list) and content:
            content = "".join(_part(part, where) for part in content)
        if not (assistant and message.get("tool_calls") and content in (None, "")):
            if assistant or not isinstance(content, str):
                filled(content, f"{where}.content")
        refuse_foreign(message, where)
        if _learned(message, where, learnable and assistant):
            learn.append(i)
        messages.append({key: part for key, part in message.items() if key not in ("weight", "train")})
    return messages, learn


def asked_in(prompt: object) -> list[dict]:
    """The turns of a row's `prompt`: messages, or text, which is a user's turn."""
    if isinstance(prompt, list):
        return messages_of(prompt, "prompt", learnable=False)[0]
    return [{"role": "user", "content": filled(prompt, "prompt")}]


def with_system(messages: list[dict], system: object) -> list[dict]:
    """The messages behind a first turn of this text, unless they have it."""
    if not isinstance(system, str):
        raise ValueError(f"got {kind(system)} for system, want a string; quote it")
    if not system or (messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("got a system that differs from the system turn in the messages, want one; drop the other")
    return [{"role": "system", "content": system}, *messages]


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        want = 'want parts {"type": "text", "text": "..."}; images and audio are not read here'
        raise ValueError(f"got {shown(part)} in {where}.content, {want}")
    return part["text"]


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


def refuse_foreign(holder: dict, where: str) -> None:
    """Keys that change the training elsewhere, where they are set. `weight` and `train` are a message's own."""
    found = [key for key in holder if key in FOREIGN and holder[key] not in (None, "", [], {})]
    if where == "the row":
        found += [key for key in ("weight", "train") if holder.get(key, 1) not in (None, 1)]
    if found:
        raise ValueError(f"got {found[0]} in {where}, which is not supported here, want none; drop the key or the row")


_MESSAGE = 'write {"role": "user", "content": "..."}'


def filled(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {kind(value)} for {name}, want a string; quote it")
    if not value.strip():
        raise ValueError(f"got an empty {name}, want text; fill it in or delete the row")
    return value


def tools_of(row: dict) -> list[dict]:
    """A row's tools, JSON schemas for the chat template: a list, or such a list as JSON. [] for none."""
    value = row.get("tools")
    if isinstance(value, str) and value:
        value = json_of(value.encode(errors="surrogatepass"), "a JSON list of tools in a string; mend it")
    if not isinstance(value or [], list) or not all(isinstance(tool, dict) for tool in value or []):
        raise ValueError(f"got {kind(value)} for tools, want a list of objects, or that list as JSON; mend it")
    return value or []
