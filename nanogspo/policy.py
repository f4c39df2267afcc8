"""The policy, as a configuration describes it: tokenizer and outline first, then the model with its adapter.

    config, tokenizer, outline = describe(config, task)     nothing is allocated: enough to check data and memory
    model = build(config, task)                             the tiny model made, or a checkpoint loaded

Tests: tests/test_train.py
"""

import dataclasses
import functools
import pathlib
import shutil

import torch

from nanogspo import checkpoint, distributed, lora, sharding, tiny
from nanogspo.config import TrainConfig, resolve
from nanogspo.device import DTYPES
from nanogspo.model import Transformer
from nanogspo.quant import packed_layers, quantize_model, weight_count
from nanogspo.run import planner
from nanogspo.tasks.base import Task
from nanogspo.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer


def describe(config: TrainConfig, task: Task | None) -> tuple[TrainConfig, Tokenizer, Transformer]:
    """(config with learning rates by the model's size and the adapter's own rank, tokenizer, outline with adapter)."""
    if config.adapter:  # a wrong name is refused before a model is fetched
        checkpoint.resolve(config.adapter, want="adapter")
    if config.model == "tiny":
        if not (characters := getattr(task, "characters", "")):
            got = "a task without `characters`" if task else "--data"
            raise ValueError(f"got --model tiny with {got}: its vocabulary is one task's alphabet; want a real --model")
        tokenizer, raw = tiny.describe(characters, config.architecture)
    else:
        source = config.model.removesuffix("config.json") if config.plan_only else config.model
        files = checkpoint.resolve(source, want="config")
        if alone := config.plan_only and not (files / "tokenizer.json").exists():
            print(f"{files} has no tokenizer.json: the plan counts bytes of prompts, and leaves long ones out")
        tokenizer, raw = byte_tokenizer() if alone else load_tokenizer(files), checkpoint.read_config(files)
    outline = planner.outline(raw, DTYPES[config.dtype], quantization(config))
    if config.router_replay and not outline.config.num_experts:
        raise ValueError(f"got --router-replay with --model {config.model}, which has no experts; want it left out")
    if packed_layers(outline) and not config.lora_r:
        raise ValueError(f"got --lora-r 0 with {config.model}, whose weights are packed in 4 bits; want --lora-r 16")
    config = resolve(config, weight_count(outline))
    adapt(outline, config)
    ranks = sorted({layer.r for layer in lora.lora_layers(outline).values()})
    if config.adapter and ranks != [config.lora_r]:
        rank = ", ".join(map(str, ranks))
        print(f"{config.adapter}: an adapter of rank {rank}, so --lora-r {config.lora_r} is not used")
        config = dataclasses.replace(config, lora_r=ranks[-1])
    return config, tokenizer, outline


def build(config: TrainConfig, task: Task | None) -> Transformer:
    """The model with its adapter, in training mode."""
    device, dtype, quant = config.device, DTYPES[config.dtype], quantization(config)
    sharded = config.shard == "on" and distributed.world() > 1
    how = {"dtype": dtype, "full": not config.lora_r, "device": device}
    shard = functools.partial(sharding.shard, **how) if sharded else None
    if config.model == "tiny":
        _, model = tiny.build(task.characters, seed=config.seed, architecture=config.architecture)
        model.to(device, dtype)
        if quant:
            quantize_model(model, quant)
        if shard:
            shard(model)
    else:
        model = checkpoint.load(config.model, device=device, dtype=dtype, quant=quant, shard=shard)
    adapt(model, config)
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing == "on"
    model.prepack = config.prepack != "off"
    return model


def save(model: Transformer, config: TrainConfig, folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """adapter/ in PEFT's format for LoRA, model/ for full fine-tuning; both with --save-merged."""
    with sharding.gathered(model):
        distributed.first(lambda: _save(model, config, folder, tokenizer))


def _save(model: Transformer, config: TrainConfig, folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    if config.lora_r:
        checkpoint.save_adapter(model, folder / "adapter", base=config.model)
    if config.save_merged and packed_layers(model):
        print(f"{folder / 'model'}: the sum of unpacked weights and adapter, saved as {config.dtype}")
    if config.save_merged or not config.lora_r or config.model == "tiny":  # whose base is saved nowhere else
        checkpoint.save(model, folder / "model", tokenizer=tokenizer)


def keep_last(
    count: int, step: int, model: Transformer, config: TrainConfig, folder: pathlib.Path, tokenizer: Tokenizer
) -> None:
    """Save the weights into folder/STEP, as `save` does, and remove all but the last `count` of such folders."""
    save(model, config, folder / str(step), tokenizer)
    kept = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    for path in kept[:-count] if distributed.rank() == 0 else ():
        shutil.rmtree(path)


def adapt(model: torch.nn.Module, config: TrainConfig) -> None:
    """Add the adapter to train: the one from --adapter, or a fresh one; with --lora-r 0, none."""
    if config.adapter:
        checkpoint.load_adapter(model, config.adapter, dropout=config.lora_dropout)
    elif config.lora_r:
        lora.add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            targets=[t.strip() for t in config.lora_targets.split(",") if t.strip()],
            dropout=config.lora_dropout,
            seed=config.seed,
        )


def quantization(config: TrainConfig) -> str | None:
    return None if config.quant == "none" else config.quant
