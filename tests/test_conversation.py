"""nanogspo/tasks/conversation.py: scenarios are read as they are written, and customers answer by the script.

Run: python -m pytest tests/test_conversation.py
"""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from examples.calculator import Calculator
from lessons.small_chat import small_tokenizer
from nanogspo.checkpoint import save
from nanogspo.config import CONVERSATIONS, TrainConfig, check
from nanogspo.episodes import Episode, episode_facts
from nanogspo.families import model_config
from nanogspo.model import Transformer
from nanogspo.run.log import read_rows
from nanogspo.tasks import build_task, get_task
from nanogspo.tasks import conversation as module
from nanogspo.tasks.conversation import SHIPPED, Conversation, Conversations, problems
from nanogspo.tasks.environments import play, serve
from train import run

LATE = """
agent: You work for {shop}.
turns: 3
scenarios:
  late:
    values: {shop: [Larkfield, B+B], days: 8}
    opening: ["Nothing came for {days} days.", "Where is it, {shop}?"]
    goals: {sorry: sorry|apolog, shop: "{shop}", digits: "[0-9]{4}"}
    faults: {blames: your fault}
    replies: {"{shop}": "Yes, {shop}.", which: The green one.}
    otherwise: ["Well?", Hm.]
"""


def rows_of(tmp_path, text=LATE):
    (tmp_path / "own.yaml").write_text(text)
    return [row for _, row in problems(str(tmp_path / "own.yaml"))]


def talk(row, *said):
    """What the customer answers to each turn, and the replies as a run gets them: JSON, from an episode's process."""
    live, replies = {}, []
    for n in range(len(said) + 1):
        history = [{"role": "assistant", "content": text} for text in said[:n]]
        replies.append(play(Conversation, live, {"id": [0, 0, 0], "row": row, "seed": 1, "history": history}))
    assert replies[0]["messages"] == row["prompt"] and not replies[0]["done"]
    for reply in replies[1:]:  # what earned nothing is there, too
        assert reply["parts"].keys() == {*row["scenario"]["goals"], *row["scenario"]["faults"]}
    earned = [{name: value for name, value in reply["parts"].items() if value} for reply in replies[1:]]
    words = [(reply["messages"] and reply["messages"][0]["content"], reply["done"]) for reply in replies[1:]]
    return [(*said, parts) for said, parts in zip(words, earned, strict=True)], replies[1:]


def test_the_file_in_the_docstring(tmp_path):
    lines = [re.split(" {5,}", line[4:])[0] for line in module.__doc__.splitlines()]
    text = "\n".join(lines[lines.index(next(line for line in lines if line.startswith("agent"))) :])
    rows = rows_of(tmp_path, text.partition("\nerns are")[0])
    assert len(rows) == 4 and rows[0]["scenario"]["goals"] == {"apologises": "sorry|apolog", "names it": "A1204"}
    assert rows[0]["scenario"]["customer"] == {"model": "NAME", "url": "ADDRESS"}


def test_every_opening_with_every_combination_of_values_is_a_problem(tmp_path):
    rows = rows_of(tmp_path)
    asked = [(row["prompt"][0]["content"], row["prompt"][1]["content"]) for row in rows]
    openings = {shop: ("Nothing came for 8 days.", f"Where is it, {shop}?") for shop in ("Larkfield", "B+B")}
    assert sorted(asked) == sorted((f"You work for {s}.", o) for s in openings for o in openings[s])
    for row in rows:
        shop = row["prompt"][0]["content"][13:-1]
        patterns = row["scenario"]["goals"]
        assert re.search(patterns["shop"], f"Here is {shop}!") and not re.search(patterns["shop"], "Here is BB!")
        assert patterns["digits"] == "[0-9]{4}"  # other braces stay
        assert row["scenario"]["otherwise"] == ["Well?", "Hm."] and row["scenario"]["replies"][0][1] == f"Yes, {shop}."
        assert row["prompt"][0]["role"] == "system" and row["prompt"][1]["role"] == "user"


def test_a_goal_counts_once_and_all_of_them_end_the_conversation(tmp_path):
    row = rows_of(tmp_path)[0]
    turns, replies = talk(row, "I am SORRY", "sorry, it's larkfield", "Number 1234")
    third = pytest.approx(1 / 3)
    assert turns == [
        ("Well?", False, {"sorry": third}),
        ("Yes, Larkfield.", False, {"shop": third}),
        ([], True, {"digits": third}),
    ]
    assert sum(reply["reward"] for reply in replies) == pytest.approx(1)
    assert replies[0]["truncated_reward"] == 0  # a limit takes nothing away
    (first,), _ = talk(row, "sorry, Larkfield, 1234")  # all at once: the end, in the first turn
    assert first[1] and first[2] == {"sorry": third, "shop": third, "digits": third}


