"""nanogspo/config.py: one record is the flags, the YAML and the saved file; what cannot work is refused, with a reason.

Run: python -m pytest tests/test_config.py
"""

import contextlib
import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nanogspo.config import (
    ROOT,
    SampleConfig,
    TrainConfig,
    check,
    check_fields,
    dump,
    load_yaml,
    parse,
    parser,
    resolve,
)

FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
REAL = "some/checkpoint"  # not tiny, so that configs/tiny.yaml is not read


def train(*argv):
    return parse(TrainConfig, list(argv), "train.py")


def flag(name):
    return "--" + name.replace("_", "-")


def value_of(field):
    """Any value its type, or its choices, allow."""
    if field.metadata["choices"]:
        return st.sampled_from(field.metadata["choices"])
    text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
    text = text.filter(lambda s: not s.startswith(("-", "~")))  # a flag; the home folder, which has a test of its own
    kinds = {int: st.integers(-(10**9), 10**9), float: st.floats(allow_nan=False), bool: st.booleans(), str: text}
    kinds[tuple[str, ...]] = st.lists(text.filter(bool), max_size=3).map(tuple)  # given several times
    return kinds[field.type]


SOME = st.fixed_dictionaries({}, optional={n: value_of(f) for n, f in FIELDS.items() if n not in ("resume", "model")})


def argv_of(values):
    """An empty text is no flag's value: it is the default, or an unset variable of a shell."""
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif isinstance(value, tuple):
            argv += [f"{flag(name)}={one}" for one in value]
        else:
            argv.append(f"{flag(name)}={value}")
    return argv


# ----------------------------------------------------------------------------
# one declaration, three forms


# epochs, which rule out steps, have a test of their own
ANY = SOME.map(lambda values: {name: value for name, value in values.items() if name != "epochs"})
GIVEN = ANY.map(lambda values: {name: value for name, value in values.items() if value not in ("", ())})


@given(values=GIVEN)
def test_every_field_is_a_flag(values):
    config, given_names = train("--model", REAL, *argv_of(values))
    if values.get("data"):  # says what the task is
        values = {"task": "jsonl", **values}
    assert config == TrainConfig(model=REAL, **values)
    assert given_names == {"model", *values}


@given(values=ANY, over=GIVEN)
def test_yaml_wins_over_defaults_and_flags_win_over_yaml(tmp_path_factory, values, over):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(yaml.safe_dump({"model": REAL, **values}), encoding="utf-8")
    assert train("--config", str(path))[0] == TrainConfig(**{"model": REAL, **values})
    config, given_names = train("--config", str(path), *argv_of(over))
    if over.get("data") and "task" not in over:
        over = {**over, "task": "jsonl"}  # nothing else --data could mean
    assert config == TrainConfig(**{"model": REAL, **values, **over})
    assert given_names == {"model", *values, *over}


