"""Our numbers on a real checkpoint, beside transformers in the same process. Quoted in README.md and LOG.md.

    load time       against reading the same bytes from the same file, both with a warm page cache
    greedy answers  20 chat prompts, 64 tokens, fp32: the very same token ids as transformers.generate?
    adapter         a LoRA adapter written here, opened by peft: logits
    merged export   the same adapter merged, opened by transformers: logits
    start-up        python train.py --help

Run: python benchmarks/real_checkpoint.py DIR [--adapter RUN/adapter] [--threads N]       needs requirements-test.txt
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanogspo import checkpoint, lora  # noqa: E402
from nanogspo.rollout import generate  # noqa: E402
from nanogspo.tokenizer import load_tokenizer  # noqa: E402

PROMPTS = """What is the capital of France?|Write a haiku about rain.|Name three primes.|Explain gravity to a child.
Translate 'good morning' to Spanish.|What is 12+7?|Who wrote Hamlet?|List two fruits.|Why is the sky blue?
Give me a recipe for tea.|What is Python?|Define entropy.|Tell a joke.|What comes after Monday?
How many legs has a spider?|Write a short poem about the sea.|What is the boiling point of water?
Name a river in Africa.|What is a prime number?|Say hello in German.""".replace("\n", "|").split("|")


def best(function, repeats: int = 5) -> float:
    """Shortest of several runs, seconds: the one least disturbed."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def read_file(path: pathlib.Path) -> None:
    """The floor of loading: every byte of the file into memory that did not exist before."""
    with open(path, "rb", buffering=0) as f:
        f.readinto(memoryview(torch.empty(path.stat().st_size, dtype=torch.uint8).numpy()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    stored = checkpoint.stored_dtype(args.folder)
    file = checkpoint.weight_files(args.folder)[0]
    results["file_MB"] = file.stat().st_size / 1e6
    results["read_s"] = best(lambda: read_file(file))
    results["load_s"] = best(lambda: checkpoint.load(args.folder, dtype=stored))
    results["load_over_read"] = results["load_s"] / results["read_s"]
    results["transformers_load_s"] = best(lambda: AutoModelForCausalLM.from_pretrained(args.folder, dtype=stored))
    results["help_s"] = best(
        lambda: subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True), 3
    )

    tokenizer, theirs = load_tokenizer(args.folder), AutoTokenizer.from_pretrained(args.folder)
    model = checkpoint.load(args.folder, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]
    prompts = [tokenizer.chat(c) for c in chats]
    wanted = [theirs.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    results["prompts_equal"] = sum(a == b for a, b in zip(prompts, wanted, strict=True))
    started = time.perf_counter()
    answers = generate(model, prompts, max_new_tokens=64, temperature=0, eos_ids=tokenizer.eos_ids)
    results["greedy_s"], started = time.perf_counter() - started, time.perf_counter()
    same = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        out = reference.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, do_sample=False
        )
        same += out[0, len(prompt) :].tolist() == answer.tokens
    results["transformers_greedy_one_by_one_s"] = time.perf_counter() - started
    results["greedy_equal"], results["greedy_of"] = same, len(PROMPTS)

    tokens = torch.tensor([prompts[0] + answers[0].tokens])
    results["logits_max_diff"] = (model.logits(model(tokens)) - reference(tokens).logits).abs().max().item()
    if args.adapter:
        checkpoint.load_adapter(model, args.adapter)
    else:
        lora.add_lora(model, r=16, alpha=32)
        generator = torch.Generator().manual_seed(0)
        for layer in lora.lora_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.02, generator=generator)
    adapted = model.logits(model(tokens))
    results["adapter_moves_logits_by"] = (adapted - reference(tokens).logits).abs().max().item()
    with tempfile.TemporaryDirectory() as folder:
        from peft import PeftModel

        checkpoint.save(model, f"{folder}/merged")
        merged = AutoModelForCausalLM.from_pretrained(f"{folder}/merged", dtype=torch.float32)
        results["merged_export_max_diff"] = (merged(tokens).logits - adapted).abs().max().item()
        checkpoint.save_adapter(model, f"{folder}/adapter", base=str(args.folder))
        wrapped = PeftModel.from_pretrained(reference, f"{folder}/adapter")
        results["peft_max_diff"] = (wrapped(tokens).logits - adapted).abs().max().item()
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
