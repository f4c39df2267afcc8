"""Exercise 5. A decode step that can be replayed: what a CUDA graph would capture, and run again and again.

The model is a table: table[t] (V,) are the scores of what follows token t. Every row takes the likeliest.

    slot                 where this step's tokens go in answers: the same column for all rows
    a row that is done   writes -1, and stays done
    a row that samples the stop token writes it, and is done from then on

Make this pass:  python -m pytest lessons/exercises/test_ex05.py        (about 6 lines)

Hints: a replay repeats what Python did during capture, on the same memory. Which of your numbers would stay as they
were? An `if` on a tensor, .item() and answers[:, int(slot)] are refused; torch has an operation in place of each.
Tensors that you compute on the way may live anywhere, those of State may not.

Source: lessons/05_a_decode_step.md
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class State:
    """Everything that a step changes; each tensor stays where it is."""

    token: Tensor  # (n,) int64, sampled last
    done: Tensor  # (n,) bool
    slot: Tensor  # (1,) int64
    answers: Tensor  # (n, T) int64


def step(table: Tensor, stop: int, state: State) -> None:
    """One token more for every row. table (V, V) float32."""
    raise NotImplementedError("exercise 5: lessons/exercises/ex05.py")
