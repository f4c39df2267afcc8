"""Mixture of experts: a forward and a backward pass, ours against transformers' three ways to multiply experts.

Both train every parameter of the same random Qwen3-MoE, fp32 on a CPU and bf16 on a GPU, in one process, taking turns;
the first turn warms up. Times are medians. Their ways are eager (a loop over experts), grouped_mm (torch._grouped_mm)
and batched_mm (copies of weights, a pair each: 6 GB at 256 tokens). A ratio says how many times longer theirs takes.

Run: python benchmarks/moe.py [--tokens 256 --rounds 5 --ways eager grouped_mm batched_mm] [--json FILE]
needs requirements-test.txt
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanogspo import checkpoint  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WAYS = ("eager", "grouped_mm", "batched_mm")
# about 50 M parameters each: few wide experts, many narrow ones
SIZES = {
    16: {"hidden_size": 512, "moe_intermediate_size": 448, "num_experts": 16, "num_experts_per_tok": 2},
    64: {"hidden_size": 512, "moe_intermediate_size": 112, "num_experts": 64, "num_experts_per_tok": 8},
}


def timed(call) -> float:
    began = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds(experts: int, tokens: int, rounds: int, ways: list[str]) -> dict[str, list[float]]:
    """Seconds of each turn of "ours" and of each of their ways that runs here."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    more = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    more |= {"vocab_size": 4096, "norm_topk_prob": True, "intermediate_size": 1024}
    with tempfile.TemporaryDirectory() as folder:
        kind = transformers.Qwen3MoeForCausalLM
        kind(transformers.Qwen3MoeConfig(**SIZES[experts], **more)).save_pretrained(folder)
        with torch.no_grad():  # a router of zeros sends every token to the same experts
            sides = {way: kind.from_pretrained(folder, dtype=DTYPE, experts_implementation=way) for way in ways}
            sides["ours"] = checkpoint.load(folder, dtype=DTYPE)
            for name, model in sides.items():
                torch.manual_seed(0)
                for layer in (model if name == "ours" else model.model).layers:
                    layer.mlp.gate.weight.normal_(0, 0.1)
                model.to(DEVICE).train().requires_grad_(True)
    batch = torch.randint(0, 4096, (4, tokens // 4), device=DEVICE)

    def turn(name: str):
        model = sides[name]
        hidden = model(batch) if name == "ours" else model.model(batch, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
        model.zero_grad()

    times: dict[str, list[float]] = {name: [] for name in ("ours", *ways)}
    for _ in range(rounds + 1):
        for name in list(times):
            try:
                times[name].append(timed(lambda name=name: turn(name)))
            except (RuntimeError, NotImplementedError) as e:  # a way that this device or dtype does not have
                print(f"{name}: {str(e).splitlines()[0][:100]}")
                del times[name]
    return {name: list(turns[1:]) for name, turns in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 256, "rounds": 5, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"threads": args.threads, "tokens": args.tokens, "dtype": str(DTYPE), "torch": torch.__version__}
    print(
        "| experts | ours, ms | "
        + " | ".join(f"{way}, x" for way in args.ways)
        + " |\n|---|---|"
        + "---|" * len(args.ways)
    )
    for experts in SIZES:
        times = result[str(experts)] = seconds(experts, args.tokens, args.rounds, args.ways)
        mid = {name: statistics.median(turns) for name, turns in times.items()}
        ratios = " | ".join(f"{mid[way] / mid['ours']:.2f}" if way in mid else "-" for way in args.ways)
        print(f"| {experts} | {1e3 * mid['ours']:.0f} | {ratios} |", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
