"""One GSPO cycle, ours and TRL's: same checkpoint, prompts, sampled tokens, updates and threads, taking turns.

A cycle samples P prompts x G answers of exactly N tokens (end tokens: banned on TRL's side, ignored on ours),
scores them and makes U updates with LoRA on all linear layers. TRL runs its own GRPOTrainer with
importance_sampling_level="sequence", loss_type="grpo", clip 3e-4 / 4e-4 and beta 0, which is GSPO. Each side runs in
processes of its own: one cycle to warm up, then the measured ones. The ratio is of medians over all cycles; peak memory
is the process's, imports included.

The floor is what the cycle's matrix products alone would take: for every linear layer, adapter and head, and every
number of rows a phase multiplies them with, the time of that very product on this machine, in the faster of two
layouts (rows, and on a CPU prepacked ones). Attention, norms, sampling, the optimiser and Python are not in it.

Run: python benchmarks/gspo_step.py DIR [--prompts 4 --group 8 --tokens 64 --updates 4 --cycles 3 --rounds 2]
needs requirements-test.txt
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = "stone river cloud maple ember frost pearl tiger lemon ocean piano brick amber coral denim eagle".split()


def prompt(i: int) -> list[dict]:
    text = f"Reverse the word '{WORDS[i % len(WORDS)]}' letter by letter and reply with nothing but the reversed word."
    return [{"role": "user", "content": text}]


def reward(tokens: list[int]) -> float:
    """Depends on the tokens alone, spreads within any group, costs nothing."""
    return (sum(tokens) % 97) / 97


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds, self.started = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.started
        self.started = now


def train_on(rollout, model, optimizer, device) -> tuple[list[tuple[float, float]], list[float]]:
    """The updates of one rollout, as train.py makes them: the smallest and largest ratio of each micro-batch, and the
    gradient's norm of each update. Also what gpu_suite.py times."""
    from kernels.seq_logprob import sequence_sums
    from nanogspo.objectives import gspo_loss
    from nanogspo.packing import score

    ratios, norms = [], []
    for batches, old in zip(rollout.minibatches, rollout.old_logp, strict=True):
        total = len(rollout.examples) // len(
            rollout.minibatches
        )  # answers with advantage 0 count, though not trained on
        for batch, old_logp in zip(batches, old, strict=True):
            batch, A = batch.to(device), rollout.advantages[batch.index].to(device)  # (N,)
            logp, _, _ = score(model, batch)  # (S,)
            seq_logp = sequence_sums(logp, batch.cu_scored)  # (N,)
            old_logp = logp.detach() if old_logp is None else old_logp.to(device)  # (S,)
            old_seq_logp = sequence_sums(old_logp, batch.cu_scored)  # (N,)
            loss, facts = gspo_loss(seq_logp, old_seq_logp, batch.lengths, A, clip_low=3e-4, clip_high=4e-4)
            (loss * (len(batch.index) / total)).backward()
            optimizer.accumulate()
            ratios.append((float(facts["ratio_min"]), float(facts["ratio_max"])))
        norms.append(optimizer.step(1e-5, 1.0).item())
    return ratios, norms


