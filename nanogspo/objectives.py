"""The objectives as pure functions of tensors: no model, no configuration, no device.

    rewards -> group_advantages -> policy_loss, kl_to_reference      log-probs of a demonstration -> sft_loss

    GRPO        one ratio a token       r[t] = pi(t) / pi_old(t)             each token is clipped by itself
    GSPO        one ratio a sequence    s = (prod_t r[t]) ** (1 / length)    a sequence is clipped whole, as rewarded
    REINFORCE   no ratio                                                     nothing is clipped

Why the printed loss is about 0: on the first update after a rollout every ratio is 1 and the advantages of a group sum
to 0. The loss says nothing about progress; its gradient, -A * grad logp, does. Watch the reward and the ratios.

Every loss is a mean over the sequences (or tokens) it is given. To split a batch of N sequences into micro-batches of
n_i, add up loss_i * n_i / N: value and gradient are those of the whole. That is the caller's business. So are other
averages: min(r A, clip(r) A) w = min(r A w, clip(r) A w) for w >= 0, so a weight of an answer is a factor of its
advantage (`answer_weights`).

Left out: dual clip, token-level advantages. A ratio overflows to inf at a log-ratio of 88.7, where a loss of inf
(A < 0) or a gradient of nan (A > 0) is returned as it is: no update should be made from such a batch, and a clamp
would hide it.

Lesson: lessons/12_gspo.md       Tests: tests/test_objectives.py, tests/test_policy_loss.py
Shapes: P prompts, G answers to each; N sequences; M their scored tokens, end to end.
"""

import math

import torch
from torch import Tensor

from kernels.seq_logprob import sequence_sums


