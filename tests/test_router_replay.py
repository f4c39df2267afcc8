"""Where tokens were sent, sent there again, and how many would go elsewhere: Routing, --router-replay, flips.

Run: python -m pytest tests/test_router_replay.py
"""

import dataclasses
import re

import pytest
import torch
from test_train import ROLLOUT_TIMES, TIMES, interrupted_at, quick, resume, script, train  # noqa: F401
from torch.nn import functional as F

from nanogspo import distributed, tiny
from nanogspo.episodes import Episode
from nanogspo.experience import experience, from_state, sampler_gap
from nanogspo.layers.moe import MoE, Routers, Routing, flips
from nanogspo.lora import add_lora, lora_layers
from nanogspo.model import separate
from nanogspo.packing import Example, pack, score
from nanogspo.quant import quantize_model
from nanogspo.rollout import Answer, generate
from nanogspo.run.doctor import noise_floor, packed, padded
from nanogspo.run.log import read_rows
from nanogspo.sampler import of_episode
from nanogspo.storage.safetensors import read_header

FLAGS = "--architecture qwen3_moe --threads 1 --task addition --task-size 2 --max-new-tokens 4 --no-control".split()
FLAGS += "--warm-steps 0 --eval-size 0 --prompts-per-rollout 4 --group-size 4 --steps 4".split()
FLAGS += "--updates-per-rollout 2 --save-every 1000 --micro-batch-tokens 60 --lr 1e-3".split()
L, E, K = 3, 8, 2  # of the tiny model


def a_model(std=0.1):
    _, model = tiny.build("0123456789+=", seed=0, architecture="qwen3_moe")
    return model.init_weights(1, std=std)


def examples_of(lengths, prompt=20):
    """Answers of these lengths to one prompt that is long enough to be shared."""
    g = torch.Generator().manual_seed(1)
    shown = torch.randint(2, 14, (prompt,), generator=g).tolist()
    return [Example.answered(shown, torch.randint(2, 14, (n,), generator=g).tolist()) for n in lengths]


# ---------------------------------------------------------------------------------------------------------------------
# one layer, one pass


@pytest.mark.parametrize("norm_topk", [False, True])
def test_replayed_experts_count_with_the_weights_of_the_new_scores(norm_topk):
    """Against sum_j w_j MLP_e_j(x) in float64, written out; gradients of x, the router and the experts. Experts 5 and 2
    are given to every token, in this order, whatever the router says of them."""
    moe = a_model().double().layers[0].mlp
    moe.norm_topk = norm_topk
    x = torch.randn(7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = torch.tensor([5, 2], dtype=torch.int16).expand(7, 1, 2)
    routing = Routing(separate, before, replay=True)
    got = moe(x[None], routing)[0]
    p = F.linear(x, moe.gate.weight).float().softmax(-1)  # scores are rounded to fp32
    w = p[:, [5, 2]] / (p[:, [5, 2]].sum(-1, keepdim=True) if norm_topk else 1)

    def mlp(e):
        gate, up, down = (getattr(moe.experts, f"{name}_proj").weight[e].T for name in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down

    want = w[:, :1].double() * mlp(5) + w[:, 1:].double() * mlp(2)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    wrt, direction = [x, *moe.parameters()], torch.randn(7, 128, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * direction).sum(), wrt) for y in (got, want)), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() and b.abs().max() > 0
    # what the router itself would choose is kept
    assert torch.equal(routing.experts[:, 0].long(), p.topk(2).indices)
    assert routing.experts.dtype == torch.int16 and not (routing.experts == before).all()


