"""The options of the objective in whole runs: averages, masking, KL, dynamic sampling, REINFORCE; and their resuming.

Run: python -m pytest tests/test_train_objectives.py
"""

import copy
import functools
import json

import pytest
import torch
import yaml

from nanogspo import checkpoint, tiny
from nanogspo.config import TrainConfig, check, resolve
from nanogspo.experience import split_minibatches
from nanogspo.lora import add_lora
from nanogspo.packing import Example
from nanogspo.reference import freeze, is_copied, reference
from nanogspo.rollout import generate
from nanogspo.run.log import read_rows
from nanogspo.run.planner import memory_parts
from nanogspo.sampler import Group, choose
from nanogspo.tasks import get_task
from tests import oracles
from tests.test_train import (  # noqa: F401      quick: no picture
    TINY,
    interrupted_at,
    quick,
    refusal,
    resume,
    steps_of,
    train,
)

STATE = "state/state.safetensors"


# ----------------------------------------------------------------------------
# the loop


OPTIONS = [
    "--algo gspo --loss-average token --mask-truncated",
    "--algo gspo --loss-average constant --mask-truncated --beta 0.5",
    "--algo grpo --loss-average token --beta 0.5",
    "--algo grpo --loss-average constant",
    "--algo gspo_token --mask-truncated",
    "--algo reinforce --loss-average token --beta 0.5 --mask-truncated",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_rollout_and_its_updates_are_those_of_a_slow_loop(tmp_path, options):
    """No packing, no micro-batches, sums and divisors as the papers write them; a copy of the model as reference. The
    run's own micro-batches are of one answer or two: the gradient is that of the update all the same."""
    flags = [*TINY, *options.split(), *"--steps 4 --lr 1e-3 --warmup-updates 0".split()]
    train(tmp_path / "run", *flags, "--micro-batch-tokens", 18)
    config, rows = TrainConfig(**read_config(tmp_path / "run")), steps_of(tmp_path / "run")
    task = get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    ref = copy.deepcopy(model)
    problems = [task.train_problem(n, 0) for n in range(4)]
    prompts = [tokenizer.encode(problem.text) for problem in problems]
    answers = generate(model, prompts, group_size=4, max_new_tokens=4, eos_ids=tokenizer.eos_ids, seed=0)
    rewards = [task.reward(problems[a.prompt_index], tokenizer.decode(a.tokens)) for a in answers]
    advantages = sum(oracles.group_advantages([rewards[i : i + 4] for i in range(0, 16, 4)]), [])
    counts = [a.finished or not config.mask_truncated for a in answers]
    assert {a.finished for a in answers} == {True, False}  # or this test would show nothing
    assert 0 in advantages and any(advantages)

    def logp(policy, answer):
        row, start = prompts[answer.prompt_index] + answer.tokens, len(prompts[answer.prompt_index])
        z = policy.logits(policy(torch.tensor([row])))[0, start - 1 : -1]  # (length, V)
        return z.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1)  # (length,)

    with torch.no_grad():
        old = [logp(model, answer) for answer in answers]
        then = [logp(ref, answer) for answer in answers]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    low, high = (0.2, 0.27) if config.algo in ("grpo", "reinforce") else (3e-4, 4e-4)
    for update, row in enumerate(rows):
        terms, kls, lengths = [], [], []  # sums over the tokens of each answer that counts
        mine = range(4 * update, 4 * update + 4)
        for i in mine:
            if not counts[i]:
                continue
            new, A = logp(model, answers[i]), advantages[i]
            log_ratio = new - old[i]  # (length,)
            ratio = (log_ratio if config.algo == "grpo" else log_ratio.mean().expand_as(new)).exp()  # (length,)
            clipped = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)  # (length,)
            terms.append(-(new * A if config.algo == "reinforce" else clipped).sum())
            kls.append((torch.exp(then[i] - new) - (then[i] - new) - 1).sum())
            lengths.append(len(new))

        def average(sums):
            if config.loss_average == "sequence":
                return sum(x / n for x, n in zip(sums, lengths, strict=True)) / len(lengths)  # noqa: B023
            return sum(sums) / (sum(lengths) if config.loss_average == "token" else 4 * 4)  # noqa: B023

        kl = average(kls) if lengths else torch.zeros(())
        loss = average(terms) + config.beta * kl if lengths else 0 * logp(model, answers[0]).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        # tolerances as in test_train.py: fp32 sums in another order, and AdamW's first steps are lr * sign(gradient)
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-3, abs=2e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-2, abs=1e-5)
        if config.beta:
            assert row["kl"] == pytest.approx(kl.item(), rel=1e-2, abs=1e-6)
        else:
            assert "kl" not in row
    assert config.beta == 0 or rows[-1]["kl"] > 0 == rows[0]["kl"]


