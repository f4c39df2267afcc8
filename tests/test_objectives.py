"""nanogspo/objectives.py against loops in plain Python, TRL's own trainer, and the laws any GSPO must keep.

Everything here runs in float64 unless it says otherwise, so tolerances are rounding: 1e-9 is 1e7 times float64's eps.

Run: python -m pytest tests/test_objectives.py
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.seq_logprob import IGNORE, seq_logprob, token_logprob
from nanogspo.objectives import (
    combine,
    group_advantages,
    grpo_loss,
    gspo_loss,
    mixed_advantages,
    ratio_histogram,
    ratio_quantiles,
    sft_loss,
    total_rewards,
)
from tests import oracles
from tests.strategies import CLIPS, SEEDS, answers

REWARDS = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])
METRICS = {"ratio_mean", "ratio_min", "ratio_max", "ratio_std", "clip_low_frac", "clip_high_frac"}


def close(got, want, atol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-9, atol=atol)


def gspo(batch, clip, index=None):
    """Loss, metrics and d loss / d logp (S,) of GSPO on a batch of packed answers (or some of them)."""
    logp = batch.logp.clone().requires_grad_(True)
    args = (batch.sums(logp), batch.sums(batch.old_logp), batch.lengths, batch.advantages)
    loss, metrics = gspo_loss(*(a if index is None else a[index] for a in args), clip_low=clip[0], clip_high=clip[1])
    loss.backward()
    return loss.detach(), metrics, logp.grad


def grpo(batch, clip):
    logp = batch.logp.clone().requires_grad_(True)
    loss, metrics = grpo_loss(
        logp, batch.old_logp, batch.cu_seqlens, batch.advantages, clip_low=clip[0], clip_high=clip[1]
    )
    loss.backward()
    return loss.detach(), metrics, logp.grad


# ----------------------------------------------------------------------------
# advantages


@given(st.lists(st.lists(REWARDS, min_size=5, max_size=5), min_size=1, max_size=4), st.booleans())
def test_advantages_are_those_of_the_loop(rewards, divide):
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), divide_by_std=divide)
    want = oracles.group_advantages(rewards, divide_by_std=divide)
    close(got, [[0.0] * 5 if len(set(row)) == 1 else w for row, w in zip(rewards, want, strict=True)])


@given(st.lists(st.lists(REWARDS, min_size=4, max_size=4), min_size=1, max_size=4), st.booleans())
def test_advantages_of_a_group_sum_to_zero(rewards, divide):
    got = group_advantages(torch.tensor(rewards), divide_by_std=divide)  # (P, 4) float32
    assert got.dtype == torch.float32
    # 4 advantages of at most 1.5, each off by 1 eps of a reward divided by the smallest spread there is here, 0.05
    assert got.sum(1).abs().max() <= 4 * 1.5 * torch.finfo(torch.float32).eps / 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("G", [2, 7, 8, 11, 64])
def test_a_group_of_equal_rewards_gives_exactly_zero(G, dtype):
    """8 times 0.1 has a mean that is not 0.1 in float32: 7e-9 / 1e-4 would be a gradient made of rounding."""
    for value in (0.0, 0.1, 1 / 3, -7.7, 1e6 / 3, 3e38):
        rewards = torch.full((3, G), 3.0 if dtype == torch.int64 else value, dtype=torch.float64).to(dtype)
        rewards[1] = torch.arange(G)  # the row between them does learn
        for divide in (True, False):
            advantages = group_advantages(rewards, divide_by_std=divide)
            assert (advantages[[0, 2]] == 0).all() and (advantages[1] != 0).any()


def test_groups_of_very_different_scale_do_not_leak():
    """Centred down the columns, or with one std for the whole batch, the small groups would vanish beside the large."""
    rows = [[0.0, 1.0, 0.0, 1.0], [1e6, 3e6, 2e6, 2e6], [-1e-3, 1e-3, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]]
    together = group_advantages(torch.tensor(rows, dtype=torch.float64))
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(group_advantages(torch.tensor([row], dtype=torch.float64))[0], got)
    close(together, oracles.group_advantages(rows))
    close(
        together[0], [-0.5 / (math.sqrt(1 / 3) + 1e-4), 0.5 / (math.sqrt(1 / 3) + 1e-4)] * 2
    )  # by hand: std over G - 1


def test_std_is_the_one_trl_computes():
    nanstd = pytest.importorskip("trl.trainer.utils", reason="TRL is an oracle of requirements-test.txt").nanstd
    rewards = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = (rewards - rewards.nanmean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), want, rtol=0, atol=1e-6)  # its G / (G - 1) is float32


@pytest.mark.parametrize(
    "rewards, text",
    [
        (torch.zeros(3, 1), r"got rewards of shape \(3, 1\), want \(P, G\) with G >= 2"),
        (torch.zeros(4), r"got rewards of shape \(4,\)"),
        (
            torch.tensor([[0.0, math.nan], [math.inf, 1.0]]),
            r"nan or inf rewards at \[prompt, answer\] \[\[0, 1\], \[1, 0\]\]",
        ),
    ],
)
def test_rewards_that_cannot_be_ranked_are_refused(rewards, text):
    with pytest.raises(ValueError, match=text):
        group_advantages(rewards)


# ----------------------------------------------------------------------------
# losses against other people's


JUDGED = st.lists(  # N = 6 answers, K = 3 reward functions, each of which may abstain
    st.lists(st.sampled_from([0.0, 0.1, 0.7, 1.0, math.nan]), min_size=3, max_size=3), min_size=6, max_size=6
)


def loop_total(row, weights):
    """Equation (1) of total_rewards, one answer at a time."""
    judged = [(v, w) for v, w in zip(row, weights, strict=True) if w and not math.isnan(v)]
    if not judged:
        return math.nan
    return sum(v * w for v, w in judged) * sum(map(abs, weights)) / sum(abs(w) for _, w in judged)


def loop_advantages(rewards, G, divide):
    """Group by group over the answers that have a reward."""
    found = []
    for first in range(0, len(rewards), G):
        group = rewards[first : first + G]
        some = [r for r in group if not math.isnan(r)]
        equal = len(set(some)) < 2
        own = iter([0.0] * len(some) if equal else oracles.group_advantages([some], divide_by_std=divide)[0])
        found += [math.nan if math.isnan(r) else next(own) for r in group]
    return found


@given(
    JUDGED,
    st.sampled_from([(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (1.0, -0.5, 2.0), (0.6, 0.0, 0.4)]),
    st.booleans(),
    st.booleans(),
)
def test_rewards_of_several_functions_that_may_abstain(values, weights, divide, first):
    got = total_rewards(torch.tensor(values, dtype=torch.float64), list(weights))
    totals = [loop_total(row, weights) for row in values]
    torch.testing.assert_close(got, torch.tensor(totals, dtype=torch.float64), rtol=1e-9, atol=1e-12, equal_nan=True)
    got = mixed_advantages(
        torch.tensor(values, dtype=torch.float64), list(weights), 3, normalize_first=first, divide_by_std=divide
    )
    if first:
        columns = [loop_advantages(list(column), 3, divide) for column in zip(*values, strict=True)]
        want = [loop_total(row, weights) for row in zip(*columns, strict=True)]
    else:  # from our totals: whether rewards of a group are equal is a question of the last bit
        totals = total_rewards(torch.tensor(values, dtype=torch.float64), list(weights)).float().tolist()
        want = loop_advantages(totals, 3, divide)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_reward_of_weight_0_is_no_reward():
    assert total_rewards(torch.tensor([[math.nan, 1.0], [0.5, math.nan]]), [1.0, 0.0]).tolist()[1:] == [0.5]
    assert total_rewards(torch.tensor([[math.nan, 1.0]]), [1.0, 0.0]).isnan().all()


def test_one_function_gives_the_bits_of_its_rewards():
    rewards = torch.rand(4, 8)
    assert torch.equal(mixed_advantages(rewards.view(-1, 1), [1.0], 8), group_advantages(rewards).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_differ_by_rounding_are_equal_rewards(dtype):
    values = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, math.nan], [1, 1, 1]], dtype=dtype)
    assert not mixed_advantages(values[:2], [0.1, 0.2, 0.3], 2).any()
    assert not mixed_advantages(values[2:], [0.1, 0.5, 0.1], 2).any()
    both = total_rewards(values[2:].double(), [0.1, 0.5, 0.1])
    assert both[0] != both[1]  # in the last bit


def test_an_abstention_leaves_the_others_as_in_a_smaller_group():
    values = torch.tensor([0.0, 1.0, math.nan, 0.25]).view(-1, 1)
    want = group_advantages(torch.tensor([[0.0, 1.0, 0.25]]))[0]
    got = mixed_advantages(values, [1.0], 4)
    assert torch.equal(got[[0, 1, 3]], want) and got[2].isnan()
    alone = mixed_advantages(torch.tensor([[math.nan], [0.3]]), [1.0], 2)
    assert alone[0].isnan() and alone[1] == 0


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_several_functions_are_trls(how):
    """TRL's lines for both, where nobody abstained; ours are not divided by the batch's deviation again."""
    values, weights = torch.rand(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0.7, 0.3]
    grouped, w = values.view(3, 4, 2), torch.tensor(weights, dtype=torch.float64)
    if how == "normalize_then_sum":
        normal = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        want = (normal * w).sum(-1).flatten()
    else:
        total = (grouped * w).sum(-1).float().double()
        want = ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten()
    close(mixed_advantages(values, weights, 4, normalize_first=how == "normalize_then_sum"), want)


def test_worked_case_by_hand():
    """Log-ratios 3, -3, 0.6 of one answer, padded to 5 by others: the mean is 0.2 over 3 tokens, not 0.12 over 5."""
    old = torch.tensor([-1.0, -2.0, -3.0])
    logp = (old + torch.tensor([3.0, -3.0, 0.6])).requires_grad_(True)
    length, advantage = torch.tensor([3]), torch.tensor([2.0])
    loss, metrics = gspo_loss(logp.sum()[None], old.sum()[None], length, advantage, clip_low=0.5, clip_high=0.5)
    loss.backward()
    s = math.exp(0.2)  # 1.2214, inside the clip
    assert loss.item() == pytest.approx(-2 * s, rel=1e-6)
    assert logp.grad.tolist() == pytest.approx([-2 * s / 3] * 3, rel=1e-6)  # all tokens weigh the same
    assert metrics["ratio_mean"].item() == pytest.approx(s, rel=1e-6)
    loss, _ = grpo_loss(logp, old, torch.tensor([0, 3]), advantage, clip_low=0.5, clip_high=0.5)
    want = -(1.5 + math.exp(-3) + 1.5) * 2 / 3  # e^3 and e^0.6 = 1.82 are clipped to 1.5
    assert loss.item() == pytest.approx(want, rel=1e-6)


@given(answers(), CLIPS)
def test_gspo_is_the_loop(batch, clip):
    loss, metrics, gradient = gspo(batch, clip)
    lists = [x.tolist() for x in (batch.sums(batch.logp), batch.sums(batch.old_logp), batch.lengths, batch.advantages)]
    want, slope = oracles.gspo(*lists, *clip)
    close(loss, want)
    close(gradient, torch.tensor(slope, dtype=torch.float64).repeat_interleave(batch.lengths))
    ratio = torch.tensor([math.exp((n - o) / k) for n, o, k, _ in zip(*lists, strict=True)], dtype=torch.float64)
    check_metrics(metrics, ratio, batch.advantages, clip)


@given(answers(), CLIPS)
def test_grpo_is_the_loop(batch, clip):
    loss, metrics, gradient = grpo(batch, clip)
    lists = [x.tolist() for x in (batch.logp, batch.old_logp, batch.cu_seqlens, batch.advantages)]
    want, slope = oracles.grpo(*lists, *clip)
    close(loss, want)
    close(gradient, slope)
    ratio = (batch.logp - batch.old_logp).exp()
    check_metrics(metrics, ratio, batch.advantages.repeat_interleave(batch.lengths), clip)


def check_metrics(metrics, ratio, advantages, clip):
    assert set(metrics) == METRICS and not any(m.requires_grad or m.ndim for m in metrics.values())
    close(metrics["ratio_mean"], ratio.mean())
    close(metrics["ratio_min"], ratio.min())
    close(metrics["ratio_max"], ratio.max())
    close(metrics["ratio_std"], (ratio - ratio.mean()).square().mean().sqrt(), atol=1e-7)  # sqrt(1e-16) of rounding
    close(metrics["clip_low_frac"], ((ratio < 1 - clip[0]) & (advantages < 0)).double().mean())
    close(metrics["clip_high_frac"], ((ratio > 1 + clip[1]) & (advantages > 0)).double().mean())


SHARES = (("01", 0.01), ("05", 0.05), ("50", 0.5), ("95", 0.95), ("99", 0.99))


@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), max_size=5), st.randoms())
def test_ratio_quantiles_are_of_the_whole_update(parts, dice):
    """Ratios that occur, at the nearest rank, however the update was cut into micro-batches and in whatever order."""
    got = ratio_quantiles([torch.tensor(part) for part in parts])
    flat = sorted(sum(parts, []))
    if not flat:
        assert got == {}
        return
    ranks = {name: round(share * (len(flat) - 1)) for name, share in SHARES}
    assert got == {f"ratio_p{name}": torch.tensor(flat[rank]).exp().item() for name, rank in ranks.items()}
    dice.shuffle(flat)
    assert ratio_quantiles([torch.tensor(flat)]) == got


@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_the_histogram_counts_every_ratio_where_it_lies(parts):
    """Counted one by one: the bin of x is the number of edges below x, and the edges are the half decades."""
    edges = [sign * 10 ** (k / 2) for sign in (-1, 1) for k in range(-12, 1)]
    got = ratio_histogram([torch.tensor(part, dtype=torch.float64) for part in parts])
    want = [0] * 27
    for x in sum(parts, []):
        want[sum(edge < x for edge in edges)] += 1
    assert got == want


def test_the_histogram_of_a_first_update_and_of_what_overflowed():
    zero, far = torch.zeros(3), torch.tensor([-90.0, 90.0, torch.nan])
    assert ratio_histogram([zero]) == [0] * 13 + [3] + [0] * 13  # all ratios 1: the bin in the middle
    assert ratio_histogram([far]) == [1] + [0] * 25 + [2]


@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), min_size=1, max_size=5))
def test_metrics_of_an_update_are_those_of_all_its_micro_batches(parts):
    whole, n = torch.tensor(sum(parts, [])), sum(map(len, parts))
    tensors = [(len(part) / n, torch.tensor(part)) for part in parts]
    ratios = [
        (w, {"ratio_mean": x.mean(), "ratio_min": x.min(), "ratio_max": x.max(), "ratio_std": x.std(correction=0)})
        for w, x in tensors
    ]
    losses = [(w, {"loss": x.mean(), "perplexity": x.mean().exp()}) for w, x in tensors]
    got = combine(losses, [], ratios)
    assert list(got) == ["loss", "perplexity", "ratio_mean", "ratio_min", "ratio_max", "ratio_std"]
    assert all(type(value) is float for value in got.values())
    assert (got["ratio_min"], got["ratio_max"]) == (whole.min(), whole.max())
    mean, std = whole.double().mean().item(), whole.double().std(correction=0).item()
    assert got["loss"] == got["ratio_mean"] == pytest.approx(mean, abs=1e-5)
    assert got["ratio_std"] == pytest.approx(std, abs=1e-2)  # a root of rounding: (9 * 2**-22) ** 0.5
    assert got["perplexity"] == math.exp(got["loss"])
    assert combine([]) == {}


def test_an_update_reads_its_metrics_once():
    """A tensor on the meta device has no numbers: to read one is an error, as it is a wait on a GPU. The losses read
    nothing, quantiles neither, and `combine` all of it together."""
    N, lengths = 4, torch.empty(4, dtype=torch.int64, device="meta")
    x, A = torch.empty(N, device="meta"), torch.empty(N, device="meta")
    logp = torch.empty(9, device="meta")
    loss, facts = gspo_loss(x, x, lengths, A, clip_low=0.1, clip_high=0.1)
    _, more = sft_loss(logp)
    assert loss.is_meta and all(value.is_meta for value in [*facts.values(), *more.values()])
    assert all(value.is_meta for value in ratio_quantiles([x, logp]).values())
    reads = []
    with patch.object(torch.Tensor, "tolist", lambda t: reads.append(t.shape) or [0.0] * len(t)):
        combine([(0.5, facts), (0.5, facts)], [(1.0, more | {"loss": loss})], [(1.0, ratio_quantiles([x]))])
    assert reads == [(2 * len(facts) + len(more) + 1 + 5,)]


@given(answers(), CLIPS)
def test_gspo_is_gspo_token(batch, clip):
    """The paper's token form (verl's too) has the same value and the same gradient at every token, 0 in the padding."""
    logp = batch.padded(batch.logp, filler=5.0).requires_grad_(True)  # (N, T) the filler must not count
    mask = batch.padded(torch.ones_like(batch.logp), filler=0.0)
    want = oracles.gspo_token(logp, batch.padded(batch.old_logp, filler=-9.0), mask, batch.advantages, *clip)
    want.backward()
    loss, _, gradient = gspo(batch, clip)
    close(loss, want.detach())
    close(gradient, logp.grad[mask.bool()])
    assert (logp.grad[~mask.bool()] == 0).all()


@given(answers(), CLIPS)
def test_both_losses_are_trls_formula(batch, clip):
    for level, ours in (("sequence", gspo), ("token", grpo)):
        logp = batch.padded(batch.logp, filler=1.0).requires_grad_(True)  # (N, T)
        mask = batch.padded(torch.ones_like(batch.logp), filler=0.0)
        want = oracles.trl(logp, batch.padded(batch.old_logp, filler=0.0), mask, batch.advantages, *clip, level)
        want.backward()
        loss, _, gradient = ours(batch, clip)
        close(loss, want.detach())
        close(gradient, logp.grad[mask.bool()])


@pytest.mark.parametrize("level, ours", [("sequence", gspo), ("token", grpo)])
def test_both_losses_are_trls_own_code(level, ours):
    """GRPOTrainer._compute_loss itself, on a stand-in for the trainer that hands it our log-probs."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is an oracle of requirements-test.txt")

    @given(answers(), CLIPS)
    def check(batch, clip):
        logp = batch.padded(batch.logp, filler=1.0).requires_grad_(True)  # (N, T)
        mask = batch.padded(torch.ones_like(batch.logp), filler=0.0)
        nothing = torch.zeros(len(mask), 0, dtype=torch.int64)  # (N, 0) no prompt
        self = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
            args=SimpleNamespace(delta=None),
            model=SimpleNamespace(training=True),
            importance_sampling_level=level,
            loss_type="grpo",
            epsilon_low=clip[0],
            epsilon_high=clip[1],
            beta=0.0,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        want = trainer.GRPOTrainer._compute_loss(
            self,
            None,
            {
                "prompt_ids": nothing,
                "prompt_mask": nothing,
                "completion_ids": mask.long(),
                "completion_mask": mask,
                "old_per_token_logps": batch.padded(batch.old_logp, filler=0.0),
                "advantages": batch.advantages,
            },
        )
        want.backward()
        loss, metrics, gradient = ours(batch, clip)
        close(loss, want.detach())
        close(gradient, logp.grad[mask.bool()])
        for name in ("low", "high"):
            (fraction,) = self._metrics["train"][f"clip_ratio/{name}_mean"]
            assert metrics[f"clip_{name}_frac"].item() == pytest.approx(fraction, abs=1e-6)  # TRL's is float32

    check()


