import torch
from hypothesis import given
from hypothesis import strategies as st
from recorder import record

from lessons.exercises import load
from lessons.exercises.ex05 import State

step = load("ex05").step

STOP, V, T = 0, 7, 6
cases = given(seed=st.integers(0, 2**31 - 1), n=st.sampled_from([1, 2, 9]))


def a_start(seed: int, n: int) -> tuple[torch.Tensor, State]:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(1, V, (n,), generator=generator)
    state = State(token, torch.zeros(n, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), torch.full((n, T), -7))
    return torch.randn(V, V, generator=generator), state


def by_hand(table: torch.Tensor, token: int) -> list[int]:
    """One row, in plain Python: up to the stop token, then -1."""
    row = []
    while len(row) < T:
        token = int(table[token].argmax())
        row.append(token)
        if token == STOP:
            return row + [-1] * (T - len(row))
    return row


@cases
def test_step_by_step(seed, n):
    table, state = a_start(seed, n)
    want = [by_hand(table, token) for token in state.token.tolist()]
    for _ in range(T):
        step(table, STOP, state)
    assert state.answers.tolist() == want
    assert state.done.tolist() == [STOP in row for row in want] and state.slot.tolist() == [T]


@cases
def test_recorded_once_and_replayed(seed, n):
    table, state = a_start(seed, n)
    before = state.token.tolist()
    replay = record(lambda: step(table, STOP, state))
    assert state.token.tolist() == before  # recording runs nothing
    for _ in range(T):
        replay()
    assert state.answers.tolist() == [by_hand(table, token) for token in before]


def test_a_graph_serves_the_next_rollout_too():
    """Other numbers in the same memory, and an updated model."""
    table, state = a_start(0, 5)
    replay = record(lambda: step(table, STOP, state))
    for seed in (1, 2, 3):
        other_table, other = a_start(seed, 5)
        table.copy_(other_table)
        for name in ("token", "done", "slot", "answers"):
            getattr(state, name).copy_(getattr(other, name))
        for _ in range(T):
            replay()
        assert state.answers.tolist() == [by_hand(table, token) for token in other.token.tolist()]
