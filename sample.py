"""Talk to a checkpoint: one prompt, a file of prompts, or a chat that streams.

    python sample.py --model runs/tiny/model "12+7="
    python sample.py --model Qwen/Qwen3-0.6B --adapter runs/my-run/adapter --chat
    python sample.py --model DIR --prompts questions.txt --samples-per-prompt 4 --out answers.jsonl

Prompts go through the checkpoint's own chat template when it has one (--raw switches that off).

Exit codes: 0 done · 2 one line on stderr says what is wrong and what to do · 130 Ctrl-C · 141 nobody reads the answers
any more, as after `| head` · 1 with a traceback: a bug.
"""

import json
import pathlib
import re
from collections.abc import Iterator
from contextlib import nullcontext

from nanogspo.config import SampleConfig, check_fields
from nanogspo.run.program import main

if __name__ == "__main__":  # flags before torch: a wrong one answers at once
    hint = "lower --max-new-tokens, or take --dtype bf16 or --quant int8"
    main(__file__, SampleConfig, check_fields, memory=hint, needs_stdout=True)

from nanogspo import checkpoint  # noqa: E402
from nanogspo.device import DTYPES, choose_device, choose_dtype  # noqa: E402
from nanogspo.fast.fused_linear import FusedLinears  # noqa: E402
from nanogspo.inputs import read_text  # noqa: E402
from nanogspo.model import Transformer  # noqa: E402
from nanogspo.rollout import Answer, decode  # noqa: E402
from nanogspo.run import planner  # noqa: E402
from nanogspo.run.process import available_memory  # noqa: E402
from nanogspo.tokenizer import Tokenizer, load_tokenizer  # noqa: E402


def run(config: SampleConfig) -> None:
    check_fields(config)
    modes = [bool(config.prompt), bool(config.prompts), config.chat]
    if not config.model:
        raise ValueError("got no --model, want a checkpoint folder or a hub id owner/name")
    if sum(modes) != 1:
        raise ValueError(f"got {sum(modes)} of --prompt, --prompts and --chat, want exactly one")
    if config.chat and (config.out or config.samples_per_prompt > 1):
        raise ValueError("got --chat with --out or --samples-per-prompt, want --prompts FILE")
    if config.out and pathlib.Path(config.out).exists():
        raise ValueError(f"got --out {config.out}, which exists; want a new file")
    if config.chat and config.raw:
        raise ValueError("got --chat with --raw, which has no turns; want one of them")
    prompts = read_prompts(config.prompts) if config.prompts else [config.prompt]
    device = choose_device(config.device)
    if config.adapter:  # named wrongly, it is said before a model is fetched
        checkpoint.resolve(config.adapter, want="adapter")
    folder = checkpoint.resolve(config.model, want="model")
    tokenizer = load_tokenizer(folder)
    dtype = DTYPES[choose_dtype(config.dtype, device, checkpoint.stored_dtype(folder))]
    if config.chat and not tokenizer.has_chat_template:
        raise ValueError(f"got --chat, but {config.model} has no chat template; want --prompt")
    ids = [[] if config.chat else encode(tokenizer, [{"role": "user", "content": p}], p, config) for p in prompts]
    quant = None if config.quant == "none" else config.quant
    outline = planner.outline(checkpoint.read_config(folder), dtype, quant)
    slots = min(len(ids) * config.samples_per_prompt, MAX_ROWS) * (max(map(len, ids)) + config.max_new_tokens - 1)
    parts, free = planner.sampling_parts(outline, slots, device), available_memory(device)
    refused = planner.too_large(parts, free, (planner.PREPACKED,))
    if refused and not config.ignore_memory_plan:
        raise ValueError(f"{refused}; or --ignore-memory-plan")
    model = checkpoint.load(folder, device=device, dtype=dtype, quant=quant)
    model.prepack = not planner.too_large(parts, free)  # faster, where the copies fit
    if config.adapter:
        checkpoint.load_adapter(model, config.adapter)
    if config.chat:
        chat(model, tokenizer, config)
        return
    if len(ids) == config.samples_per_prompt == 1 and not config.out:
        for piece in stream(model, tokenizer, ids[0], config):
            print(piece, end="", flush=True)
        print()
        return
    with open(config.out, "x", encoding="utf-8", errors="backslashreplace") if config.out else nullcontext() as file:
        for answer in answers(model, tokenizer, ids, config):
            row = {"prompt": prompts[answer.prompt_index], "answer": tokenizer.decode(answer.tokens)}
            if file:
                row |= {"prompt_index": answer.prompt_index, "finished": answer.finished, "tokens": len(answer.tokens)}
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
            else:
                print(f"> {row['prompt']}\n{row['answer']}\n", flush=True)


MAX_ROWS = 32  # bounds the KV cache: a thousand prompts at once would take 34 GB with Qwen3-0.6B


def read_prompts(path: str) -> list[str]:
    text = read_text(path, "a text file, one prompt a line")
    prompts = [line for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if not prompts:
        raise ValueError(f"got no prompts in {path}, want one a line")
    return prompts


def encode(tokenizer: Tokenizer, messages: list[dict], text: str, config: SampleConfig) -> list[int]:
    if config.raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    system = [{"role": "system", "content": config.system}] if config.system else []
    thinking = {} if config.thinking == "auto" else {"enable_thinking": config.thinking == "on"}
    return tokenizer.chat([*system, *messages], **thinking)


def settings(tokenizer: Tokenizer, config: SampleConfig) -> dict:
    """What `generate` and `decode` are told about how to sample."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    return {name: getattr(config, name) for name in names} | {"eos_ids": tokenizer.eos_ids}


def answers(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]], config: SampleConfig) -> Iterator[Answer]:
    """samples_per_prompt answers to each prompt, in order, as soon as those decoded with them are done."""
    G, fused = config.samples_per_prompt, FusedLinears(model)
    size = max(1, MAX_ROWS // G)  # prompts at a time
    for first in range(0, len(ids), size):
        part = ids[first : first + size]
        made = [Answer(first + p) for p in range(len(part)) for _ in range(G)]
        how = {"group_size": G, "first_prompt": first, **settings(tokenizer, config)}
        for rows, tokens, _, finished, _ in decode(model, part, fused, **how):
            for row, token, end in zip(rows, tokens, finished, strict=True):
                made[row].tokens.append(token)
                made[row].finished = end
        yield from made


def stream(model: Transformer, tokenizer: Tokenizer, prompt: list[int], config: SampleConfig) -> Iterator[str]:
    """Pieces of text as they become certain. A character may span several tokens (most emoji do), so what decodes to
    the replacement character is held back until it is whole."""
    ids, shown = [], ""
    for _, tokens, *_ in decode(model, [prompt], group_size=1, **settings(tokenizer, config)):
        ids += tokens
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def chat(model: Transformer, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Turns until an empty line. The whole conversation goes through the template each time."""
    messages, line = [], ""
    print("chat: an empty line or Ctrl-D ends")
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in stream(model, tokenizer, encode(tokenizer, messages, line, config), config):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
