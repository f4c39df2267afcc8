"""nanogspo/storage/state.py: what was saved comes back to the last bit; a file that does not fit says so in one line.

Run: python -m pytest tests/test_state.py
"""

import copy
import dataclasses
import json
import os
import struct
import weakref
from unittest.mock import patch

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.config import TrainConfig, dump
from nanogspo.families import model_config
from nanogspo.lora import add_lora
from nanogspo.model import Transformer
from nanogspo.optimizer import Optimizer
from nanogspo.packing import Example
from nanogspo.storage import state as runstate
from nanogspo.storage.safetensors import Stored, read_header, write_safetensors
from nanogspo.storage.state import Progress, changes, fingerprint, load_state, resume, save_state, write_state
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
    save_state(path, model, optimizer, PROGRESS, rollout)
    # LoRA: the base comes from the checkpoint, so it is equal from the start; the rest must come from the file
    other, its_optimizer = run(seed % 100 + (not lora), dtype, lora, updates=1)
    assert not equal(everything(other, its_optimizer), everything(model, optimizer))
    progress, loaded = load_state(path, other, its_optimizer)
    assert equal(everything(other, its_optimizer), everything(model, optimizer))
    assert progress == PROGRESS
    if rollout is None:
        assert loaded is None
    else:
        assert (loaded["examples"], loaded["facts"]) == (rollout["examples"], rollout["facts"])
        assert equal(loaded["tensors"], rollout["tensors"])
    again = path.with_name("again.safetensors")
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
    assert {n for n in header if not n.startswith("model.")} == parts


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


def test_a_temporary_file_left_by_a_kill_is_not_read_and_the_next_save_removes_it(tmp_path):
    path = tmp_path / "state.safetensors"
    model, optimizer = run()
    save_state(path, model, optimizer, PROGRESS, None)
    (tmp_path / ".state.safetensors.1234.tmp").write_bytes(b"half")
    assert load_state(path, *run())[0] == PROGRESS
    save_state(path, model, optimizer, PROGRESS, None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def one_line(path, *target):
    """The message of the refusal; the model and its optimiser must be as they were."""
    before = everything(*target)
    with pytest.raises(ValueError) as error:
        load_state(path, *target)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    assert equal(everything(*target), before)
    return message


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    """So that a run that fits in memory can be resumed."""
    path, alive, most = tmp_path / "state.safetensors", [], []
    save_state(path, *run(dtype=torch.bfloat16), PROGRESS, None)

    def counted(stored, rows=None, read=Stored.read):
        tensor = read(stored, rows)
        if tensor.is_floating_point():
            alive.append(weakref.ref(tensor))
            most.append(sum(held() is not None for held in alive))
        return tensor

    monkeypatch.setattr(Stored, "read", counted)
    load_state(path, *run(seed=1, dtype=torch.bfloat16))
    assert len(most) > 10 and max(most) == 1


def test_tokens_of_a_rollout_are_tensors(tmp_path):
    """The package reads headers of at most 100 MB, which 13 million tokens in JSON came to."""
    path = tmp_path / "state.safetensors"
    save_state(path, *run(), PROGRESS, ROLLOUT)
    header, metadata = read_header(path)
    assert header["rollout.tokens"].read().tolist() == [1, 2, 3, 4, 5, 6]
    assert header["rollout.lengths"].read().tolist() == [[4, 2], [2, 1]]
    assert json.loads(metadata["state"]).keys() == {*("progress", "config", "files", "checksums", "rollout", "crc32")}


def test_an_episode_keeps_what_is_scored_of_it(tmp_path):
    """Several scored stretches, and token 0 in all places."""
    path, N, Y = tmp_path / "state.safetensors", False, True
    episodes = [Example([0, 1, 0, 5, 0, 0, 7, 0], [N, N, Y, Y, N, N, Y, Y]), Example([3, 0, 0], [N, Y, N])]
    save_state(path, *run(), PROGRESS, ROLLOUT | {"examples": episodes})
    assert load_state(path, *run(seed=1))[1]["examples"] == episodes


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
    """Such as the model's own weights, copied to the place of the state."""
    path = tmp_path / "state.safetensors"
    model, optimizer = run()
    tensors = {f"model.{n}": p for n, p in model.named_parameters()}
    for metadata in ({}, {"format": "pt"}):
        write_safetensors(path, tensors, metadata)
        assert "no run saved" in one_line(path, model, optimizer)


def test_a_flipped_bit_anywhere_is_refused_in_one_line(tmp_path):
    """In a tensor, in the JSON, in the header: nothing of it is taken, whatever the bit would have changed."""
    path = tmp_path / "state.safetensors"
    model, optimizer = run(lora=True)
    save_state(path, model, optimizer, PROGRESS, ROLLOUT)
    whole, (header, _) = path.read_bytes(), read_header(path)
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    places = {*range(0, length, 43), *range(length, len(whole), 397), *range(len(whole) - 1, length, -1023)}
    for place in sorted(places):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError) as error:
            load_state(path, model, optimizer)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    last = list(header)[-1]
    assert f"{last} is not what was saved, the file is damaged; want a whole copy" in one_line(path, model, optimizer)


