"""Exercise 22. What a conversation with a customer earns, turn by turn.

A goal earns 1 / goals in the turn that first says it, a fault costs as much in the turn that first makes it:

    reward of a turn = (goals it is the first to reach - faults it is the first to make) / all goals

A pattern is found anywhere in a turn, whatever its case. The conversation ends with the turn that reaches the last goal
there was left, or with turn number `patience`; what the model would say after that is never heard.

    goals {"sorry": "sorry|apolog", "offers": "refund"}, faults {"blames": "your fault"}, patience 3

    turn 1   Sorry, it is your fault.       + 1/2 - 1/2     0.0
    turn 2   Sorry! And your fault.         neither again   0.0
    turn 3   A REFUND is on its way.        + 1/2           0.5     the end: all goals, and patience too

Make this pass:  python -m pytest lessons/exercises/test_ex22.py        (about 12 lines)

Hints: keep the names found so far in one set. A fault made in the last turn counts, too.
"""


def rewards_of(turns: list[str], goals: dict[str, str], faults: dict[str, str], patience: int) -> list[float]:
    """The reward of each turn that is heard. goals and faults: name -> pattern, all names different."""
    raise NotImplementedError("exercise 22: lessons/exercises/ex22.py")
