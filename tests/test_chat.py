"""nanogspo/chat.py: what a reward reads of an answer. Prompts and demonstrations: tests/test_train.py, test_tasks.py.

Run: python -m pytest tests/test_chat.py
"""

import types

import pytest

from lessons.small_chat import small_tokenizer
from nanogspo.chat import Chat
from nanogspo.tasks.base import Problem
from nanogspo.tokenizer import character_tokenizer


@pytest.mark.parametrize(
    ("decoded", "read"),
    [
        ("4", "4"),
        ("<think>2 and 2</think>4", "4"),
        ("2 and 2</think>4", "4"),  # a template may open the chain of thought in the prompt
        ("<think>a</think>3<think>b</think>4", "4"),
        ("<think>2 and 2", "<think>2 and 2"),  # never finished: all of it is read, and nothing is right by chance
    ],
)
def test_a_finished_chain_of_thought_is_not_read(decoded, read):
    assert Chat(types.SimpleNamespace(decode=lambda ids: decoded), {}).text([1]) == read


def test_a_prompt_of_messages_needs_a_template():
    """Without one it would be no tokens at all, and the error a later one about empty prompts."""
    chat = Chat(character_tokenizer("ab"), {})
    assert chat.prompt(Problem("ab", [], "")) == chat.tokenizer.encode("ab")
    with pytest.raises(ValueError, match="a prompt of messages for a model without a chat template, want text"):
        chat.prompt(Problem("", [{"role": "user", "content": "ab"}], ""))


def test_tools_of_a_problem_go_through_the_template():
    chat = Chat(small_tokenizer(), {})
    problem = Problem("", [{"role": "user", "content": "12 * 30"}], "360", tools=[{"name": "calculate"}])
    shown = chat.tokenizer.decode(chat.prompt(problem), False)
    assert '[{"name": "calculate"}]' in shown
    example = chat.demonstration(problem)
    assert example.tokens[: len(chat.prompt(problem))] == chat.prompt(problem)
    with pytest.raises(ValueError, match="got tools, which the chat template does not read"):
        Chat(character_tokenizer("ab"), {}).prompt(Problem("ab", [], "", tools=[{}]))