def read_config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_all_answers_cut_off_teach_nothing_and_break_nothing(tmp_path):
    """An update, here of one answer, is made all the same, with a gradient of 0; with a KL term, too."""
    flags = [*TINY, *"--steps 24 --lr 1e-12 --mask-truncated --prompts-per-rollout 2 --group-size 2".split()]
    for beta in (0, 0.5):
        train(tmp_path / str(beta), *flags, "--beta", beta)
        rows = steps_of(tmp_path / str(beta))
        truncated = [row["truncated"] for row in read_rows(tmp_path / str(beta) / "samples.jsonl")]
        for row, cut in zip(rows, truncated, strict=True):
            assert not cut or row["loss"] == row["grad_norm"] == 0
        assert {True, False} == set(truncated) and all(value is not None for row in rows for value in row.values())
        assert any(row["grad_norm"] for row in rows)


def test_what_is_kept_of_a_minibatch():
    """nan: never; 0: where there is a reference. Of a minibatch of neither the shortest stays."""
    examples = [Example.answered([5, 6], [7] * n) for n in (3, 1, 4, 2, 2, 5, 1, 3)]
    A = torch.tensor([0.0, torch.nan, 1.0, -1.0, torch.nan, torch.nan, torch.nan, torch.nan])
    for with_zeros, want in ((False, [[2, 3], [6]]), (True, [[0, 2, 3], [6]])):
        parts = split_minibatches(examples, A, 2, 10**6, with_zeros)
        assert [sorted(i for b in part for i in b.index.tolist()) for part in parts] == want


# ----------------------------------------------------------------------------
# the reference


def a_model(lora_r=0):
    _, model = tiny.build("0123456789+=", seed=0)
    if lora_r:
        add_lora(model, r=lora_r, alpha=8)
    return model


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("warm_steps", [0, 3])
def test_within_reference_the_model_is_what_it_was(lora_r, warm_steps):
    """The very bits; and afterwards it is as it had become, after an error, too. Only a fresh adapter needs no copy,
    and what is kept is planned for."""
    config = TrainConfig(lora_r=lora_r, beta=0.1, warm_steps=warm_steps)
    model, tokens = a_model(lora_r), torch.tensor([[2, 3, 4]])
    trained = [p for p in model.parameters() if p.requires_grad]
    if warm_steps:
        with torch.no_grad():
            [p.add_(0.01) for p in trained]
    before, frozen = model(tokens), freeze(model, config)
    copied = bool(warm_steps or not lora_r)
    assert bool(frozen) == copied == is_copied(config)
    size = sum(t.numel() * t.element_size() for t in frozen.values())
    assert (
        memory_parts(config, model, 5).get("reference policy", 0)
        == size
        == copied * 4 * sum(p.numel() for p in trained)
    )
    with torch.no_grad():
        [p.mul_(1.1).add_(0.02) for p in trained]
    after = model(tokens)
    assert not torch.equal(before, after)
    with pytest.raises(KeyError), reference(model, frozen):
        assert torch.equal(model(tokens), before)
        raise KeyError
    assert torch.equal(model(tokens), after)
    assert [p for p in model.parameters() if p.requires_grad] == trained


def test_without_a_kl_term_nothing_is_copied():
    assert not is_copied(TrainConfig(lora_r=0)) and not freeze(a_model(), TrainConfig(lora_r=0))
    assert not is_copied(TrainConfig(lora_r=0, beta=0.1, algo="sft"))
    assert is_copied(TrainConfig(lora_r=4, beta=0.1, adapter="x"))