def test_patience_ends_it_and_a_fault_costs_a_goals_share_once(tmp_path):
    row = rows_of(tmp_path)[0]
    turns, replies = talk(row, "It's your fault", "your fault! which?", "no")
    assert turns == [("Well?", False, {"blames": pytest.approx(-1 / 3)}), ("The green one.", False, {}), ([], True, {})]
    assert [reply["reward"] for reply in replies] == [pytest.approx(-1 / 3), 0, 0]  # 0 and not None: it was judged
    assert [words for words, _, _ in talk(row, "a", "b", "c")[0]] == ["Well?", "Hm.", []]
    assert talk(row, "Which Larkfield?")[0][0][0] == "Yes, Larkfield."  # the first of two that fit
    long = row | {"scenario": row["scenario"] | {"turns": 5}}
    assert [words for words, _, _ in talk(long, *"abcd")[0]] == ["Well?", "Hm.", "Hm.", "Hm."]  # the last one again


def test_a_model_plays_the_customer(tmp_path, monkeypatch):
    heard, made = [], []

    class Fake:
        def __init__(self, options, flag):
            made.append(options)

        def __call__(self, messages):
            heard.append(messages)
            return f"<think>As {len(heard)}?</think>\n\nI am {len(heard)}"

    monkeypatch.setattr(module, "Remote", Fake)
    module.remote.cache_clear()
    rows = rows_of(tmp_path, LATE.replace("turns: 3", "turns: 3\ncustomer: {model: m, url: u}"))
    turns, _ = talk(rows[0], "one", "two", "three")
    assert heard.pop(0) == [
        {"role": "user", "content": "Hello"}
    ]  # at a wrong address this fails, before the run begins
    assert [words for words, _, _ in turns] == ["I am 2", "I am 3", []] and made == [{"model": "m", "url": "u"}]
    opening = rows[0]["prompt"][1]["content"]
    assert [m["role"] for m in heard[1]] == ["system", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in heard[1][1:]] == [opening, "one", "I am 2", "two"]
    assert opening in heard[1][0]["content"]  # what it wants, where the scenario does not say
    module.remote.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_scenarios(name):
    """An agent who says nothing earns nothing, and one who reaches every goal is sent away content; every line of the
    script can be reached."""
    task = get_task(name)
    assert task.held_out() and get_task(name).held_out() == task.held_out() and task.train_problem(7, 1).row
    file = Path(module.__file__).parent / "conversations" / f"{name}.yaml"
    rows = [row for _, row in problems(str(file))]
    assert len(rows) >= 15
    for row in rows:
        texts = json.dumps([row["prompt"], row["scenario"]["replies"], row["scenario"]["otherwise"]])
        assert not re.search(r"\{\w*[a-z]\w*\}", texts), "a name in braces without a value"
        patience = row["scenario"]["turns"]
        turns, _ = talk(row, *["…"] * patience)
        assert [done for _, done, _ in turns] == [False] * (patience - 1) + [True]
        assert not any(parts for *_, parts in turns)
    given = yaml.safe_load(file.read_text())
    names = [list(scenario["goals"]) for scenario in given["scenarios"].values()]
    assert all(2 <= len(goals) <= 4 for goals in names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("customer_service", "Feel free to order now, or order nothing."),
        ("technical_support", "We called you, delighted that it is installed and enabled."),
        ("sales", "I sell them across the country because it pays: 1,900 or 1900, or 1600."),
    ],
)
def test_a_word_in_a_word_reaches_no_goal(name, said):
    file = Path(module.__file__).parent / "conversations" / f"{name}.yaml"
    rows = [row for where, row in problems(str(file)) if not where.endswith("hills")]  # there 1900 is right
    assert not any(talk(row, said)[0][0][2] for row in rows)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("agent:", "agnet:", "own.yaml: got agnet, want only agent, turns, customer, scenarios"),
        ("turns: 3", "turns: 0", "own.yaml: got turns: '0', want a number from 1"),
        ("turns: 3", "turns: yes", "own.yaml: got turns: 'yes', want a number from 1"),
        ("goals: {", "goals: []\n    values2: {", "late: got values2, want only "),
        ('    goals: {sorry: sorry|apolog, shop: "{shop}", digits: "[0-9]{4}"}\n', "", "late: got goals: None, want"),
        ("sorry|apolog", '"(sorry"', r"late: got the pattern '\(sorry' \(.*\), want a regular expression"),
        ("sorry|apolog", f'"a{{{10**20}}}"', r"late: got the pattern .* \(the repetition number is too large\), want"),
        ("sorry|apolog", "[sorry, apolog]", r"late: got goals: {'sorry': \['sorry', .*, want names, each with a text$"),
        ("sorry|apolog", '""', "late: got goals: {'sorry': '', .*, want names, each with a text"),
        (
            '    otherwise: ["Well?", Hm.]\n',
            "    otherwise: []\n",
            r"late: got otherwise: \[\], want a text or a list of texts",
        ),
        ("  late:\n", "  late: 3\n  later:\n", "own.yaml: got scenarios: .*, want names, each with a mapping"),
        ("digits:", "sorry:", "own.yaml:8: not YAML \\(sorry twice\\)"),
        ("blames:", "sorry:", "late: got sorry as a goal and as a fault, want different names"),
        ("Yes, {shop}.", "Yes, {shp}.", "late: got {shp} in 'Yes, {shp}.', want one of shop, days; add it to values"),
        ("days: 8", "days: []", r"late: got values: .*, want names, each with a text or a list of texts"),
        ("days: 8", "4: 8, days: 8", "late: got values for 4, want names of letters, digits and _"),
        ("days: 8", f"days: {list(range(5000))}", "late: got 20,000 problems .*, want at most 10,000"),
        ("turns: 3", "turns: [3", "own.yaml:4: not YAML"),
        ("turns: 3", "turns: \0", "own.yaml: not YAML .unacceptable character"),
        (LATE, "", "own.yaml: got None, want a mapping with agent, scenarios"),
        (LATE, LATE.replace("[Larkfield, B+B]", "B+B").replace(', "Where is it, {shop}?"', ""), "got a single opening"),
    ],
)
def test_says_what_is_wrong(tmp_path, old, new, said):
    assert old in LATE
    (tmp_path / "own.yaml").write_text(LATE.replace(old, new))
    with pytest.raises(ValueError, match=said):
        Conversations(str(tmp_path / "own.yaml"))