# ----------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("ratio, advantage, on", [(1.5, 1, False), (1.5, -1, True), (0.5, 1, True), (0.5, -1, False)])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_four_quadrants_of_the_clip(ratio, advantage, on, level):
    """The gradient is off in exactly two: where the policy has already gone further than allowed the way A points."""
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    old = torch.tensor([-1.0, -1.0])
    logp = (old + math.log(ratio)).requires_grad_(True)
    A = torch.tensor([float(advantage)])
    if level == "sequence":
        loss, metrics = gspo_loss(logp.sum()[None], old.sum()[None], torch.tensor([2]), A, **clip)
    else:
        loss, metrics = grpo_loss(logp, old, torch.tensor([0, 2]), A, **clip)
    loss.backward()
    want = -ratio * advantage / 2 if on else 0.0
    assert logp.grad.tolist() == pytest.approx([want, want], rel=1e-6)
    assert metrics["clip_low_frac"] == (1 if not on and ratio < 1 else 0)
    assert metrics["clip_high_frac"] == (1 if not on and ratio > 1 else 0)
    assert loss.item() == pytest.approx(
        -ratio * advantage if on else -(1.3 if ratio > 1 else 0.8) * advantage, rel=1e-6
    )


@given(answers(), CLIPS)
def test_clip_fractions_count_the_silent_ones(batch, clip):
    """In float32, where 1 + 4e-4 is itself rounded: an answer is counted if and only if its gradient is exactly 0."""
    new, old = batch.sums(batch.logp).float().requires_grad_(True), batch.sums(batch.old_logp).float()
    loss, metrics = gspo_loss(new, old, batch.lengths, batch.advantages.float(), clip_low=clip[0], clip_high=clip[1])
    loss.backward()
    silent = (new.grad == 0) & (batch.advantages != 0)
    assert (metrics["clip_low_frac"] + metrics["clip_high_frac"]).item() == pytest.approx(silent.float().mean().item())


