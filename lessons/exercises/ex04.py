"""Exercise 4. Min-p sampling: keep what is at least min_p times as likely as the likeliest token, sample from that.

    kept[v]  =  p[v] >= min_p * max(p)            p = softmax(logits / temperature)
    token    =  sampled from p, restricted to kept and renormalised
    logp     =  its log-prob under that distribution

Make this pass:  python -m pytest lessons/exercises/test_ex04.py        (about 6 lines)

Where the model is sure, few tokens are kept; where it is not, many. Top-k keeps k of them in both cases.
Hints: nanogspo.rollout.sample samples one token a row from any logits, and returns its log-prob: what has to be in
them so that it can return nothing else than what is kept? Does the condition need p itself? Try both ends, min_p 0 and
1, and mind in which order temperature and condition come.
"""

from torch import Tensor


def sample_min_p(logits: Tensor, uniform: Tensor, temperature: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(N, V) float32 logits, (N,) float64 numbers in [0, 1), temperature > 0, min_p in [0, 1] -> tokens, logp (N,)."""
    raise NotImplementedError("exercise 4: lessons/exercises/ex04.py")