def test_all_is_read_as_it_is_written(tmp_path):
    """YAML 1.1 would make True, False, 97, 8, 90 and 1000 of these."""
    odd = ["yes", "no", "0x61", "010", "1:30", "1_000"]
    (first, *_) = rows = rows_of(
        tmp_path, LATE.replace("days: 8", f"days: [{', '.join(odd)}]").replace("which:", "no:")
    )
    said = {row["prompt"][1]["content"] for row in rows}
    assert {f"Nothing came for {word} days." for word in odd} < said and first["scenario"]["replies"][1][0] == "no"
    shipped = Path(module.__file__).parent / "conversations" / "technical_support.yaml"
    printers = [row for where, row in problems(str(shipped)) if where.endswith("printer")]
    assert {row["scenario"]["goals"]["names the code"] for row in printers} == {"E02", "E13", "0x61"}


def test_a_tenth_of_the_openings_is_held_out(tmp_path):
    """Here 20 problems have two openings: a tenth of the problems would be both."""
    text = LATE.replace("[Larkfield, B+B]", "B+B").replace("days: 8", f"days: 8, hidden: {list(range(10))}")
    (tmp_path / "own.yaml").write_text(text)
    task = Conversations(str(tmp_path / "own.yaml"))
    assert len(task.held_out()) == 1 and len({task.train_problem(n, 0).messages[1]["content"] for n in range(10)}) == 1


def test_a_task_brings_its_environment_and_no_other_row_has_a_customer(tmp_path, checkpoint):
    (tmp_path / "a.python").mkdir()  # .py in the name of a folder makes no program of it
    (tmp_path / "a.python" / "own.yaml").write_text(LATE)
    for task in (*SHIPPED, f"conversation:{tmp_path}/a.python/own.yaml"):
        config = TrainConfig(task=task, model="x", max_new_tokens=32)
        check(config)
        assert config.environment == "conversation" and isinstance(build_task(config.task), Conversations)
    assert TrainConfig(task="sales", environment="mine.py:Mine").environment == "mine.py:Mine"
    assert TrainConfig().environment == TrainConfig(task="addition").environment == ""
    assert CONVERSATIONS[1:] == SHIPPED and serve("conversation")[0] is None
    for tasks in ("sales", "addition"), ("addition", "sales"):
        with pytest.raises(ValueError, match=f"got {'.'.join(tasks)} with --environment .*, want conversations alone"):
            run(TrainConfig(**SMALL, model=checkpoint, task=tasks))
    for wrong in ({"model": "tiny"}, {"model": "x", "algo": "sft"}):
        with pytest.raises(ValueError, match="got --task sales with --.*: customers are talked to, turn by turn"):
            check(TrainConfig(task="sales", **wrong))
    _, answer = serve("conversation")
    failed = answer({"id": [0, 0, 0], "row": {"prompt": "?"}, "seed": 0, "history": []})["failed"]
    assert "got a row without a scenario, want problems of a conversation task" in failed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with a chat template and random weights, but for a bias that makes it stop after some four tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("chat"), small_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"intermediate_size": 16, "vocab_size": 406, "max_position_embeddings": 4096, "mlp_bias": True}
    model = Transformer(model_config({"model_type": "llama", **shape})).init_weights(0, std=0.3)
    with torch.no_grad():
        model.layers[-1].mlp.down_proj.bias[0] = 20.0  # after the norm the hidden state is nearly 4 there
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_ids[0], 0] = 1.2
    save(model, str(folder))
    tokenizer.save(folder)
    return str(folder)