@given(answers(), CLIPS, SEEDS)
def test_first_update_has_a_ratio_of_exactly_one(batch, clip, seed):
    """Scored without gradients, then with them, by the one scorer: every ratio is 1 bit for bit, nothing is clipped,
    the loss is the mean of -A, and the gradient of a sequence is REINFORCE's, -A / (N length)."""
    g = torch.Generator().manual_seed(seed)
    S = len(batch.logp)
    hidden, weight, targets = (
        torch.randn(S, 8, generator=g),
        torch.randn(50, 8, generator=g),
        torch.randint(0, 50, (S,)),
    )
    with torch.no_grad():
        old = seq_logprob(hidden, weight, targets, batch.cu_seqlens)
        old_logp, _ = token_logprob(hidden, weight, targets)
    hidden.requires_grad_(True)
    seq_logp = seq_logprob(hidden, weight, targets, batch.cu_seqlens)
    seq_logp.retain_grad()
    A = batch.advantages.float()
    loss, metrics = gspo_loss(seq_logp, old, batch.lengths, A, clip_low=clip[0], clip_high=clip[1])
    loss.backward()
    assert torch.equal(loss, -A.mean())
    torch.testing.assert_close(seq_logp.grad, -A / (len(A) * batch.lengths))
    logp, _ = token_logprob(hidden, weight, targets)
    _, per_token = grpo_loss(logp, old_logp, batch.cu_seqlens, A, clip_low=clip[0], clip_high=clip[1])
    for m in (metrics, per_token):
        assert m["ratio_min"] == m["ratio_mean"] == m["ratio_max"] == 1 and m["ratio_std"] == 0
        assert m["clip_low_frac"] == m["clip_high_frac"] == 0


