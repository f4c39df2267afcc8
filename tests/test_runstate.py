"""nanogspo/runstate.py: what was saved comes back to the last bit, and a file that does not fit says so in one line.

Run: python -m pytest tests/test_runstate.py
"""

import copy
import json
import os
import struct
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.checkpoint import read_header, write_safetensors
from nanogspo.families import model_config
from nanogspo.lora import add_lora
from nanogspo.model import Transformer
from nanogspo.optimizer import Optimizer
from nanogspo.packing import Example
from nanogspo.runstate import load_state, save_state
from tests.strategies import SEEDS

SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
PROGRESS = {"phase": 1, "phase_step": 5, "step": 25, "rl_cursor": 32, "seconds": 1.5}
ROLLOUT = {
    "examples": [Example([1, 2, 3, 4], [False, False, True, True]), Example([5, 6], [False, True])],
    "tensors": {"advantages": torch.tensor([0.1, -0.1]), "old_logp": torch.tensor([-1.5, -1e-9, -40.0])},
    "facts": {"reward": 0.25, "note": "naïve ✓"},
}


def run(seed=0, dtype=torch.float32, lora=False, updates=2, **changes):
    """A model and its optimiser in the middle of a run."""
    model = Transformer(model_config({**SHAPE, **changes})).init_weights(seed).to(dtype)
    if lora:
        add_lora(model, r=2, alpha=4, seed=seed)
    optimizer = Optimizer(model, weight_decay=0.1)
    g = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.accumulate()
        optimizer.step(1e-3, 1.0)
    return model, optimizer


def everything(model, optimizer):
    return {**{n: p.detach().clone() for n, p in model.named_parameters()}, **copy.deepcopy(optimizer.state())}


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(t, other[name]) and t.dtype == other[name].dtype for name, t in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@given(seed=SEEDS, rollout=st.sampled_from([None, ROLLOUT]))
def test_everything_comes_back_to_the_last_bit(tmp_path_factory, dtype, lora, seed, rollout):
    path = tmp_path_factory.mktemp("run") / "state" / "state.safetensors"  # its folder is made
    model, optimizer = run(seed % 100, dtype, lora)
    torch.manual_seed(seed)
    random_state = torch.get_rng_state()
    save_state(path, model, optimizer, PROGRESS, rollout)
    drawn = torch.rand(3)
    # LoRA: the base comes from the checkpoint, so it is equal from the start; the rest must come from the file
    other, its_optimizer = run(seed % 100 + (not lora), dtype, lora, updates=1)
    assert not equal(everything(other, its_optimizer), everything(model, optimizer))
    progress, loaded = load_state(path, other, its_optimizer)
    assert torch.equal(torch.get_rng_state(), random_state) and torch.equal(torch.rand(3), drawn)
    assert equal(everything(other, its_optimizer), everything(model, optimizer))
    assert progress == PROGRESS
    if rollout is None:
        assert loaded is None
    else:
        assert (loaded["examples"], loaded["facts"]) == (rollout["examples"], rollout["facts"])
        assert equal(loaded["tensors"], rollout["tensors"])
    again = path.with_name("again.safetensors")
    torch.set_rng_state(random_state)
    save_state(again, other, its_optimizer, progress, loaded)
    assert again.read_bytes() == path.read_bytes()


def test_holds_only_what_is_trained(tmp_path):
    """With LoRA the base weights stay in their checkpoint: the state of a 7 B model is 100 MB, not 14 GB."""
    path = tmp_path / "state.safetensors"
    model, optimizer = run(lora=True)
    save_state(path, model, optimizer, PROGRESS, None)
    header, _ = read_header(path)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and {n.removeprefix("model.") for n in header if n.startswith("model.")} == names
    parts = {f"optimizer.{name}.{part}" for name in names for part in ("step", "exp_avg", "exp_avg_sq")}
    assert {n for n in header if not n.startswith("model.")} == parts | {"rng.cpu"}


def test_a_save_that_is_cut_off_leaves_the_old_state(tmp_path):
    """Whatever moment the disk fills up or the process dies at: the file is the old one or the new one, whole."""
    path = tmp_path / "state.safetensors"
    model, optimizer = run()
    save_state(path, model, optimizer, PROGRESS, ROLLOUT)
    before = path.read_bytes()

    class Full(Exception):
        pass

    for function in ("fsync", "replace"):  # the last two steps; the bytes are all written by then, under another name
        with patch.object(os, function, side_effect=Full), pytest.raises(Full):
            save_state(path, *run(seed=1), {**PROGRESS, "step": 26}, None)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # and no half-written file is left behind
    save_state(path, *run(seed=1), {**PROGRESS, "step": 26}, None)
    assert load_state(path, *run())[0]["step"] == 26


def test_a_temporary_file_left_by_a_kill_is_not_read(tmp_path):
    path = tmp_path / "state.safetensors"
    model, optimizer = run()
    save_state(path, model, optimizer, PROGRESS, None)
    (tmp_path / ".state.safetensors.1234.tmp").write_bytes(b"half")
    assert load_state(path, *run())[0] == PROGRESS


def one_line(path, *target):
    """The message of the refusal; the model and its optimiser must be as they were."""
    before = everything(*target)
    with pytest.raises(ValueError) as error:
        load_state(path, *target)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    assert equal(everything(*target), before)
    return message


def test_a_missing_state_is_refused(tmp_path):
    assert "no state to resume from" in one_line(tmp_path / "state.safetensors", *run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_the_state_of_another_run_is_refused(tmp_path, dtype, lora):
    path = tmp_path / "state.safetensors"
    save_state(path, *run(dtype=dtype, lora=lora), PROGRESS, None)
    others = {
        "full or LoRA": run(dtype=dtype, lora=not lora),
        "a layer more": run(dtype=dtype, lora=lora, num_hidden_layers=2),
        "a wider model": run(dtype=dtype, lora=lora, hidden_size=24),
    }
    if not lora:  # adapters are fp32 over either base
        others["another dtype"] = run(dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)
    for other in others.values():
        message = one_line(path, *other)
        assert "trained other parameters (model." in message and "resume with its own flags" in message


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, *run(), PROGRESS, ROLLOUT)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for cut in (0, 7, 8, 100, length, length + 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        one_line(path, *run())
    path.write_bytes(whole[:8] + b"x" * length + whole[8 + length :])
    one_line(path, *run())
    path.write_bytes(whole)
    assert load_state(path, *run())[0] == PROGRESS


def test_a_safetensors_file_that_is_no_state_is_refused(tmp_path):
    """Such as the model's own weights, copied to the place of the state, or the state of a program of the future."""
    path = tmp_path / "state.safetensors"
    model, optimizer = run()
    tensors = {f"model.{n}": (p.dtype, tuple(p.shape), lambda p=p: p) for n, p in model.named_parameters()}
    for metadata in ({}, {"format": "pt"}, {"state": json.dumps({"progress": PROGRESS})}):
        write_safetensors(path, tensors, metadata)
        assert "no run saved" in one_line(path, model, optimizer)
