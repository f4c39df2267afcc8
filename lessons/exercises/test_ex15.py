import copy

from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load

training_rows = load("ex15").training_rows

P, A, B, C, D, E = range(6)  # as the docstring draws them
IDS = st.lists(st.integers(0, 2), max_size=4)  # few different ids: prefixes that are equal by chance
TURN = st.tuples(st.sampled_from(["append", "rewrite", "shorten"]), IDS, IDS.filter(len))
conversations = given(st.lists(TURN, min_size=1, max_size=6))


def an_agent(plan) -> list[tuple[list[int], list[int]]]:
    turns, so_far = [], [0]
    for how, new, sampled in plan:
        so_far = {"append": so_far, "rewrite": [9, *so_far[1:]], "shorten": so_far[:-1]}[how] + new
        turns.append((so_far, sampled))
        so_far = so_far + sampled
    return turns


def test_the_picture():
    turns = [([P, P, P], [A, A, E]), ([P, P, P, A, A, E, B, B], [C, E]), ([P, P, B, B, B], [D, E])]
    first = [P, P, P, A, A, E, B, B, C, E], [m == "1" for m in "...111..11"]
    assert training_rows(turns) == [first, ([P, P, B, B, B, D, E], [m == "1" for m in ".....11"])]


def test_the_same_text_in_other_ids_is_another_row():
    """3, 60 was sampled; the agent encoded it again as 360, or dropped it: neither may be scored behind the other."""
    assert len(training_rows([([1], [3, 60]), ([1, 3, 60, 7], [5])])) == 1
    assert len(training_rows([([1], [3, 60]), ([1, 360, 7], [5])])) == 2
    assert len(training_rows([([1], [3, 60]), ([1, 3], [60])])) == 2  # a retry: shorter than the row


@conversations
def test_each_sampled_id_is_scored_once_behind_what_it_was_sampled_behind(plan):
    turns = an_agent(plan)
    given_turns = copy.deepcopy(turns)
    rows = training_rows(turns)
    assert turns == given_turns  # the server's notes are its own
    seen = [tokens[: i + 1] for tokens, mask in rows for i, scored in enumerate(mask) if scored]
    assert seen == [prompt + sampled[: j + 1] for prompt, sampled in turns for j in range(len(sampled))]
    assert all(len(tokens) == len(mask) for tokens, mask in rows)


@conversations
def test_no_row_is_split_without_need(plan):
    turns = an_agent(plan)
    ends = [prompt + sampled for prompt, sampled in turns]
    breaks = sum(prompt[: len(end)] != end for end, (prompt, _) in zip(ends, turns[1:], strict=False))
    assert len(training_rows(turns)) == 1 + breaks