def ours(args) -> list[dict]:
    import torch

    from nanogspo import checkpoint
    from nanogspo.device import DTYPES, choose_dtype
    from nanogspo.experience import experience
    from nanogspo.lora import add_lora
    from nanogspo.objectives import group_advantages
    from nanogspo.optimizer import Optimizer
    from nanogspo.packing import Example
    from nanogspo.rollout import generate
    from nanogspo.tokenizer import load_tokenizer

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoint.load(args.checkpoint, device=device, dtype=DTYPES[choose_dtype("auto", device)])
    tokenizer = load_tokenizer(args.checkpoint)
    add_lora(model, r=16, alpha=32.0)
    optimizer = Optimizer(model)
    rows = []
    for cycle in range(args.cycles + 1):
        clock = Clock()
        prompts = [tokenizer.chat(prompt(cycle * args.prompts + i)) for i in range(args.prompts)]
        answers = generate(model, prompts, group_size=args.group, max_new_tokens=args.tokens, eos_ids=(), seed=cycle)
        clock.lap("sample")
        rewards = torch.tensor([reward(a.tokens) for a in answers]).view(args.prompts, args.group)  # (P, G)
        rollout = experience(
            model,
            [Example.answered(prompts[a.prompt_index], a.tokens) for a in answers],
            group_advantages(rewards).flatten(),
            updates=args.updates,
            max_tokens=args.micro_batch_tokens,
            temperature=1.0,
            device=device,
            score_first=cycle == 0,  # as train.py: once the passes were seen to agree, the first update's own will do
        )
        clock.lap("score")
        ratios, _ = train_on(rollout, model, optimizer, device)
        if device == "cuda":
            torch.cuda.synchronize()
        clock.lap("train")
        rows.append({**clock.seconds, "tokens": sum(len(a.tokens) for a in answers), "first_ratio": ratios[0]})
    assert rows[0]["first_ratio"] == (1.0, 1.0), rows[0]  # the cycle that was scored twice
    return rows[1:]


def trl(args) -> list[dict]:
    import datasets
    import peft
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from nanogspo.device import DTYPES, choose_dtype

    dtype = choose_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu")  # both sides in the same
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    answers = args.prompts * args.group
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        beta=0.0,
        num_generations=args.group,
        per_device_train_batch_size=answers // args.updates,
        gradient_accumulation_steps=1,
        steps_per_generation=args.updates,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        max_steps=(args.cycles + 1) * args.updates,
        learning_rate=1e-5,
        bf16=dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": DTYPES[dtype]},
        gradient_checkpointing=False,
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([{"prompt": prompt(i)} for i in range(args.prompts * (args.cycles + 1))])
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    rows, clock = [], Clock()

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *arguments, **keywords):
            clock.lap("other")
            out = super()._generate_single_turn(*arguments, **keywords)
            clock.lap("sample")
            return out

        def _generate_and_score_completions(self, inputs):
            nonlocal clock
            if clock.seconds:
                clock.lap("train")
                rows.append(clock.seconds)
            clock = Clock()
            out = super()._generate_and_score_completions(inputs)
            clock.lap("score")
            clock.seconds["tokens"] = int(out["completion_mask"].sum())
            return out

    trainer = Timed(
        model=args.checkpoint,
        reward_funcs=lambda completions, completion_ids, **_: [reward(list(ids)) for ids in completion_ids],
        args=config,
        train_dataset=data,
        peft_config=lora,
    )
    trainer.train()
    clock.lap("train")
    rows.append(clock.seconds)
    return rows[1:]


