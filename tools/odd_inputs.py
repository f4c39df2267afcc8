"""Small sound inputs of every format, and one thing wrong about one of them: what tools/fuzz.py tries.

    make(home)              checkpoints in two styles, an adapter, data, prompts, YAML, and a run that can be resumed
    damage(path, dice)      something wrong about a file, in the ways of its format; returns what
    odd_flags(argv, ...)    flags and one more, mostly with an absurd value

dice is a random.Random: the same one gives the same damage.       Tests: tests/test_fuzz.py
"""

import contextlib
import dataclasses
import io
import json
import random
import shutil
import struct
import zlib
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

import train
from nanogspo import config
from nanogspo.storage.safetensors import read_header, write_safetensors

# ---------------------------------------------------------------------------------------------------------------------
# sound inputs

CHATML = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASK, SAY = {"role": "user", "content": "the end"}, {"role": "assistant", "content": "then 12"}
ROWS = [
    {"messages": [{"role": "system", "content": "a"}, ASK, SAY, ASK, SAY, {**SAY, "weight": 0}], "id": 7},
    {"prompt": "1+1=", "completion": "2", "system": "add", "chat_template_kwargs": {"style": "x"}},
    {"prompt": [ASK], "completion": "yes", "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"title": "sum", "description": "of two", "input_format": "", "solution": "print(2)"},
]
SFT = "--model qwen --data rows.jsonl --algo sft --steps 1 --batch-size 2 --lora-r 2 --dtype fp32 --device cpu".split()


def make(home: Path) -> None:
    """Writes qwen/ (sharded, keys as on the hub), gemma/ (keys of transformers 5), adapter/, run/ and four files."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
    layers = ["sliding_attention", "full_attention"]
    none = {"bos_token_id": None, "pad_token_id": None}
    qwen = transformers.Qwen3Config(**sizes, **none, num_hidden_layers=1, eos_token_id=257)
    gemma = transformers.Gemma3TextConfig(
        **sizes, num_hidden_layers=2, layer_types=layers, sliding_window=8, query_pre_attn_scalar=8
    )
    torch.manual_seed(0)
    for name, kind, options, shard in (
        ("qwen", transformers.Qwen3ForCausalLM, qwen, "40KB"),
        ("gemma", transformers.Gemma3ForCausalLM, gemma, "5GB"),
    ):
        model = kind(options)
        for p in model.parameters():
            p.data += torch.randn_like(p) * 0.2 * (p.ndim == 1)  # norms other than 1: a wrong one shows
        model.save_pretrained(home / name, max_shard_size=shard)
    old = json.loads((home / "qwen/config.json").read_text())
    theta, dtype = old.pop("rope_parameters")["rope_theta"], old.pop("dtype")
    old |= {"rope_theta": theta, "torch_dtype": dtype}
    old["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    del old["layer_types"]
    write_json(home / "qwen/config.json", old)
    write_json(home / "qwen/generation_config.json", {"eos_token_id": [257, 256], "temperature": 0.6})
    tokenizer_like_qwen(home / "qwen")
    tokenizer_like_gemma(home / "gemma")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "prompts.txt").write_text("the end\nthen é\n1+1=\n")
    (home / "config.yaml").write_text((config.ROOT / "configs/tiny.yaml").read_text())
    out = io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train.run(config.parse(config.TrainConfig, [*SFT, "--out", "run"], "train.py")[0])
    shutil.copytree(home / "run/adapter", home / "adapter")
    tensors = {}
    for name, stored in read_header(home / "adapter/adapter_model.safetensors")[0].items():
        tensors[name] = torch.randn(stored.shape) * 0.2  # after one update B is nearly 0, and nothing would show
    write_safetensors(home / "adapter/adapter_model.safetensors", tensors, {"format": "pt"})


def tokenizer_like_qwen(folder: Path) -> None:
    """Bytes, a chat template and tokens by id in tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    backend.save(str(folder / "tokenizer.json"))
    tokens = {str(i): {"content": t.content, "special": True} for i, t in backend.get_added_tokens_decoder().items()}
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    facts |= {"added_tokens_decoder": tokens, "chat_template": CHATML, "model_max_length": 64}
    write_json(folder / "tokenizer_config.json", facts)


def tokenizer_like_gemma(folder: Path) -> None:
    """Merges with byte fallback, a post-processor that prints <bos>, and every file that older repositories have."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁\ndehnt12", "th", "the"]
    ids = {token: i for i, token in enumerate(vocab)}
    merges = [("t", "h"), ("th", "e")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(vocab[:4])
    backend.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}})
    write_json(folder / "added_tokens.json", {"<|im_start|>": 271, "<|im_end|>": 272})
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# something wrong

COPY, DEEP = "a second key", "a deep list"  # stand for what no Python value becomes
ODD = [None, True, False, 0, 1, 2, -1, 7, 0.5, 2**31, 2**63, 10**400, 1e308, -1e308, 1e-320, float("nan"), float("inf"),
       "", " ", "x", "1", "a\nb", "\ud800", "\0", "é" * 3000, "../x", "<eos>", "<|im_end|>", [], {}, [[]], ["x"], [0],
       [None], {"x": 1}, {"content": "x"}, DEEP]  # fmt: skip
WORDS = ["", "0", "-1", "1", "2", "1e308", "1e-320", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "٣", "1_000", "0x10",
         " 5 ", "010", "1:30", "true", "on", "no", "null", "~", "~nobody/x", "[]", "{}", "[1, 2]", "'", "a\nb", "\0",
         "\udc80", "é" * 3000, "..", "/dev/null", "/", "a/b", "a/b/c", "-", "--", "--steps", "&a *a", "!!int 5", "+5",
         "!!python/name:os", "2001-01-01", "qwen", "adapter", "run", "rows.jsonl", "1e3", ".5", "5.", "q_proj", "{{",
         "%}", "{% for x in range(10**9) %}", "x: &a"]  # fmt: skip


def near(value: object) -> list:
    """Other values of the same type: many are accepted, and must then mean here what they mean elsewhere."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 2, value / 2, value // 2]
    if isinstance(value, str):
        return [value + " ", value.upper(), value[:-1], "llama", "linear", "gelu", "<|endoftext|>", "the", "train"]
    if isinstance(value, list):
        return [value * 2, value[::-1], value[:1]]
    return [{**value, "x": 1}, dict([*value.items()][1:])] if value else [None]


def odd_json(text: str, dice: random.Random) -> tuple[str, str]:
    """(text, what is wrong) of a JSON file in which one node, found by a walk from the root, is odd."""
    holder, key, path = [json.loads(text)], 0, ""
    root = holder
    while isinstance(holder[key], dict | list) and holder[key] and (not path or dice.random() < 0.7):
        holder = holder[key]
        key = dice.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        path += f"/{key}"
    how = dice.choice(["set"] * 6 + ["wrap"] + ["drop"] * bool(path) + ["twice", "add"] * isinstance(holder, dict))
    odd, second = dice.choice(near(holder[key]) if dice.random() < 0.4 else ODD), key if how == "twice" else "unknown"
    if how == "wrap":
        odd = dice.choice([{"x": holder[key]}, [holder[key]]])
    if how == "drop":
        del holder[key]
    else:
        holder[COPY if how in ("twice", "add") else key] = odd
    text = json.dumps(root[0]).replace(json.dumps(COPY), json.dumps(second))
    return text.replace(json.dumps(DEEP), "[" * 900 + "]" * 900), f"{how} {path or 'all'} {odd!r:.40}"


def odd_bytes(path: Path, dice: random.Random) -> str:
    """Damage that knows nothing of the format."""
    data = path.read_bytes() or b"x"
    place, others = dice.randrange(len(data)), sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    marks = ["utf-8-sig"] * (path.suffix != ".jinja")  # which transformers prints, and no file's author means
    how = dice.choice(["cut", "flip", "empty", "folder", "gone", "utf-16", "latin-1", "crlf", "swap", "tail", *marks])
    if how == "swap" and others:
        other = dice.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"swapped with {other.name}"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        if how in ("utf-16", "utf-8-sig"):
            data = data.decode("latin-1").encode(how)
        changed = {
            "cut": data[:place],
            "flip": data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :],
            "empty": b"",
            "latin-1": data[:place] + b"\xe9" + data[place:],
            "crlf": data.replace(b"\n", b"\r\n"),
            "tail": data + dice.choice([b"\0", b"\n", b"}", b"x" * 100, b"\xff\xfe"]),
        }
        path.write_bytes(changed.get(how, data))
    return f"{how} at {place} of {len(data)}"


