"""What a run trains on and is examined on: the rows of a file, or the problems of a task.

The n-th example is a function of n and the seed, so a cursor is one integer, and a resumed run goes on where it was.

Tests: tests/test_data.py, tests/test_train.py
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanogspo.chat import Chat
from nanogspo.config import TrainConfig
from nanogspo.episodes import probe
from nanogspo.evaluation import split
from nanogspo.families import ModelConfig
from nanogspo.inputs import shown, some
from nanogspo.packing import Example
from nanogspo.run.environments import Environments, OwnEnvironments
from nanogspo.run.rewards import Rewards
from nanogspo.sampler import group_of, row_of
from nanogspo.tasks import NEEDED, build_task
from nanogspo.tasks.base import Problem, Task, shuffled
from nanogspo.tasks.conversation import Conversations
from nanogspo.tasks.jsonl import load_jsonl
from nanogspo.tasks.mix import Mix
from nanogspo.tasks.prompts import Episodes, PromptRows
from nanogspo.tasks.rows import read_rows
from nanogspo.tokenizer import Tokenizer


class Given(NamedTuple):
    """What a caller from Python gives instead of flags, as train.run has them."""

    task: Task | None
    rewards: Sequence[Callable]
    weights: Sequence[float]
    environment: object | None

    def settings(self, config: TrainConfig) -> dict:
        """What it changes in the configuration. Raises ValueError for what would fail later, and less clearly."""
        if not isinstance(config, TrainConfig):
            raise ValueError(f"got {shown(config)} as the configuration, want run(TrainConfig(model=...))")
        if isinstance(self.task, type):
            name = self.task.__name__
            raise ValueError(f"got task={name}, a class, want an object; write task={name}()")
        if self.task is not None and (lacks := [name for name in NEEDED if not hasattr(self.task, name)]):
            raise ValueError(f"got task={shown(self.task)} without {some(lacks)}, want an object that has them")
        if not isinstance(self.rewards, Sequence) or not all(map(callable, self.rewards)):
            raise ValueError(f"got rewards={shown(self.rewards)}, want a list of functions; write rewards=[f]")
        fit = isinstance(self.weights, Sequence) and all(isinstance(w, int | float) for w in self.weights)
        if not fit or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"got weights={shown(self.weights)}, want a list of finite numbers; write weights=[1.0]")
        if len(self.weights) not in {0, len(self.rewards)}:
            raise ValueError(f"got {len(self.weights)} weights for {len(self.rewards)} rewards, want one each, or none")
        if self.environment is None:
            return {}
        if not (hasattr(self.environment, "reset") and hasattr(self.environment, "step")):
            raise ValueError("got an environment without reset and step, want a class or object that has both")
        if config.environment not in ("", "conversation", "python"):  # conversation is what the task set
            raise ValueError(f"got --environment {config.environment} and environment=..., want one of them")
        return {"environment": "python"}


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
    def from_prompts(
        cls, config: TrainConfig, prompts: PromptRows, chat: Chat, model: ModelConfig
    ) -> tuple[TrainConfig, "Data"]:
        """The rows of --data as prompts to answer, and the config with what only they decide: eval_size."""
        room, lengths = model.max_positions - config.max_new_tokens, [0]
        limit = min(config.max_prompt_tokens or room, room)

        def too_long(problem: Problem) -> bool:
            length = len(chat.prompt(problem))
            lengths.append(length if length <= limit else 0)
            return length > limit

        prompts.leave_out(too_long)
        if prompts.left_out:
            why = "--max-prompt-tokens" if limit < room else "max_position_embeddings less --max-new-tokens"
            print(f"left out {prompts.left_out} prompts longer than {limit} tokens ({why})")
        most = len(prompts.held_out())  # of gsm8k a tenth, of which --eval-size are asked
        config = dataclasses.replace(config, eval_size=min(config.eval_size if config.eval_size >= 0 else most, most))
        if config.eval_size:
            note = f", and {prompts.repeats} rows left out that repeat them" if prompts.repeats else ""
            print(f"{config.eval_size} prompts held out{note}")
        data = cls.from_task(config, prompts, chat, model)
        return config, dataclasses.replace(data, longest_prompt=max(lengths))

    @classmethod
    def from_task(cls, config: TrainConfig, task: Task, chat: Chat, model: ModelConfig) -> "Data":
        """A task's problems, once it is checked that prompts and answers have room. Lengths are those of 50 draws."""
        drawn = [task.train_problem(n, config.seed) for n in range(50)]
        longest = max(len(chat.prompt(problem)) for problem in drawn)
        data = cls(chat, config.seed, longest, task=task)
        if longest + config.max_new_tokens > model.max_positions:
            raise ValueError(
                f"got prompts of {longest} tokens + --max-new-tokens {config.max_new_tokens}, "
                f"want at most {model.max_positions} together (max_position_embeddings)"
            )
        imitated = "--algo sft" if config.algo == "sft" else config.warm_steps and f"--warm-steps {config.warm_steps}"
        if imitated and not all(problem.answer for problem in drawn):
            raise ValueError(
                f"got {imitated}, which imitates the task's own answers, with problems that have none; want an "
                "`answer` in every row, or --warm-steps 0"
            )
        # the answer of a row may be a solution, which nobody is to say word for word
        said = [p for p in drawn if p.answer and (imitated or not p.row)]
        longest_answer = max((sum(chat.demonstration(p).loss_mask) for p in said), default=0)
        if longest_answer > config.max_new_tokens:
            raise ValueError(
                f"got --max-new-tokens {config.max_new_tokens} for answers of up to {longest_answer} tokens; "
                f"want at least {longest_answer}"
            )
        problems = task.held_out(config.eval_size) if config.eval_size else []
        if len(problems) != config.eval_size:  # the fraction right would be of another number
            raise ValueError(f"got {len(problems)} held-out problems, want {config.eval_size}; lower --eval-size")
        return dataclasses.replace(data, problems=problems)

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
        """A question to try the trained model with; None for rows of answers and where an environment asks."""
        if not self.task:
            return None
        example = self.problems[0] if self.problems else self.task.train_problem(0, self.seed)
        return (example.messages[-1]["content"] if self.chat.tokenizer.has_chat_template else example.text) or None


