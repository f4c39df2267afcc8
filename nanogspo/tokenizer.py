"""Text in, token ids out: the checkpoint's own tokenizer.json and its own chat template, nothing of ours in between.

    prompt = encode_plain(template(messages))            ids that the model reads                          (1)
    answer = decode(ids up to a stop id)                 text that a person or a reward reads              (2)

Ids must match those the model was trained on, so every rule is read from the checkpoint: merges and BOS from
tokenizer.json, the turn format from the chat template, stop ids from generation_config.json, config.json and template.

A hub checkpoint is untrusted. tokenizer.json is data, parsed in Rust; the template is a program, so it runs in jinja2's
immutable sandbox (private attributes closed, range() at most 100,000 long) on a JSON copy of its arguments: no object
of ours is in its reach. What it can still do is waste time, with loops inside loops.

Reading order: load_tokenizer, Tokenizer, conversation_examples; character_tokenizer is for the tiny model.

Left out: checkpoints without tokenizer.json (the error says how transformers makes one), tokenizers that are Python
code, the additional_chat_templates/ folder, and `clean_up_tokenization_spaces`, which turns " ." into "." after
decoding: a reward would judge text that the model did not write.   Tests: tests/test_tokenizer.py
"""

import functools
import json
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

# All that `save` writes. We read the templates and the first three; the rest is kept for other programs.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>")  # Qwen; Gemma 1 to 3; Gemma 4; Llama 3


