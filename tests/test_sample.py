"""sample.py from the outside: one prompt, a file, a chat; streaming that never shows half a character.

Run: python -m pytest tests/test_sample.py
"""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogspo import checkpoint
from nanogspo.config import ROOT, SampleConfig
from nanogspo.lora import add_lora, lora_layers
from nanogspo.rollout import generate
from nanogspo.tokenizer import load_tokenizer
from tests.test_train import edit_json, script, write_checkpoint

module = importlib.import_module("sample")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("sample") / "model", seed=1, std=0.3
    )  # answers depend on every word


def sample(*argv, stdin=""):
    done = script("sample.py", *argv, stdin=stdin)
    assert done.code == 0, done.err
    return done.out


def greedy(base, ids, n, **settings):
    tokenizer, model = load_tokenizer(base), checkpoint.load(base, dtype=torch.float32)
    [answer] = generate(
        model, [ids], max_new_tokens=n, eos_ids=tokenizer.eos_ids, **{"temperature": 0.0, **settings}
    )  # fmt: skip
    return tokenizer.decode(answer.tokens)


def user(text):
    return [{"role": "user", "content": text}]


# ----------------------------------------------------------------------------
# the three ways to ask


def test_one_prompt_goes_through_the_chat_template(base):
    flags = ["--model", base, "--max-new-tokens", 8, "--temperature", 0]
    tokenizer = load_tokenizer(base)
    answer = greedy(base, tokenizer.chat(user("What is 3?")), 8)
    assert sample(*flags, "--prompt", "What is 3?") == sample(*flags, "What is 3?") == answer + "\n"
    assert sample(*flags, "--raw", "What is 3?") == greedy(base, tokenizer.encode("What is 3?"), 8) + "\n"
    system = [{"role": "system", "content": "Reply only"}, *user("What is 3?")]
    assert sample(*flags, "--system", "Reply only", "What is 3?") == greedy(base, tokenizer.chat(system), 8) + "\n"


def test_sampling_settings_and_seed_reach_the_sampler(base):
    flags = ["--model", base, "--max-new-tokens", 8, "hello"]
    ids = load_tokenizer(base).chat(user("hello"))
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0, "top_p": 0.5}):
        more = [x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", value)]
        for seed in (0, 1):
            assert sample(*flags, *more, "--seed", seed) == greedy(base, ids, 8, **settings, seed=seed) + "\n"


def test_a_file_of_prompts_is_answered_in_order(base, tmp_path):
    """In one batch; each answer is the one its prompt gets alone."""
    # as Windows writes it: a byte order mark, and two characters at the end of a line
    (tmp_path / "questions.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\nWhat is 3?\n")
    flags = ["--model", base, "--max-new-tokens", 6, "--temperature", 0]
    out = sample(*flags, "--prompts", tmp_path / "questions.txt")
    ids = [load_tokenizer(base).chat(user(prompt)) for prompt in ("one", "What is 3?")]
    answers = [greedy(base, row, 6) for row in ids]
    assert out == f"> one\n{answers[0]}\n\n> What is 3?\n{answers[1]}\n\n"


def test_many_prompts_are_written_as_they_are_answered(base, tmp_path, monkeypatch):
    """Three answers each, four rows at a time, so a prompt at a time; the same as generate makes of all at once."""
    (tmp_path / "q.txt").write_text("one\ntwo\nWhat is 3?\n")
    flags = ["--model", base, "--max-new-tokens", 6, "--temperature", 1.5, "--seed", 3, "--samples-per-prompt", 3]
    flags += ["--prompts", tmp_path / "q.txt"]
    tokenizer, model = load_tokenizer(base), checkpoint.load(base, dtype=torch.float32)
    ids = [tokenizer.chat(user(prompt)) for prompt in ("one", "two", "What is 3?")]
    how = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3, "eos_ids": tokenizer.eos_ids}
    want = generate(model, ids, group_size=3, **how)
    assert len({tuple(answer.tokens) for answer in want}) > 6
    config = SampleConfig(**{"model": str(base), "prompts": str(tmp_path / "q.txt"), "out": str(tmp_path / "a.jsonl")})
    config = dataclasses.replace(config, max_new_tokens=6, temperature=1.5, seed=3, samples_per_prompt=3)
    written, real = [], module.decode

    def counted(*args, **kwargs):
        written.append(len((tmp_path / "a.jsonl").read_text().splitlines()))
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "MAX_ROWS", 4)
    monkeypatch.setattr(module, "decode", counted)
    module.run(config)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert written == [0, 3, 6]
    assert [row["answer"] for row in rows] == [tokenizer.decode(answer.tokens) for answer in want]
    assert [row["prompt"] for row in rows] == ["one"] * 3 + ["two"] * 3 + ["What is 3?"] * 3
    assert [(row["prompt_index"], row["finished"], row["tokens"]) for row in rows] == [
        (answer.prompt_index, answer.finished, len(answer.tokens)) for answer in want
    ]
    out = sample(*flags)
    assert out == "".join(f"> {row['prompt']}\n{row['answer']}\n\n" for row in rows)
    for more, words in ((["--out", tmp_path / "a.jsonl"], "which exists"), (["--chat"], "of --prompt, --prompts and")):
        assert words in script("sample.py", *flags, *more).err
    chat = script("sample.py", "--model", base, "--chat", "--samples-per-prompt", 2)
    assert chat.code == 2 and "got --chat with --out or --samples-per-prompt" in chat.err