SMALL = {
    "max_new_tokens": 12, "prompts_per_rollout": 2, "group_size": 4, "updates_per_rollout": 2, "steps": 2, "lora_r": 2,
    "eval_size": 1, "warm_steps": 0, "dtype": "fp32", "max_turns": 3,
}  # fmt: skip


def test_a_run_of_conversations_logs_its_components(tmp_path, checkpoint, monkeypatch):
    """Shipped scenarios, in worker processes; every answer contains what a random model says: letters."""
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
    goals = "{a: a, e: e, never: never said}"
    text = re.sub("goals: .*", f"goals: {goals}", LATE)
    (tmp_path / "own.yaml").write_text(text)
    task = f"conversation:{tmp_path / 'own.yaml'}"
    folder, metrics = run(TrainConfig(**SMALL, model=checkpoint, task=task, out=str(tmp_path / "run")))
    assert metrics["step"] == 2 and metrics["environment_failed"] == 0
    rows = read_rows(folder / "metrics.jsonl")
    for row in (r for r in rows if "loss" in r):
        parts = [row[f"environment/{name}"] for name in ("a", "e", "blames")]
        assert row["environment/never"] == 0 and row["reward"] == pytest.approx(sum(parts))
    samples = read_rows(folder / "samples.jsonl")
    for sample in samples:
        said = [m["content"] for m in sample["messages"] if m["role"] == "assistant"]
        said = said[: len(said) - sample["truncated"]]  # a turn that was cut off is not given to the customer
        met = sum(any(goal in text.lower() for text in said) for goal in "ae")
        assert sample["reward"] == pytest.approx(met / 3)
    assert {s["reward"] for s in samples} != {0}


def test_an_environment_from_python(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
    calls = itertools.count(1)

    class Own(Calculator):
        def step(self, message):
            return [{"role": "user", "content": "Sure?"}], False, {"call": float(next(calls))}

    config = TrainConfig(**SMALL, model=checkpoint, out=str(tmp_path / "run"))  # without rows: it draws by its seed
    folder, metrics = run(config, environment=Own)
    said = capsys.readouterr().out
    assert "What is" in (folder / "samples.jsonl").read_text() and "try it" not in said
    assert metrics["step"] == 2 and metrics["environment/call"] > 0 and next(calls) > 8
    assert "environment: python" in (folder / "config.yaml").read_text()  # what a resumed run reads
    again = TrainConfig(**SMALL, model=checkpoint, environment="python", resume=str(folder))
    with pytest.raises(ValueError, match="got --environment python, which a run from Python has"):
        run(again)
    with pytest.raises(ValueError, match="got --environment own.py:Own and environment=..., want one of them"):
        run(dataclasses.replace(config, environment="own.py:Own"), environment=Own)
    for wrong, said in (
        ({"environment": object()}, "got an environment without reset and step"),
        ({"task": Conversations}, "got task=Conversations, a class, want an object; write task=Conversations"),
        ({"rewards": len}, "want a list of functions; write rewards="),
        ({"weights": [1.0]}, "got 1 weights for 0 rewards"),
        ({"weights": 1.0}, "got weights=1.0, want a list of finite numbers"),
        ({"weights": [math.nan]}, r"got weights=\[nan\], want a list of finite numbers"),
        ({"weights": torch.ones(2)}, "got weights=tensor.*, want a list of finite numbers"),
        ({"task": "addition"}, "got task='addition' without train_problem, held_out, reward, want an object"),
        ({"task": Conversations("sales")}, "got sales with --environment left out, want conversations alone"),
    ):
        with pytest.raises(ValueError, match=said):
            run(config, **wrong)


def test_components_are_means_over_the_episodes_that_did_not_fail():
    made = [({"a": 1.0}, ""), ({"a": 0.5, "b": -1.0}, ""), ({"a": 9.0}, "step: no answer within 10 s")]
    episodes = [Episode(0, n, {}, 0, parts=parts, failed=failed) for n, (parts, failed) in enumerate(made)]
    facts = episode_facts(episodes)
    assert (facts["environment/a"], facts["environment/b"], facts["environment_failed"]) == (0.75, -0.5, 1)
    assert not [name for name in episode_facts(episodes[2:]) if name.startswith("environment/")]
