"""Sampling: ours against transformers' generate on the same weights, prompts, settings and number of tokens.

Both draw exactly N tokens for every answer at temperature 1 from the whole vocabulary (end tokens: banned on their
side, ignored on ours), in one process, taking turns; the first turn warms up. Times are medians, with the prefill.
Two more questions need no peer: how long a token takes late in an answer, and what a prompt of many answers costs
(there the shortest of three turns).

Run: python benchmarks/generate.py DIR [--rows 8 32 --tokens 64 --rounds 5 --lora] [--json FILE]
     python benchmarks/generate.py DIR --alone        without the peer: the length of an answer, and shared prompts
needs requirements-test.txt
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gspo_step import prompt  # noqa: E402
from nanogspo import checkpoint  # noqa: E402
from nanogspo.device import DTYPES, choose_dtype  # noqa: E402
from nanogspo.lora import add_lora  # noqa: E402
from nanogspo.packing import Example, pack, score  # noqa: E402
from nanogspo.rollout import decode, generate  # noqa: E402
from nanogspo.tokenizer import load_tokenizer  # noqa: E402

GROUP = 8  # answers to a prompt
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(call) -> float:
    began = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def against_transformers(args, model, tokenizer) -> list[dict]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    dtype = model.norm.weight.dtype
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=dtype).to(DEVICE).eval()
    if args.lora:
        import peft

        settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(theirs, settings)
    out = []
    for rows in args.rows:
        prompts = [tokenizer.chat(prompt(i)) for i in range(max(1, rows // GROUP))]
        seconds = take_turns(model, theirs, prompts, rows // len(prompts), args.tokens, args.rounds)
        mid = {side: statistics.median(times[1:]) for side, times in seconds.items()}
        speeds = {side: rows * args.tokens / s for side, s in mid.items()}
        ratio = mid["transformers"] / mid["ours"]
        print(
            f"| {rows} x {args.tokens} | {speeds['ours']:.0f} | {speeds['transformers']:.0f} | {ratio:.2f} x |",
            flush=True,
        )
        out.append({"rows": rows, "tokens": args.tokens, "seconds": seconds, "ratio": ratio})
    return out


def take_turns(model, theirs, prompts: list[list[int]], group: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of rounds + 1 turns of either side; the first warms up. Exactly `tokens` tokens for every answer."""
    rows, widest = len(prompts) * group, max(map(len, prompts))
    padded = [[0] * (widest - len(p)) + p for p in prompts]  # on the left, as their generate wants it
    seen = [[0] * (widest - len(p)) + [1] * len(p) for p in prompts]
    inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(seen)}
    inputs = {name: x.to(theirs.device) for name, x in inputs.items()}
    whole = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    exact = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_return_sequences": group}

    def their_turn():
        drawn = theirs.generate(**inputs, **whole, **exact)
        assert drawn.shape == (rows, widest + tokens), drawn.shape

    def our_turn():
        answers = generate(model, prompts, group_size=group, max_new_tokens=tokens)
        assert sum(len(a.tokens) for a in answers) == rows * tokens

    seconds = {"ours": [], "transformers": []}
    for _ in range(rounds + 1):
        seconds["ours"].append(timed(our_turn))
        seconds["transformers"].append(timed(their_turn))
    return seconds


def late_tokens(model, prompts: list[list[int]], early: int = 32, late: int = 512, around: int = 16) -> dict:
    """Seconds a step around token `early` and around token `late`, and what reading the keys between them must cost."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_ids": (), "seed": 0}
    steps = decode(model, prompts, group_size=GROUP, max_new_tokens=late + around, **settings)
    times = [time.perf_counter() for _ in steps]  # a step ends when its tokens reach the host
    taken = [b - a for a, b in zip(times, times[1:], strict=False)]
    config, rows = model.config, len(prompts) * GROUP
    element = 4 if DEVICE == "cpu" else model.norm.weight.element_size()
    read = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element * rows * (late - early)
    x = torch.ones(100_000_000, device=DEVICE)  # 400 MB: no cache holds it
    bandwidth = x.nbytes / min(timed(x.sum) for _ in range(5))
    a, b = (statistics.median(taken[at - around : at + around]) for at in (early, late))
    return {
        "rows": rows,
        "early": early,
        "late": late,
        "early_s": a,
        "late_s": b,
        "bytes_s": read / bandwidth,
        "beyond": (b - read / bandwidth) / a - 1,
    }


def said(late: dict) -> str:
    return (
        f"{late['rows']} rows: {1e3 * late['early_s']:.1f} ms a step around token {late['early']}, "
        f"{1e3 * late['late_s']:.1f} around {late['late']}; reading their keys takes "
        f"{1e3 * late['bytes_s']:.1f} of it; {100 * late['beyond']:+.0f} % beyond that"
    )


def shared_prompt(model, tokens: int = 512, group: int = 16, answer: int = 64, rounds: int = 3) -> dict:
    """A prompt with all its answers, against as many rows that each have their own: time over the tokens' share."""
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, model.config.vocab_size, (n,), generator=g).tolist()  # noqa: E731
    together, answers = draw(tokens), [draw(answer) for _ in range(group)]
    others = [draw(tokens) for _ in range(group)]

    def prefill(prompts, group_size):
        return lambda: generate(model, prompts, group_size=group_size, max_new_tokens=1)

    def packed(prompts):
        examples = [Example.answered(p, a) for p, a in zip(prompts, answers, strict=True)]
        return [batch.to(DEVICE) for batch in pack(examples, max_tokens=10**6)]

    def forward(batches):
        return lambda: [score(model, batch) for batch in batches]

    def both(batches):
        return lambda: [score(model, batch)[0].sum().backward() for batch in batches]

    shared, apart = packed([together] * group), packed(others)
    tokens_share = len(shared[0].tokens) / len(apart[0].tokens)
    out = {}
    for name, (one, many), share in (
        ("prefill", (prefill([together], group), prefill(others, 1)), 1 / group),
        ("training forward", (forward(shared), forward(apart)), tokens_share),
        ("forward and backward", (both(shared), both(apart)), tokens_share),
    ):
        seconds = [(timed(one), timed(many)) for _ in range(rounds)]
        a, b = (min(side) for side in zip(*seconds, strict=True))
        out[name] = {"shared_s": a, "apart_s": b, "share": share, "over_share": a / b / share}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder in Hugging Face layout")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="answers at a time, 8 to a prompt")
    for name, default in {"tokens": 64, "rounds": 5, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora", action="store_true", help="an adapter of rank 16 on all linear layers, on both sides")
    parser.add_argument("--alone", action="store_true", help="ours only: late tokens and shared prompts")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = choose_dtype("auto", DEVICE)
    model = checkpoint.load(args.checkpoint, device=DEVICE, dtype=DTYPES[dtype])
    tokenizer = load_tokenizer(args.checkpoint)
    if args.lora or args.alone:
        add_lora(model, r=16, alpha=32.0)
    result = {"threads": args.threads, "lora": args.lora or args.alone, "dtype": dtype, "torch": torch.__version__}
    if args.alone:
        late = result["late"] = late_tokens(model, [tokenizer.chat(prompt(i)) for i in range(4)])
        print(said(late))
        for name, row in result.setdefault("shared", shared_prompt(model)).items():
            print(
                f"{name}: 512 tokens shared by 16 answers {row['shared_s']:.2f} s, apart {row['apart_s']:.2f} s; "
                f"{row['over_share']:.2f} x the tokens' share"
            )
    else:
        print("| answers x tokens | ours, tokens/s | transformers | ratio |\n|---|---|---|---|")
        result["against"] = against_transformers(args, model, tokenizer)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