def choose_task(config: TrainConfig) -> Task | None:
    """Where problems come from: --task, or in RL the rows of --data; None for SFT on rows."""
    if config.task == ("episodes",):
        return Episodes()
    if not config.data:
        return build_task(config.task, config.task_size or None)
    if config.algo == "sft":
        return None
    return PromptRows(read_rows(config.data), held_out=config.eval_size, system=config.system)


def read_data(
    config: TrainConfig, task: Task | None, tokenizer: Tokenizer, model: ModelConfig
) -> tuple[TrainConfig, Data]:
    """What to train on, and the config with what only the rows of a file decide."""
    chat = Chat(tokenizer, {} if config.thinking == "auto" else {"enable_thinking": config.thinking == "on"})
    if task is None:
        return Data.from_rows(config, chat, model)
    if isinstance(task, PromptRows):
        return Data.from_prompts(config, task, chat, model)
    return config, Data.from_task(config, task, chat, model)


def choose_judges(
    config: TrainConfig, data: Data, model: ModelConfig, given: Given, held: contextlib.ExitStack
) -> tuple[Rewards | None, Environments | OwnEnvironments | None]:
    """What rewards the answers, where it is not the task itself: the functions of --reward or those given from Python,
    once each has been tried, and the environment, once it has begun an episode. `held` closes both."""
    rewards = environments = None
    if given.rewards and config.reward:
        raise ValueError("got --reward and functions from Python, want one of them")
    if given.rewards or config.reward:
        how = {"timeout": config.reward_timeout, "state": lambda: {"max_steps": config.steps}}
        rewards = held.enter_context(Rewards(given.rewards or config.reward, given.weights or None, **how))
        rewards.probe(group_of(data.task.train_problem(0, config.seed), [], []))
    if config.environment == "python" and given.environment is None:
        raise ValueError("got --environment python, which a run from Python has, want run(config, environment=...)")
    tasks = data.task.tasks.values() if isinstance(data.task, Mix) else [data.task]
    talks = {isinstance(task, Conversations) for task in tasks}
    if config.environment in ("", "conversation") and talks != {config.environment == "conversation"}:
        got = f"{getattr(data.task, 'name', 'a task')} with --environment {config.environment or 'left out'}"
        raise ValueError(f"got {got}, want conversations alone with --environment conversation, other tasks without it")
    if given.environment is not None:
        environments = OwnEnvironments(given.environment, config.reward_timeout)
        held.callback(environments.close)
    elif config.environment:
        environments = held.enter_context(Environments(config.environment, config.reward_timeout))
    if environments:
        probe(model, data.chat, environments, row_of(data.task.train_problem(0, config.seed)), config)
    return rewards, environments
