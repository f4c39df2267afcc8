import torch
from torch import Tensor

from kernels.seq_logprob import sequence_sums


def gspo_token_loss(
    logp: Tensor, old_logp: Tensor, cu_seqlens: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    lengths = cu_seqlens.diff()  # (N,)
    s = (sequence_sums(logp - old_logp, cu_seqlens) / lengths).exp().detach()  # (N,)
    ratio = s.repeat_interleave(lengths) * (logp - logp.detach()).exp()  # (S,)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)  # (S,)
    return -(sequence_sums(objective, cu_seqlens) / lengths).mean()
