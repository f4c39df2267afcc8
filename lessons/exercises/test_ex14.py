import pytest

from examples.reward import right_and_short
from lessons.exercises import load
from nanogspo.tasks import rewards

blind_answer = load("ex14").blind_answer

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10 - a)]  # 9 in 10 of 55
DIGITS = "0123456789"


def test_a_reward_for_naming_the_answer_is_free():
    answer, value = blind_answer(lambda answer, row: float(row["answer"] in answer), SUMS, DIGITS, most=20)
    assert (sorted(answer), value) == (sorted(DIGITS), 1.0)  # ten pieces and no eleventh, which would raise nothing
    assert answer[:3] == "987"  # what raises the mean most comes first


def test_a_reward_for_the_last_number_pays_for_the_best_guess_only():
    numeric = rewards.load("numeric").function
    assert blind_answer(numeric, SUMS, DIGITS, most=20) == ("9", pytest.approx(10 / 55))


def test_the_sum_of_a_dict_counts():
    """Half of examples/reward.py is for free."""
    assert blind_answer(right_and_short, SUMS, [*DIGITS, " "], most=5) == ("9", pytest.approx(0.5 + 0.5 * 10 / 55))


def test_abstentions_are_not_zeros():
    """As zeros they would make "b" the best: two of the four rows abstain for "a"."""

    def reward(answer, row):
        return {"a": [1.0, 1.0, None, None], "b": [0.6] * 4}.get(answer, [0.0] * 4)[row["n"]]

    rows = [{"n": n} for n in range(4)]
    assert blind_answer(reward, rows, "ab", most=3) == ("a", 1.0)
    assert blind_answer(lambda answer, row: None, rows, "ab", most=3) == ("", 0.0)


def test_it_stops():
    assert blind_answer(lambda answer, row: float(len(answer)), SUMS, ["ab", "c"], most=3) == ("ababab", 6.0)
    assert blind_answer(lambda answer, row: 0.25, SUMS, DIGITS, most=3) == ("", 0.25)
    keywords = rewards.load("keywords:refund,apology").function
    assert blind_answer(keywords, SUMS, ["hello ", "apology ", "refund "], most=9)[1] == 1.0