@pytest.mark.parametrize("how", ["plain", "lora", "nf4", "bf16", "checkpointing"])
def test_replaying_a_pass_under_its_own_weights_changes_no_bit(how):
    """So the first ratio stays 1, in a row in which a prompt is shared. And under moved weights every token goes where
    it went: its experts have gradients, others have none."""
    model = a_model()
    if how == "nf4":
        quantize_model(model, "nf4")
    if how in ("lora", "nf4"):
        add_lora(model, r=2, alpha=4.0)
        for layer in lora_layers(model).values():
            layer.lora_B.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    if how == "bf16":
        model.to(torch.bfloat16)
    model.gradient_checkpointing = how == "checkpointing"
    [batch] = pack(examples_of([3, 5, 2, 4]), max_tokens=999)
    assert batch.segments.parents.count(0) == 4  # the prompt is shared
    with torch.no_grad():
        scored = Routing(separate)
        old, _, _ = score(model, batch, linear=scored)
    assert scored.experts.shape == (len(batch.tokens), L, K)
    trained, found = [p for p in model.parameters() if p.requires_grad], []
    for routing in (separate, Routing(separate, scored.experts, replay=True)):
        logp, _, _ = score(model, batch, linear=routing)
        found.append((logp, torch.autograd.grad(logp.sum(), trained, allow_unused=True)))
    assert torch.equal(found[0][0], old) and torch.equal(found[1][0], old)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a is b is None or torch.equal(a, b)
    if how in ("plain", "checkpointing"):
        for block in model.layers:
            block.mlp.gate.weight.data.neg_()  # the least likely experts are now the likeliest
        routing = Routing(separate, scored.experts, replay=True)
        model(batch.tokens[None], segments=batch.segments, linear=routing).square().sum().backward()
        assert flips(routing.experts, scored.experts).float().mean() > 0.9
        for layer, block in enumerate(model.layers):
            met = torch.bincount(scored.experts[:, layer].flatten().long(), minlength=E) > 0
            moved = block.mlp.experts.down_proj.weight.grad.flatten(1).abs().amax(1) > 0
            assert torch.equal(met, moved) and block.mlp.gate.weight.grad.abs().max() > 0


def test_flips_are_of_sets():
    one = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 0]]], dtype=torch.int16)  # (T, L, k)
    other = torch.tensor([[[2, 1], [3, 5]], [[6, 5], [0, 7]]], dtype=torch.int16)
    assert flips(one, other).tolist() == [[False, True], [False, False]]


