"""Text in, token ids out: the checkpoint's own tokenizer.json and its own chat template, nothing of ours in between.

    prompt = encode_plain(template(messages))            ids that the model reads                          (1)
    answer = decode(ids up to a stop id)                 text that a person or a reward reads              (2)

Ids must match those the model was trained on, so every rule is read from the checkpoint: merges and BOS from
tokenizer.json, the turn format from the chat template, stop ids from generation_config.json, config.json and template.

A hub checkpoint is untrusted. tokenizer.json is data, parsed in Rust; the template is a program, so templates.py runs
it in jinja2's sandbox and in a process of its own, which is ended when it takes too much time or memory. Files that
disagree are read as transformers reads them, and what that leaves unused is told in a line (`notices`).

Reading order: load_tokenizer, Tokenizer, conversation_examples; character_tokenizer is for the tiny model.

Left out: checkpoints without tokenizer.json (the error says how transformers makes one), tokenizers that are Python
code, the additional_chat_templates/ folder, and `clean_up_tokenization_spaces`, which turns " ." into "." after
decoding: a reward would judge text that the model did not write.   Tests: tests/test_tokenizer.py
"""

import contextlib
import functools
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import tokenizers

from nanogspo import templates
from nanogspo.inputs import kind, need, parse_json, tell, text_of
from nanogspo.special_tokens import NAMES, add_tokens, named_tokens
from nanogspo.storage.files import TOKENIZER_FILES, atomic_write, resolve
from nanogspo.templates import one_line

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>")  # Qwen; Gemma 1 to 3; Gemma 4; Llama 3
# What a template is always given. tools and documents as None, because some templates only ask whether they are none
BARE = {"tools": None, "documents": None, "add_generation_prompt": True}


