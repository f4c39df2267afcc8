"""What a run trains on and is examined on: the rows of a file, or the problems of a task.

The n-th example is a function of n and the seed, so a cursor is one integer, and a resumed run goes on where it was.

Tests: tests/test_data.py, tests/test_train.py
"""

import contextlib
import dataclasses
from collections.abc import Iterator

from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.episodes import probe
from nanogspo.evaluation import split
from nanogspo.experience import environment_row
from nanogspo.families import ModelConfig
from nanogspo.packing import Example
from nanogspo.run.environments import Environments
from nanogspo.tasks.base import Problem, Task, shuffled
from nanogspo.tasks.jsonl import load_jsonl

# seeds apart from the rollouts' own: three different orders of the training problems
SFT_STREAM, PROBE_STREAM = 1_000_000, 2_000_000


@dataclasses.dataclass(frozen=True)
class Data:
    """Either rows, some of them held out, or a task with held-out problems."""

    chat: Chat
    seed: int
    longest_prompt: int  # tokens
    rows: list[Example] = ()
    held_out: list[Example] = ()  # rows never trained on
    task: Task | None = None
    problems: list[Problem] = ()  # of the task, never trained on

    @classmethod
    def from_rows(cls, config: TrainConfig, chat: Chat, model: ModelConfig) -> tuple[TrainConfig, "Data"]:
        """The rows of --data, and the config with what only they decide: steps and eval_size."""
        limit, name = min((config.max_length, "--max-length"), (model.max_positions, "max_position_embeddings"))
        rows, too_long = load_jsonl(config.data, chat.tokenizer, max_length=limit, template_kwargs=chat.template_kwargs)
        if too_long:
            lines = ", ".join(map(str, too_long[:20])) + (", ..." if len(too_long) > 20 else "")
            print(f"left out {len(too_long)} rows longer than {limit} tokens ({name}): lines {lines}")
        beyond = [row.line for row in rows if max(row.tokens) >= model.vocab_size]
        if beyond:
            V = model.vocab_size
            raise ValueError(f"{config.data}:{beyond[0]}: got token ids beyond the model's {V}; want its own tokenizer")
        config, rows, held_out = split(config, rows)
        return config, cls(chat, config.seed, max(len(row.tokens) for row in rows), rows=rows, held_out=held_out)

    @classmethod
    def from_task(cls, config: TrainConfig, task: Task, chat: Chat, model: ModelConfig) -> "Data":
        """A task's problems, once it is checked that prompts and answers have room. Lengths are those of 50 draws."""
        longest = max(len(chat.prompt(task.train_problem(n, config.seed))) for n in range(50))
        data = cls(chat, config.seed, longest, task=task)
        if longest + config.max_new_tokens > model.max_positions:
            raise ValueError(
                f"got prompts of {longest} tokens + --max-new-tokens {config.max_new_tokens}, "
                f"want at most {model.max_positions} together (max_position_embeddings)"
            )
        longest_answer = max(sum(data.sft_example(n).loss_mask) for n in range(50))
        if longest_answer > config.max_new_tokens:
            raise ValueError(
                f"got --max-new-tokens {config.max_new_tokens} for answers of up to {longest_answer} tokens; "
                f"want at least {longest_answer}"
            )
        return dataclasses.replace(data, problems=task.held_out(config.eval_size) if config.eval_size else [])

    def sft_example(self, n: int) -> Example:
        """The n-th draw: a row, each once an epoch, or a problem with its answer."""
        if self.task:
            return self.chat.demonstration(self.task.train_problem(n, self.seed + SFT_STREAM))
        epoch, i = divmod(n, len(self.rows))
        return self.rows[shuffled(len(self.rows), f"{self.seed}-{epoch}")[i]]

    def probe(self, count: int) -> list[Problem]:
        """Training problems that tell when a warm-up has done enough; always the same."""
        return [self.task.train_problem(n, self.seed + PROBE_STREAM) for n in range(count)]

    def example_prompt(self) -> str | None:
        """A question to try the trained model with; None for rows."""
        if not self.task:
            return None
        example = self.problems[0] if self.problems else self.task.train_problem(0, self.seed)
        return example.messages[-1]["content"] if self.chat.tokenizer.has_chat_template else example.text


@contextlib.contextmanager
def open_environments(config: TrainConfig, data: Data, model: ModelConfig) -> Iterator[Environments]:
    """The processes that --environment runs in, once it has begun an episode of the first training problem."""
    environments = Environments(config.environment)
    try:
        probe(model, data.chat, environments, environment_row(data.task.train_problem(0, config.seed)), config)
        yield environments
    finally:
        environments.close()
