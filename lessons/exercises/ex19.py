"""Exercise 19. Of all answers that were sampled, how many pushed the weights?

An answer pushes if it has an advantage (its group has a spread) and the clip has not taken its gradient. A row of
metrics.jsonl says both:

    trained_frac                     of the update's answers, those with an advantage
    clip_low_frac, clip_high_frac    of *those*, the ones whose gradient the clip has switched off

    trained_frac 0.8, clip 0.1 + 0.15        0.8 * (1 - 0.25) = 0.6 of the answers pushed

Average over the updates of RL. Rows of SFT have no clip and do not count, evaluations have no "algo" at all, and what
is null in the file (a number that was not finite) makes its row worth nothing: it pushed nobody knows where, count 0.

Make this pass:  python -m pytest lessons/exercises/test_ex19.py        (about 7 lines)
"""


def pushing_fraction(rows: list[dict]) -> float:
    """Rows of metrics.jsonl -> the fraction of sampled answers that pushed; nan without an update of RL."""
    raise NotImplementedError("exercise 19: lessons/exercises/ex19.py")
