"""nanogspo/words.py: another program's flag ends in one line that names ours, and every such line is true.

Run: python -m pytest tests/test_words.py      python tests/test_words.py writes the README's table anew
"""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the call without pytest

from nanogspo.config import ROOT, SampleConfig, TrainConfig, check, dump, load_yaml, parse
from nanogspo.words import TABLE, WORDS, explain, fields_of, translate

FIELDS = {f.name for f in dataclasses.fields(TrainConfig)}
# Our flags that are on their way: until TrainConfig has one, no line names it
PENDING = set()

README = ROOT / "README.md"
START, END = "<!-- words: python tests/test_words.py writes this table -->\n", "<!-- end of words -->\n"


def readme_table() -> str:
    """A row for each flag of ours, or for those that together say what one of theirs does."""
    rows: dict[str, list[list[str]]] = {}
    for names, entry in TABLE.items():
        here = ", ".join("`--" + f.replace("_", "-") + "`" for f in fields_of(entry)) or "nothing to set"
        for column, who in enumerate("TLO"):
            row = rows.setdefault(here, [[], [], []])
            row[column] += [f"`{name}`" for name in names.split() if who in entry[0]]
    lines = ["| here | TRL | LLaMA-Factory | Unsloth, verl, GSPO guides |", "|---|---|---|---|"]
    lines += [f"| {' | '.join([here, *map(', '.join, columns)])} |" for here, columns in rows.items()]
    return "\n".join(lines) + "\n"


def refused(capsys, config_class, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(config_class, list(argv), "train.py")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err.removeprefix("train.py: ").rstrip("\n")


# ----------------------------------------------------------------------------
# the table against this program, TRL and the README


def test_every_flag_that_is_named_exists():
    named = set()
    for _, ours, remark in WORDS.values():
        flags = f"{' '.join(ours.values()) if isinstance(ours, dict) else ours} {remark}"
        named |= {f.replace("-", "_") for f in re.findall(r"--(?:no-)?([a-z][a-z-]+)", flags)}
    assert named - FIELDS - PENDING == set()
    assert PENDING & FIELDS == set(), "these exist now: take them out of PENDING"
    assert PENDING <= named


def test_the_table_has_no_name_of_ours_which_no_line_could_reach():
    assert set(WORDS) & FIELDS == set()
    assert sum(len(names.split()) for names in TABLE) == len(WORDS), "a name stands twice"


VALUES = {
    "--reward-mix": "sum_then_normalize", "--reward": "exact", "--lora-targets": "q_proj,v_proj", "--clip-low": "0.1",
    "--clip-high": "0.1", "--lr": "1e-6",
}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_every_translation_parses_and_is_accepted(tmp_path, name):
    (tmp_path / "config.yaml").write_text(dump(TrainConfig(model="some/checkpoint")), encoding="utf-8")
    ours = WORDS[name][1]
    for text in filter(None, ours.values() if isinstance(ours, dict) else [ours]):
        if set(fields_of(("", text, ""))) & PENDING:
            continue
        flag = shlex.split(text)[0]
        value = str(tmp_path) if flag == "--resume" else VALUES.get(flag, "2")
        rows = ["--data", "rows.jsonl", "--algo", "sft"] if flag in ("--epochs", "--data", "--max-length") else []
        argv = ["--model", "some/checkpoint"] * (flag != "--resume") + rows + shlex.split(text.replace("{}", value))
        config, given = parse(TrainConfig, argv, "train.py")
        check(config)
        assert set(fields_of(("", text, ""))) <= given


def test_trl_has_the_names_that_are_said_to_be_its():
    """Read from its source: importing TRL takes twelve seconds."""

    def declared(path):
        return {
            line.target.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef)
            for line in node.body
            if isinstance(line, ast.AnnAssign)
        }

    if not (spec := importlib.util.find_spec("trl")):
        pytest.skip("TRL is an oracle of requirements-test.txt")
    trl = Path(spec.origin).parent
    files = ["trainer/grpo_config.py", "trainer/sft_config.py", "trainer/model_config.py", "trainer/base_config.py"]
    theirs = set().union(*(declared(trl / file) for file in [*files, "scripts/utils.py", "scripts/grpo.py"]))
    theirs |= declared(Path(importlib.util.find_spec("transformers").origin).parent / "training_args.py")
    ours = {name for name, (who, _, _) in WORDS.items() if "T" in who}
    assert ours - theirs == set() and len(ours) > 30


def test_the_readme_shows_the_table():
    text = README.read_text(encoding="utf-8")
    assert readme_table() in text, "python tests/test_words.py writes it anew"
    assert text.count(START) == text.count(END) == 1


