"""Exercise 4. Min-p sampling: keep what is at least min_p times as likely as the likeliest token, and draw from that.

    kept[v]  =  p[v] >= min_p * max(p)            p = softmax(logits / temperature)
    token    =  drawn from p, restricted to kept and renormalised
    logp     =  the log-prob it was drawn with

Make this pass:  python -m pytest lessons/exercises/test_ex04.py        (about 6 lines)

Where the model is sure, few tokens are kept; where it is not, many. Top-k keeps k of them in both cases.
Hints: p[v] >= min_p * max(p) is a difference of two logits, so no softmax is needed to decide it; log(0) is -inf, which
keeps everything. What is not kept gets the logit -inf, and nanogspo.rollout.sample does the rest.
"""

from torch import Tensor


def sample_min_p(logits: Tensor, uniform: Tensor, temperature: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(N, V) float32 logits, (N,) float64 numbers in [0, 1), temperature > 0, min_p in [0, 1] -> tokens, logp (N,)."""
    raise NotImplementedError("exercise 4: lessons/exercises/ex04.py")