def test_the_kl_term_keeps_the_policy_near(tmp_path):
    """Without a reward to follow (groups of equal rewards) it is the only gradient; and with one it holds it back."""
    flags = [*TINY, *"--steps 12 --lr 3e-3 --temperature 1".split()]
    far = {}
    for beta in (1e-6, 30.0):
        train(tmp_path / str(beta), *flags, "--beta", beta)
        far[beta] = steps_of(tmp_path / str(beta))[-1]["kl"]
    assert 0 < far[30.0] < far[1e-6] / 3


# ----------------------------------------------------------------------------
# dynamic sampling


def test_groups_with_a_spread_come_first_in_their_order():
    spread = torch.tensor([[0, 0], [-1, 1], [0, 0], [1, -1], [1, -1], [torch.nan, 1]])
    groups = [Group(n, [], [], [], advantages) for n, advantages in enumerate(spread)]
    assert [g.problem for g in choose(groups, 3)] == [1, 3, 4]
    assert [g.problem for g in choose(groups, 5)] == [0, 1, 3, 4, 5]  # the first of those without
    assert [g.problem for g in choose(groups, 6)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("most", [1, 30])
def test_zero_spread_groups_are_replaced_in_whole_rounds(tmp_path, most):
    """The cursor goes on by what was asked; what is logged is of all that was sampled."""
    flags = [*TINY, *"--steps 8 --lr 1e-12 --temperature 0.6".split()]
    train(tmp_path / "run", *flags, "--dynamic-sampling", most)
    rows, cursor, task = steps_of(tmp_path / "run"), 0, get_task("addition", 2)
    tokenizer, model = tiny.build(task.characters, seed=0)
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 32
    for rollout in (0, 1):
        rounds = rows[4 * rollout]["sampling_rounds"]
        assert all(row["sampling_rounds"] == rounds for row in rows[4 * rollout : 4 * rollout + 4])
        problems = [task.train_problem(cursor + n, 0) for n in range(4 * rounds)]
        table = []  # lr 1e-12: the model stays as it was
        for first in range(0, len(problems), 4):
            prompts = [tokenizer.encode(problem.text) for problem in problems[first : first + 4]]
            how = {"group_size": 4, "max_new_tokens": 4, "temperature": 0.6, "seed": 0}
            answers = generate(model, prompts, eos_ids=tokenizer.eos_ids, first_prompt=cursor + first, **how)
            texts = [tokenizer.decode(a.tokens) for a in answers]
            rewards = [task.reward(problems[first + n // 4], text) for n, text in enumerate(texts)]
            table += [rewards[i : i + 4] for i in range(0, 16, 4)]
        spread = [n for n, group in enumerate(table) if len(set(group)) > 1]
        flat = [n for n, group in enumerate(table) if len(set(group)) == 1]
        assert len(spread) >= 4 or rounds == 1 + most
        assert sum(n < 4 * (rounds - 1) for n in spread) < 4  # and no round too many
        kept = sorted((spread + flat)[:4])
        mine = samples[16 * rollout : 16 * rollout + 16]
        assert [row["prompt"] for row in mine] == [problems[n].text for n in kept for _ in range(4)]
        assert [row["reward"] for row in mine] == [reward for n in kept for reward in table[n]]
        assert rows[4 * rollout]["reward"] == pytest.approx(sum(map(sum, table)) / (16 * rounds))
        assert rows[4 * rollout]["zero_spread_frac"] == pytest.approx(len(flat) / len(table))
        cursor += 4 * rounds
    assert cursor > 8


# ----------------------------------------------------------------------------
# resuming

RUNS = {
    "kl of a full copy": "--beta 0.3 --loss-average token --lr 1e-3",
    "kl without adapter": "--beta 0.3 --lora-r 4 --lr 1e-2",
    "kl of a warm adapter": "--beta 0.3 --lora-r 4 --lr 1e-2 --warm-steps 3 --warm-until 2 --algo grpo",
    "dynamic": "--dynamic-sampling 2 --temperature 0.6 --lr 1e-3 --loss-average constant --mask-truncated",
    "reinforce": "--algo reinforce --lr 1e-3",
    "reinforce at once": "--algo reinforce --updates-per-rollout 1 --lr 1e-3",
    "gspo_token": "--algo gspo_token --lr 1e-3 --dtype bf16 --beta 0.1",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(folder, *TINY, "--steps", 7, *RUNS[name].split())
        return folder

    return make


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_equals_the_whole_run_to_the_last_byte(tmp_path, whole, name):
    """Inside the first rollout, at its end, and inside the second; after a warm-up of 3, by so much earlier."""
    folder, flags = tmp_path / "run", [*TINY, "--steps", 7, *RUNS[name].split()]
    for stop in (2, 4, 6):
        with interrupted_at(stop):
            resume(folder) if stop > 2 else train(folder, *flags)
    resume(folder)
    for file in whole(name).glob("*/*.safetensors"):  # model/, adapter/ and state/
        assert (folder / file.relative_to(whole(name))).read_bytes() == file.read_bytes()
    assert steps_of(folder) == steps_of(whole(name))
    assert read_rows(folder / "samples.jsonl") == read_rows(whole(name) / "samples.jsonl")


def test_what_a_state_holds_is_what_its_run_needs(whole):
    def names(name, prefix):
        header, _ = checkpoint.read_header(whole(name) / STATE)
        return {n.removeprefix(prefix) for n in header if n.startswith(prefix)}

    assert names("kl of a full copy", "reference.") == names("kl of a full copy", "model.") != set()
    assert not names("kl without adapter", "reference.") and "ref_logp" in names("kl without adapter", "rollout.")
    assert all("lora" in n for n in names("kl of a warm adapter", "reference.")) and names(
        "kl of a warm adapter", "reference."
    )
    assert names("reinforce", "rollout.") == {"advantages", "tokens", "lengths"}
    assert names("dynamic", "rollout.") == {"advantages", "old_logp", "tokens", "lengths"}
    header, metadata = checkpoint.read_header(whole("dynamic") / STATE)
    rounds = {row["step"]: row["sampling_rounds"] for row in steps_of(whole("dynamic"))}
    assert json.loads(metadata["state"])["progress"]["rl_cursor"] == 4 * (rounds[1] + rounds[5]) > 8


@pytest.mark.parametrize("name", ["kl of a full copy", "kl without adapter", "kl of a warm adapter"])
def test_the_reference_is_the_start_of_rl_and_stays_it(whole, name):
    """At the first update of RL, warmed up or not, the divergence is exactly 0; it is not taken anew by later ones."""
    rows = [row for row in steps_of(whole(name)) if "kl" in row]
    assert rows[0]["kl"] == 0
    assert all(row["kl"] > 0 or row["grad_norm"] == 0 for row in rows[1:]) and rows[-1]["kl"] > 0


def test_a_rollout_is_finished_with_the_log_probs_it_was_scored_for(tmp_path):
    train(tmp_path / "run", *TINY, "--steps", 2, *RUNS["reinforce"].split())
    for flags in (["--algo", "gspo"], ["--beta", 0.1]):
        said = refusal("--resume", tmp_path / "run", "--steps", 7, "--accept-changes", *flags)
        assert f"got another {flags[0]} in the middle of a rollout" in said


# ----------------------------------------------------------------------------
# flags


def test_one_update_per_rollout_has_a_name():
    with pytest.raises(ValueError, match=r"--updates-per-rollout 1 with gspo_token: .*by its name: --algo reinforce"):
        check(TrainConfig(updates_per_rollout=1, algo="gspo_token"))
    check(TrainConfig(updates_per_rollout=1, algo="reinforce"))


def test_gspo_token_has_the_range_of_gspo():
    for algo, want in (("gspo_token", (3e-4, 4e-4)), ("reinforce", (0.2, 0.27))):
        config = resolve(TrainConfig(algo=algo))
        assert (config.clip_low, config.clip_high) == want
