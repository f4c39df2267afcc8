"""Exercise 16. A decode step that can be replayed: what a CUDA graph would record, and run again and again.

The model is a table: table[t] (V,) are the scores of what follows token t. Every row takes the likeliest.

    slot                 where this step's tokens go in answers: the same column for all rows
    a row that is done   writes -1, and stays done
    a row that draws the stop token writes it, and is done from then on

Make this pass:  python -m pytest lessons/exercises/test_ex16.py        (about 6 lines)

Hints: the step is recorded once, so `state.slot += 1` (the same memory) and never `state.slot = state.slot + 1`. No
`if` on a tensor, no .item(), no answers[:, int(slot)]: torch.where and x.index_copy_(1, slot, column) do without.
Tensors that you compute on the way may live anywhere.

Source: lessons/16_a_decode_step.md
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class State:
    """Everything that a step changes; each tensor stays where it is."""

    token: Tensor  # (n,) int64, drawn last
    done: Tensor  # (n,) bool
    slot: Tensor  # (1,) int64
    answers: Tensor  # (n, T) int64


def step(table: Tensor, stop: int, state: State) -> None:
    """One token more for every row. table (V, V) float32."""
    raise NotImplementedError("exercise 16: lessons/exercises/ex16.py")
