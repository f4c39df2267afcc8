"""configs/*.yaml: each is read, passes the checks, says why beside its numbers, fits the card it names, and starts.

Run: python -m pytest tests/test_recipes.py -s     prints the memory of each
     python tests/test_recipes.py                  writes the README's table of hardware anew
"""

import copy
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the call without pytest

from test_families import REAL

from lessons.small_chat import small_tokenizer
from nanogspo import checkpoint
from nanogspo.config import ROOT, TrainConfig, check, load_yaml, parse, resolve
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.policy import adapt, quantization
from nanogspo.quant import weight_count
from nanogspo.run import planner
from nanogspo.run.log import read_rows
from nanogspo.storage.safetensors import read_header, write_safetensors
from train import run

ALL = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [path for path in ALL if not path.stem.startswith("tiny")]
PLAIN = {"algo", "task", "model", "eval_every", "eval_size", "grad_clip", "warmup_updates", "warm_steps", "save_every"}


A3B = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "norm_topk_prob": True,
       "mlp_only_layers": [], "tie_word_embeddings": False, "decoder_sparse_step": 1, "rms_norm_eps": 1e-6}  # fmt: skip
A3B |= {"intermediate_size": 6144, "max_position_embeddings": 40960}
QWEN3 = {"model_type": "qwen3_moe", "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}  # fmt: skip
NEXT = {"model_type": "qwen3_next", "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "full_attention_interval": 4,
        "shared_expert_intermediate_size": 512, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
EXPERTS = {"Qwen3-30B-A3B": A3B | QWEN3, "Qwen3-Coder-30B-A3B": A3B | QWEN3, "Qwen3-Next-80B-A3B": A3B | NEXT}


def published(model):
    name = re.sub("-(Instruct|it)$", "", model.split("/")[1])
    return EXPERTS[name] if name in EXPERTS else REAL[name][0]


def plan(raw, config, ranks):
    """The number of weights, and the bytes by part."""
    if raw.get("num_experts") and raw["num_hidden_layers"] > 8:
        # an object for each packed expert: all 48 layers of Next would take 10 s. All that is counted grows by layer
        few, more = (plan(raw | {"num_hidden_layers": n}, config, ranks) for n in (4, 8))
        whole = lambda a, b: a + (b - a) * (raw["num_hidden_layers"] - 4) // 4  # noqa: E731
        return whole(few[0], more[0]), {name: whole(few[1][name], more[1][name]) for name in few[1]}
    outline = planner.outline(raw, torch.bfloat16, quantization(config))
    count = weight_count(outline)
    config = resolve(dataclasses.replace(config, device="cuda", dtype="bf16"), count)
    adapt(outline, config)
    return count, planner.memory_parts(config, outline, 64, ranks)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_card_and_says_why(path):
    """Planned with the published shapes for bf16 on a GPU; a seventh of the card is left for what no plan counts."""
    text = path.read_text()
    data = ["--data", "rows.jsonl"] if "task: jsonl" in text else []
    config, given = parse(TrainConfig, ["--config", str(path), *data], "train.py")
    check(config)
    assert f" train.py --config configs/{path.name}" in text.splitlines()[0]
    [(ranks, card)] = re.findall(r"(?:(\d+) )?GPUs? of (\d+) GB", text) or [("", "8")]
    count, parts = plan(published(config.model), config, int(ranks or 1))
    usual = resolve(dataclasses.replace(config, lr=0.0), count).lr
    assert config.lr == pytest.approx(usual, rel=0.05) or config.model == "Qwen/Qwen3-8B"  # which rounds up to 0.6 B's
    needed = planner.most(parts) / 1e9
    weights = (parts["weights"] + parts.get("nf4 weights", 0)) / 1e9
    print(f"{path.stem:<22} {needed:5.1f} GB, of which weights {weights:.1f}")
    assert needed < int(card) * 6 / 7
    numbers = re.findall(r"^(\w+): ([^#\n]*[^#\n ]) *(#.*)?$", text, re.MULTILINE)
    assert {name for name, _, _ in numbers} == given - {"data"}
    without = {name for name, _, why in numbers if not why} - PLAIN
    assert without <= {"clip_high", "temperature", "steps", "max_new_tokens", "lr", "micro_batch_tokens", "lora_alpha"}


def test_every_size_of_the_guides_has_a_recipe():
    """Qwen2.5 and Qwen3 from 0.5B to 80B-A3B, Gemma 2 and 3 by size; the rates fall with the square root of size."""
    configs = [parse(TrainConfig, ["--config", str(path), "--data", "x"], "train.py")[0] for path in RECIPES]
    named = {config.model.split("/")[1] for config in configs}
    assert {re.sub("-(Instruct|it)$", "", name) for name in named} == set(REAL) | set(EXPERTS)
    rates = {c.model: c.lr for c in configs if "Qwen2.5" in c.model}
    ordered = sorted(rates, key=lambda name: float(re.search(r"-([\d.]+)B", name)[1]))
    assert [rates[name] for name in ordered] == sorted(rates.values(), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# the first update

FEW = {"prompts_per_rollout": 1, "max_new_tokens": 18, "steps": 1, "eval_size": 0, "warm_steps": 1}  # what bounds cost
MODEL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32, "vocab_size": 408}
SMALLER = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "full_attention_interval": 2,
           "shared_expert_intermediate_size": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
           "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def tiny_folder(folder, published, tokenizer):
    """A random model with the published config.json but for its sizes, in the names and the layout of its hub files."""
    raw = copy.deepcopy(published)
    text = raw.get("text_config", raw)
    grouped = text.get("num_key_value_heads", 1) != text.get("num_attention_heads", 2)
    layers = 6 if "gemma3" in text["model_type"] else 2  # five with a window and one without
    text |= {**MODEL, "num_key_value_heads": 1 if grouped else 2, "num_hidden_layers": layers}
    text |= {name: size for name, size in SMALLER.items() if name in text}
    raw["eos_token_id"] = list(tokenizer.eos_ids)
    config = model_config(raw)
    model = Transformer(config).init_weights(0, std=0.1)
    if config.num_experts:  # a file has an expert's matrices one by one
        checkpoint.save(model.to(torch.bfloat16), folder, tokenizer=tokenizer)
        return folder
    names = {name: name if name == "lm_head.weight" else config.module_prefix + name for name in model.state_dict()}
    tensors = {names[name]: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    if raw is not text:
        tensors["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(8)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_recipe_makes_its_first_update(path, tmp_path, monkeypatch, tokenizer):
    """On a tiny random model of its family: with its algorithm, packing, adapter, clip, group, micro-batches and dtype,
    which "auto" makes fp32 on a CPU without bf16 units. Only what bounds the cost is smaller. Every recipe starts on a
    CPU; what needs a GPU is the size of the models that they are for."""
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
    recipe = load_yaml(path, TrainConfig, "a recipe")
    few, rewards = {k: v for k, v in FEW.items() if k in recipe}, [lambda answer, row: len(answer) % 3]
    if recipe["model"] != "tiny":
        few["model"] = str(tiny_folder(tmp_path / "model", published(recipe["model"]), tokenizer))
    if recipe["algo"] == "sft":  # 2 epochs of 8 rows are one update of 16
        rows = [
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a" * n}]}
            for n in range(1, 9)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        few, rewards = few | {"data": str(tmp_path / "rows.jsonl"), "epochs": 2}, ()
    folder, _ = run(TrainConfig(**{"threads": 1} | recipe | few, out=str(tmp_path / "run")), rewards=rewards)
    used = load_yaml(folder / "config.yaml", TrainConfig, "a run")
    assert {key: used[key] for key in recipe if key not in few} == {k: v for k, v in recipe.items() if k not in few}
    updates = [row for row in read_rows(folder / "metrics.jsonl") if "algo" in row]
    assert [row["algo"] for row in updates] == ["sft"] * ("warm_steps" in few) + [recipe["algo"]]
    assert all(row["grad_norm"] > 0 for row in updates) and updates[-1].get("ratio_max", 1.0) == 1.0
    if recipe.get("lora_r"):
        trained = read_header(folder / "adapter" / "adapter_model.safetensors")[0]
        assert all(tensor.read().any() for name, tensor in trained.items() if "lora_B" in name)


# ---------------------------------------------------------------------------------------------------------------------
# the README's table of hardware

README, START, END = (
    ROOT / "README.md",
    "<!-- hardware: python tests/test_recipes.py writes this table -->\n",
    "<!-- end",
)
MACHINES = ((1, 24), (1, 48), (1, 80), (2, 80), (8, 80))  # processes, GB
WAYS = {"full": {"lora_r": 0}, "LoRA": {}, "NF4": {"quant": "nf4"}}
# 8 prompts of 256 tokens with 8 answers of 1024, which the table's heading says
SHAPE = {"prompts_per_rollout": 8, "group_size": 8, "max_new_tokens": 1024, "rollout_rows": 16}
SHAPE |= {"gradient_checkpointing": "on", "device": "cuda", "dtype": "bf16", "model": "of the row"}


def hardware_row(name):
    """What of full fine-tuning, LoRA and LoRA over NF4 fits each machine, and in how many GB a GPU; s: sharded."""
    cells = {machine: [] for machine in MACHINES}
    for way, changes in WAYS.items():
        config = TrainConfig(**SHAPE, **changes)
        outline = planner.outline(REAL[name][0], torch.bfloat16, quantization(config))
        adapt(outline, config)
        for (ranks, card), cell in cells.items():
            chosen = planner.decide_sharding(config, outline, 256, card * 1e9, ranks)
            needed = planner.most(planner.memory_parts(chosen, outline, 256, ranks))
            if needed <= planner.FILL * card * 1e9:
                cell.append(f"{way} {needed / 1e9:.0f}{' s' * (chosen.shard == 'on')}")
    return f"| {name} | {' | '.join(', '.join(cell) or '-' for cell in cells.values())} |\n"


def hardware_head():
    names = [f"{ranks} x {card} GB" for ranks, card in MACHINES]
    return f"| model | {' | '.join(names)} |\n|---|{'---|' * len(names)}\n"


@pytest.mark.parametrize("name", ["Qwen3-8B", "gemma-2-27b"])
def test_the_readme_shows_what_fits(name):
    """Two of the rows: every formula that makes one makes all."""
    text = README.read_text(encoding="utf-8")
    assert hardware_row(name) in text, "python tests/test_recipes.py writes it anew"
    table = text.split(START)[1].split(END)[0]
    assert hardware_head() in table and re.findall(r"^\| ([\w.-]+) \|", table, re.MULTILINE)[1:] == list(REAL)


if __name__ == "__main__":
    before, rest = README.read_text(encoding="utf-8").split(START)
    rows = "".join(map(hardware_row, REAL))
    README.write_text(f"{before}{START}\n{hardware_head()}{rows}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")