def group_advantages(rewards: Tensor, *, divide_by_std: bool = True) -> Tensor:
    """How much better each answer is than the other answers to the same prompt.

        A[p, g] = (r[p, g] - mean_g r[p]) / (std_g r[p] + 1e-4)

    rewards        (P, G) float or int: P prompts, G >= 2 answers each
    divide_by_std  False keeps r - mean: no group counts more for being nearly unanimous
    returns        (P, G) float32 (float64 if given float64), no gradient; rows sum to 0 within rounding, and a row of
                   equal rewards is exactly 0: nothing to learn, not even from the last bit of the mean

    Raises ValueError for another shape, G = 1, and rewards that are not finite, naming them.

    Source: GRPO, arXiv:2402.03300; divide_by_std=False is Dr. GRPO, arXiv:2503.20783. The papers write a plain std;
    as TRL does, it is the sample std (over G - 1) and 1e-4 is added to it. With G = 8 the factor is 0.94.
    Elsewhere: TRL GRPOTrainer._generate_and_score_completions (scale_rewards="group"), which leaves float noise
    over 1e-4 in a group of equal rewards; verl core_algos.py compute_grpo_outcome_advantage.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"got rewards of shape {tuple(rewards.shape)}, want (P, G) with G >= 2; sample two or more answers"
        )
    bad = (~rewards.isfinite()).nonzero().tolist()  # [[p, g], ...]
    if bad:
        raise ValueError(f"got nan or inf rewards at [prompt, answer] {bad[:8]}, want finite numbers; check the reward")
    rewards = _at_least_float32(rewards.detach())  # (P, G)
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    # The mean of 8 times 0.1 is not 0.1 in fp32: 7e-9 would be left, and divided by 1e-4 it is 7e-5 of pure noise.
    centred = centred.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)  # (P, G)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4) if divide_by_std else centred  # (P, G)


def total_rewards(values: Tensor, weights: list[float]) -> Tensor:
    """The rewards of answers that several reward functions have judged, each of which may abstain.

        reward[i] = sum_k w[k] v[i, k] * (sum_k |w[k]|) / (sum of |w[k]| over those that did not abstain)    (1)

    values   (N, K) float: N answers, K reward functions; nan where one abstained
    weights  K numbers
    returns  (N,), nan where all abstained; a reward of weight 0 is only a metric

    Elsewhere: TRL GRPOTrainer, reward_weights; there an abstention is a 0 in the sum.
    """
    w = torch.tensor(weights, dtype=values.dtype)  # (K,)
    there = ~values.isnan() & (w != 0)  # (N, K)
    scale = w.abs().sum() / (there * w.abs()).sum(1).clamp(min=1e-30)  # (N,)
    return ((values.nan_to_num() * w).sum(1) * scale).masked_fill(~there.any(1), torch.nan)  # (N,)


def mixed_advantages(
    values: Tensor, weights: list[float], group_size: int, *, normalize_first: bool = False, divide_by_std: bool = True
) -> Tensor:
    """The advantages of answers that several reward functions have judged.

        A = group_advantages(total_rewards(v))                                     sum_then_normalize
          = total_rewards of the K columns group_advantages(v[:, k])               normalize_then_sum: every reward has
                                                                                   the same say, whatever its scale
    values, weights  as in total_rewards; groups of G = group_size answers, one after the other
    returns          (N,), nan where all abstained

    An answer without a reward is in no mean and no deviation: the others' advantages are those of a smaller group. In a
    group of which only one answer is left, that one has advantage 0.

    Source: normalising before the sum is GDPO, arXiv:2601.05242. Elsewhere: TRL, multi_objective_aggregation, which
    then also divides by the standard deviation of the whole batch.
    """

    def advantages(v: Tensor) -> Tensor:  # (N,) -> (N,)
        return _advantages_of_some(v.reshape(-1, group_size), divide_by_std).flatten()

    if normalize_first:
        return total_rewards(torch.stack([advantages(v) for v in values.T], dim=1), weights)
    # summed in float64, then rounded to float32: 0.1 + 0.2 and 0.3 are one reward, not two that differ by noise
    return advantages(total_rewards(values.double(), weights).float().to(values.dtype))


def _advantages_of_some(rewards: Tensor, divide_by_std: bool) -> Tensor:
    """group_advantages of (P, G) rewards, in which nan counts as not there and stays nan."""
    there = ~rewards.isnan()  # (P, G)
    if there.all():
        return group_advantages(rewards, divide_by_std=divide_by_std)  # (P, G)
    advantages = torch.full_like(rewards, torch.nan)  # (P, G)
    for p, kept in enumerate(there):
        some = rewards[p, kept][None]  # (1, g)
        advantages[p, kept] = group_advantages(some, divide_by_std=divide_by_std)[0] if some.numel() > 1 else 0.0
    return advantages


def gspo_loss(
    seq_logp: Tensor, old_seq_logp: Tensor, lengths: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with one importance ratio per sequence.

        s[i] = exp((seq_logp[i] - old_seq_logp[i]) / lengths[i])                                         (1)
        loss = -mean_i min(s[i] * A[i], clip(s[i], 1 - clip_low, 1 + clip_high) * A[i])                   (2)

    seq_logp      (N,) float32, sum of the answer's logp under the current weights; carries the gradient
    old_seq_logp  (N,) float32, the same sum under the weights that sampled, from the same scorer; no gradient
    lengths       (N,) int64, scored tokens of each answer, EOS included, >= 1
    advantages    (N,) float32, no gradient
    clip_low/_high  >= 0; s is a geometric mean over tokens, so its range is 3e-4 / 4e-4 where GRPO's is 0.2 / 0.27
    returns       loss, a scalar; metrics, detached scalars: ratio_mean, ratio_min, ratio_max, ratio_std, and
                  clip_low_frac, clip_high_frac = the fraction of sequences whose gradient the clip has switched off

    All tokens of an answer get the same weight, s A / (N length): GRPO weighs each with its own ratio. (2) has the same
    value and gradient as the paper's GSPO-token form, because an answer has one advantage.

    Raises ValueError for an empty answer (dropping it here would change N behind the caller's back) or other shapes.

    Source: GSPO, arXiv:2507.18071, equations 5 to 7.
    Elsewhere: verl core_algos.py compute_policy_loss_gspo (the GSPO-token form; clamps the log-ratio at 10);
    TRL GRPOTrainer._compute_loss with importance_sampling_level="sequence", loss_type="grpo"; Liger grpo_loss.py.
    """
    _check("seq_logp", seq_logp, old_seq_logp=old_seq_logp, lengths=lengths, advantages=advantages)
    _check_lengths(lengths)
    log_ratio = (_at_least_float32(seq_logp) - old_seq_logp.detach()) / lengths  # (N,)
    objective, metrics = _clipped(log_ratio, advantages, clip_low, clip_high)  # (N,)
    return -objective.mean(), metrics