@given(values=SOME)
def test_a_saved_record_is_read_back_as_it_was(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    config = TrainConfig(**values)
    path.write_text(dump(config), encoding="utf-8")
    # without its own folder: a copy given to --config must not go on with the run it came from
    one_call = {"out": "", "resume": "", "accept_changes": False, "check": False, "plan_only": False}
    one_call |= {"ignore_memory_plan": False, "plan_for": ""}
    assert TrainConfig(**load_yaml(path, TrainConfig, "")) == dataclasses.replace(config, **one_call)
    fields = [name for name in FIELDS if name not in one_call]
    assert list(yaml.safe_load(dump(config))) == fields  # in the order they are declared: a file to read


def test_help_names_every_flag_with_what_it_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # help is wrapped to the terminal, at hyphens too
    text = " ".join(parser(TrainConfig, "train.py").format_help().split())
    for name, field in FIELDS.items():
        assert f" {flag(name)}" in text
        assert field.metadata["help"] in text
    for f in dataclasses.fields(SampleConfig):
        assert f.metadata["help"] in " ".join(parser(SampleConfig, "sample.py").format_help().split())


def test_help_is_in_groups_and_shows_both_defaults(monkeypatch):
    """What a real model gets, and what plain `python train.py` takes from configs/tiny.yaml where that differs."""
    monkeypatch.setenv("COLUMNS", "1000")
    text = parser(TrainConfig, "train.py").format_help()
    places = [text.index(f"\n{title}:\n") for title in ("what", "how long", "rollout", "objective", "optimiser")]
    assert places == sorted(places) and places[1] < text.index("--steps") < places[2] < text.index("--group-size")
    text = " ".join(text.split())
    assert f"{FIELDS['group_size'].metadata['help']} (default: 8) --" in text
    assert f"{FIELDS['save_merged'].metadata['help']} (default: off) --" in text
    assert f"{FIELDS['adapter'].metadata['help']} --" in text  # none is not a value
    assert "flags win over it what:" in text
    tiny = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    other = {name: value for name, value in tiny.items() if value != FIELDS[name].default and name != "task"}
    assert len(other) > 10 and text.count("; tiny: ") == len(other)
    for name, value in other.items():
        assert f"{FIELDS[name].metadata['help']} (default: {FIELDS[name].default}; tiny: {value})" in text


def test_plain_train_reads_tiny_yaml_and_a_real_model_does_not():
    tiny = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    assert train()[0] == train("--model", "tiny")[0] == TrainConfig(**tiny)
    assert train("--steps", "3")[0] == TrainConfig(**{**tiny, "steps": 3})
    assert train("--model", REAL)[0] == TrainConfig(model=REAL)


@pytest.mark.parametrize("text", ["on", "off", "true", "'on'", "auto"])
def test_on_and_off_need_no_quotes_in_yaml(tmp_path, text):
    """YAML 1.1 takes them for truth values."""
    (tmp_path / "c.yaml").write_text(f"gradient_checkpointing: {text}\nthinking: {text}\n")
    config, _ = train("--config", str(tmp_path / "c.yaml"))
    want = {"true": "on", "'on'": "on"}.get(text, text)
    assert config.gradient_checkpointing == config.thinking == want


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load_and_pass_the_checks(path):
    values = load_yaml(path, TrainConfig, "")
    needs_file = ["--data", "rows.jsonl"] if values.get("task") == ("jsonl",) and not values.get("data") else []
    config, _ = train("--config", str(path), *needs_file)
    check(config)
    check(resolve(config, 10**9))


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "'3e-4'"])
def test_yaml_floats_without_a_dot_are_floats(tmp_path, text):
    """YAML 1.1 reads 3e-4 as a string: a learning rate that only fails when it is multiplied."""
    (tmp_path / "c.yaml").write_text(f"lr: {text}\nlora_alpha: 16\n")
    config, _ = train("--config", str(tmp_path / "c.yaml"))
    assert (config.lr, config.lora_alpha) == (3e-4, 16.0)
    assert type(config.lr) is type(config.lora_alpha) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown field 'stepz'; did you mean steps?"),
        ("1: 3", "unknown field '1'"),
        ("steps: many", "steps is 'many' (str), want int"),
        ("steps: 3.5", "steps is '3.5' (float), want int"),
        ("steps: true", "steps is 'true' (bool), want int"),
        ("lr: true", "lr is 'true' (bool), want float"),
        ("lr: fast", "lr is 'fast' (str), want float"),
        ("steps:", "steps is empty, want int"),
        ("control: 1", "control is '1' (int), want bool"),
        ("algo: ppo", "algo is 'ppo' (str), want one of gspo, grpo, sft"),
        ("model: 3", "model is '3' (int), want text: write model: \"3\""),
        ("model: no", "model is 'no' (bool), want text: write model: \"no\""),
        ("model: 2026-01-31", "model is '2026-01-31' (timestamp), want text: write model: \"2026-01-31\""),
        ("model: 2026-13-45", "model is '2026-13-45' (timestamp)"),  # no day of any calendar
        ("model: ~", "model is '~' (null), want text"),
        ("steps: 010", "steps is '010' (int), which YAML 1.1 reads as 8: write steps: 8 if you mean that"),
        ("steps: 1:30", "steps is '1:30' (int), which YAML 1.1 reads as 90: write steps: 90"),
        ("steps: 1_000", "write steps: 1000"),
        ("lr: 0x10", "write lr: 16"),
        ("lr: 1:30.5", "write lr: 90.5"),
        ("steps: 1e3", "steps is '1e3' (str), want int"),
        ("steps: " + "9" * 5000, "steps is '99999"),
        ("steps: 0" + "7" * 5000, "steps is '07777"),
        ("steps: !!int '[['", "steps is '[[' (int), want int"),
        ("steps: !!python/object:os.system 3", "steps is '3' (python/object:os.system), want int"),
        ("algo: gspo\nsteps: 1\nalgo: sft", "c.yaml:3: got algo a second time, want every field once"),
        ("steps: [1]", "steps is a sequence, want one value (int)"),
        ("a: &a [x]\nsteps: *a", "unknown field 'a'"),
        ("steps: &a [*a]", "steps is a sequence"),
        ("[1]: 3", "unknown field"),
        ("<<: {steps: 1}", "unknown field '<<'"),
        ("steps: " + "[" * 500, "nested too deeply"),
        ("{a: " * 500, "nested too deeply"),
        ("", "got an empty file"),
        ("# nothing\n", "got an empty file"),
        ("steps", "got scalar, want `field: value` lines"),
        ("steps: 1\n---\nsteps: 2", "not YAML (but found another document)"),
        ("steps: 1\nlr: %", "c.yaml:2: not YAML"),
        ("steps: 1\0", "not YAML"),
        ("- steps", "got sequence, want `field: value` lines"),
        ("steps: [", "not YAML"),
        ("a: b: c", "not YAML"),
    ],
)
def test_a_wrong_yaml_file_is_named_with_its_field(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        train("--config", str(path))
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_yaml_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ValueError, match="want (a YAML file|UTF-8)") as error:
            train("--config", str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="want a YAML file"):
        train("--config", "zero\0byte")
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\r\nmodel: 'no'\r\n")  # as Windows' editors save
    assert train("--config", str(tmp_path / "marked.yaml"))[0] == TrainConfig(steps=3, model="no")


