import pytest
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load
from nanogspo.tasks.conversation import Conversation

rewards_of = load("ex22").rewards_of

GOALS, FAULTS = {"sorry": "sorry|apolog", "offers": "refund"}, {"blames": "your fault"}


def test_the_table():
    turns = ["Sorry, it is your fault.", "Sorry! And your fault.", "A REFUND is on its way.", "sorry"]
    assert rewards_of(turns, GOALS, FAULTS, 3) == [0.0, 0.0, 0.5]


def test_it_ends_with_the_last_goal_or_with_patience():
    assert rewards_of(["Sorry, a refund.", "your fault"], GOALS, FAULTS, 4) == [1.0]
    assert rewards_of(["a", "b", "sorry"], GOALS, FAULTS, 2) == [0.0, 0.0]
    assert rewards_of(["your fault, sorry,\nrefund"], GOALS, FAULTS, 1) == [0.5]


WORDS = st.lists(st.sampled_from("ab cd Ab CD x \n".split(" ")), max_size=4).map(" ".join)
PATTERNS = st.lists(st.sampled_from(["a", "b|c", "cd", "a.*x", "never", "^x"]), max_size=3)


@given(st.lists(WORDS, max_size=5), PATTERNS.filter(len), PATTERNS, st.integers(1, 5))
def test_a_run_gives_the_same(turns, goals, faults, patience):
    """The environment of nanogspo, asked turn by turn until it says that it is done."""
    goals, faults = ({f"{kind}{n}": p for n, p in enumerate(x)} for kind, x in (("goal", goals), ("fault", faults)))
    script = {"goals": goals, "faults": faults, "replies": [], "otherwise": ["Well?"], "wants": "", "customer": None}
    customer, want = Conversation(), []
    customer.reset({"prompt": [{"role": "user", "content": "?"}], "scenario": script | {"turns": patience}}, 0)
    for text in turns:
        _, done, earned = customer.step({"role": "assistant", "content": text})
        want.append(sum(earned.values()))
        if done:
            break
    assert rewards_of(turns, goals, faults, patience) == pytest.approx(want)
