"""Exercise 12. GSPO-token: GSPO's ratio and clip, with an advantage for each token.

    s[i]    = exp(mean_{t in i} (logp[t] - old_logp[t]))                    one number an answer, as in GSPO
    s[i, t] = sg[s[i]] * exp(logp[t] - sg[logp[t]])                         its value is s[i], its gradient is token t's
    loss    = -mean_i mean_{t in i} min(s[i, t] A[t], clip(s[i, t], 1 - clip_low, 1 + clip_high) A[t])

sg is "stop gradient", detach() in torch. With one advantage for a whole answer, loss and gradient are GSPO's.

Make this pass:  python -m pytest lessons/exercises/test_ex12.py        (about 6 lines)

Hints: sequence_sums(values, cu_seqlens) adds up each answer; torch.repeat_interleave is its opposite. Value and
gradient come from different factors of s[i, t]: clipping sg[s[i]] instead gives the same loss. And the same gradient?

Source: GSPO, arXiv:2507.18071, section 4.3; verl core_algos.py compute_policy_loss_gspo.
"""

from torch import Tensor

from kernels.seq_logprob import sequence_sums  # noqa: F401  (you will want it)


def gspo_token_loss(
    logp: Tensor, old_logp: Tensor, cu_seqlens: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """logp (S,) with gradient, old_logp (S,), cu_seqlens (N + 1,), advantages (S,), one for each token -> a scalar."""
    raise NotImplementedError("exercise 12: lessons/exercises/ex12.py")
