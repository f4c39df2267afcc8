"""Exercise 0. Did it learn? Answer from metrics.jsonl alone, as you will for every run of your own.

Make this pass:  python -m pytest lessons/exercises/test_ex00.py        (about 10 lines for both functions)

`rows` is what nanogspo.run.log.read_rows returns, in the order in which it was written. There are two kinds:

    an update   {"step": 95, "algo": "gspo", "phase": "gspo", "reward": 0.41, ...}     SFT rows have no "reward"
    evaluation  {"step": 90, "phase": "sft", "eval_exact": 0.2, "eval_low": 0.17, "eval_high": 0.24, ...}

Hints: a number that was not finite is null in the file, so it is None here. A phase may be evaluated many times; its
last evaluation counts.
"""


def gain(rows: list[dict]) -> float:
    """Mean reward of the last quarter of the RL updates minus that of the first quarter.

    RL updates are those of algo "gspo" or "grpo"; leave out rewards that are None. A quarter of n is n // 4, but at
    least 1.
    """
    raise NotImplementedError("exercise 0: lessons/exercises/ex00.py")


def clearly_better(rows: list[dict], phase: str, than: str) -> bool:
    """Whether the 95 % interval of phase's last evaluation lies wholly above that of `than`'s.

    Raises ValueError naming the phase that was never evaluated.
    """
    raise NotImplementedError("exercise 0: lessons/exercises/ex00.py")