@given(answers(), CLIPS, st.integers(0, 6))
def test_micro_batches_add_up(batch, clip, cut):
    """sum_i loss_i n_i / N is the loss of the whole, in value and in gradient, however the batch is cut."""
    N = len(batch.lengths)
    whole = {"gspo": gspo(batch, clip), "grpo": grpo(batch, clip)}
    logp = batch.logp.clone().requires_grad_(True)
    for name, (want, _, gradient) in whole.items():
        total, logp.grad = 0.0, None
        for part in (slice(0, min(cut, N)), slice(min(cut, N), N)):
            n = part.stop - part.start
            if n == 0:
                continue
            tokens = slice(batch.cu_seqlens[part.start], batch.cu_seqlens[part.stop])
            lengths, A = batch.lengths[part], batch.advantages[part]
            bounds = {"clip_low": clip[0], "clip_high": clip[1]}
            if name == "gspo":
                loss, _ = gspo_loss(batch.sums(logp)[part], batch.sums(batch.old_logp)[part], lengths, A, **bounds)
            else:
                cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
                loss, _ = grpo_loss(logp[tokens], batch.old_logp[tokens], cu_seqlens, A, **bounds)
            (loss * n / N).backward()
            total += loss.item() * n / N
        close(want, total)
        close(logp.grad, gradient)