# ----------------------------------------------------------------------------
# resume: a run in the middle of a rollout

AT_HAND = Progress(step=25, phase_step=5, update=1, rl_cursor=32)


def saved(folder, change=lambda tensors, facts: None):
    """RUN/state/state.safetensors after `change`, with checksums that say it is whole."""
    config = TrainConfig(updates_per_rollout=2, lr=0.25)
    path = folder / "state" / "state.safetensors"
    made_of = {"config": {"lr": 0.25, "seed": 0}, "files": {"data": "1-a", "model/config.json": "2-b"}}
    rollout = {**ROLLOUT, "tensors": {"advantages": torch.tensor([0.1, -0.1]), "old_logp": torch.tensor([-1.5])}}
    save_state(path, *run(), dataclasses.asdict(AT_HAND), rollout, made_of)
    (folder / "config.yaml").write_text(dump(config))
    header, metadata = read_header(path)
    tensors, facts = {name: stored.read() for name, stored in header.items()}, json.loads(metadata["state"])
    del facts["crc32"], facts["checksums"]
    facts = change(tensors, facts) or facts
    if isinstance(facts, dict):
        write_state(path, tensors, facts)
    else:
        text = facts if isinstance(facts, str) else json.dumps(facts)
        write_safetensors(path, tensors, {"state": runstate._sealed(text)})
    return path, config, made_of


def test_a_run_goes_on_in_the_middle_of_a_rollout(tmp_path):
    path, config, made_of = saved(tmp_path)
    model, optimizer = run(seed=1)
    progress, rollout, changed = resume(path, config, made_of, model, optimizer, 1)
    assert (progress, changed) == (AT_HAND, []) and equal(everything(model, optimizer), everything(*run()))
    assert rollout.examples == ROLLOUT["examples"] and rollout.facts == ROLLOUT["facts"]
    assert [[logp if logp is None else logp.tolist() for logp in logps] for logps in rollout.old_logp] == [
        [None],
        [[-1.5]],
    ]


@pytest.mark.parametrize(
    "older", [{"examples": []}, {}, {"config": {}}], ids=["tokens in JSON", "no checksums", "crc32"]
)
def test_a_state_of_an_older_version_is_refused_in_one_line(tmp_path, older):
    path, target = tmp_path / "state.safetensors", run()
    text = json.dumps({"progress": PROGRESS, **older, **({"checksums": {}} if older else {})})
    seal = {"crc32": "00000000"} if "config" in older else {}  # an entry of its own, before it moved into the JSON
    write_safetensors(path, {"model.w": torch.ones(1)}, {"state": text, **seal})
    assert "an older version of this program saved it; finish the run with that version" in one_line(path, *target)


