"""The options of the objective: every --algo, --loss-average and --beta against loops, and TRL's own trainer.

In float64 unless it says otherwise, so tolerances are rounding: 1e-9 is 1e7 times float64's eps.

Run: python -m pytest tests/test_policy_loss.py
"""

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.objectives import (
    answer_weights,
    grpo_loss,
    gspo_loss,
    kl_to_reference,
    policy_loss,
    reinforce_loss,
)
from tests.strategies import CLIPS, answers

AVERAGES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}  # --loss-average -> TRL's loss_type
MAX = 50  # the longest of strategies.answers: TRL's max_completion_length, our max_new_tokens


def close(got, want, atol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-9, atol=atol)


def loss_of(algo, batch, clip, weights=1.0, dtype=torch.float64):
    """policy_loss of all answers, and its gradient at every token (M,)."""
    logp = batch.logp.to(dtype).requires_grad_(True)
    A = (batch.advantages * weights).to(dtype)
    args = (logp, batch.old_logp.to(dtype), batch.cu_seqlens, A)
    loss, metrics, log_ratio = policy_loss(algo, *args, clip_low=clip[0], clip_high=clip[1])
    loss.backward()
    return loss.detach(), logp.grad, metrics, log_ratio


@given(answers(), CLIPS, st.sampled_from([torch.float32, torch.float64]))
def test_gspo_token_is_gspo(batch, clip, dtype):
    """Value and gradient, in fp32 too: both take s from the same sums, bit for bit, so the same tokens are clipped.
    Then the token form adds up n equal numbers and divides by n, in a value and in a gradient: n eps."""
    want, slope, _, log_ratio = loss_of("gspo", batch, clip, dtype=dtype)
    loss, gradient, _, token_log_ratio = loss_of("gspo_token", batch, clip, dtype=dtype)
    assert torch.equal(token_log_ratio, log_ratio.repeat_interleave(batch.lengths))
    rounding = (int(batch.lengths.max()) + 8) * torch.finfo(dtype).eps
    size = (log_ratio.exp() * batch.advantages.to(dtype)).abs().max().item()
    assert (loss - want).abs() <= rounding * size
    assert ((gradient - slope).abs() <= rounding * slope.abs()).all()


@given(answers())
def test_reinforce_is_the_loop(batch):
    loss, gradient, metrics, log_ratio = loss_of("reinforce", batch, (0.2, 0.27))
    total, slope, N = 0.0, [], len(batch.advantages)
    for logp, A in zip(batch.logp.split(batch.lengths.tolist()), batch.advantages.tolist(), strict=True):
        total -= A * math.fsum(logp.tolist()) / len(logp) / N
        slope += [-A / len(logp) / N] * len(logp)
    close(loss, total)
    close(gradient, slope)
    assert (log_ratio == 0).all() and len(log_ratio) == N
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["clip_low_frac"] == 0


@given(answers(), CLIPS)
def test_at_a_ratio_of_one_all_are_reinforce(batch, clip):
    """The first update of a rollout: gradients are equal, whatever the loss is called."""
    first = dataclasses.replace(batch, old_logp=batch.logp)
    _, want, _, _ = loss_of("reinforce", first, clip)
    for algo in ("gspo", "gspo_token", "grpo"):
        _, gradient, metrics, log_ratio = loss_of(algo, first, clip)
        close(gradient, want)
        assert (log_ratio == 0).all() and metrics["ratio_min"] == metrics["ratio_max"] == 1


@given(answers(), CLIPS)
def test_each_name_is_its_loss(batch, clip):
    clips = {"clip_low": clip[0], "clip_high": clip[1]}
    sums = batch.sums(batch.logp), batch.sums(batch.old_logp)
    want, _ = gspo_loss(*sums, batch.lengths, batch.advantages, **clips)
    loss, _, _, log_ratio = loss_of("gspo", batch, clip)
    close(loss, want)
    close(log_ratio, (sums[0] - sums[1]) / batch.lengths)
    want, _ = grpo_loss(batch.logp, batch.old_logp, batch.cu_seqlens, batch.advantages, **clips)
    loss, _, _, log_ratio = loss_of("grpo", batch, clip)
    close(loss, want)
    close(log_ratio, batch.logp - batch.old_logp)


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match=r"got empty answers at \[1\]"):
        reinforce_loss(torch.zeros(2), torch.tensor([0, 2, 2]), torch.ones(2))


# ----------------------------------------------------------------------------
# averages and the KL term, against TRL's own code