@given(answers(), CLIPS, SEEDS)
def test_padding_on_either_side_changes_nothing(batch, clip, seed):
    """Left-padded, right-padded and packed rows give the same bits: loss, and gradient at every real token. What stands
    in the padding (nan here) gets a gradient of exactly 0, and the ratio divides by real tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths, S = batch.lengths.tolist(), len(batch.logp)
    N, T = len(lengths), max(lengths) + 1
    hidden, weight = torch.randn(S, 8, generator=g), torch.randn(50, 8, generator=g)
    targets = torch.randint(0, 50, (S,), generator=g)
    old = batch.sums(batch.old_logp).float()

    def loss_and_gradient(rows, cu_seqlens):
        """rows: where each real token stands in the row that is scored."""
        size = int(cu_seqlens[-1])
        h = torch.full((size, 8), math.nan).index_copy(0, rows, hidden).requires_grad_(True)
        y = torch.full((size,), IGNORE).index_copy(0, rows, targets)
        seq_logp = seq_logprob(h, weight, y, cu_seqlens)
        loss, _ = gspo_loss(seq_logp, old, batch.lengths, batch.advantages.float(), clip_low=clip[0], clip_high=clip[1])
        loss.backward()
        real = torch.zeros(size, dtype=torch.bool).index_fill(0, rows, True)
        assert (h.grad[~real] == 0).all()
        return loss.detach(), h.grad[rows]

    rectangle = torch.arange(N + 1) * T
    right = torch.cat([i * T + torch.arange(n) for i, n in enumerate(lengths)])
    left = torch.cat([i * T + T - n + torch.arange(n) for i, n in enumerate(lengths)])
    want = loss_and_gradient(torch.arange(S), batch.cu_seqlens)
    for rows in (right, left):
        got = loss_and_gradient(rows, rectangle)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@given(answers(), CLIPS)
def test_nothing_flows_back_to_the_old_policy(batch, clip):
    frozen = [x.clone().requires_grad_(True) for x in (batch.old_logp, batch.advantages)]
    bounds = {"clip_low": clip[0], "clip_high": clip[1]}
    logp = batch.logp.clone().requires_grad_(True)
    grpo_loss(logp, frozen[0], batch.cu_seqlens, frozen[1], **bounds)[0].backward()
    gspo_loss(batch.sums(logp), batch.sums(frozen[0]), batch.lengths, frozen[1], **bounds)[0].backward()
    assert frozen[0].grad is None and frozen[1].grad is None


def test_bfloat16_is_lifted_to_float32():
    """1 + 3e-4 is 1 in bf16: computed there, no sequence would ever leave the clip range."""
    logp = torch.tensor([-0.5, -0.25], dtype=torch.bfloat16)
    old = torch.tensor([-0.501, -0.2505])
    lengths, A = torch.tensor([1, 1]), torch.tensor([1.0, 1.0])
    loss, metrics = gspo_loss(logp, old, lengths, A.bfloat16(), clip_low=1e-5, clip_high=0.1)
    assert loss.dtype == torch.float32
    assert metrics["ratio_mean"].item() == pytest.approx((math.exp(0.001) + math.exp(0.0005)) / 2, abs=2e-7)
    assert group_advantages(A.bfloat16()[None]).dtype == sft_loss(logp)[0].dtype == torch.float32


def test_an_overflowing_ratio_is_not_hidden():
    """Log-ratio 100: exp is inf in float32. A clamp would turn a broken run into a quiet one."""
    for A, loss_ok in ((1.0, True), (-1.0, False)):
        logp = torch.tensor([0.0], requires_grad=True)
        loss, metrics = gspo_loss(
            logp, torch.tensor([-100.0]), torch.tensor([1]), torch.tensor([A]), clip_low=0.2, clip_high=0.3
        )
        loss.backward()
        assert loss.isfinite() == loss_ok and not logp.grad.isfinite().any() and metrics["ratio_max"] == math.inf


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=9))
def test_sft_is_the_mean_negative_logp(values):
    logp = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss, metrics = sft_loss(logp)
    loss.backward()
    close(loss.detach(), -math.fsum(values) / len(values))
    close(logp.grad, [-1 / len(values)] * len(values))
    assert set(metrics) == {"perplexity"} and not metrics["perplexity"].requires_grad
    close(metrics["perplexity"], math.exp(loss.item()))


# ----------------------------------------------------------------------------
# what is said when it is wrong

TWO = torch.zeros(2)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"lengths": torch.tensor([3, 0])}, r"empty answers at \[1\], want one token or more in each; drop them"),
        (
            {"advantages": torch.zeros(1)},
            r"seq_logp \(2,\), old_seq_logp \(2,\), lengths \(2,\), advantages \(1,\), want",
        ),
        ({"old_seq_logp": torch.zeros(2, 1)}, r"old_seq_logp \(2, 1\)"),
        ({k: torch.zeros(0) for k in ("seq_logp", "old_seq_logp", "lengths", "advantages")}, r"want one dimension"),
        ({"clip_low": -0.1}, "got clip_low -0.1, clip_high 0.1, want both >= 0"),
        ({"clip_high": math.nan}, "clip_high nan"),
    ],
)
def test_gspo_says_what_is_wrong(change, text):
    call = {"seq_logp": TWO, "old_seq_logp": TWO, "lengths": torch.tensor([3, 4]), "advantages": TWO}
    with pytest.raises(ValueError, match=text):
        gspo_loss(**(call | {"clip_low": 0.1, "clip_high": 0.1} | change))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"cu_seqlens": torch.tensor([0, 3, 3])}, r"empty answers at \[1\]"),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, "got 2 tokens in cu_seqlens, want 3"),
        ({"cu_seqlens": torch.tensor([1, 2, 4])}, r"got cu_seqlens \[1, 2, 4\], want it to rise from 0 to 3"),
        ({"advantages": torch.zeros(3)}, r"lengths \(2,\), advantages \(3,\)"),
        ({"old_logp": torch.zeros(1)}, r"old_logp \(1,\)"),
    ],
)
def test_grpo_says_what_is_wrong(change, text):
    call = {
        "logp": torch.zeros(3),
        "old_logp": torch.zeros(3),
        "cu_seqlens": torch.tensor([0, 1, 3]),
        "advantages": TWO,
    }
    with pytest.raises(ValueError, match=text):
        grpo_loss(**(call | change), clip_low=0.1, clip_high=0.1)


def test_dropping_the_empty_answer_is_the_callers_choice():
    """An answer whose tokens are all masked sums to exactly 0, is refused by name, and once dropped leaves no trace."""
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    targets = torch.tensor([1, 2, IGNORE, IGNORE, 8])
    cu_seqlens = torch.tensor([0, 2, 4, 5])
    seq_logp = seq_logprob(hidden, weight, targets, cu_seqlens)
    lengths, A = torch.tensor([2, 0, 1]), torch.tensor([1.0, 7.0, -1.0])
    assert seq_logp[1] == 0
    with pytest.raises(ValueError, match=r"empty answers at \[1\]"):
        gspo_loss(seq_logp, seq_logp, lengths, A, clip_low=0.1, clip_high=0.1)
    kept = lengths > 0
    loss, _ = gspo_loss(seq_logp[kept], seq_logp[kept], lengths[kept], A[kept], clip_low=0.1, clip_high=0.1)
    assert loss == 0  # the mean over two, of advantages 1 and -1


def test_sft_needs_a_token():
    with pytest.raises(ValueError, match=r"got logp \(0,\), want one dimension"):
        sft_loss(torch.zeros(0))