# ----------------------------------------------------------------------------
# the lines


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--num-generations 16", "unknown flag --num-generations 16; here it is --group-size 16"),
        ("--num_generations=16", "unknown flag --num_generations=16; here it is --group-size 16"),
        ("--steps 3 --num-generations", "unknown flag --num-generations; here it is --group-size VALUE"),
        (
            "--cutoff-len 9 --lr 1e-5",
            "unknown flag --cutoff-len 9; here it is --max-length 9 (longer ones are left out and counted, never cut)",
        ),
        ("--use-4bit", "unknown flag --use-4bit; here it is --quant nf4"),
        ("--use-4bit --steps 3", "unknown flag --use-4bit; here it is --quant nf4"),
        ("--load_in_4bit yes", "unknown flag --load_in_4bit yes; here it is --quant nf4"),
        ("--load_in_4bit False", "unknown flag --load_in_4bit False; leave it out: so it is here by default"),
        ("--fp16 0", "unknown flag --fp16 0; leave it out: so it is here by default"),
        ("--max_steps -1", "unknown flag --max_steps -1; leave it out: so it is here by default"),
        ("--max_steps 30", "unknown flag --max_steps 30; here it is --steps 30"),
        ("--scale_rewards none", "unknown flag --scale_rewards none; here it is --no-divide-by-std"),
        ("--scale-rewards x", "unknown flag --scale-rewards x; here there is --divide-by-std, --no-divide-by-std"),
        ("--quantization_bit 5", "unknown flag --quantization_bit 5; here there is --quant nf4, --quant int8"),
        ("--quantization_bit None", "unknown flag --quantization_bit None; leave it out: so it is here by default"),
        ("--output_dir None", "unknown flag --output_dir None; leave it out: so it is here by default"),
        ("--output_dir 'a b'", "unknown flag --output_dir 'a b'; here it is --out 'a b'"),
        (
            "--lora_target_modules q_proj v_proj",
            "unknown flag --lora_target_modules q_proj v_proj; here it is --lora-targets q_proj,v_proj",
        ),
        ("actor_rollout_ref.rollout.n=8", "unknown flag actor_rollout_ref.rollout.n=8; here it is --group-size 8"),
        ("+data.train_batch_size=8", "unknown flag +data.train_batch_size=8; here it is --prompts-per-rollout 8"),
    ],
)
def test_a_flag_of_another_program(capsys, argv, line):
    assert refused(capsys, TrainConfig, *shlex.split(argv)) == line


@pytest.mark.parametrize("name", [name for name, entry in WORDS.items() if entry[1] == ""])
def test_where_no_flag_takes_the_value_the_remark_says_what_to_do(capsys, name):
    assert refused(capsys, TrainConfig, f"--{name}=3") == f"unknown flag --{name}=3; {WORDS[name][2]}"


def test_a_pasted_command_is_corrected_in_one_go(capsys):
    argv = "--num_generations 16 --optim x --learning_rate=1e-6 --mine 3 --bf16"
    assert refused(capsys, TrainConfig, *argv.split()) == (
        "unknown flag --num_generations 16; here it is --group-size 16; --learning_rate is --lr 1e-6; "
        "--bf16 is --dtype bf16"
    )


def test_one_that_is_misspelled_gets_the_nearest_as_before(capsys):
    assert refused(capsys, TrainConfig, "--stepz", "3", "--bf16") == "unknown flag --stepz; did you mean --steps?"


def test_sample_names_only_flags_that_it_has(capsys):
    line = refused(capsys, SampleConfig, "--max_completion_length", "9")
    assert line == "unknown flag --max_completion_length 9; here it is --max-new-tokens 9"
    assert "group-size" not in refused(capsys, SampleConfig, "--num-generations", "9")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("num_generations: 16", "unknown field 'num_generations'; here it is group_size: 16"),
        ("num-generations: 16", "unknown field 'num-generations'; here it is group_size: 16"),
        ("bf16: true", "unknown field 'bf16'; here it is dtype: bf16"),
        ("scale_rewards: false", "unknown field 'scale_rewards'; here it is divide_by_std: false"),
        ("scale_rewards: true", "unknown field 'scale_rewards'; here it is divide_by_std: true"),
        ("lora_target: [q_proj, v_proj]", "unknown field 'lora_target'; here it is lora_targets: q_proj,v_proj"),
        ("resume_from_checkpoint: null", "'resume_from_checkpoint'; leave it out: so it is here by default"),
        ("dataset: a.jsonl", "data: a.jsonl (the file itself, not its name in dataset_info.json)"),
        ("dataset: {a: b}", "here it is data: VALUE (the file itself, not its name in dataset_info.json)"),
        ("optim: adamw", "; leave it out: the optimiser is AdamW on fp32 copies of what is trained"),
        ("stepz: 3", "unknown field 'stepz'; did you mean steps?"),
    ],
)
def test_a_field_of_another_programs_yaml(tmp_path, text, end):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_yaml(path, TrainConfig, "")
    assert str(error.value).startswith(f"{path}:1: unknown field ") and str(error.value).endswith(end)


def test_rewards_are_named_one_by_one():
    fields = {"reward"}
    assert translate("--reward_funcs", ["f", "g"], fields)[0] == "--reward FILE.py:f --reward FILE.py:g"
    assert "reward: [FILE.py:f, FILE.py:g] (" in explain("reward_funcs", ["f", "g"], fields, yaml=True)
    assert translate("reward_weights", ["0.7"], fields)[0] == "--reward FILE.py:function=0.7"
    assert translate("reward_funcs", ["f"], set()) is None  # a program without it


if __name__ == "__main__":
    before, _, after = README.read_text(encoding="utf-8").partition(START)
    README.write_text(before + START + "\n" + readme_table() + "\n" + END + after.partition(END)[2], encoding="utf-8")