@pytest.mark.parametrize("average", AVERAGES)
@given(lengths=st.lists(st.integers(1, MAX), min_size=1, max_size=6), cut=st.sets(st.integers(0, 5)))
def test_weights_are_what_the_sums_of_the_papers_say(average, lengths, cut):
    """Of terms that are 1 at every token: what is left of each answer in the average, over what it divides by."""
    counts = [i not in cut for i in range(len(lengths))]
    weights = answer_weights(torch.tensor(lengths), torch.tensor(counts), average, MAX)
    counted, tokens = sum(counts), sum(n for n, c in zip(lengths, counts, strict=True) if c)
    for weight, length, count in zip(weights.tolist(), lengths, counts, strict=True):
        if not count:
            assert weight == 0
        else:
            want = {"sequence": 1 / counted, "token": length / tokens, "constant": length / (len(lengths) * MAX)}
            assert weight / counted == pytest.approx(want[average], rel=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("level, algo", [("sequence", "gspo"), ("token", "grpo")])
def test_averages_and_kl_are_trls_own_code(level, algo, average):
    """GRPOTrainer._compute_loss itself, on a stand-in for the trainer that hands it our log-probs. Cut off answers are
    in its mask as 0. Its "grpo" divides by all answers, ours by those that count; the rest is the same."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is an oracle of requirements-test.txt")

    @given(answers(), CLIPS, st.sampled_from([0.0, 0.04]), st.sets(st.integers(0, 5), max_size=3))
    def check(batch, clip, beta, cut):
        counts = torch.tensor([i not in cut for i in range(len(batch.lengths))])
        ref = batch.old_logp + 0.3 * torch.sin(torch.arange(len(batch.logp), dtype=torch.float64))  # (M,)
        padded = batch.padded(batch.logp, filler=1.0).requires_grad_(True)  # (N, T)
        mask = batch.padded(torch.ones_like(batch.logp), filler=0.0) * counts[:, None]
        self = stand_in(padded, level, AVERAGES[average], clip, beta)
        nothing = torch.zeros(len(mask), 0, dtype=torch.int64)  # (N, 0) no prompt
        want = trainer.GRPOTrainer._compute_loss(
            self,
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": mask.long(),
                "completion_mask": mask,
                "old_per_token_logps": batch.padded(batch.old_logp, filler=0.0),
                "ref_per_token_logps": batch.padded(ref, filler=0.0),
                "advantages": batch.advantages,
                "num_items_in_batch": mask.sum(),
            },
        )
        want.backward()
        # as train.py: a factor of the advantages, and the mean over the answers that count
        weights = answer_weights(batch.lengths, counts, average, MAX).double()
        logp = batch.logp.clone().requires_grad_(True)
        args = logp, batch.old_logp, batch.cu_seqlens, batch.advantages * weights
        loss, _, _ = policy_loss(algo, *args, clip_low=clip[0], clip_high=clip[1])
        loss = loss + beta * kl_to_reference(logp, ref, batch.cu_seqlens, weights)
        N, counted = len(counts), max(int(counts.sum()), 1)
        loss = loss * N / counted * (counted / N if average == "sequence" else 1.0)
        loss.backward()
        close(loss.detach(), want.detach(), atol=1e-7)  # the weights are float32
        torch.testing.assert_close(logp.grad, padded.grad[batch.padded(torch.ones_like(logp), 0.0).bool()], rtol=1e-6,
                                   atol=1e-7)  # fmt: skip

    check()


def stand_in(logp, level, loss_type, clip, beta):
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        beta=beta,
        max_completion_length=MAX,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


@given(answers())
def test_the_kl_estimate_is_the_loop(batch):
    logp, ref = batch.logp.clone().requires_grad_(True), batch.old_logp
    weights = torch.linspace(0.5, 2.0, len(batch.lengths), dtype=torch.float64)
    kl = kl_to_reference(logp, ref, batch.cu_seqlens, weights)
    kl.backward()
    total, slope, t = 0.0, [], 0
    for length, weight in zip(batch.lengths.tolist(), weights.tolist(), strict=True):
        for _ in range(length):
            d, part = (ref[t] - batch.logp[t]).item(), weight / length / len(weights)
            total += part * (math.exp(d) - d - 1)
            slope.append(part * (1 - math.exp(d)))
            t += 1
    close(kl.detach(), total)
    close(logp.grad, slope)
    assert kl >= 0 and kl_to_reference(ref, ref, batch.cu_seqlens, weights) == 0


def test_the_kl_estimate_holds_in_fp32_where_policies_are_close():
    """exp(d) - d - 1 is d^2 / 2, which float32 loses below d = 3e-4 if it is written so."""
    d = torch.tensor([1e-3, -1e-3, 1e-4])  # (M,)
    got = [kl_to_reference(-1 - x, torch.full((1,), -1.0), torch.tensor([0, 1]), torch.ones(1)) for x in d.split(1)]
    want = [math.expm1(x) - x for x in (-1 - (-1 - d)).tolist()]  # d as float32 has it near 1
    for value, exact in zip(got, want, strict=True):
        assert value.item() == pytest.approx(exact, rel=0.02)