def grpo_loss(
    logp: Tensor, old_logp: Tensor, cu_seqlens: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss with one importance ratio per token, averaged in each answer, then over answers.

        r[t] = exp(logp[t] - old_logp[t])
        loss = -mean_i mean_{t in i} min(r[t] * A[i], clip(r[t], 1 - clip_low, 1 + clip_high) * A[i])

    logp        (M,) float32, logp of every scored token under the current weights; carries the gradient
    old_logp    (M,) float32, the same under the weights that sampled, from the same scorer; no gradient
    cu_seqlens  (N + 1,) int32 or int64: answer i is logp[cu_seqlens[i] : cu_seqlens[i + 1]], never empty
    advantages  (N,) float32, no gradient
    clip_low/_high  >= 0; DAPO and the GSPO paper's baseline use 0.2 / 0.27 or so
    returns     loss, a scalar; metrics as in gspo_loss, over tokens

    Raises ValueError for an empty answer, or when the shapes or cu_seqlens do not fit the row.

    Source: GRPO, arXiv:2402.03300, equation 3, without its KL term; two clip ranges: DAPO, arXiv:2503.14476.
    Elsewhere: TRL GRPOTrainer._compute_loss, loss_type="grpo"; verl loss_agg_mode="seq-mean-token-mean".
    """
    lengths = cu_seqlens.diff()  # (N,)
    _check("lengths", lengths, advantages=advantages)
    _check("logp", logp, old_logp=old_logp)
    _check_lengths(lengths, len(logp))
    per_token = advantages.repeat_interleave(lengths, output_size=len(logp))  # (M,)
    log_ratio = _at_least_float32(logp) - old_logp.detach()  # (M,)
    objective, metrics = _clipped(log_ratio, per_token, clip_low, clip_high)  # (M,)
    return -(sequence_sums(objective, cu_seqlens) / lengths).mean(), metrics


def reinforce_loss(logp: Tensor, cu_seqlens: Tensor, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss without a ratio: every update takes its answers for its own policy's.

        loss = -mean_i A[i] mean_{t in i} logp[t]

    logp, cu_seqlens, advantages   as in grpo_loss
    returns  loss, a scalar; metrics as in gspo_loss, of ratios that are all 1

    Its gradient is that of gspo_loss and grpo_loss at a ratio of 1, the first update of a rollout. From the second on
    it is off by what the ratio would correct. Source: Williams 1992, with the group's mean as baseline.
    Elsewhere: nanochat chat_rl.py; TRL with its defaults, where old_per_token_logps is None.
    """
    lengths = cu_seqlens.diff()  # (N,)
    _check("lengths", lengths, advantages=advantages)
    _check_lengths(lengths, len(logp))
    means = sequence_sums(_at_least_float32(logp), cu_seqlens) / lengths  # (N,)
    _, metrics = _clipped(torch.zeros_like(means.detach()), advantages, 0.0, 0.0)
    return -(advantages.detach() * means).mean(), metrics


def policy_loss(
    algo: str, logp: Tensor, old_logp: Tensor, cu_seqlens: Tensor, advantages: Tensor, **clip: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of an --algo, from log-probs of tokens.

    logp, old_logp, cu_seqlens, advantages, clip   as in grpo_loss
    returns  loss; metrics; log-ratios, no gradient: of answers (N,) for gspo and reinforce, else of tokens (M,)

    gspo_token is the paper's token form of GSPO (equations 13 and 14), with value and gradient of gspo:

        s[i, t] = sg[s[i]] * pi[t] / sg[pi[t]]         sg: no gradient. Its value is s[i], its gradient token t's
    """
    if algo == "grpo":  # one ratio per token
        return *grpo_loss(logp, old_logp, cu_seqlens, advantages, **clip), logp.detach() - old_logp
    lengths = cu_seqlens.diff()  # (N,)
    if algo == "reinforce":
        return *reinforce_loss(logp, cu_seqlens, advantages), torch.zeros_like(advantages)
    seq_logp, old_seq_logp = sequence_sums(logp, cu_seqlens), sequence_sums(old_logp, cu_seqlens)  # (N,), (N,)
    log_ratio = (seq_logp.detach() - old_seq_logp) / lengths  # (N,)
    if algo == "gspo":
        return *gspo_loss(seq_logp, old_seq_logp, lengths, advantages, **clip), log_ratio
    log_ratio = log_ratio.repeat_interleave(lengths, output_size=len(logp))  # (M,)
    per_token = log_ratio + (logp - logp.detach())  # (M,)
    return *grpo_loss(per_token, torch.zeros_like(logp), cu_seqlens, advantages, **clip), log_ratio


def answer_weights(lengths: Tensor, counts: Tensor, average: str, max_new_tokens: int) -> Tensor:
    """What the mean over an answer's tokens is multiplied by, in the mean over an update's answers that count.

        sequence    1                                              mean over answers of means over tokens: GRPO, GSPO
        token       length / (mean length of those that count)     sum over all tokens / how many: DAPO
        constant    length / max_new_tokens * counted / N          sum over all tokens / (N max_new_tokens): Dr. GRPO

    lengths  (N,) scored tokens of every answer of the update, trained on or not
    counts   (N,) bool, False for an answer that is left out: it was cut off (--mask-truncated), or has no reward
    returns  (N,) float32, 0 where counts is False

    An answer that is left out is in no mean, as if it had not been sampled. Only "constant" still divides by all N: a
    token's weight is then the same in every update, which is what Dr. GRPO is about.

    Source: GRPO, arXiv:2402.03300; DAPO, arXiv:2503.14476, equation 8, and its overlong filtering; Dr. GRPO,
    arXiv:2503.20783. Elsewhere: TRL GRPOTrainer, loss_type "grpo", "dapo", "dr_grpo". With
    mask_truncated_completions its "grpo" still divides by all answers, so a rollout half of which was cut off makes
    half a step; and its "dapo" divides by the tokens of a rollout's mean update, ours by those of the update itself.
    """
    lengths = lengths.float()  # (N,)
    weights = torch.ones_like(lengths)  # (N,)
    if average == "token":
        weights = lengths * counts.sum() / (lengths * counts).sum().clamp(min=1)
    elif average == "constant":
        weights = lengths / max_new_tokens * counts.sum() / len(counts)
    return weights * counts  # (N,)


def kl_to_reference(logp: Tensor, ref_logp: Tensor, cu_seqlens: Tensor, weights: Tensor) -> Tensor:
    """How far the policy is from a reference, estimated from its own samples; averaged as the loss is.

        k3[t] = exp(d) - d - 1,  d = ref_logp[t] - logp[t]
        KL    = mean_i weights[i] mean_{t in i} k3[t]

    logp      (M,) float32, of every scored token; carries the gradient
    ref_logp  (M,) float32, under the reference, from the same scorer; no gradient
    weights   (N,) of `answer_weights`, no gradient
    returns   a scalar, >= 0; exactly 0, with gradient 0, where the two are equal

    Source: GRPO, arXiv:2402.03300, equation 4; Schulman's k3, unbiased while the samples are the policy's own.
    Elsewhere: TRL GRPOTrainer with use_bias_correction_kl=False; with True, its default, k3 is multiplied by the
    clipped loss's ratio, which makes up for stale samples only where that ratio is a token's.
    """
    _check("logp", logp, ref_logp=ref_logp)
    d = ref_logp.detach() - _at_least_float32(logp)  # (M,)
    return (weights * sequence_sums(d.expm1() - d, cu_seqlens) / cu_seqlens.diff()).mean()


def ratio_quantiles(log_ratios: list[Tensor]) -> dict[str, Tensor]:
    """Where the ratios of one update lie. Over all of its micro-batches: it cannot be had from each one's quantiles.

        ratio_p01, ratio_p05, ratio_p50, ratio_p95, ratio_p99 = the ratios at 1 %, 5 %, ... of the way from smallest to
                                                                largest

    log_ratios  [(N_1,), (N_2,), ...] no gradient, a tensor a micro-batch: of answers (GSPO) or tokens (GRPO)
    returns     ratios that occur, the nearest ones; {} for []
    """
    if not log_ratios:
        return {}
    ordered = torch.cat(log_ratios).exp().sort().values  # (N,)
    return {f"ratio_p{p:02}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (1, 5, 50, 95, 99)}


# Half decades of |log ratio|, 1e-6 to 1: fp32 rounding is in the first bin, GSPO's clip range in the middle
EDGES = [10 ** (k / 2) for k in range(-12, 1)]


def ratio_histogram(log_ratios: list[Tensor]) -> list[int]:
    """How many ratios of one update lie in each of 27 fixed bins, so that updates and runs can be laid side by side.

        -inf .. -1 .. -0.32 .. -0.1 ... -1e-6 .. 1e-6 ... 0.1 .. 0.32 .. 1 .. inf        log(ratio); an edge counts left

    log_ratios  as in ratio_quantiles; nan counts in the last bin
    """
    x = torch.cat(log_ratios)  # (N,)
    edges = torch.tensor([-e for e in reversed(EDGES)] + EDGES, dtype=x.dtype, device=x.device)  # (26,)
    return torch.bucketize(x, edges).bincount(minlength=len(edges) + 1).tolist()


def combine(*parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, float]:
    """Metrics of an update from those of its micro-batches: minima, maxima, and weighted means of the rest.

    parts    each [(weight, {name: scalar}), ...], an entry a micro-batch; the weights of a part sum to 1
    returns  numbers, all read at once: a GPU is waited for once an update
    """
    scalars = [value.detach().float() for part in parts for _, facts in part for value in facts.values()]
    numbers, out = iter(torch.stack(scalars).tolist() if scalars else ()), {}
    for part in parts:
        rows = [(weight, {key: next(numbers) for key in facts}) for weight, facts in part]
        for key in rows[0][1] if rows else ():
            if key.endswith(("_min", "_max")):
                out[key] = (min if key.endswith("_min") else max)(facts[key] for _, facts in rows)
            else:
                out[key] = sum(weight * facts[key] for weight, facts in rows)
        if rows and "ratio_std" in rows[0][1]:  # of the whole update: mean square minus squared mean
            squares = sum(weight * (facts["ratio_std"] ** 2 + facts["ratio_mean"] ** 2) for weight, facts in rows)
            out["ratio_std"] = max(0.0, squares - out["ratio_mean"] ** 2) ** 0.5
    if "perplexity" in out:
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
    return out


def sft_loss(logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood of the tokens to imitate.

        loss = -mean_t logp[t]

    logp     (M,) float32, logp of the scored tokens only: an ignored one has logp 0 and would bias the mean towards 0
    returns  loss, a scalar; metrics: perplexity = exp(loss), "as unsure as between that many tokens"

    Raises ValueError when there is no token.
    """
    _check("logp", logp)
    loss = -_at_least_float32(logp).mean()
    return loss, {"perplexity": loss.detach().exp()}


def _at_least_float32(x: Tensor) -> Tensor:
    """bf16 has 8 bits: it cannot even hold 1 + 3e-4. float64 stays, so that gradients can be checked in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _clipped(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(ratio * A, clip(ratio) * A) of each item, and what the ratios look like. Items: sequences or tokens."""
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"got clip_low {clip_low}, clip_high {clip_high}, want both >= 0; they are distances from 1")
    low, high = 1 - clip_low, 1 + clip_high
    advantages = advantages.detach().to(log_ratio.dtype)  # (N,)
    ratio = log_ratio.exp()  # (N,)
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)  # (N,)
    with torch.no_grad():
        metrics = {
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "ratio_std": ratio.std(correction=0),  # over all there are, so 0 and not nan for a single one
            # min() picks the clipped side, which is constant, in two of the four quadrants
            "clip_low_frac": ((ratio < low) & (advantages < 0)).to(ratio.dtype).mean(),
            "clip_high_frac": ((ratio > high) & (advantages > 0)).to(ratio.dtype).mean(),
        }
    return objective, metrics


def _check(name: str, first: Tensor, **others: Tensor) -> None:
    """All of one length, and of at least one item: (1,) against (N,) would broadcast without a word."""
    if first.ndim != 1 or len(first) == 0 or any(t.shape != first.shape for t in others.values()):
        shapes = ", ".join(f"{key} {tuple(t.shape)}" for key, t in {name: first, **others}.items())
        raise ValueError(f"got {shapes}, want one dimension, the same and not 0; check what was packed")


def _check_lengths(lengths: Tensor, total: int | None = None) -> None:
    """On a CPU. A GPU would have to be waited for, and gets its lengths from packing.pack, which has checked them."""
    if not lengths.is_cpu:
        return
    if (lengths < 1).any():
        empty = (lengths < 1).nonzero().flatten().tolist()
        raise ValueError(f"got empty answers at {empty[:8]}, want one token or more in each; drop them before the loss")
    if total is not None and lengths.sum() != total:
        raise ValueError(f"got {lengths.sum()} tokens in cu_seqlens, want {total}, as in logp; check what was packed")