def load_tokenizer(path_or_repo: str | Path) -> "Tokenizer":
    """Open the tokenizer of a checkpoint: a local folder, or a hub id such as "Qwen/Qwen3-0.6B".

    Raises ValueError when there is no tokenizer.json (the line says how to get one) or a file is broken.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        folder = resolve(path_or_repo, want="tokenizer")
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "tokenizer.json" not in present:
        advice = "copy the tokenizer files of the model that this one was trained from into it"
        if "tokenizer.model" in present or {"vocab.json", "merges.txt"} <= {*present}:
            code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            advice = f'make it once with: python -c "from transformers import AutoTokenizer; {code}"'
        found = ", ".join(present[:8]) + (", …" if len(present) > 8 else "")
        raise ValueError(f"got {folder} with {found or 'no files'}, want a tokenizer.json in it: {advice}")
    names = {*TOKENIZER_FILES, "generation_config.json", "config.json"}
    tokenizer = Tokenizer({name: (folder / name).read_bytes() for name in present if name in names}, str(folder))
    for notice in tokenizer.notices:
        tell(f"{folder}: {notice}")
    return tokenizer


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop ids, made of the bytes of its files.

    files    name -> content. Kept whole (Gemma 3: 35 MB), so `save` works after their folder is gone
    folder   where they came from, for error messages
    eos_ids  sorted ids that end an answer: generation_config.json | config.json | the turn end that the template
             prints; the tokenizer's own eos_token only when these name none
    bos_id   the id that opens a text, or None (Qwen has none: config.json may name one, but it is never used)
    pad_id   fills short rows. Padding is never found by its value, so sharing an id with EOS is harmless
    notices  what the files say and nobody reads, a line each: load_tokenizer prints them
    """

    def __init__(self, files: dict[str, bytes], folder: str):
        self.files, self.folder = files, folder
        content = files["tokenizer.json"]
        try:
            with _without_descriptor_2():  # where a panic prints itself
                self._backend = tokenizers.Tokenizer.from_buffer(content.removeprefix(b"\xef\xbb\xbf"))
                self._backend.encode("")  # a template of special tokens that do not exist ends in a panic
        except BaseException as error:  # Rust raises ValueError, bare Exception, or a panic, which is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            hint = "run git lfs pull" if content.startswith(b"version https://git-lfs") else "get it again"
            line = f"got {folder}/tokenizer.json of {len(content)} bytes that do not parse ({one_line(error)})"
            raise ValueError(f"{line}, want the whole file: {hint}") from error
        self._backend.no_truncation()  # some files carry the settings of the run that wrote them,
        self._backend.no_padding()  # and a long prompt would lose its end in silence

        try:
            self._read_files()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}: get the files of the checkpoint again") from error

    def _read_files(self) -> None:
        config, generation, model = map(self._json, ("tokenizer_config.json", "generation_config.json", "config.json"))
        older = map(self._json, ("special_tokens_map.json", "added_tokens.json"))
        self.special_tokens = add_tokens(self._backend, config, *older)
        special_id = {name: self._backend.token_to_id(text) for name, text in self.special_tokens.items()}
        self._backend.encode_special_tokens = config.get("split_special_tokens") is True
        self.templates = self._read_templates(config)
        lost = [name for name in NAMES if self.spells(name) and name not in self.special_tokens]
        if lost and config.get("tokenizer_class") is None:  # transformers has names of each family's own then
            line = f"got a chat template with {lost[0]} and no tokenizer_config.json with a tokenizer_class"
            raise ValueError(f"{line}, want the file")

        # Multimodal configs keep the language model's ids deeper: text_config (Gemma 3), thinker_config (Qwen-Omni).
        part = functools.partial(need, kind=dict, where="config.json", default={})
        thinker = part(model, "thinker_config")
        models = [model, part(model, "text_config"), thinker, part(thinker, "text_config")]
        eos = self.special_tokens.get("eos_token", "")
        sources = "\n".join(self.templates.values()).replace("eos_token", eos)  # {{ eos_token }} prints it as well
        printed = [end for end in (*TURN_ENDS, eos) if end in sources]
        named = _ids([generation, *models], "eos_token_id")
        stops = {*named, *map(self._backend.token_to_id, printed)} - {None}
        self.bos_id = special_id.get("bos_token")
        self.eos_ids = tuple(sorted(stops or {special_id.get("eos_token")} - {None}))
        pads = [special_id.get("pad_token"), *_ids([generation, *models], "pad_token_id"), *self.eos_ids, 0]
        self.pad_id = next(pad for pad in pads if pad is not None)
        self.rows = max(_ids(models, "vocab_size"), default=None)  # of the model's embedding
        self._prefixed = _adds_prefix(self._backend)
        self.notices = self._compare_files(named)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, with the special tokens that the checkpoint adds itself: BOS for Gemma, none for Qwen.

        A text that already begins with a written "<bos>" gets no second one. Other control tokens written in the text,
        such as "<|im_end|>", become control tokens here and in chat messages, as in transformers.
        """
        ids = self._encode(text, add_special_tokens=True)
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id] else ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text as it stands: for rendered templates, which print their own BOS."""
        return self._encode(text, add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after another one: an answer.

        Tokenizers that come from SentencePiece (Llama 2, Mistral, T5) put a space before a text. In the middle of a
        text there is none, so there the ids are those after an anchor, a character that is no part of any of them:

            ids(anchor + text) = ids(anchor) + ids of the continuation                                         (3)

        The offsets tell whether a token or a normaliser joins the two (a newline and a newline, a letter and its
        accent); then the next anchor is tried. Without a crossing token, merges within the text are those it has alone.
        """
        if not self._prefixed or not text:
            return self.encode_plain(text)
        for anchor in ("\n", "a", ":", "1"):
            given = self.encode_plain(anchor)
            encoding = self._backend.encode(anchor + text, add_special_tokens=False)
            start = next((n for n, (begin, _) in enumerate(encoding.offsets) if begin >= 1), len(encoding.ids))
            if encoding.ids[:start] == given and all(end <= 1 for _, end in encoding.offsets[:start]):
                return self._checked(encoding.ids[start:])
        raise ValueError(f"got text {text[:20]!r}, whose first token joins whatever is before it: want another start")

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids, as transformers decodes them.

        Ids without a token give nothing: Qwen3 has 151,669 tokens, but 151,936 rows to sample. A tokenizer that puts a
        space before texts (see encode_continuation) takes one away here, also from an answer that begins with its own.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id with a token: the rows that a new embedding needs."""
        return 1 + max(self._backend.get_vocab().values())

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    def chat(self, messages: list[dict], **template_kwargs) -> list[int]:
        """Ids of a conversation, ready to be answered: encode_plain(render(messages))."""
        return self.encode_plain(self.render(messages, **template_kwargs))

    def render(self, messages: list[dict], **template_kwargs) -> str:
        """The conversation as the checkpoint's template writes it, BOS and control tokens included.

        messages         [{"role": "user", "content": "…"}, …] of plain JSON values; keys that hold None are dropped,
                         because templates print the word. Where `content` is a list of text parts and the template does
                         not read those (Qwen3 fails), or drops all but the first of a system turn (Gemma 3), it is
                         given the parts joined
        template_kwargs  whatever this template asks for: enable_thinking=False (Qwen3), tools=[…], date_string="…".
                         add_generation_prompt is True unless given (transformers: False): mostly we want an answer

        Raises ValueError without a template, for what is not a chat, and when the template refuses or fails.

        Source: transformers `render_jinja_template`, same environment and variables. Llama 3 templates print today's
        date unless told one: give date_string for runs that must repeat.
        """
        if not self.templates:
            advice = "use an instruct checkpoint, or plain prompts instead of messages"
            raise ValueError(f"got {self.folder} without a chat template, want chat_template.jinja in it: {advice}")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            want = 'want turns: write [{"role": "user", "content": "…"}]'
            raise ValueError(f"got messages {one_line(messages)}, {want}")
        name = "tool_use" if template_kwargs.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f"got chat templates {[*self.templates]}, want a default one: rename one in {self.folder}")
        given = BARE | self.special_tokens | template_kwargs
        given["messages"] = [
            {k: self._content(v, m) if k == "content" else v for k, v in m.items() if v is not None} for m in messages
        ]
        try:
            variables = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            reason = one_line(error)
            raise ValueError(f"got chat values outside JSON ({reason}), want plain ones: convert them") from error
        try:
            return templates.render(self.templates[name], variables)
        except ValueError as error:
            more = ", …" if len(messages) > 8 else ""
            roles = ", ".join(str(message.get("role")) for message in messages[:8]) + more
            line = f"got messages ({one_line(roles)}) that the chat template of {self.folder} does not take ({error})"
            raise ValueError(f"{line}, want what it was written for: change messages or template arguments") from error

    def _content(self, content: object, message: dict) -> object:
        """What the template is given as the content of a message: text parts joined where it would lose some."""
        parts = content if isinstance(content, list) else []
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        all_read = self._reads_parts and (len(texts) == 1 or message.get("role") != "system") if texts else True
        return content if all_read or len(texts) < len(parts) else "".join(texts)

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """Whether the template prints the text of a part, and not the part as Python or JSON spells it."""
        given = BARE | self.special_tokens
        given["messages"] = [{"role": "user", "content": [{"type": "text", "text": "xyz"}]}]
        try:
            shown = templates.render(next(iter(self.templates.values())), json.dumps(given))
        except ValueError:
            return False
        return "xyz" in shown and not any(f"{quote}xyz{quote}" in shown for quote in "'\"")

    def spells(self, name: str) -> bool:
        """Whether a chat template has this name in it: one that none of them spells is not read."""
        return any(name in source for source in self.templates.values())

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer files into folder, byte for byte as loaded."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in self.files.keys() & {*TOKENIZER_FILES}:
            atomic_write(Path(folder) / name, self.files[name])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            # Half a surrogate pair, which JSON can spell ("\ud83d") but UTF-8 cannot; or a character outside the
            # alphabet of a character tokenizer. A real model's tokenizer takes everything else.
            halves = {c for c in text if "\ud800" <= c <= "\udfff"}
            strange = sorted(halves or {c for c in text if self._backend.token_to_id(c) is None})
            raise ValueError(f"got text with {strange[:8]}, want characters that have tokens: clean it") from error
        return self._checked(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        if self.rows and ids and max(ids) >= self.rows:
            token = self._backend.id_to_token(max(ids))
            line = f"got token {token!r} with id {max(ids)}, but {self.folder}/config.json has vocab_size {self.rows}"
            raise ValueError(f"{line}, want text without it, or the model's own tokenizer")
        return ids

    def _compare_files(self, stops: list[int]) -> list[str]:
        """Where files of the folder disagree with what was read: a line each."""
        notices, ids = [], {}
        for name in sorted(self.files.keys() & {"vocab.json", "added_tokens.json"}):
            ids = ids or self._backend.get_vocab()
            others = [token for token, number in self._json(name).items() if ids.get(token) != number]
            if others:
                line = f"{name} has other ids than tokenizer.json for {len(others)} tokens ({one_line(others[:3])})"
                notices.append(f"{line}: they are not used, as in transformers")
        mapped, _ = named_tokens(self._json("special_tokens_map.json"))
        others = [name for name, token in mapped.items() if self.special_tokens.get(name) != token.content]
        if others:
            line = f"special_tokens_map.json has another {', '.join(others)} than tokenizer_config.json"
            notices.append(f"{line}: it is not used, as in transformers")
        size, rows = self._backend.get_vocab_size(), self.rows or 0
        lost = [stop for stop in stops if self._backend.id_to_token(stop) is None]
        if lost or (rows > 1000 and size < 0.9 * rows):  # real models pad by less than 2 %, toys as they like
            line = f"the tokenizer has {size} tokens, the model {rows} rows"
            notices.append(line + (f" and stop ids {lost}" if lost else "") + ": is it this model's own?")
        if 0 < rows < size:
            token = self._backend.id_to_token(size - 1)
            notices.append(f"the tokenizer has {size} tokens, the model {rows} rows: text with {token!r} is refused")
        return notices

    def _read_templates(self, config: dict) -> dict[str, str]:
        if "chat_template.jinja" in self.files:  # the newer place wins, as in transformers
            try:
                return {"default": text_of(self.files["chat_template.jinja"])}
            except ValueError as error:
                raise ValueError(f"{error} in chat_template.jinja") from error
        found = config.get("chat_template") or self._json("chat_template.json").get("chat_template") or {}
        found = {"default": found} if isinstance(found, str) else found
        if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):  # default, tool_use, …
            found = {str(entry.get("name")): entry.get("template") for entry in found}
        if not isinstance(found, dict) or not all(isinstance(template, str) for template in found.values()):
            raise ValueError("got a chat_template that is no text, want a template, or a list of named ones")
        return found

    def _json(self, name: str) -> dict:
        try:
            return parse_json(self.files.get(name, b"{}"), name)
        except ValueError as error:
            raise ValueError(f"got {name} that is not a JSON object ({one_line(error)}), want one") from error


