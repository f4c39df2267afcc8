"""One frozen dataclass is the flags, the help, the YAML file and the saved record of a run.

    defaults  <  configs/tiny.yaml when the model is tiny, or --config FILE  <  flags

A field is declared once, with its help text and bounds; `parse` makes the command line from it, `check` refuses what
lies outside, `dump` writes config.yaml. Values of 0 or "auto" marked so are filled by `resolve` from the size of the
model; the filled record is what is saved.

Reading order: TrainConfig, SampleConfig, parse, resolve, check.      Tests: tests/test_config.py
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import pathlib
import re
from typing import Any

from nanogspo.inputs import read_text
from nanogspo.words import explain, explain_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURES = ("qwen3", "qwen3_moe", "qwen3_5")  # nanogspo/tiny.py
AUTO, DTYPES, QUANTS = ("auto", "on", "off"), ("auto", "bf16", "fp32"), ("none", "nf4", "int8")
TRACKERS = ("none", "wandb", "trackio", "tensorboard")
MIXES, AVERAGES = ("sum_then_normalize", "normalize_then_sum"), ("sequence", "token", "constant")
CONVERSATIONS = ("conversation", "customer_service", "technical_support", "sales")  # tasks/conversation.py
Texts = tuple[str, ...]  # the type of a flag that may be given several times


def flag(
    default, help: str, choices: tuple = (), *, low=0, high=10**9, exclude=None, group: str = "", path: bool = False
) -> Any:
    """A field. A number lies in low .. high and is not `exclude`. group: --help begins one with this field. path: ~ at
    its start becomes the home folder."""
    metadata = {"help": help, "choices": choices, "bounds": (low, high, exclude), "group": group, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a Qwen, Gemma or Llama model with SFT, GRPO or GSPO. Without flags: the two-minute tiny run."""

    model: str = flag(
        "tiny", "folder, hub id owner/name, or tiny: 0.4 M parameters, made here", group="what", path=True
    )
    architecture: str = flag("qwen3", "of the tiny model; qwen3_moe: 8 experts; qwen3_5: gated DeltaNet", ARCHITECTURES)
    algo: str = flag("gspo", "what to optimise", ("gspo", "grpo", "sft", "gspo_token", "reinforce"))
    task: Texts = flag(
        ("reverse",), "reverse, addition, FILE.py[:Class]; several, as NAME=SHARE, are mixed; jsonl: --data", path=True
    )
    task_size: int = flag(0, "digits (addition) or longest word (reverse); 0: the task's own default", high=1000)
    data: str = flag(
        "", "JSONL file; sft: messages, prompt + completion, or title ... solution; RL: prompt, any columns", path=True
    )
    reward: Texts = flag(
        (),
        "instead of the task's: FILE.py:function, exact, numeric, regex:PATTERN, ...; [=WEIGHT] of each",
        path=True,
    )
    reward_mix: str = flag("sum_then_normalize", "advantages of the weighted sum, or weighted sum of advantages", MIXES)
    reward_timeout: float = flag(10.0, "seconds a call of a --reward may take", high=86400, exclude=0)
    system: str = flag("", "system message for rows of --data that have none (in RL)")
    max_prompt_tokens: int = flag(0, "longer prompts of --data are left out, and counted; 0: as the model has room for")
    adapter: str = flag("", "start from this LoRA adapter (a PEFT folder) instead of a fresh one", path=True)
    out: str = flag("", "run folder; default: the first free one of runs/NAME, runs/NAME-2, ...", path=True)
    resume: str = flag("", "continue the run in this folder; its own config.yaml is used, flags win", path=True)
    accept_changes: bool = flag(False, "with --resume: accept changed settings and input files, noted in metrics.jsonl")
    seed: int = flag(0, "seeds the data order, the adapter or model initialisation, and sampling", high=2**63 - 1)
    steps: int = flag(200, "optimiser updates of the main phase", low=1, group="how long")
    epochs: float = flag(0.0, "passes over --data, instead of --steps; a saved run has them as steps", high=10**6)
    eval_every: int = flag(0, "updates between held-out evaluations; 0: only before and after")
    eval_size: int = flag(
        -1,
        "held-out problems or rows; -1: 200, or a tenth of 200 or more rows, at most 200",
        low=-1,
        high=10**6,
    )
    eval_samples: int = flag(0, "sampled answers to each held-out problem: how often one, or any, is right", high=1000)
    patience: int = flag(0, "end after so many evaluations in a row that are no better than the best; 0: never")
    keep_best: bool = flag(False, "also keep the weights of the best evaluation of the main phase, in best/")
    save_every: int = flag(50, "updates between saves of the state that --resume reads", low=1)
    keep_saves: int = flag(0, "also keep the weights of so many saves, the newest ones, in saves/STEP/", high=10**6)
    warm_steps: int = flag(0, "at most this many SFT updates on the task's own answers before RL starts")
    warm_until: float = flag(0.3, "end the warm-up at this share of right answers; 2: never", high=2, exclude=0)
    warm_probe: int = flag(300, "fresh training problems answered greedily every 5 warm-up updates", low=1, high=10**6)
    warm_lr: float = flag(0.0, "learning rate of the warm-up; 0: what --algo sft would take", high=1)
    control: bool = flag(False, "after RL, also continue the warm-up's SFT for as long as RL took, to compare")
    prompts_per_rollout: int = flag(8, "prompts sampled at a time", low=1, high=10**6, group="rollout")
    group_size: int = flag(8, "answers per prompt; the baseline of an answer is its group's mean", low=1, high=10**6)
    updates_per_rollout: int = flag(4, "updates (minibatches) a rollout; with 1 no ratio can move", low=1, high=10**6)
    max_new_tokens: int = flag(64, "answers are cut here, and then count as truncated", low=1, high=10**7)
    environment: str = flag("", "FILE.py:Class with reset and step: several turns of max_new_tokens each", path=True)
    max_turns: int = flag(8, "turns of the model in an episode", low=1, high=10**4)
    max_episode_tokens: int = flag(4096, "an episode ends when no other turn has room", low=2, high=10**7)
    rollout_rows: int = flag(0, "answers decoded at a time, to bound the KV cache; 0: all of a rollout")
    temperature: float = flag(1.0, "of sampling, and of the log-probs that are trained", high=100)
    top_k: int = flag(0, "must stay 0 in RL: truncated sampling is not the distribution that is scored")
    top_p: float = flag(1.0, "must stay 1 in RL, likewise", high=1, exclude=0)
    # off: Qwen3 would otherwise think past any max_new_tokens that suits these tasks, and no answer would be finished
    thinking: str = flag("off", "the chat template's enable_thinking; auto leaves it to the template", AUTO)
    clip_low: float = flag(
        0.0, "ratio may fall to 1 - clip_low; 0: 3e-4 for gspo, 0.2 for grpo", high=1, exclude=1, group="objective"
    )
    clip_high: float = flag(0.0, "ratio may rise to 1 + clip_high; 0: 4e-4 for gspo, 0.27 for grpo", high=1, exclude=1)
    clip: str = flag("fixed", "auto: gspo's range by the noise of the first rollout, 3e-4 or more", ("fixed", "auto"))
    divide_by_std: bool = flag(True, "divide advantages by their group's standard deviation; off: Dr. GRPO")
    loss_average: str = flag(
        "sequence", "over tokens, then answers; over all tokens (DAPO); or sums / max_new_tokens (Dr. GRPO)", AVERAGES
    )
    mask_truncated: bool = flag(False, "do not train on answers that were cut off (DAPO); they count in their group")
    dynamic_sampling: int = flag(0, "extra rounds to replace groups with equal rewards, at most (DAPO)", high=10**4)
    router_aux_loss: float = flag(
        0.0, "weight of the load-balancing loss of experts; it is not in the logged loss", high=1
    )
    router_replay: bool = flag(False, "train with the experts that the old weights chose for each token (R2)")
    beta: float = flag(0.0, "weight of the KL divergence (k3) from the policy at the start of RL", high=1000)
    lr: float = flag(0.0, "AdamW learning rate; 0: by algorithm, adapter and model size", high=1, group="optimiser")
    warmup_updates: int = flag(5, "updates over which the learning rate rises from 0")
    lr_schedule: str = flag("constant", "after the warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.0, "AdamW weight decay, on matrices only", high=100)
    grad_clip: float = flag(1.0, "largest norm of the gradient; a large number switches it off", high=1e30, exclude=0)
    batch_size: int = flag(16, "examples per SFT update", low=1, high=10**6)
    max_length: int = flag(2048, "longer SFT rows are left out, and counted", low=1)
    micro_batch_tokens: int = flag(4096, "tokens per forward and backward pass; bounds activation memory", low=1)
    gradient_checkpointing: str = flag("auto", "recompute activations, a third slower; auto: if memory needs it", AUTO)
    prepack: str = flag("auto", "on a CPU, sample with copied weights in a faster order; auto: if memory allows", AUTO)
    lora_r: int = flag(16, "LoRA rank; 0: full fine-tuning", high=10**5, group="adapter and weights")
    lora_alpha: float = flag(32.0, "LoRA scale is alpha / r")
    lora_targets: str = flag(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "leaf names of layers with adapters"
    )
    lora_dropout: float = flag(0.0, "SFT only; in RL it would make the ratio noise", high=1, exclude=1)
    save_merged: bool = flag(False, "also write model/, the weights with the adapter merged in")
    push_to_hub: str = flag("", "OWNER/NAME: upload adapter, or merged or full weights, at the end, with a model card")
    tracker: str = flag("none", "send the numbers of metrics.jsonl there as well", TRACKERS)
    tracker_project: str = flag("nanogspo", "the tracker's project")
    dtype: str = flag("auto", "of the weights; auto: bf16, or fp32 for tiny and on CPUs without bf16 units", DTYPES)
    quant: str = flag("none", "pack the frozen linear layers under LoRA; none: as the checkpoint is", QUANTS)
    device: str = flag("auto", "auto: cuda when there is one", ("auto", "cpu", "cuda"), group="machine")
    shard: str = flag("auto", "by torchrun: spread weights over processes; auto: if a whole copy does not fit", AUTO)
    threads: int = flag(0, "CPU threads; 0: torch's own choice", high=1024)
    check: bool = flag(False, "say whether this model's numbers can be trusted here, and end: nothing is trained")
    plan_only: bool = flag(False, "print what the run would take, and end; a config.json is enough for --model")
    plan_for: str = flag("", "NxGB, such as 2x80: print the plan for N such GPUs instead, with a floor of its time")
    ignore_memory_plan: bool = flag(False, "start although the plan says that the memory cannot suffice")

    def __post_init__(self) -> None:
        if self.data and self.task == ("reverse",):  # nothing else --data could mean
            object.__setattr__(self, "task", ("jsonl",))
        if self.environment and self.task == ("reverse",):  # whose words an environment would not read
            object.__setattr__(self, "task", ("episodes",))
        task = self.task if isinstance(self.task, str) else "".join(self.task[:1])
        if not self.environment and re.split("[:=]", task)[0] in CONVERSATIONS:  # the customer's side
            object.__setattr__(self, "environment", "conversation")
        for f in filter(repeatable, dataclasses.fields(self)):  # from Python, one name may stand alone; JSON has lists
            value = getattr(self, f.name)
            object.__setattr__(self, f.name, (value,) if isinstance(value, str) else tuple(value))


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sample from a checkpoint: one prompt, a file of prompts, or a chat."""

    model: str = flag("", "checkpoint folder (also RUN/model of a run) or hub id owner/name", group="what", path=True)
    adapter: str = flag("", "PEFT adapter folder, for example RUN/adapter", path=True)
    prompt: str = flag("", "one prompt; its flag may be left out")
    prompts: str = flag("", "a text file, one prompt a line", path=True)
    samples_per_prompt: int = flag(1, "answers to each prompt", low=1, high=10**6)
    out: str = flag("", "write answers to this JSONL file as they are made, instead of to the console", path=True)
    chat: bool = flag(False, "talk to the model; an empty line or Ctrl-D ends")
    raw: bool = flag(False, "give the prompt to the model as it is, without the chat template")
    system: str = flag("", "system message for the chat template")
    max_new_tokens: int = flag(256, "answers are cut here", low=1, high=10**7, group="sampling")
    temperature: float = flag(0.7, "0: always the likeliest token", high=100)
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "sample among the likeliest tokens that together have this probability", high=1, exclude=0)
    thinking: str = flag("auto", "passed to the chat template as enable_thinking", AUTO)
    seed: int = flag(0, "same seed, same answers", high=2**63 - 1)
    dtype: str = flag("auto", "auto: bf16, or fp32 for CPUs without it and files with more", DTYPES, group="machine")
    quant: str = flag("none", "pack the linear layers; none: as the checkpoint is", QUANTS)
    device: str = flag("auto", "auto: cuda when there is one", ("auto", "cpu", "cuda"))
    ignore_memory_plan: bool = flag(False, "start although weights and KV cache are larger than the free memory")


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and exit code 2."""

    def error(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"{self.prog}: {line if len(line) < 500 else line[:500] + ' ...'}\n")


@functools.cache
def tiny_yaml() -> dict:
    return load_yaml(ROOT / "configs" / "tiny.yaml", TrainConfig, "the file of the repository")


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def reader(field: dataclasses.Field) -> Any:
    """What makes a field's value, or one of its values, of its text."""
    return os.path.expanduser if field.metadata["path"] else scalar(field)


def scalar(field: dataclasses.Field) -> type:
    """The type of one value: a flag of type Texts may be given several times."""
    return str if repeatable(field) else field.type


def repeatable(field: dataclasses.Field) -> bool:
    return field.type == Texts


def parser(config_class: type, prog: str) -> Parser:
    """The flags, in groups. They have no defaults here, so that the result holds what was given and nothing else."""
    tiny = tiny_yaml() if config_class is TrainConfig else {}
    p = Parser(prog=prog, usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    p.description = config_class.__doc__
    for f in dataclasses.fields(config_class):
        choices, defaults = f.metadata["choices"], {"default": f.default, "tiny": tiny.get(f.name, f.default)}
        if defaults["tiny"] == f.default:
            del defaults["tiny"]
        defaults = {k: {True: "on", False: "off"}[v] if f.type is bool else v for k, v in defaults.items() if v != ""}
        shown = "; ".join(f"{name}: {value}" for name, value in defaults.items())
        kind = {"type": reader(f), "choices": choices or None, "metavar": None if choices else scalar(f).__name__}
        kind |= {"action": "append"} if repeatable(f) else {}
        if f.metadata["group"]:
            group = p.add_argument_group(f.metadata["group"])
        group.add_argument(
            flag_name(f.name),
            help=(f.metadata["help"] + (f" ({shown})" if shown else "")).replace("%", "%%"),
            **{"action": argparse.BooleanOptionalAction} if f.type is bool else kind,
        )
    if config_class is TrainConfig:
        p.epilog = "tiny: the value in configs/tiny.yaml, which is read when --model is tiny and there is no --config"
        help = "YAML file with any of these fields; flags win over it"
        p.add_argument("--config", metavar="FILE", type=os.path.expanduser, help=help)
    else:
        p.add_argument("words", nargs="?", metavar="PROMPT", help="one prompt, without --prompt in front")
    return p


def parse(config_class: type, argv: list[str], prog: str) -> tuple[Any, set[str]]:
    """Flags alone -> (config, names of the fields that were given). Exits with code 2 and one line on a wrong flag."""
    p = parser(config_class, prog)
    args, unknown = p.parse_known_args(argv)
    if unknown:
        if line := explain_flags(unknown, argv, {f.name for f in dataclasses.fields(config_class)}):
            p.error(line)
        near = difflib.get_close_matches(unknown[0].split("=")[0], p._option_string_actions, n=1, cutoff=0.5)
        p.error(f"unknown flag {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    empty = [flag_name(name) for name, of in parts.items() if not of or "" in of or [] in of]  # argparse: [] for --
    if empty:
        p.error(f"got an empty {empty[0]}, want a value, or no such flag")
    file = given.pop("config", "")
    if "words" in given:
        if "prompt" in given:
            raise ValueError(f"got a prompt and --prompt {given['prompt']!r:.40}, want one of them")
        given["prompt"] = given.pop("words")
    base: dict = {}
    if config_class is TrainConfig:
        if given.get("resume") and file:
            raise ValueError("got --config with --resume, which reads the run's own config.yaml; want one of them")
        if given.get("resume"):
            base = load_yaml(pathlib.Path(given["resume"]) / "config.yaml", TrainConfig, "the folder of an earlier run")
            base["out"] = given["resume"]
        elif file:
            base = load_yaml(pathlib.Path(file), TrainConfig, "a YAML file of flag names and values")
        elif given.get("model", "tiny") == "tiny":
            base = tiny_yaml() | ({"eval_size": -1} if given.get("data") else {})  # 500 are of its own task
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(name) and not given.get(other):
            base.pop(other, None)  # a flag wins over the file's other way to say how long
    if (base | given).get("epochs") and "steps" in base | given:
        raise ValueError("got --epochs and --steps, want one of them")
    if base.get("resume"):
        raise ValueError("got resume in a --config file, want --resume DIR on the command line")
    if given.get("data") and given.get("task", ("jsonl",))[-1] == "jsonl":
        given["task"] = ("jsonl",)  # rows are not mixed with tasks: the last --task counts, as with any other flag
    if given.get("resume"):
        changed = [name for name in given if name in base and given[name] != base[name]]
        if "eval_size" in changed and base.get("data"):
            why = "rows that were trained on would be held out; want the run's own"
            raise ValueError(f"got --resume with another --eval-size (was {base['eval_size']}): {why}")
        kept = {name: base[name] for name in changed if name not in MAY_CHANGE}
        if kept and not given.get("accept_changes"):
            flags = ", ".join(f"{flag_name(name)} (was {value})" for name, value in kept.items())
            raise ValueError(f"got --resume with another {flags}; want the run's own, --accept-changes, or a new run")
    return config_class(**{**base, **given}), set(base) | set(given)


# Said anew at every call, so not in config.yaml
PER_CALL = {"resume", "out", "accept_changes", "check", "plan_only", "plan_for", "ignore_memory_plan"}
# What a resumed run may change: how long it goes on, what it saves and evaluates, where and how it is computed
MAY_CHANGE = PER_CALL | {
    "steps", "eval_every", "eval_size", "eval_samples", "patience", "keep_best", "save_every",
    "keep_saves", "save_merged", "control", "device", "threads", "push_to_hub", "tracker", "tracker_project",
    "rollout_rows", "micro_batch_tokens", "gradient_checkpointing", "updates_per_rollout", "shard",
}  # fmt: skip


def load_yaml(path: pathlib.Path, config_class: type, want: str) -> dict:
    """The fields in a YAML file: `name: value` lines. ValueError names the file, the line and the field.

    Values are read by the type of their field, and refused where YAML 1.1 would make something else of them: 010 is 8
    there, 1:30 is 90, no is false.
    """
    import yaml

    try:
        root = yaml.SafeLoader(read_text(path, want)).get_single_node()
    except RecursionError:
        raise ValueError(f"{path}: got values nested too deeply, want `field: value` lines") from None
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or str(e).splitlines()[0]
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ValueError(f"{where}: not YAML ({problem}); want {want}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: got {root.id if root else 'an empty file'}, want `field: value` lines")
    fields, values = {f.name: f for f in dataclasses.fields(config_class)}, {}
    for key, node in root.value:
        name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if name not in fields:
            hint = explain(name, [n.value[:200] for n in items if isinstance(n, yaml.ScalarNode)], fields, yaml=True)
            if not hint and (near := difflib.get_close_matches(name, fields, n=1)):
                hint = f"; did you mean {near[0]}?"
            raise ValueError(f"{where}: unknown field {name[:80]!r}{hint}")
        if name in values:
            raise ValueError(f"{where}: got {name} a second time, want every field once")
        try:
            if repeatable(fields[name]):
                values[name] = tuple(read_value(fields[name], item) for item in items)
            else:
                values[name] = read_value(fields[name], node)
        except ValueError as e:
            raise ValueError(f"{where}: {name} is {e}") from None
    return values


# a number as YAML and its reader understand it; "3e-4" too, which is a string to YAML 1.1
DECIMAL = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?(e[-+]?\d+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


def read_value(field: dataclasses.Field, node) -> Any:
    """A YAML node as the field's type. ValueError says what it is instead, and what to write."""
    import yaml

    kind, choices, tag = scalar(field), field.metadata["choices"], node.tag.removeprefix("tag:yaml.org,2002:")
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"a {node.id}, want one value ({kind.__name__})")
    text, shown = node.value, f"{node.value[:80]!r} ({tag})" if node.value else "empty"
    if tag == "bool":
        truth = text.lower() in ("true", "yes", "on")
        if kind is bool:
            return truth
        if "on" in choices:  # YAML 1.1 reads on and off as true and false
            return "on" if truth else "off"
    if kind is str and tag == "str":
        if choices and text not in choices:
            raise ValueError(f"{shown}, want one of {', '.join(choices)}")
        return reader(field)(text)
    if kind is str and text:
        raise ValueError(f'{shown}, want text: write {field.name}: "{text[:80]}"')
    if kind in (int, float) and tag in ("int", "float", "str"):
        if DECIMAL.fullmatch(text):
            with contextlib.suppress(ValueError):  # 3.5 for an int; more digits than Python converts
                return kind(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        elif tag != "str" and not node.style and len(text) < 30:
            value = yaml.safe_load(text)
            raise ValueError(f"{shown}, which YAML 1.1 reads as {value}: write {field.name}: {value} if you mean that")
    raise ValueError(f"{shown}, want {kind.__name__}")


def dump(config: Any) -> str:
    """YAML of every field but PER_CALL, in declaration order: what config.yaml holds and --config reads."""
    import yaml

    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in PER_CALL}
    return yaml.safe_dump(fields, sort_keys=False)


def resolve(config: TrainConfig, parameters: int = 0) -> TrainConfig:
    """Fill the fields that say "auto" or "by size". parameters: of the base model; 0 leaves the learning rate open.

    Learning rates: RL with full fine-tuning takes 5e-6 at 0.6 B and falls with the square root of size. LoRA takes ten
    times that ("LoRA without regret": the optimum is about 10 x that of full fine-tuning at every rank and size). SFT
    takes four times the RL rate: its gradient is not a difference of noisy rewards.
    """
    gspo = config.algo.startswith("gspo")
    values = {"clip_low": 3e-4 if gspo else 0.2, "clip_high": 4e-4 if gspo else 0.27}
    if parameters:
        rate = 5e-6 * min(1.0, (0.6e9 / parameters) ** 0.5) * (10 if config.lora_r else 1)
        values |= {"lr": rate * (4 if config.algo == "sft" else 1), "warm_lr": rate * 4}
    values = {name: value for name, value in values.items() if not getattr(config, name)}
    if config.eval_size < 0 and not config.data:
        values["eval_size"] = 16 if config.task == ("episodes",) else 200  # an episode is several turns
    return dataclasses.replace(config, **values)


def check_fields(config: TrainConfig | SampleConfig) -> None:
    """Every field by itself, by what stands beside it. nan passes no comparison; infinity is beyond every bound."""
    for f in dataclasses.fields(config):
        name, value, (low, high, exclude) = flag_name(f.name), getattr(config, f.name), f.metadata["bounds"]
        if scalar(f) is str and re.search("[\0\ud800-\udfff]", "".join(value)):
            raise ValueError(f"got {name} {value!a}, want UTF-8 text")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            raise ValueError(f"got {name} {value!r:.40}, want one of {', '.join(f.metadata['choices'])}")
        if f.type in (int, float) and (not low <= value <= high or value == exclude):
            above, below = "more than " * (exclude == low), "less than " * (exclude == high)
            raise ValueError(f"got {name} {value!r:.40}, want {above}{low} to {below}{high}")


def check(config: TrainConfig, judged: bool = False) -> None:
    """Refuse what cannot work, with the reason. Nothing has been loaded or written yet.
    judged: whether functions from Python stand in for --reward.

    The most important refusal: a run in which the importance ratio can never leave 1 is not GSPO or GRPO but REINFORCE
    under another name (TRL's defaults are such a run), and one in which it leaves 1 without an update measures noise.
    """
    check_fields(config)
    rl, tiny = config.algo != "sft", config.model == "tiny"
    if config.architecture != TrainConfig.architecture and not tiny:
        raise ValueError(f"got --architecture {config.architecture} with --model {config.model}, which states its own")
    if config.lora_r and config.lora_alpha <= 0:
        raise ValueError(f"got --lora-alpha {config.lora_alpha}: the adapter would stay without effect; want above 0")
    if config.accept_changes and not config.resume:
        raise ValueError("got --accept-changes without --resume RUN, want both, or neither: a new run has no changes")
    if config.resume and config.out not in ("", config.resume):
        raise ValueError(f"got --out {config.out} with --resume {config.resume}, want one: a run goes on in its folder")
    if "jsonl" in config.task and not config.data:
        raise ValueError("got --task jsonl without --data FILE.jsonl")
    if config.data and config.task != ("jsonl",):
        raise ValueError(f"got --data with --task {', '.join(config.task)}, want --task jsonl")
    if config.epochs and (not config.data or rl):
        why = "with RL on --data" if config.data else "without --data: a task's problems do not end"
        raise ValueError(f"got --epochs {config.epochs:g} {why}; want --steps")
    if config.epochs and config.steps != TrainConfig.steps:
        raise ValueError(f"got --epochs {config.epochs:g} and --steps {config.steps}, want one of them")
    if config.data and rl and not (config.reward or config.environment or judged):
        want = "--reward FILE.py:function, a name (exact, numeric, regex:PATTERN), or --algo sft to imitate rows"
        why = f"rows do not say what a good answer is; want {want}"
        raise ValueError(f"got --data with --algo {config.algo} and no --reward: {why}")
    if config.environment == "conversation" and (tiny or not rl):
        got = f"--task {', '.join(config.task)} with {'--model tiny' if tiny else '--algo sft'}"
        raise ValueError(f"got {got}: customers are talked to, turn by turn; want RL of an instruct --model")
    of_rl = "reward", "environment", "system", "max_prompt_tokens", "beta", "dynamic_sampling", "mask_truncated"
    for name in (*of_rl, "router_replay"):
        if not rl and getattr(config, name):
            raise ValueError(f"got {flag_name(name)} with --algo sft, which samples no answers; want --algo gspo")
    if config.quant != "none" and not config.lora_r:
        got = f"--quant {config.quant} with --lora-r 0 (full fine-tuning{', as configs/tiny.yaml says' * tiny})"
        raise ValueError(f"got {got}: packed weights cannot be trained; want an adapter over them, --lora-r 16")
    if config.adapter and not config.lora_r:
        raise ValueError("got --adapter with --lora-r 0 (full fine-tuning), want one or the other")
    if config.quant != "none" and config.shard == "on":
        got = f"--shard on with --quant {config.quant}, whose packed weights every process holds whole"
        raise ValueError(f"got {got}; want --shard auto, or --quant none")
    if not re.fullmatch(r"([1-9]\d{0,4}x[1-9]\d{0,4})?", config.plan_for):
        raise ValueError(f"got --plan-for {config.plan_for}, want PROCESSESxGB of a GPU, such as 2x80")
    if not re.fullmatch(r"(.+\.py:\w+|conversation|python)?", config.environment):
        raise ValueError(f"got --environment {config.environment}, want FILE.py:Class")
    if rl:
        check_rl(config)


def check_rl(config: TrainConfig) -> None:
    """The refusals of sampling and its objectives."""
    rows, updates, algo = config.prompts_per_rollout * config.group_size, config.updates_per_rollout, config.algo
    if algo == "grpo" and 0 < config.clip_high < 0.01:
        why = "that is GSPO's range, for ratios averaged over an answer; per token nearly everything would be clipped"
        raise ValueError(f"got --clip-high {config.clip_high} with grpo: {why}; want about 0.2, or 0 for the default")
    if config.group_size < 2:
        why = "an answer alone in its group has advantage 0; want 2 or more (8 is usual)"
        raise ValueError(f"got --group-size {config.group_size} with {algo}: {why}")
    if config.router_replay and algo == "reinforce":
        raise ValueError("got --router-replay with --algo reinforce, which scores no old policy; want gspo or grpo")
    if config.clip == "auto" and not algo.startswith("gspo"):
        raise ValueError(f"got --clip auto with {algo}, want --algo gspo: a token's range is far above noise")
    if updates == 1 and algo != "reinforce":
        why = "every ratio is then exactly 1, clipping never acts and the run is REINFORCE"
        want = "2 or more (4 in the GSPO paper), or REINFORCE by its name: --algo reinforce"
        raise ValueError(f"got --updates-per-rollout 1 with {algo}: {why}; want {want}")
    if rows % updates:
        want = f"a multiple of --updates-per-rollout {updates}"
        raise ValueError(f"got {rows} answers a rollout (prompts x group), want {want}")
    if config.temperature <= 0:
        why = "greedy answers of a group are all alike"
        raise ValueError(f"got --temperature {config.temperature} with {algo}, want more than 0: {why}")
    if config.top_k or config.top_p != 1:
        why = "the sampled distribution would not be the one that is scored, and the gradient would be biased"
        raise ValueError(f"got --top-k or --top-p in RL: {why}; want 0 and 1")
    if config.environment and config.max_episode_tokens <= config.max_new_tokens:
        got = f"--max-episode-tokens {config.max_episode_tokens} and --max-new-tokens {config.max_new_tokens}"
        raise ValueError(f"got {got} for each turn, want room for a prompt and several turns")
    if config.lora_dropout:
        why = "dropout moves the ratio by more than the clip range without any update; want 0"
        raise ValueError(f"got --lora-dropout {config.lora_dropout} with {algo}: {why}")