def test_chat_keeps_the_conversation(base):
    flags = ["--model", base, "--max-new-tokens", 5, "--temperature", 0, "--chat"]
    tokenizer = load_tokenizer(base)
    first = greedy(base, tokenizer.chat(user("one")), 5)
    turns = [*user("one"), {"role": "assistant", "content": first}, *user("What is 3?")]
    second = greedy(base, tokenizer.chat(turns), 5)
    assert second != greedy(base, tokenizer.chat(user("What is 3?")), 5)  # the first turn has a say in it
    want = f"you> {first}\nyou> {second}\nyou> "
    for ending in ("\n", "", "   \nnever read\n"):  # an empty line, Ctrl-D, blanks
        assert sample(*flags, stdin="one\nWhat is 3?\n" + ending).split("\n", 1)[1] == want


def test_an_adapter_is_put_on(base, tmp_path):
    model = checkpoint.load(base, dtype=torch.float32)
    add_lora(model, r=2, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 1.0, generator=torch.Generator().manual_seed(0))
    checkpoint.save_adapter(model, tmp_path / "adapter")
    checkpoint.save(model, tmp_path / "merged")
    flags = ["--max-new-tokens", 8, "--temperature", 0, "hello"]
    plain = sample("--model", base, *flags)
    with_adapter = sample("--model", base, "--adapter", tmp_path / "adapter", *flags)
    assert plain != with_adapter == sample("--model", tmp_path / "merged", *flags)


# ----------------------------------------------------------------------------
# streaming


class Bytes:
    """A tokenizer of single bytes, as byte-level BPE is at its worst: an emoji takes four tokens."""

    eos_ids = (256,)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def streamed(monkeypatch, ids):
    steps = [([0], [token], [0.0], [token == 256]) for token in ids]
    monkeypatch.setattr(module, "decode", lambda *args, **kwargs: iter(steps))
    return list(module.stream(None, Bytes(), [1], SampleConfig()))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_pieces_are_whole_characters_and_add_up(text):
    with pytest.MonkeyPatch.context() as monkeypatch:
        pieces = streamed(monkeypatch, [*text.encode(), 256])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_shown_as_soon_as_it_is_whole(monkeypatch):
    pieces = streamed(monkeypatch, [*"aé🙂b".encode(), 256])
    assert [piece for piece in pieces if piece] == ["a", "é", "🙂", "b"]
    # an answer that is cut off in the middle of a character ends in the replacement character, once
    assert streamed(monkeypatch, [*b"ok", *"🙂".encode()[:2]]) == ["o", "k", "\ufffd"]


def test_broken_bytes_in_the_middle_do_not_lose_what_follows(monkeypatch):
    """A model may write bytes that are no character. What came before is never printed again, nothing after is lost."""
    ids = [*b"a", 0xF0, *b"bc", 0x80, 0x80, *"é".encode(), 256]
    assert "".join(streamed(monkeypatch, ids)) == Bytes().decode(ids)


# ----------------------------------------------------------------------------
# bad input


def refusal(*argv):
    done = script("sample.py", *argv)
    assert done.code == 2 and done.out == "", (done.code, done.out)
    assert done.err.startswith("sample.py: ") and done.err.count("\n") == 1
    return done.err


def test_bad_input_ends_in_one_line_and_exit_code_2(base, tmp_path):
    assert "got no --model" in refusal("hello")
    assert "got 0 of --prompt, --prompts and --chat" in refusal("--model", base)
    assert "got 2 of --prompt" in refusal("--model", base, "--chat", "hello")
    assert "did you mean --temperature?" in refusal("--model", base, "--temprature", 1)
    assert "no folder here" in refusal("--model", tmp_path / "absent", "hello")
    assert "no such file or directory, want a text file, one" in refusal("--model", base, "--prompts", "absent.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "got no prompts" in refusal("--model", base, "--prompts", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: got byte 0xe9 at column 4, want UTF-8" in refusal(
        "--model", base, "--prompts", tmp_path / "latin.txt"
    )
    assert "is a directory, want a text file" in refusal("--model", base, "--prompts", tmp_path)
    assert "--temperature -1.0, want 0 to 100" in refusal("--model", base, "--temperature", -1, "hello")
    assert "--max-new-tokens 0, want 1 to" in refusal("--model", base, "--max-new-tokens", 0, "hello")
    assert "max_position_embeddings" in refusal("--model", base, "--max-new-tokens", 1000, "hello")
    assert "adapter_config.json" in refusal("--model", base, "--adapter", base, "hello")
    with pytest.raises(ValueError, match="got adapter 'gone', which is no folder here"):  # before a model is fetched
        module.run(SampleConfig(model="owner/unknown", adapter="gone", prompt="hello"))
    shutil.copytree(base, tmp_path / "model")
    edit_json(tmp_path / "model", "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    assert "chat template" in refusal("--model", tmp_path / "model", "hello")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "want a tokenizer.json" in refusal("--model", tmp_path / "model", "hello")
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").mkdir()  # an error of the operating system
    assert "config.json" in refusal("--model", tmp_path / "model", "hello")
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in refusal("--model", base, "--device", "cuda", "hello")


def test_a_chat_survives_a_turn_that_does_not_fit(base):
    """The conversation has outgrown the context: one line says so; no traceback."""
    done = script("sample.py", "--model", base, "--chat", "--max-new-tokens", "200", stdin="hello " * 40 + "\n\n")
    assert done.code == 2 and "max_position_embeddings" in done.err and done.err.count("\n") == 1


def test_a_real_process_streams_over_pipes(base):
    command = [sys.executable, "sample.py", "--model", base, "--chat", "--max-new-tokens", "4", "--temperature", "0"]
    done = subprocess.run(command, cwd=ROOT, input="one\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answer = greedy(base, load_tokenizer(base).chat(user("one")), 4)
    assert done.stdout == f"chat: an empty line or Ctrl-D ends\nyou> {answer}\nyou> "