def load_tokenizer(path_or_repo: str | Path) -> "Tokenizer":
    """Open the tokenizer of a checkpoint: a local folder, or a hub id such as "Qwen/Qwen3-0.6B".

    Raises ValueError when there is no tokenizer.json (the line says how to get one) or a file is broken.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        from nanogspo.checkpoint import resolve  # not on top: it brings torch, seconds of start-up

        folder = resolve(path_or_repo)
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "tokenizer.json" not in present:
        advice = "copy the tokenizer files of the model that this one was trained from into it"
        if "tokenizer.model" in present or {"vocab.json", "merges.txt"} <= {*present}:
            code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            advice = f'make it once with: python -c "from transformers import AutoTokenizer; {code}"'
        found = ", ".join(present[:8]) + (", …" if len(present) > 8 else "")
        raise ValueError(f"got {folder} with {found or 'no files'}, want a tokenizer.json in it: {advice}")
    names = {*TOKENIZER_FILES, "generation_config.json", "config.json"}
    return Tokenizer({name: (folder / name).read_bytes() for name in present if name in names}, str(folder))


class Tokenizer:
    """A checkpoint's tokenizer, chat template and stop ids, made of the bytes of its files.

    files    name -> content. Kept whole (Gemma 3: 35 MB), so `save` works after their folder is gone
    folder   where they came from, for error messages
    eos_ids  sorted ids that end an answer: generation_config.json | config.json | the turn end that the template
             prints; the tokenizer's own eos_token only when these name none
    bos_id   the id that opens a text, or None (Qwen has none: config.json may name one, but it is never used)
    pad_id   fills short rows. Padding is never found by its value, so sharing an id with EOS is harmless
    """

    def __init__(self, files: dict[str, bytes], folder: str):
        self.files, self.folder = files, folder
        content = files["tokenizer.json"]
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust parser raises ValueError or bare Exception
            hint = "run git lfs pull" if content.startswith(b"version https://git-lfs") else "get it again"
            line = f"got {folder}/tokenizer.json of {len(content)} bytes that do not parse ({_line(error)})"
            raise ValueError(f"{line}, want the whole file: {hint}") from error
        self._backend.no_truncation()  # some files carry the settings of the run that wrote them,
        self._backend.no_padding()  # and a long prompt would lose its end in silence

        config = self._json("tokenizer_config.json")
        added = {int(number): token for number, token in (config.get("added_tokens_decoder") or {}).items()}
        for number, token in sorted(added.items()):  # a few fine-tunes name new tokens in this file only
            if self._backend.token_to_id(token["content"]) is None:
                self._backend.add_tokens([tokenizers.AddedToken(**token)])
                if self._backend.token_to_id(token["content"]) != number:
                    line = f"got {folder}/tokenizer_config.json with id {number} for {token['content']!r}, which"
                    raise ValueError(f"{line} tokenizer.json cannot give, want files of one model: get both again")

        # As in transformers: special_tokens_map.json counts only in old repos, which have no added_tokens_decoder.
        named = config if added else config | self._json("special_tokens_map.json")
        values = {key: named[key] for key in SPECIAL_TOKENS if named.get(key) is not None}
        self.special_tokens = {key: v["content"] if isinstance(v, dict) else v for key, v in values.items()}
        special_id = {key: self._backend.token_to_id(text) for key, text in self.special_tokens.items()}
        self.templates = self._read_templates(config)

        # Multimodal configs keep the language model's ids deeper: text_config (Gemma 3), thinker_config (Qwen-Omni).
        generation, model = self._json("generation_config.json"), self._json("config.json")
        thinker = model.get("thinker_config") or {}
        parts = [generation, model, model.get("text_config") or {}, thinker, thinker.get("text_config") or {}]
        eos = self.special_tokens.get("eos_token", "")
        sources = "\n".join(self.templates.values()).replace("eos_token", eos)  # {{ eos_token }} prints it as well
        printed = [end for end in (*TURN_ENDS, eos) if end in sources]
        stops = {*_ids(parts, "eos_token_id"), *map(self._backend.token_to_id, printed)} - {None}
        self.bos_id = special_id.get("bos_token")
        self.eos_ids = tuple(sorted(stops or {special_id.get("eos_token")} - {None}))
        pads = [special_id.get("pad_token"), *_ids(parts, "pad_token_id"), *self.eos_ids, 0]
        self.pad_id = next(pad for pad in pads if pad is not None)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, with the special tokens that the checkpoint adds itself: BOS for Gemma, none for Qwen.

        A text that already begins with a written "<bos>" gets no second one. Other control tokens written in the text,
        such as "<|im_end|>", become control tokens here and in chat messages, as in transformers.
        """
        ids = self._encode(text, add_special_tokens=True)
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id] else ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of the text as it stands: for rendered templates, which print their own BOS, and for answers."""
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids. Ids without a token give nothing: Qwen3 has 151,669 tokens, but 151,936 rows to sample."""
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
                         because templates print the word
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
            raise ValueError(f'got messages {_line(messages)}, want turns: write [{{"role": "user", "content": "…"}}]')
        name = "tool_use" if template_kwargs.get("tools") and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise ValueError(f"got chat templates {[*self.templates]}, want a default one: rename one in {self.folder}")
        # tools and documents are there as None, because some templates only ask whether they are none
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        given |= {**self.special_tokens, **template_kwargs}
        given["messages"] = [{key: value for key, value in m.items() if value is not None} for m in messages]
        try:
            given = json.loads(json.dumps(given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"got chat values outside JSON ({_line(error)}), want plain ones: convert them") from error
        try:
            return _compile(self.templates[name]).render(given)
        except Exception as error:  # somebody else's program: it may fail in any way
            # raise_exception(…) speaks to the reader; any other error needs its type to be understood
            reason = _line(error) if type(error) is jinja2.TemplateError else f"{type(error).__name__}: {_line(error)}"
            roles = ", ".join(str(message.get("role")) for message in messages[:8]) + (
                ", …" if len(messages) > 8 else ""
            )
            line = f"got messages ({roles}) that the chat template of {self.folder} does not take ({reason})"
            raise ValueError(f"{line}, want what it was written for: change messages or template arguments") from error

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer files into folder, byte for byte as loaded."""
        from nanogspo.checkpoint import atomic_write  # not on top, as in load_tokenizer

        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in self.files.keys() & {*TOKENIZER_FILES}:
            atomic_write(Path(folder) / name, self.files[name])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            # Half a surrogate pair, which JSON can spell ("\ud83d") but UTF-8 cannot; or a character outside the
            # alphabet of a character tokenizer. A real model's tokenizer takes everything else.
            halves = {c for c in text if "\ud800" <= c <= "\udfff"}
            strange = sorted(halves or {c for c in text if self._backend.token_to_id(c) is None})
            raise ValueError(f"got text with {strange[:8]}, want characters that have tokens: clean it") from error

    def _read_templates(self, config: dict) -> dict[str, str]:
        if "chat_template.jinja" in self.files:  # the newer place wins, as in transformers
            return {"default": self.files["chat_template.jinja"].decode()}
        inline = config.get("chat_template") or self._json("chat_template.json").get("chat_template") or {}
        if isinstance(inline, list):  # [{"name": "default", "template": "…"}, {"name": "tool_use", "template": "…"}]
            return {entry["name"]: entry["template"] for entry in inline}
        return {"default": inline} if isinstance(inline, str) else inline

    def _json(self, name: str) -> dict:
        try:
            return {**json.loads(self.files.get(name, b"{}"))}
        except (TypeError, ValueError) as error:  # not JSON, not UTF-8, or not an object
            line = f"got {self.folder}/{name} that is not a JSON object ({_line(error)})"
            raise ValueError(f"{line}, want the file of the checkpoint: get it again") from error


def conversation_examples(
    tokenizer: Tokenizer, messages: list[dict], **template_kwargs
) -> list[tuple[list[int], list[bool]]]:
    """Training examples of a conversation: loss on what the assistant must produce, and on nothing else.

        prompt[i] = encode_plain(render(messages[:i], add_generation_prompt=True))                         (3)
        answer[i] = encode_plain(what render(messages[:i + 1], add_generation_prompt=False) adds to it)    (4)

    returns  [(tokens, loss_mask), …], two lists of one length. loss_mask is True on answer[i] up to its last stop
             token; what the template prints after that (a newline) is read in the next turn, never produced

    Prompt and answer are encoded apart: the model will be given exactly prompt[i] and go on token by token. A turn
    continues the example before it when the ids of that example begin its prompt, as they mostly do: one example.
    Where a template rewrites the past (Qwen3 drops the thinking of earlier turns) a new one starts. So every loss
    token follows the very ids it will follow in use. Turns after the last answer teach nothing and are left off.

    Raises ValueError when no assistant turn has a turn before it, when an answer does not continue its prompt, and when
    the template closes one without a stop token, since the model would not learn to stop.

    Elsewhere: TRL's `assistant_only_loss` needs a template with {% generation %} marks; this does not.
    """
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
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
        prompt, answer = tokenizer.encode_plain(before), tokenizer.encode_plain(after[len(before) :])
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


def _ids(parts: list[dict], key: str) -> list[int]:
    """Ids under key, part by part. A part says 5, [5, 7], null, or -1, which also means none."""
    values = [part.get(key) for part in parts]
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return [i for i in ids if isinstance(i, int) and i >= 0]


def _line(text: object) -> str:
    """One line, at most 300 characters: parsers and templates write as much as they like."""
    return " ".join(str(text).split())[:300]


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for TRL; here it prints what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(maxsize=8)  # compiling costs about a hundred renderings
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes "<" for HTML; models are trained on plain JSON
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
