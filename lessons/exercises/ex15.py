"""Exercise 15. Training rows from an agent that you do not control.

An agent talks to your model through a server, which notes the ids of each turn: the prompt that came in, and what was
sampled. The agent may append to the conversation, or rewrite it (drop a chain of thought, encode a turn anew, shorten).

    turn 1   prompt p p p            sampled a a E
    turn 2   prompt p p p a a E b b  sampled c E          begins with all of row 1: the row goes on
    turn 3   prompt p p b b b        sampled d E          does not: a new row

    row 1    p p p a a E b b c E     mask . . . 1 1 1 . . 1 1
    row 2    p p b b b d E           mask . . . . . 1 1

Each sampled id is scored once, behind the very ids that it was sampled behind, in as few rows as the order of turns
allows: a turn goes on with the last row or begins a new one.

Make this pass:  python -m pytest lessons/exercises/test_ex15.py        (about 9 lines)

Hints: what has to be equal is ids, not texts. Whose lists do you append to?
"""


def training_rows(turns: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[bool]]]:
    """(prompt ids, sampled ids) of each turn -> (tokens, loss_mask) of each row."""
    raise NotImplementedError("exercise 15: lessons/exercises/ex15.py")
