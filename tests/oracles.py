"""The right answers, computed the slow way: float64, no tile, no trick, and nothing imported from the code under test.

Loops in plain Python where the formula is short; plain torch with its own autograd where gradients are compared.
"""

import math
import statistics

import torch
from torch import Tensor

IGNORE = -100


def group_advantages(rewards: list[list[float]], *, divide_by_std: bool = True) -> list[list[float]]:
    """TRL 1.x, GRPOTrainer._generate_and_score_completions: (r - mean) / (sample std + 1e-4), group by group."""
    out = []
    for row in rewards:
        mean = statistics.fmean(row)
        scale = statistics.stdev(row) + 1e-4 if divide_by_std else 1.0  # stdev is over G - 1, as TRL's nanstd
        out.append([(r - mean) / scale for r in row])
    return out


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """min(ratio A, clip(ratio) A) and its derivative in log ratio, one item at a time."""
    value = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    off = (ratio > 1 + high and advantage > 0) or (ratio < 1 - low and advantage < 0)
    return value, 0.0 if off else ratio * advantage


def gspo(seq_logp, old_seq_logp, lengths, advantages, low: float, high: float) -> tuple[float, list[float]]:
    """GSPO loss of lists of numbers, and d loss / d seq_logp."""
    N, total, gradient = len(seq_logp), 0.0, []
    for new, old, length, advantage in zip(seq_logp, old_seq_logp, lengths, advantages, strict=True):
        value, slope = clipped(math.exp((new - old) / length), advantage, low, high)
        total += value
        gradient.append(-slope / length / N)
    return -total / N, gradient


def grpo(logp, old_logp, cu_seqlens, advantages, low: float, high: float) -> tuple[float, list[float]]:
    """GRPO loss of lists of numbers, and d loss / d logp."""
    N, total, gradient = len(advantages), 0.0, []
    for i, advantage in enumerate(advantages):
        tokens = range(cu_seqlens[i], cu_seqlens[i + 1])
        for t in tokens:
            value, slope = clipped(math.exp(logp[t] - old_logp[t]), advantage, low, high)
            total += value / len(tokens) / N
            gradient.append(-slope / len(tokens) / N)
    return -total, gradient


def gspo_token(logp: Tensor, old_logp: Tensor, mask: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """GSPO-token, equations 13 and 14 of arXiv:2507.18071, on padded rows (N, T).

    The form verl has in core_algos.py compute_policy_loss_gspo ("seq-mean-token-mean"), without its clamp at e^10.
    """
    lengths = mask.sum(1)  # (N,)
    seq = ((logp - old_logp) * mask).sum(1) / lengths  # (N,)
    ratio = torch.exp(seq.detach()[:, None] + logp - logp.detach())  # (N, T) the value of s[i], the gradient of a token
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(1 - low, 1 + high) * advantages[:, None])  # (N, T)
    return -((surrogate * mask).sum(1) / lengths).mean()


def trl(
    logp: Tensor, old_logp: Tensor, mask: Tensor, advantages: Tensor, low: float, high: float, level: str
) -> Tensor:
    """TRL 1.16 GRPOTrainer._compute_loss on padded rows (N, T): loss_type="grpo", importance_sampling_level=level."""
    weights = logp - old_logp  # (N, T)
    if level == "sequence":
        weights = ((weights * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]  # (N, 1)
    coef_1 = weights.exp()  # (N, T) or (N, 1)
    coef_2 = coef_1.clamp(1 - low, 1 + high)
    per_token = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])  # (N, T) or (N, 1)
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """log_softmax over the whole (N, V) matrix in float64; log-prob of the target and entropy, 0 where it is IGNORE."""
    z = hidden.double() @ weight.double().T  # (N, V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, dim=1)  # (N, V)
    keep = targets != IGNORE  # (N,)
    logp = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)  # (N,)
    entropy = torch.special.entr(log_p.exp()).sum(1)  # (N,) entr(0) = 0
    zero = torch.zeros_like(logp)
    return torch.where(keep, logp, zero), torch.where(keep, entropy, zero)