# ----------------------------------------------------------------------------
# wrong flags


def refused(capsys, config_class, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(config_class, list(argv), "prog.py")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("prog.py: ") and len(err) < 600
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
        (["--stepz=3"], "unknown flag --stepz=3; did you mean --steps?"),
        (["--groupsize", "3"], "did you mean --group-size?"),
        (["--no-controll"], "did you mean --no-control?"),
        (["--lora_r", "3"], "did you mean --lora-r?"),
        (["--step", "3"], "did you mean --steps?"),  # an abbreviation is no flag: it would change meaning with the next
        (["--qqqqqqqq"], "unknown flag --qqqqqqqq; --help lists them"),
        (["stray"], "unknown flag stray"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--algo", "ppo"], "argument --algo: invalid choice: 'ppo'"),
        (["--control", "yes"], "unknown flag yes"),
        (["--steps", "9" * 5000], "argument --steps: invalid int value"),
        (["--resume", ""], "got an empty --resume, want a value, or no such flag"),  # an unset variable of a shell
        (["--config="], "got an empty --config"),
        (["two\nlines"], "unknown flag two\\nlines"),
        (["\udcff"], "unknown flag \\udcff"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_exit_code_2(capsys, argv, message):
    assert message in refused(capsys, TrainConfig, *argv)


def test_sample_flags(capsys):
    config, names = parse(SampleConfig, ["--model", "m", "12+7="], "sample.py")
    assert config == SampleConfig(model="m", prompt="12+7=") and names == {"model", "prompt"}
    assert parse(SampleConfig, ["12+7=", "--model", "m"], "sample.py")[0] == config
    assert "did you mean --temperature?" in refused(capsys, SampleConfig, "--temprature", "1")
    assert "unknown flag two" in refused(capsys, SampleConfig, "one", "two")


def test_help_and_wrong_flags_answer_without_torch():
    """In a process of its own: whoever mistypes a flag does not wait two seconds for an import to hear so."""
    code = "import sys, nanogspo.config as c; c.parse(c.TrainConfig, [], 'train.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ----------------------------------------------------------------------------
# --resume


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    """In flags (--out=~/x reaches Python as it is), in YAML, and where --resume compares the two; in no other text."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # its name on Windows
    home = str(tmp_path)
    paths = {"model": "~/m", "adapter": "~/a", "data": "~/d.jsonl"}
    config, _ = parse(TrainConfig, [f"--{n}={p}" for n, p in {**paths, "out": "~/o"}.items()], "train.py")
    assert [config.model, config.adapter, config.data, config.out] == [
        home + end for end in ("/m", "/a", "/d.jsonl", "/o")
    ]
    (tmp_path / "run").mkdir()
    for file in ("run/config.yaml", "c.yaml"):
        (tmp_path / file).write_text(yaml.safe_dump({**paths, "task": "jsonl"}))
    for flags in (["--config", "~/c.yaml"], ["--resume", "~/run", "--model", "~/m"]):
        config, _ = parse(TrainConfig, flags, "train.py")
        assert [config.model, config.adapter, config.data] == [home + end for end in ("/m", "/a", "/d.jsonl")]
    assert config.resume == config.out == home + "/run"
    argv = ["--model=~/m", "--adapter=~/a", "--prompts=~/p", "--prompt=~/x", "--system=~/y"]
    config, _ = parse(SampleConfig, argv, "sample.py")
    assert [config.model, config.adapter, config.prompts] == [home + end for end in ("/m", "/a", "/p")]
    assert (config.prompt, config.system) == ("~/x", "~/y")


def test_a_run_is_as_long_as_steps_or_as_epochs_say(tmp_path):
    """The default of --steps counts as given when it is; a flag wins over what a file says of either."""
    for argv in (["--epochs", "2", "--steps", "200"], ["--config", "both.yaml"]):
        (tmp_path / "both.yaml").write_text("epochs: 2\nsteps: 200\n")
        with contextlib.chdir(tmp_path), pytest.raises(ValueError, match="got --epochs and --steps, want one of them"):
            train(*argv)
    (tmp_path / "steps.yaml").write_text("steps: 7\n")
    (tmp_path / "epochs.yaml").write_text("epochs: 3\n")
    cases = [("steps", [], 7, 0), ("steps", ["--epochs", "2"], 200, 2), ("epochs", [], 200, 3)]
    for name, argv, steps, epochs in [*cases, ("epochs", ["--steps", "200"], 200, 0)]:
        config, _ = train("--config", str(tmp_path / f"{name}.yaml"), *argv)
        assert (config.steps, config.epochs) == (steps, epochs)


def test_a_prompt_is_given_once():
    with pytest.raises(ValueError, match="got a prompt and --prompt 'a', want one of them"):
        parse(SampleConfig, ["--model", REAL, "--prompt", "a", "b"], "sample.py")


def test_resume_reads_the_runs_own_config_and_flags_win(tmp_path):
    saved = TrainConfig(model=REAL, steps=10, seed=5, out="elsewhere", resume="old")
    (tmp_path / "config.yaml").write_text(dump(saved))
    config, _ = train("--resume", str(tmp_path), "--steps", "20")
    assert config == dataclasses.replace(saved, steps=20, out=str(tmp_path), resume=str(tmp_path))
    check(config)
    with pytest.raises(ValueError, match="absent.*want the folder of an earlier run"):
        train("--resume", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="--config with --resume"):
        train("--resume", str(tmp_path), "--config", str(ROOT / "configs" / "tiny.yaml"))


def test_a_resumed_run_keeps_its_held_out_rows(tmp_path):
    """Other ones might have been trained on. Of a task, problems to evaluate on are never trained on anyway."""
    for data in ("", "rows.jsonl"):
        record = TrainConfig(model="x", algo="sft", data=data, task="jsonl" if data else "addition", eval_size=20)
        (tmp_path / "config.yaml").write_text(dump(record))
        if data:
            with pytest.raises(ValueError, match=r"another --eval-size \(was 20\): rows that were trained on"):
                train("--resume", str(tmp_path), "--eval-size", "10", "--accept-changes")
        else:
            assert train("--resume", str(tmp_path), "--eval-size", "10")[0].eval_size == 10


# ----------------------------------------------------------------------------
# resolve and check

AT_LEAST_1 = (
    "steps prompts_per_rollout updates_per_rollout max_new_tokens batch_size micro_batch_tokens save_every max_length"
    " warm_probe"
).split()
AT_LEAST_0 = (
    "eval_every warm_steps warmup_updates lora_r lr warm_lr weight_decay clip_low clip_high threads task_size"
    " rollout_rows"
).split()
FLOATS = [name for name, field in FIELDS.items() if field.type is float]
REFUSALS = [
    *[({name: 0}, f"{flag(name)} 0, want 1 to ") for name in AT_LEAST_1],
    *[({name: -1}, f"{flag(name)} -1, want 1 to ") for name in AT_LEAST_1],
    *[({name: -1}, f"{flag(name)} -1, want 0 to ") for name in AT_LEAST_0],
    *[({name: math.nan}, f"{flag(name)} nan, want ") for name in FLOATS],
    *[({name: math.inf}, f"{flag(name)} inf, want ") for name in FLOATS],
    ({"seed": -1}, "--seed -1, want 0 to"),
    ({"seed": 2**63}, "--seed 9223372036854775808, want 0 to"),
    ({"steps": 10**30}, "--steps 1000000000000000000000000000000, want 1 to 1000000000"),
    ({"steps": 10**300}, "--steps 1000000000000000000000000000000000000000, want"),  # cut: one line that can be read
    ({"threads": 1025}, "--threads 1025, want 0 to 1024"),
    ({"group_size": 10**9}, "--group-size 1000000000, want 1 to 1000000"),
    ({"clip_low": 1.0}, "--clip-low 1.0, want 0 to less than 1"),
    ({"clip_high": 2.0}, "--clip-high 2.0, want 0 to less than 1"),
    ({"lr": 1.5}, "--lr 1.5, want 0 to 1"),
    ({"algo": "sft", "top_p": 2.0}, "--top-p 2.0, want more than 0 to 1"),
    ({"algo": "sft", "top_p": 0.0}, "--top-p 0.0, want more than 0 to 1"),
    ({"out": "a\0b"}, "--out 'a\\x00b', want UTF-8 text"),
    ({"model": "\udcff"}, "--model '\\udcff', want UTF-8 text"),
    ({"grad_clip": 0.0}, "--grad-clip 0.0, want more than 0"),
    ({"warm_until": 0.0}, "--warm-until 0.0, want more than 0"),
    ({"lora_alpha": 0.0}, "--lora-alpha 0.0: the adapter would stay without effect"),
    ({"algo": "sft", "lora_dropout": 1.0}, "--lora-dropout 1.0, want 0 to less than 1"),
    ({"algo": "sft", "lora_dropout": -0.1}, "--lora-dropout -0.1"),
    ({"resume": "a", "out": "b"}, "--out b with --resume a"),
    ({"task": "jsonl"}, "--task jsonl without --data"),
    ({"eval_size": -2}, "--eval-size -2, want -1 to 1000000"),
    ({"accept_changes": True}, "--accept-changes without --resume RUN, want both, or neither"),
    ({"epochs": 2.0, "algo": "sft"}, "--epochs 2 without --data: a task's problems do not end; want --steps"),
    ({"epochs": 2.0, "steps": 3, "data": "f", "task": "jsonl", "algo": "sft"}, "--epochs 2 and --steps 3, want one"),
    ({"data": "f.jsonl", "task": "addition"}, "--data with --task addition, want --task jsonl"),
    ({"data": "f.jsonl", "task": "jsonl"}, "--data with --algo gspo and no --reward: rows do not say"),
    ({"adapter": "a", "lora_r": 0}, "--adapter with --lora-r 0"),
    ({"group_size": 1}, "--group-size 1 with gspo: an answer alone in its group has advantage 0"),
    ({"group_size": 1, "algo": "grpo"}, "--group-size 1 with grpo"),
    ({"updates_per_rollout": 1}, "--updates-per-rollout 1 with gspo: every ratio is then exactly 1"),
    ({"updates_per_rollout": 1, "algo": "grpo"}, "--updates-per-rollout 1 with grpo"),
    ({"prompts_per_rollout": 3, "group_size": 3}, "9 answers a rollout"),
    ({"temperature": 0.0}, "--temperature 0.0 with gspo, want more than 0"),
    ({"temperature": -1.0}, "--temperature -1.0"),
    ({"top_k": 5}, "--top-k or --top-p in RL: the sampled distribution would not be the one that is scored"),
    ({"top_p": 0.9}, "--top-k or --top-p in RL"),
    ({"lora_dropout": 0.1}, "--lora-dropout 0.1 with gspo: dropout moves the ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_what_cannot_work_is_refused_with_its_reason(values, message):
    with pytest.raises(ValueError) as error:
        check(TrainConfig(**{"model": REAL, **values}))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": -1}, "--max-new-tokens -1, want 1 to 10000000"),
        ({"temperature": math.inf}, "--temperature inf, want 0 to 100"),
        ({"temperature": -0.1}, "--temperature -0.1, want 0 to 100"),
        ({"top_p": 2.0}, "--top-p 2.0, want more than 0 to 1"),
        ({"top_p": 0.0}, "--top-p 0.0, want more than 0 to 1"),
        ({"top_k": -1}, "--top-k -1, want 0 to"),
        ({"seed": 2**63}, "--seed 9223372036854775808, want 0 to 9223372036854775807"),
        ({"prompt": "\udcff"}, "--prompt '\\udcff', want UTF-8 text"),
        ({"thinking": "maybe"}, "got --thinking 'maybe', want one of auto, on, off"),
    ],
    ids=str,
)
def test_fields_of_sampling_have_bounds(values, message):
    with pytest.raises(ValueError) as error:
        check_fields(SampleConfig(**values))
    assert message in str(error.value)
    check_fields(SampleConfig(temperature=0.0, top_p=1.0, seed=2**63 - 1, max_new_tokens=1))


NUMBERS = "0 -1 -0 1e400 -1e400 nan inf 1e308 5e-324 1_0 0x10 010 ٣ 1: 9223372036854775808 99999999999999999999".split()
ABSURD = [
    *NUMBERS,
    "1" * 5000,
    "",
    " ",
    "a\nb",
    "\0",
    "\udcff",
    "-",
    "--",
    "--=",
    "-1-",
    "=",
    "%s",
    "{}",
    "~",
    "🙂" * 300,
]


@pytest.mark.parametrize("config_class", [TrainConfig, SampleConfig])
def test_no_value_of_a_flag_makes_a_traceback(config_class, capsys):
    """Every flag with every absurd value, as one word and as two: a record that passes its checks, or one line."""
    names = [*(f.name for f in dataclasses.fields(config_class)), "config"]
    accepted = 0
    for name, value, apart in itertools.product(names, ABSURD, (True, False)):
        argv = [flag(name), value] if apart else [f"{flag(name)}={value}"]
        try:
            config, _ = parse(config_class, argv, "prog.py")
            (check if config_class is TrainConfig else check_fields)(config)
        except SystemExit as stop:
            line = capsys.readouterr().err
            assert stop.code == 2 and line.count("\n") == 1 and line.startswith("prog.py: "), argv
            continue
        except ValueError as error:
            assert str(error).count("\n") <= ("\n" in value), argv
            continue
        accepted += 1
        numbers = [getattr(config, f.name) for f in dataclasses.fields(config) if f.type in (int, float)]
        # -1 is eval_size's default
        assert all(-1 <= number < (2**63 if type(number) is int else 1e31) for number in numbers), argv
    assert accepted


def test_what_only_rl_cannot_do_is_allowed_in_sft():
    check(TrainConfig())
    check(TrainConfig(algo="grpo"))
    sft = {
        "algo": "sft",
        "group_size": 1,
        "updates_per_rollout": 1,
        "temperature": 0.0,
        "top_k": 5,
        "lora_dropout": 0.1,
    }
    check(TrainConfig(**sft))
    check(TrainConfig(algo="sft", task="jsonl", data="f.jsonl"))
    check(TrainConfig(algo="sft", task="jsonl", data="f.jsonl", epochs=0.5))
    check(TrainConfig(lora_r=0, lora_alpha=0.0))


@given(
    algo=st.sampled_from(["gspo", "grpo", "sft"]),
    model=st.sampled_from(["tiny", REAL]),
    lora_r=st.sampled_from([0, 16]),
    parameters=st.integers(1, 10**12),
)
def test_resolve_fills_what_is_open_and_nothing_else(algo, model, lora_r, parameters):
    open_ = TrainConfig(algo=algo, model=model, lora_r=lora_r)
    config = resolve(resolve(open_), parameters)
    assert resolve(config, 7) == config  # a saved record is not filled again, whatever the model
    if algo != "sft":
        assert (config.clip_low, config.clip_high) == ((3e-4, 4e-4) if algo == "gspo" else (0.2, 0.27))
    most = 5e-6 * (10 if lora_r else 1) * (1 + 1e-9)
    assert 0 < config.lr <= most * (4 if algo == "sft" else 1) and 0 < config.warm_lr <= most * 4
    larger = resolve(open_, parameters * 4)
    if parameters >= 0.6e9:
        assert larger.lr == pytest.approx(config.lr / 2)  # the square root of the size
    changed = {n for n in FIELDS if getattr(config, n) != getattr(open_, n)}
    assert config.eval_size == 200 and resolve(dataclasses.replace(open_, data="f")).eval_size == -1  # the file decides
    assert changed == {"eval_size", "lr", "warm_lr", "clip_low", "clip_high"}
    mine = dataclasses.replace(open_, eval_size=0, lr=0.5, warm_lr=0.5, clip_low=0.1, clip_high=0.3)
    assert resolve(mine, parameters) == mine


def test_the_tiny_runs_exam_is_not_asked_of_a_file():
    rows, _ = parse(TrainConfig, ["--data", "rows.jsonl"], "train.py")
    assert rows.eval_size == -1 and parse(TrainConfig, [], "train.py")[0].eval_size == 500
    assert parse(TrainConfig, ["--data", "rows.jsonl", "--eval-size", "3"], "train.py")[0].eval_size == 3
