"""configs/*.yaml: each is read, passes the checks, gives a reason beside its numbers, and fits the card it names.

Run: python -m pytest tests/test_recipes.py -s     prints the memory of each
"""

import dataclasses
import re

import pytest
import torch
from test_families import REAL

from nanogspo.config import ROOT, TrainConfig, check, parse, resolve
from nanogspo.policy import adapt, quantization
from nanogspo.quant import weight_count
from nanogspo.run import planner

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("tiny"))
PLAIN = {"algo", "task", "model", "eval_every", "eval_size", "grad_clip", "warmup_updates", "warm_steps", "save_every"}


def published(model):
    return REAL[re.sub("-(Instruct|it)$", "", model.split("/")[1])][0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_card_and_says_why(path):
    """Planned with the published shapes for bf16 on a GPU; a seventh of the card is left for what no plan counts."""
    text = path.read_text()
    data = ["--data", "rows.jsonl"] if "task: jsonl" in text else []
    config, given = parse(TrainConfig, ["--config", str(path), *data], "train.py")
    check(config)
    assert f"python train.py --config configs/{path.name}" in text.splitlines()[0]
    outline = planner.outline(published(config.model), torch.bfloat16, quantization(config))
    usual = resolve(dataclasses.replace(config, lr=0.0), weight_count(outline)).lr
    assert config.lr == pytest.approx(usual, rel=0.05) or config.model == "Qwen/Qwen3-8B"  # which rounds up to 0.6 B's
    config = resolve(dataclasses.replace(config, device="cuda", dtype="bf16"), weight_count(outline))
    adapt(outline, config)
    parts = planner.memory_parts(config, outline, 64)
    needed = planner.most(parts) / 1e9
    weights = (parts["weights"] + parts.get("nf4 weights", 0)) / 1e9
    print(f"{path.stem:<22} {needed:5.1f} GB, of which weights {weights:.1f}")
    [card] = re.findall(r"GPU of (\d+) GB", text) or ["8"]
    assert needed < int(card) * 6 / 7
    numbers = re.findall(r"^(\w+): ([^#\n]*[^#\n ]) *(#.*)?$", text, re.MULTILINE)
    assert {name for name, _, _ in numbers} == given - {"data"}
    without = {name for name, _, why in numbers if not why} - PLAIN
    assert without <= {"clip_high", "temperature", "steps", "max_new_tokens", "lr", "micro_batch_tokens", "lora_alpha"}


def test_every_size_of_the_guides_has_a_recipe():
    """Qwen2.5 and Qwen3 from 0.5B to 72B, Gemma 2 and 3 by size; the rates fall with the square root of size."""
    configs = [parse(TrainConfig, ["--config", str(path), "--data", "x"], "train.py")[0] for path in RECIPES]
    named = {config.model.split("/")[1] for config in configs}
    assert {re.sub("-(Instruct|it)$", "", name) for name in named} == set(REAL)
    rates = {c.model: c.lr for c in configs if "Qwen2.5" in c.model}
    ordered = sorted(rates, key=lambda name: float(re.search(r"-([\d.]+)B", name)[1]))
    assert [rates[name] for name in ordered] == sorted(rates.values(), reverse=True)