def test_an_updates_flips_and_load_are_those_of_all_processes(monkeypatch):
    """Layer 0 has 1 of 4 tokens elsewhere than before, layer 1 has 3. Replayed, the load is that of the experts used.
    Another process had the same tokens, all with experts 6 and 7 in layer 0."""
    model, tokens = a_model(), torch.tensor([[3, 4, 5, 6]])
    config = dataclasses.replace(model.config, num_layers=2, layer_types=("full",) * 2, moe_layers=(True, True))
    model.layers = model.layers[:2]
    model.config, routers = config, Routers(config)
    first = Routing(separate)
    model(tokens, linear=first)
    before = first.experts.clone()
    before[0, 0] = before[1, 1] = before[2, 1] = before[3, 1] = torch.tensor([7, 7])  # no set of two
    for replay in (False, True):
        model(tokens, linear=routers.watch(separate, before, replay))
        assert routers.balance(0.0) == 0.0
        sums = routers.sums
        used = before if replay else first.experts
        for layer in range(2):
            pairs = torch.bincount(used[:, layer].flatten().long(), minlength=E)
            assert torch.equal(sums[layer, :E], pairs.double()), (replay, layer)
        routers.sums = torch.zeros_like(sums)
    elsewhere = sums.clone()
    elsewhere[0, :E], elsewhere[:, -2] = torch.tensor([0, 0, 0, 0, 0, 0, 4, 4]), 0  # no flips there
    routers.sums = sums
    monkeypatch.setattr(distributed, "total", lambda mine: mine + elsewhere)
    facts = routers.metrics()
    load = sums[:, :E] + elsewhere[:, :E]
    assert facts["experts_flipped_by_layer"] == ([1 / 8, 3 / 8] if not replay else facts["experts_flipped_by_layer"])
    assert facts["experts_flipped"] == pytest.approx(sum(facts["experts_flipped_by_layer"]) / 2)
    assert facts["experts_max_load_by_layer"] == pytest.approx((load.amax(1) / load.mean(1)).tolist(), abs=1e-4)
    assert facts["experts_unused"] == pytest.approx((load == 0).double().mean().item(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# sampling and scoring


@pytest.mark.parametrize("max_rows", [0, 4])
def test_a_sampled_tokens_experts_are_those_of_the_full_forward(max_rows):
    """fp32 rounds too little to meet a tie here. Answers end at different steps, so rows are compacted, and with
    max_rows prompts are decoded in slices. Token t was drawn after the pass over token t - 1, the first after the
    prompt."""
    model, prompts = a_model(), [[3, 4, 5], [6, 7], [8, 3, 3, 9]]
    how = {"max_new_tokens": 9, "eos_ids": (2, 5, 7, 11), "seed": 3, "max_rows": max_rows}
    answers = generate(model, prompts, group_size=4, **how)
    lengths = [len(answer.tokens) for answer in answers]
    assert len(set(lengths)) > 3 and generate(model, prompts, group_size=4, **how) == answers
    for answer in answers:
        prompt, routing = prompts[answer.prompt_index], Routing(separate)
        with torch.no_grad():
            model(torch.tensor([prompt + answer.tokens[:-1]]), linear=routing)
        want = routing.experts[len(prompt) - 1 :]
        assert answer.experts.shape == (len(answer.tokens), L, K) and not flips(answer.experts, want).any()
    dense = tiny.build("0123456789+=", seed=0)[1]
    assert generate(dense, [[3]], max_new_tokens=2, seed=0)[0].experts is None


def test_the_gap_to_the_sampler_counts_experts_of_scored_tokens():
    """Three of the pairs of a token and a layer are made different; those of the first update (0, 1) are not looked
    at. And what is saved of a rollout comes back micro-batch by micro-batch."""
    model, examples = a_model(), examples_of([3, 4, 2, 5])
    how = {"updates": 2, "max_tokens": 25}
    one = experience(model, examples, torch.arange(1.0, 5.0), **how, temperature=1.0, device="cpu")
    drawn = [x[e.loss_mask[1:]] for x, e in zip(packed(model, examples, 30, 1.0)[1], examples, strict=True)]
    assert sampler_gap(one, [[0.0] * len(x) for x in drawn], drawn)["experts_flipped_sampler"] == 0
    drawn = [x.clone() for x in drawn]
    for example, token, layer in ((0, 0, 0), (1, 2, 1), (2, 1, 0), (3, 0, 2), (3, 4, 1)):
        drawn[example][token, layer] = torch.tensor([7, 7])
    facts = sampler_gap(one, [[0.0] * len(x) for x in drawn], drawn)
    assert facts["experts_flipped_sampler"] == pytest.approx(3 / (7 * L))
    again = from_state(one.state(), **how)
    assert again.experts[0] == [None] * len(one.experts[0]) and len(one.experts[1]) == 2
    for a, b, batch in zip(one.experts[1], again.experts[1], one.minibatches[1], strict=True):
        assert torch.equal(a, b) and len(a) == len(batch.tokens)


def test_an_episodes_experts_are_those_of_all_its_turns():
    """Two turns of 2 and 3 tokens; what stands between them is not sampled."""
    turns = [torch.full((n, L, K), n, dtype=torch.int16) for n in (2, 3)]
    episode = Episode(0, 0, {}, 0, tokens=[1], loss_mask=[False])
    for turn in turns:
        episode.said(Answer(0, [5] * len(turn), [-0.5] * len(turn), True, turn), "text")
        episode.add([7, 8], False)
    sample = of_episode(episode)
    assert torch.equal(sample.experts, torch.cat(turns)) and len(sample.logp) == 5


def test_the_noise_floor_says_what_replay_would_leave_of_it(capsys):
    """bf16 sends some tokens elsewhere when their sums are taken in another order; those are what an answer's log-prob
    is off by most. Where rows of a prompt are packed together, each example's experts are found again."""
    model, examples = a_model(), examples_of([3, 5, 2, 6, 4, 4])
    experts = packed(model, examples, 30, 1.0)[1]
    for e, got in zip(examples, experts, strict=True):
        routing = Routing(separate)
        with torch.no_grad():
            model(torch.tensor([e.tokens[:-1]]), linear=routing)
        assert not flips(routing.experts, got).any()
    for got, want in zip(padded(model, examples, 60, 1.0)[1], experts, strict=True):
        assert not flips(got, want).any()  # two rows at a time, and the longest alone
    exact = noise_floor(model, examples, 999, 1.0)
    assert exact.flipped == 0 and exact.by_replay == pytest.approx((exact.p99,) * 2, abs=1e-6)
    model.bfloat16()
    examples = examples_of([6] * 30)
    noise, replayed = (noise_floor(model, examples, 999, 1.0, replay) for replay in (False, True))
    assert 0 < noise.flipped < 0.2 and noise.by_replay == replayed.by_replay
    assert (noise.p99, replayed.p99) == noise.by_replay and replayed.p99 < noise.p99 and replayed.token < noise.token
    assert f"{noise.flipped:.2%} of (token, layer) change experts, p99 {noise.p99:.1e} without and" in str(noise)


# ---------------------------------------------------------------------------------------------------------------------
# whole runs


def rows(folder) -> list[dict]:
    times = TIMES | ROLLOUT_TIMES
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(folder / "metrics.jsonl")]


def test_a_replayed_run_is_another_one_and_is_resumed_to_the_last_byte(tmp_path):
    """Update 1 is the first of a rollout and the run's first: its ratios prove that a replayed pass is the scored one.
    Killed after update 3, in the middle of a rollout, it goes on with the experts it saved."""
    for name, flags in (("without", ()), ("whole", ["--router-replay"])):
        train(tmp_path / name, *FLAGS, *flags)
    with interrupted_at(3):
        train(tmp_path / "run", *FLAGS, "--router-replay")
    header, _ = read_header(tmp_path / "run" / "state" / "state.safetensors")
    assert header["rollout.experts"].shape[1:] == (L, K)
    resume(tmp_path / "run")
    a, b = ((tmp_path / name / "state" / "state.safetensors").read_bytes() for name in ("whole", "run"))
    assert a == b and rows(tmp_path / "run") == rows(tmp_path / "whole")
    one, other = ([row for row in rows(tmp_path / name) if "algo" in row] for name in ("without", "whole"))
    assert one[0] == other[0] and one[1]["grad_norm"] != other[1]["grad_norm"]
    for update, row in enumerate(other):
        assert (row["ratio_min"], row["ratio_max"]) == (1, 1) or update % 2
        assert row["experts_flipped_sampler"] == 0 and len(row["experts_flipped_by_layer"]) == L
        assert row["experts_flipped"] > 0 if update % 2 else row["experts_flipped"] == 0
    [note] = [row for row in rows(tmp_path / "whole") if row.get("doctor") == "noise"]
    assert note["experts_flipped"] == 0 and "with --router-replay" in note["says"]


def test_replay_is_refused_where_it_could_do_nothing(tmp_path):
    for flags, why in (
        ("--architecture qwen3", "got --router-replay with --model tiny, which has no experts; want it left out"),
        ("--architecture qwen3_moe --algo sft", "got --router-replay with --algo sft, which samples no answers"),
        (
            "--architecture qwen3_moe --algo reinforce",
            "--algo reinforce, which scores no old policy",
        ),
    ):
        done = script("train.py", "--router-replay", *flags.split(), "--out", tmp_path / "run")
        assert done.code == 2 and why in done.err and done.err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_check_counts_the_experts_that_differ_from_the_samplers():
    out = script("train.py", *FLAGS, "--check").out
    assert re.search(r"^sampler against scorer: 0\.00% of \(token, layer\) change experts$", out, re.MULTILINE)
    assert "0.00% of (token, layer) change experts, p99 " in out and isinstance(a_model().layers[0].mlp, MoE)
