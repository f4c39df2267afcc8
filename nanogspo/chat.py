"""How a problem becomes token ids and an answer becomes text: through the chat template when there is one.

Tests: tests/test_train.py
"""

import dataclasses

from nanogspo.packing import Example
from nanogspo.tasks.base import Problem
from nanogspo.tokenizer import Tokenizer, conversation_examples


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a problem becomes token ids: through the chat template when there is one, as bare text when not."""

    tokenizer: Tokenizer
    template_kwargs: dict

    def prompt(self, problem: Problem) -> list[int]:
        variables = self.variables(problem)
        if self.tokenizer.has_chat_template:
            return self.tokenizer.chat(problem.messages, **variables)
        if not problem.text:
            raise ValueError("got a prompt of messages for a model without a chat template, want text as the prompt")
        return self.tokenizer.encode(problem.text)

    def variables(self, problem: Problem) -> dict:
        """What the chat template is given beside the messages."""
        if problem.tools and not self.tokenizer.spells("tools"):
            raise ValueError("got tools, which the chat template does not read, want a model trained for them")
        return self.template_kwargs | ({"tools": problem.tools} if problem.tools else {})

    def demonstration(self, problem: Problem) -> Example:
        """Prompt and reference answer; the loss counts on the answer and the token that ends it."""
        if self.tokenizer.has_chat_template:
            turns = [*problem.messages, {"role": "assistant", "content": problem.answer}]
            return Example(*conversation_examples(self.tokenizer, turns, **self.variables(problem))[-1])
        if not self.tokenizer.eos_ids:
            raise ValueError(
                "the tokenizer names no stop token, so answers would have no end; add eos_token_id to config.json"
            )
        prompt = self.tokenizer.encode(problem.text)
        answer = self.tokenizer.encode_continuation(problem.answer) + [min(self.tokenizer.eos_ids)]
        return Example.answered(prompt, answer)

    def text(self, answer: list[int]) -> str:
        """What a task's reward reads: special tokens dropped, and a finished chain of thought too."""
        return self.tokenizer.decode(answer).rpartition("</think>")[2]