WRONG = {
    "no JSON": lambda t, f: "{",
    "deep": lambda t, f: "[" * 100_000,
    "a list": lambda t, f: [f],
    "no progress": lambda t, f: f.pop("progress") and None,
    "progress is a list": lambda t, f: f.update(progress=[1]),
    "progress without its step": lambda t, f: f["progress"].pop("step") and None,
    "progress of another kind": lambda t, f: f["progress"].update(epoch=1),
    "step is text": lambda t, f: f["progress"].update(step="25"),
    "step is negative": lambda t, f: f["progress"].update(step=-1),
    "step is true": lambda t, f: f["progress"].update(step=True),
    "done is a number": lambda t, f: f["progress"].update(phase_done=1),
    "a phase that is not there": lambda t, f: f["progress"].update(phase=1),
    "an update that is not there": lambda t, f: f["progress"].update(update=2),
    "no rollout": lambda t, f: [f.pop("rollout"), t.pop("rollout.tokens"), t.pop("rollout.lengths")] and None,
    "rollout is text": lambda t, f: f.update(rollout="none"),
    "no config": lambda t, f: f.pop("config") and None,
    "checksums are a list": lambda t, f: json.dumps({**f, "checksums": [1]}),
    "a checksum too few": lambda t, f: json.dumps({**f, "checksums": {}}),
    "no tokens": lambda t, f: t.pop("rollout.tokens") is None,
    "no lengths": lambda t, f: t.pop("rollout.lengths") is None,
    "an example too few": lambda t, f: t.update({"rollout.lengths": torch.tensor([[6, 2]])}),
    "a token too few": lambda t, f: t.update({"rollout.tokens": torch.tensor([1, 2, 3, 4, 5])}),
    "tokens are fractions": lambda t, f: t.update({"rollout.tokens": t["rollout.tokens"].double()}),
    "tokens are negative": lambda t, f: t.update({"rollout.tokens": -t["rollout.tokens"]}),
    "a first scored token that is not": lambda t, f: t["rollout.tokens"][2].mul_(-1) is None,
    "tokens in a table": lambda t, f: t.update({"rollout.tokens": t["rollout.tokens"].view(3, 2)}),
    "lengths in a row": lambda t, f: t.update({"rollout.lengths": t["rollout.lengths"].view(-1)}),
    "nothing but a prompt": lambda t, f: t.update({"rollout.lengths": torch.tensor([[4, 4], [2, 1]])}),
    "no prompt": lambda t, f: t.update({"rollout.lengths": torch.tensor([[4, 0], [2, 1]])}),
    "no moments": lambda t, f: t.pop("optimizer.norm.weight.exp_avg") is None,
    "moments of another shape": lambda t, f: t.update({"optimizer.norm.weight.exp_avg": torch.zeros(3)}),
    "moments of another kind": lambda t, f: t.update({"optimizer.norm.weight.exp_avg": torch.zeros(16).half()}),
    "no advantages": lambda t, f: t.pop("rollout.advantages") is None,
    "advantages of another kind": lambda t, f: t.update({"rollout.advantages": torch.tensor([1, 2])}),
    "log-probs in a table": lambda t, f: t.update({"rollout.old_logp": torch.zeros(1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_of_wrong_types_is_refused_in_one_line(tmp_path, wrong):
    """With the right checksums, so that each is found by itself."""
    path, config, made_of = saved(tmp_path, WRONG[wrong])
    with pytest.raises(ValueError) as error:
        resume(path, config, made_of, *run(seed=1), 1)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and "want" in message and len(message) < 500


def test_what_has_changed_is_named_and_only_accepted_by_a_flag(tmp_path):
    path, config, made_of = saved(tmp_path)
    now = {"config": {"lr": 0.5, "seed": 0, "a_later_flag": 1}}
    now["files"] = {"data": "1-c", "model/tokenizer.json": "3-d", "rewards/own.py": "4-e"}  # rewards: no such kind then
    changed = ["--lr (0.25 -> 0.5)", "data", "model/config.json", "model/tokenizer.json"]
    assert changes(made_of, now) == changed and changes(made_of, made_of) == []
    (line,) = changes({"config": {"data": "a\0" * 900}, "files": {}}, {"config": {"data": "b"}, "files": {}})
    assert line.isprintable() and len(line) < 200 and line.endswith("... -> b)")
    model, optimizer = run(seed=1)
    before = everything(model, optimizer)
    with pytest.raises(ValueError) as error:
        resume(path, config, now, model, optimizer, 1)
    assert f"with other inputs than it was saved with: {', '.join(changed)}; want" in str(error.value)
    assert equal(everything(model, optimizer), before)
    accepted = dataclasses.replace(config, accept_changes=True)
    assert resume(path, accepted, now, model, optimizer, 1)[2] == changed


def test_a_config_file_need_not_say_how_the_rollout_was_cut(tmp_path):
    """Between rollouts it does not matter; in the middle of one, what a file does not say is the default."""
    path, config, made_of = saved(tmp_path)
    (tmp_path / "config.yaml").write_text("lr: 0.25\n")
    with pytest.raises(ValueError, match=f"that was cut into {TrainConfig.updates_per_rollout}; want"):
        resume(path, dataclasses.replace(config, updates_per_rollout=3), made_of, *run(seed=1), 1)
    save_state(path, *run(), dataclasses.asdict(dataclasses.replace(AT_HAND, update=0)), None, made_of)
    assert resume(path, config, made_of, *run(seed=1), 1)[0].step == AT_HAND.step


def test_only_files_that_are_read_count(tmp_path, monkeypatch):
    """Another weight file beside the model's is no change, and of an adapter on the hub no model is fetched."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
        for name in (
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "x.safetensors",
            "adapter_model.safetensors",
        ):
            (folder / name).write_text(name)
    (adapter / "adapter_config.json").write_text("{}")
    fetched = []

    def snapshot_download(repo, *, allow_patterns):
        fetched.extend(allow_patterns)
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    counted = runstate.inputs(TrainConfig(model=str(model), adapter="owner/adapter"))["files"]
    files = {"model/config.json", "model/tokenizer.json", "model/model.safetensors"}
    assert counted.keys() == files | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert "adapter_model.safetensors" in fetched and "model.safetensors" not in fetched
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    files = runstate.inputs(TrainConfig(model=str(model)))["files"].keys()
    assert {"model/a.safetensors", "model/model.safetensors.index.json"} < files and "model/x.safetensors" not in files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_rows_from_a_pipe_are_refused(tmp_path, monkeypatch):
    """They are gone once they are read: there is nothing to hash, and nothing that a resumed run could read."""
    monkeypatch.setattr(runstate, "fingerprint", lambda path: "")  # else it would wait for a writer
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(ValueError, match="got a pipe as --data .*rows., want a file: a resumed run reads it again$"):
        runstate.inputs(TrainConfig(task="jsonl", data=str(tmp_path / "rows")))


def test_a_large_file_is_known_by_its_size_and_pieces_of_it(tmp_path, monkeypatch):
    """A small one by every byte."""
    path, size = tmp_path / "weights", 10_007
    data = bytes(i * i % 251 for i in range(size))

    def of(data):
        path.write_bytes(data)
        return fingerprint(path)

    def flipped(places):
        return [i for i in places if of(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]) != of(data)]

    some = [0, 1, 5000, size - 2, size - 1]
    assert of(data) == of(data) and flipped(some) == some
    monkeypatch.setattr(runstate, "WHOLE", 1000)
    monkeypatch.setattr(runstate, "PIECES", 4)
    monkeypatch.setattr(runstate, "PIECE", 100)  # from bytes 0, 3302, 6604 and 9907 on
    places = [0, 99, 100, 3301, 3302, 3401, 3402, 6604, 6703, 6704, 9906, 9907, size - 1]
    assert flipped(places) == [0, 99, 3302, 3401, 6604, 6703, 9907, size - 1]
    assert of(data) != of(data + b"\0") != of(data + b"\0\0")


def test_every_file_that_a_task_or_a_reward_names_is_part_of_a_run(tmp_path):
    names = ["rows=1.2,3.jsonl", "prompt", "customers", "mine.py", "world.py"]  # as odd as they may be
    rows, prompt, customers, mine, world = (tmp_path / name for name in names)
    for path in (rows, prompt, customers, mine, world):
        path.write_text(path.name)
    config = TrainConfig(
        task=(f"gsm8k:{rows}=0.5", f"conversation:{customers}", "addition"),
        reward=(f"judge:{prompt},model=m=0.5", f"{mine}:right=0.3", "regex:a.b", "length:0.5"),
        environment=f"{world}:World",
    )
    before = runstate.inputs(config)["files"]
    # a kind of its own: a state of a version that did not hash them can be resumed, though it may have code
    kinds = {rows: "read", prompt: "read", customers: "read", mine: "code", world: "code"}
    assert before.keys() == {f"{kind}/{path}" for path, kind in kinds.items()}
    for path, kind in kinds.items():
        path.write_text("other")
        after = runstate.inputs(config)["files"]
        assert [name for name in before if before[name] != after[name]] == [f"{kind}/{path}"]
        before = after
    for text in (f"judge:{prompt}", f"judge:{prompt}=-1e-3"):
        assert f"read/{prompt}" in runstate.inputs(TrainConfig(reward=text))["files"]