def floor(args) -> list[dict]:
    """Seconds of the cycle's matrix products, by phase."""
    import torch
    import torch.nn.functional as F

    from kernels.prepacked import Layer, PrepackedLinear, can_prepack, can_prepack_head
    from nanogspo import checkpoint
    from nanogspo.device import DTYPES, choose_dtype
    from nanogspo.experience import split_minibatches
    from nanogspo.packing import Example
    from nanogspo.tokenizer import load_tokenizer

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoint.load(args.checkpoint, device=device, dtype=DTYPES[choose_dtype("auto", device)])
    tokenizer = load_tokenizer(args.checkpoint)
    prompts = [tokenizer.chat(prompt(i)) for i in range(args.prompts)]
    examples = [Example.answered(tokens, [1] * args.tokens) for tokens in prompts for _ in range(args.group)]
    minibatches = split_minibatches(examples, torch.ones(len(examples)), args.updates, args.micro_batch_tokens)
    kept = {}

    def timed(call) -> float:
        best = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    @torch.no_grad()
    def product(n: int, weight, *, widened: bool = False) -> float:
        """x (n, in) times weight (out, in); widened: in fp32, as the head is while answers are sampled."""
        key = (n, *weight.shape, widened)
        if key not in kept:
            weight = weight.detach().float() if widened else weight.detach()
            x, fits = torch.ones(n, weight.shape[1], dtype=weight.dtype, device=device), can_prepack(weight)
            calls = [lambda: F.linear(x, weight)]
            if fits or (widened and can_prepack_head(weight)):
                calls.append(functools.partial(PrepackedLinear([Layer(weight)]).linear, x))
            kept[key] = min(map(timed, calls))
        return kept[key]

    def layers(n: int, *, backward: bool = False) -> float:
        """All linear layers with their adapters: forward, or the gradients of x, A and B."""
        total = 0.0
        for m in model.layers.modules():
            if isinstance(m, torch.nn.Linear):
                out, width = m.weight.shape
                A, B = m.weight.new_empty(16, width), m.weight.new_empty(out, 16)
                total += product(n, m.weight.T.contiguous() if backward else m.weight)
                total += (2 if backward else 1) * (product(n, A) + product(n, B))
        return total

    head, answers = model.head_weight, args.prompts * args.group
    batches = [[(len(b.tokens), len(b.targets)) for b in batches] for batches in minibatches]
    step = layers(answers) + product(answers, head, widened=True)
    forward = [sum(layers(n) + product(scored, head) for n, scored in update) for update in batches]
    train = sum(2 * product(scored, head) + layers(n) + layers(n, backward=True) for u in batches for n, scored in u)
    return [
        {"sample": layers(sum(map(len, prompts))) + (args.tokens - 1) * step, "score": sum(forward[1:]), "train": train}
    ]


def worker(args) -> None:
    rows = {"ours": ours, "trl": trl, "floor": floor}[args.worker](args)
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print("RESULT " + json.dumps({"rows": rows, "peak_bytes": peak}))


def seconds(row: dict) -> float:
    return sum(row.get(name, 0.0) for name in ("sample", "score", "train", "other"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder in Hugging Face layout")
    for name, default in dict(
        prompts=4, group=8, tokens=64, updates=4, cycles=3, rounds=2, threads=os.cpu_count(), micro_batch_tokens=8192
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--only", choices=["ours", "trl"], help="one side and the floor")
    parser.add_argument("--worker", choices=["ours", "trl", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    results = {"ours": [], "trl": [], "floor": []}
    sides = [args.only, "floor"] if args.only else ["ours", "trl", "floor"]
    for _ in range(args.rounds):
        for side in sides:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in child.stdout.splitlines() if x.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{side} ended with {child.returncode}:\n{child.stderr[-3000:]}")
            results[side].append(json.loads(line[7:]))
    summary = {"machine": platform.machine(), "threads": args.threads, "cycle": vars(args) | {"checkpoint": "..."}}
    print("| | s per cycle | sample | score | train | peak GB | sampled tokens |\n|---|---|---|---|---|---|---|")
    for side in sides:
        rows = [row for result in results[side] for row in result["rows"]]
        mid = {n: statistics.median(row.get(n, 0.0) for row in rows) for n in ("sample", "score", "train")}
        total, peak = statistics.median(map(seconds, rows)), max(r["peak_bytes"] for r in results[side])
        summary[side] = {"seconds": total, **mid, "peak_bytes": peak, "rows": rows}
        tokens = statistics.median(row.get("tokens", 0) for row in rows)
        print(f"| {side} | {total:.2f} | " + " | ".join(f"{v:.2f}" for v in mid.values()), end=" ")
        print(f"| {peak / 1e9:.2f} | {tokens:.0f} |")
    if args.only != "trl":
        summary["over_floor"] = summary["ours"]["seconds"] / summary["floor"]["seconds"]
        print(f"{summary['over_floor']:.2f} x the time of its matrix products alone")
    if not args.only:
        summary["speedup"] = summary["trl"]["seconds"] / summary["ours"]["seconds"]
        summary["memory_ratio"] = summary["ours"]["peak_bytes"] / summary["trl"]["peak_bytes"]
        print(f"{summary['speedup']:.2f} x as fast as TRL, {100 * summary['memory_ratio']:.0f} % of its peak memory")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
