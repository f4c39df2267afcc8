"""Other programs' flags and what they are called here, for the line that a wrong flag or YAML field ends in.

    python train.py --num-generations 16
    train.py: unknown flag --num-generations 16; here it is --group-size 16

TABLE holds them: their names -> (who has them, our flags, what differs). README.md shows it; a test keeps both equal.
Nothing is translated in silence: a word that means nearly the same thing would change a run without a trace.

Reading order: TABLE, translate, explain, explain_flags.      Tests: tests/test_words.py
"""

import re
import shlex
from collections.abc import Container, Sequence

# Who: T is TRL (GRPOConfig, SFTConfig, ModelConfig, its scripts), L LLaMA-Factory, O others (Unsloth, GSPO guides, and
# verl by the end of its dotted names). Our flags: {} is their value; a dict is by their value, with * for every other
# one; "" means that no flag of ours takes their value: the remark says what to do, in a dict that it is the default.
BATCH = (
    "SFT: --batch-size is per_device_train_batch_size x gradient_accumulation_steps; RL: an update has "
    "--prompts-per-rollout x --group-size / --updates-per-rollout answers; memory: --micro-batch-tokens"
)
GROUP, NONE = "--divide-by-std", "--no-divide-by-std"
LOSSES = {"grpo": "--loss-average sequence", "dapo": "--loss-average token", "dr_grpo": "--loss-average constant"}
LEFT_OUT = "longer ones are left out and counted, never cut"
TABLE: dict[str, tuple[str, str | dict[str, str], str]] = {
    "model_name_or_path": ("TL", "--model {}", ""),
    "model_name model.path": ("O", "--model {}", ""),
    "bf16": ("TL", {"true": "--dtype bf16", "false": "--dtype fp32"}, ""),
    "fp16": ("TL", {"true": "--dtype bf16", "false": ""}, "fp16 is not built; bf16 has the range of fp32"),
    "load_in_4bit": ("TO", {"true": "--quant nf4", "false": ""}, ""),
    "load_in_8bit": ("TO", {"true": "--quant int8", "false": ""}, ""),
    "use_4bit": ("O", {"true": "--quant nf4", "false": ""}, ""),
    "quantization_bit": ("L", {"4": "--quant nf4", "8": "--quant int8"}, ""),
    "use_peft": ("T", {"true": "--lora-r 16", "false": "--lora-r 0"}, ""),
    "use_lora": ("O", {"true": "--lora-r 16", "false": "--lora-r 0"}, ""),
    "finetuning_type": ("L", {"lora": "--lora-r 16", "full": "--lora-r 0"}, ""),
    "lora_rank": ("LO", "--lora-r {}", ""),
    "lora_target_modules": ("TO", {"all-linear": "", "*": "--lora-targets {}"}, ""),
    "lora_target": ("L", {"all": "", "*": "--lora-targets {}"}, ""),
    "trust_remote_code": ("TL", "", "leave it out: a checkpoint cannot run code here"),
    "dataset_name": ("T", "--data hf:{}", "a file: --data FILE.jsonl"),
    "dataset": ("L", "--data {}", "the file itself, not its name in dataset_info.json"),
    "cutoff_len": ("L", "--max-length {}", LEFT_OUT),
    "max_seq_length": ("O", "--max-length {}", f"of SFT rows; {LEFT_OUT}"),
    "max_prompt_length": ("O", "--max-prompt-tokens {}", LEFT_OUT),
    "val_size": ("L", "--eval-size {}", "a number of rows, not a fraction"),
    "packing": ("TL", "", "leave it out: rows are always packed, and none sees another"),
    "stage": ("L", {"sft": "--algo sft"}, ""),
    "output_dir": ("TL", "--out {}", ""),
    "num_train_epochs": ("TL", "--epochs {}", "SFT; RL counts its updates with --steps"),
    "max_steps": ("TL", {"-1": "", "*": "--steps {}"}, ""),
    "num_outer_iterations": ("O", "", "here --steps counts updates: rollouts x --updates-per-rollout"),
    "save_steps": ("TL", "--save-every {}", ""),
    "eval_steps": ("TL", "--eval-every {}", ""),
    "resume_from_checkpoint": ("TL", "--resume {}", "the run's folder, no checkpoint inside it"),
    "report_to": ("TL", "", "leave it out: metrics.jsonl and curves.png in the run folder have every number"),
    "learning_rate": ("TL", "--lr {}", ""),
    "optim.lr": ("O", "--lr {}", ""),
    "lr_scheduler_type": ("TL", {n: f"--lr-schedule {n}" for n in ("constant", "linear", "cosine")}, ""),
    "warmup_steps": ("TL", "--warmup-updates {}", ""),
    "warmup_ratio": ("L", "", "here --warmup-updates is a number of updates: the ratio x --steps"),
    "max_grad_norm": ("TL", "--grad-clip {}", ""),
    "optim": ("TL", "", "leave it out: the optimiser is AdamW on fp32 copies of what is trained"),
    "per_device_train_batch_size gradient_accumulation_steps": ("TL", "", BATCH),
    "num_generations": ("T", "--group-size {}", ""),
    "rollout.n gspo_group_size": ("O", "--group-size {}", ""),
    "train_batch_size": ("O", "--prompts-per-rollout {}", ""),
    "steps_per_generation": ("T", "", "here --updates-per-rollout: it / gradient_accumulation_steps; usually 4"),
    "num_iterations": ("T", "", "here a rollout is used once, in --updates-per-rollout minibatches, usually 4"),
    "ppo_mini_batch_size": ("O", "", "here --updates-per-rollout: train_batch_size / ppo_mini_batch_size"),
    "max_completion_length": ("T", "--max-new-tokens {}", ""),
    "max_response_length": ("O", "--max-new-tokens {}", ""),
    "epsilon": ("T", "--clip-low {}", "and --clip-high, where there is no epsilon_high"),
    "epsilon_high": ("T", "--clip-high {}", ""),
    "clip_range_left clip_ratio_low": ("O", "--clip-low {}", ""),
    "clip_range_right clip_ratio_high": ("O", "--clip-high {}", ""),
    "kl_loss_coef": ("O", "--beta {}", ""),
    "importance_sampling_level": ("T", {"token": "--algo grpo", "sequence": "--algo gspo"}, ""),
    "loss_type": ("T", LOSSES, ""),
    "scale_rewards": ("T", {"group": GROUP, "true": GROUP, "none": NONE, "false": NONE}, ""),
    "mask_truncated_completions": ("T", {"true": "--mask-truncated", "false": ""}, ""),
    "multi_objective_aggregation": ("T", "--reward-mix {}", ""),
    "reward_funcs": ("T", "--reward FILE.py:{}", "the file that has it, and its name there; it runs unchanged"),
    "reward_weights": ("T", "--reward FILE.py:function={}", "each reward with its weight"),
    "use_vllm": ("T", "", "leave it out: this process samples, from the very weights it trains"),
}
WORDS = {name: entry for names, entry in TABLE.items() for name in names.split()}
TRUTH = {"": "true", "1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}


def translate(name: str, values: Sequence[str], fields: Container[str]) -> tuple[str, str] | None:
    """(our flags, "" where none takes the value; what differs, or what to do) for a flag or field of another program.

    None where `name` is no word of theirs, or where `fields`, this program's, lack what it is called here. All
    spellings are read: --use-4bit, use_4bit, and actor_rollout_ref.rollout.n by its end.
    """
    parts = name.lstrip("-+").replace("-", "_").split(".")
    entry = WORDS.get(".".join(parts[-2:])) or WORDS.get(parts[-1])
    if not entry or not all(field in fields for field in fields_of(entry)):
        return None
    (_, ours, remark), value = entry, ",".join(values)
    default = "", "leave it out: so it is here by default"
    if isinstance(ours, dict):
        said = TRUTH.get(value.lower(), value.lower()) if "true" in ours else value.lower()
        if said not in ours and "*" not in ours and said not in ("none", "null"):
            return "", "here there is " + ", ".join(dict.fromkeys(filter(None, ours.values())))
        ours = ours.get(said) or ours.get("*" * (said not in ours), "")
        if not ours:
            return default
    elif ours and value.lower() in ("none", "null"):
        return default
    each = values if ours.startswith("--reward ") else [value] if value else []  # a reward has a flag of its own
    return " ".join(ours.replace("{}", shlex.quote(v)) for v in each) or ours.replace("{}", "VALUE"), remark


def fields_of(entry: tuple[str, str | dict[str, str], str]) -> list[str]:
    """Our fields that an entry names: those of its flags, or of its remark where no flag takes the value."""
    _, ours, remark = entry
    flags = " ".join(ours.values()) if isinstance(ours, dict) else ours
    return [f.replace("-", "_") for f in dict.fromkeys(re.findall(r"--(?:no-)?([a-z][a-z-]+)", flags or remark))]


def explain(name: str, values: Sequence[str], fields: Container[str], *, yaml: bool = False) -> str:
    """The end of an error line about `name`; "" where translate knows nothing. yaml: our flags as lines of a file."""
    found = translate(name, values, fields)
    if not found:
        return ""
    ours, remark = found
    if not ours:
        return f"; {remark}"
    return f"; here it is {in_yaml(ours) if yaml else ours}" + (f" ({remark})" if remark else "")


def in_yaml(flags: str) -> str:
    """--reward a --reward b --no-divide-by-std -> reward: [a, b], divide_by_std: false"""
    values: dict[str, list[str]] = {}
    for token in shlex.split(flags):
        if token.startswith("--"):
            no, field = token.startswith("--no-"), token.removeprefix("--no-").removeprefix("--").replace("-", "_")
            values.setdefault(field, ["false"] if no else [])
        else:
            values[field].append(token)
    return ", ".join(f"{f}: {'[' + ', '.join(v) + ']' if len(v) > 1 else (*v, 'true')[0]}" for f, v in values.items())


def explain_flags(unknown: Sequence[str], argv: Sequence[str], fields: Container[str]) -> str:
    """The line about the first unknown argument of a command, "" where translate knows nothing about it. The others
    that it knows follow without their remarks, so that a pasted command is corrected in one go."""
    line = ""
    for argument in unknown:
        name, equals, value = argument.partition("=")
        after = argv[argv.index(argument) + 1 :]
        stop = next((i for i, word in enumerate(after) if word.startswith("--")), len(after))
        values = [value] if equals else after[:stop]
        found = translate(name, values, fields)
        if not line and not found:
            return ""
        if not line:
            line = f"unknown flag {shlex.join([argument, *([] if equals else values)])}" + explain(name, values, fields)
        elif found and found[0]:
            line += f"; {name} is {found[0]}"
    return line