def conversation_examples(
    tokenizer: Tokenizer, messages: list[dict], learn: Collection[int] | None = None, **template_kwargs
) -> list[tuple[list[int], list[bool]]]:
    """Training examples of a conversation: loss on what the assistant must produce, and on nothing else.

        prompt[i] = encode_plain(render(messages[:i], add_generation_prompt=True))                                (4)
        answer[i] = encode_continuation(what render(messages[:i + 1], add_generation_prompt=False) adds to it)    (5)

    learn    places of the assistant turns to learn, None for all; the others are context, rendered but not looked at
    returns  [(tokens, loss_mask), …], two lists of one length. loss_mask is True on answer[i] up to its last stop
             token; what the template prints after that (a newline) is read in the next turn, never produced

    Prompt and answer are encoded apart: the model will be given exactly prompt[i] and go on token by token. A turn
    continues the example before it when the ids of that example begin its prompt, as they mostly do: one example.
    Where a template rewrites the past (Qwen3 drops the thinking of earlier turns) a new one starts. So every loss
    token follows the very ids it will follow in use. Turns after the last answer teach nothing and are left off.

    Raises ValueError when there is no turn to learn or none before it, when an answer does not continue its prompt, and
    when the template closes one without a stop token, since the model would not learn to stop.

    Elsewhere: TRL's `assistant_only_loss` needs a template with {% generation %} marks; this does not.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    turns = [i for i in turns if learn is None or i in learn]
    if not turns or turns[0] == 0:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ValueError(f"got messages ({roles}), want an assistant turn after a user turn: drop or mend this row")
    examples: list[tuple[list[int], list[bool]]] = []
    for i in turns:
        before = tokenizer.render(messages[:i], **template_kwargs, add_generation_prompt=True)
        after = tokenizer.render(messages[: i + 1], **template_kwargs, add_generation_prompt=False)
        if not after.startswith(before):
            line = f"got messages[{i}], which the template does not begin with its own prompt ({before[-40:]!r})"
            raise ValueError(f"{line}, want an answer that continues it: no thinking where enable_thinking=False")
        prompt, answer = tokenizer.encode_plain(before), tokenizer.encode_continuation(after[len(before) :])
        produced = max((n for n, token in enumerate(answer, 1) if token in tokenizer.eos_ids), default=0)
        if not produced:
            line = f"got a template that ends messages[{i}] in {after[-20:]!r}, want one of the stop ids"
            raise ValueError(f"{line} {tokenizer.eos_ids}: print {{{{ eos_token }}}} after the assistant's content")
        if not examples or prompt[: len(examples[-1][0])] != examples[-1][0]:
            examples.append(([], []))
        tokens, loss_mask = examples[-1]
        tokens += prompt[len(tokens) :] + answer
        loss_mask += [False] * (len(tokens) - len(answer) - len(loss_mask))
        loss_mask += [True] * produced + [False] * (len(answer) - produced)
    return examples


def character_tokenizer(characters: str) -> Tokenizer:
    """One token per character, for models small enough to be made here: <pad> is 0, <eos> is 1, then the characters.

    characters  the alphabet, repeats dropped. Encoding any other character is an error, because leaving it out
                would change the task in silence

    What `save` writes opens in transformers.AutoTokenizer too.
    """
    if not characters:
        raise ValueError("got an empty alphabet, want the characters of the task: pass task.characters")
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *dict.fromkeys(characters)])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))  # without <unk>, so that strangers raise
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")  # "." skips \n
    backend.decoder = tokenizers.decoders.Fuse()  # by default words are joined with spaces
    backend.add_special_tokens(["<pad>", "<eos>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    files = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}
    return Tokenizer({name: text.encode() for name, text in files.items()}, "the character tokenizer")


def byte_tokenizer() -> Tokenizer:
    """A token per byte, and ChatML: for the plan of a model whose tokenizer is not here. Its own makes fewer tokens."""
    model = tokenizers.models.BPE({c: i for i, c in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}, [])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    files = {"tokenizer.json": backend.to_str(), "chat_template.jinja": CHATML}
    return Tokenizer({name: text.encode() for name, text in files.items()}, "the byte tokenizer")


@contextlib.contextmanager
def _without_descriptor_2() -> Iterator[None]:
    """What libraries write to stderr past Python goes nowhere meanwhile."""
    try:
        kept = os.dup(2)
    except OSError:  # a program without a console has none
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _ids(parts: list[dict], key: str) -> list[int]:
    """Ids under key, part by part. A part says 5, [5, 7], null, or -1, which also means none."""
    values = [part.get(key) for part in parts]
    ids = [i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None]
    for i in ids:
        if type(i) is not int or i >= 2**31:
            raise ValueError(f"got {one_line(i) if kind(i) == 'number' else kind(i)} for {key}, want an id")
    return [i for i in ids if i >= 0]


def _adds_prefix(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text gets a space before it, be it from the normaliser (Prepend), the pre-tokeniser (Metaspace,
    ByteLevel's add_prefix_space) or both in a row: asked, not looked up, since each can hide in a Sequence."""
    text = backend.normalizer.normalize_str("a") if backend.normalizer else "a"
    pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return "".join(piece for piece, _ in pieces) != "a"