def odd_safetensors(path: Path, dice: random.Random) -> str:
    """The header: a tensor's name, dtype, shape, offsets; its length; and the JSON that a run's state keeps in it."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    facts = header.get("__metadata__", {})
    if "state" in facts and dice.random() < 0.6:  # forged, so its checksum says that it is whole
        forged, what = odd_json(facts["state"][:-22] + "}", dice)
        crc = f"{zlib.crc32(forged.encode('utf-8', 'surrogatepass')):08x}"
        facts["state"] = f'{forged[:-1]}, "crc32": "{crc}"}}'
        text = json.dumps(header)
    elif dice.random() < 0.4:
        text, what = odd_json(data[8:end].decode(), dice)
    else:
        name = dice.choice([n for n in header if n != "__metadata__"])
        entry, what = header[name], dice.choice(["name", "dtype", "shape", "turned", "offsets"])
        if what == "name":
            renamed = dice.choice(["x", "model.", "", "\n" * 9, f"module.{name}", f"{name}.weight", name.upper()])
            header[renamed] = header.pop(name)
        elif what == "dtype":
            entry["dtype"] = dice.choice(["F64", "F16", "BF16", "I64", "U8", "I8", "F8_E4M3", "BOOL", "x", "f32"])
        elif what == "shape":
            entry["shape"] = dice.choice([[], [1, *entry["shape"]], [0], [2**40, 2**40], [-1], [True], [1.0]])
        elif what == "turned":
            entry["shape"].reverse()
        else:
            entry["data_offsets"][dice.randrange(2)] += dice.choice([-4, 4, 2**40, -(2**40)])
        text, what = json.dumps(header), f"{what} of {name}: {header.get(name)!r:.60}"
    header = text.encode("utf-8", "surrogatepass")
    length = dice.choice([len(header)] * 20 + [0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + header + data[end:])
    return what + (f", length {length}" if length != len(header) else "")


def damage(path: Path, dice: random.Random) -> str:
    if dice.random() < 0.25 or not path.stat().st_size:
        what = odd_bytes(path, dice)
    elif path.suffix == ".safetensors":
        what = odd_safetensors(path, dice)
    elif path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        n = dice.randrange(len(lines))
        lines[n], what = odd_json(lines[n], dice)
        path.write_text("\n".join(lines))
        what = f"line {n + 1}, {what}"
    else:  # YAML, a template, prompts
        pieces, word = path.read_text().split(" "), dice.choice(WORDS)
        n = dice.randrange(len(pieces))
        pieces[n : n + dice.choice([0, 1, 1, 2])] = [word]
        path.write_text(" ".join(pieces), "utf-8", "surrogateescape")
        what = f"{word!r:.40} at piece {n}"
    return f"{path}: {what}"


def odd_flags(argv: list[str], kind: type, dice: random.Random, fixed: tuple[str, ...] = ()) -> list[str]:
    """argv and a flag of this configuration, none of the fixed ones."""
    field = dice.choice([f for f in dataclasses.fields(kind) if f.name not in fixed])
    flag, value = config.flag_name(field.name), dice.choice([*WORDS, *field.metadata["choices"]])
    if field.type is bool:
        return [*argv, dice.choice([flag, flag.replace("--", "--no-"), f"{flag}={value}"])]
    return [*argv, *dice.choice([[flag, value], [f"{flag}={value}"], [flag], [flag, value, flag, "1"]])]
