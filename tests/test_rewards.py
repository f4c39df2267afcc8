"""nanogspo/tasks/rewards.py and nanogspo/run/rewards.py: what a reward may be, what it is given, and what goes wrong.

Run: python -m pytest tests/test_rewards.py
"""

import asyncio
import dataclasses
import http.server
import importlib.util
import json
import math
import pickle
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from nanogspo import distributed
from nanogspo.config import ROOT
from nanogspo.run.rewards import Rewards
from nanogspo.sampler import merged
from nanogspo.tasks.rewards import NAMED, Group, Mean, Reward, _loop, _new_loop, load, parse

GROUP = Group("2+2=", {"prompt": "2+2=", "answer": "4", "level": 3}, ["4", "five"], [[1], [2, 3]])
CHAT = Group([{"role": "user", "content": "2+2="}], {"answer": "4"}, ["<think>x</think>4", "5"], [[1, 1, 1, 1], [1, 2]])

OWN = """
import asyncio, os, signal, sys, time
from beside import FOUR          # a file beside this one
state = []
lock = asyncio.Semaphore(1)      # belongs to one event loop
print("imported")

def right(answer, row):
    print("printed")
    return answer == row["answer"] == FOUR

async def slow_right(answer, row):
    async with lock:
        await asyncio.sleep(0)
    return {"a": 1.5, "b": None if answer == "4" else -1}

def named(completions, level, *, trainer_state, log_extra, log_metric, missing=7):
    log_extra("length", [len(c) for c in completions])
    log_metric("longest", max(map(len, completions)))
    return [level[0] + trainer_state.global_step + trainer_state.epoch] + [None] * (len(level) - 1)

async def picky(prompts, completions, **columns):
    assert columns["level"] == [3] * len(prompts) and "prompt" not in columns
    return [1 / (len(c) - 4) for c in completions]

def wild(answer, row):
    time.sleep(60 * answer.startswith("hang"))
    if answer.startswith("raise"):
        raise ValueError("no\\nway")
    if answer.startswith("die"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return float(answer.split()[0]) if not answer.startswith("none") else None

def needs(completions, colour):
    return [1.0]

def unfit(answer):
    return 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "random.py").write_text(OWN)  # a file of this name must not take the place of Python's
    (folder / "beside.py").write_text("FOUR = '4'")
    return folder


@pytest.fixture
def own(folder):
    """own("f", "g=2") -> Rewards of these functions of OWN."""
    made = []

    def make(*names, **options):
        made.append(Rewards([f"{folder / 'random.py'}:{name}" for name in names], **{"workers": 1} | options))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


def refused(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_means_of_several_processes_are_the_mean_of_all():
    """Each has its own number of answers, of which some abstain; what arrives has been pickled."""
    parts = [{"a": Mean.of([1.0, 2.0, 3.0]), "n": 2}, {"a": Mean.of([6.0]), "b": Mean.of([True, False]), "n": 1}]
    found = merged(pickle.loads(pickle.dumps(parts)))
    assert found == {"a": 3.0, "b": 0.5, "n": 3} and json.dumps(found) == '{"a": 3.0, "n": 3, "b": 0.5}'
    assert merged([found, {"a": Mean.of([0.0] * 4)}])["a"] == 1.5  # rounds of processes


def test_specs():
    file = parse("C:\\my\\reward.py:f=0.3")
    assert (file.file, file.name, file.weight) == ("C:\\my\\reward.py", "f", 0.3)
    pattern = parse("regex:a=b: .py")
    assert (pattern.name, pattern.argument, pattern.weight) == ("regex", "a=b: .py", 1.0)
    assert parse("regex:a=1=-2").argument == "a=1" and parse("regex:a=1=-2").weight == -2
    assert load("regex:^a=1$=1")(Group("?", {}, ["a=1"], []), {})["values"] == [1.0]
    assert "exact" in refused(parse, "exakt:answer") and "finite" in refused(parse, "exact=nan")


def test_both_forms_from_a_file(own, capfd):
    rewards = own("right=0.5", "slow_right", "named", state=lambda: {"epoch": 0.5})
    assert rewards.names == ["right", "slow_right", "named"] and rewards.weights == [0.5, 1, 1]
    rewards.probe(GROUP)
    scores = rewards([GROUP, GROUP], 7)
    assert scores.values[:2] == scores.values[2:]
    assert scores.values[0] == [1.0, 1.5, 10.5]
    assert scores.values[1][:2] == [0.0, 0.5] and math.isnan(scores.values[1][2])
    assert scores.notes[1] == {
        "rewards": {"right": 0.0, "slow_right": {"a": 1.5, "b": -1.0}, "named": None},
        "length": 4,
    }
    assert scores.facts == {
        "reward/right": 0.5,
        "reward/slow_right": 1.0,
        "reward/slow_right/a": 1.5,
        "reward/slow_right/b": -1.0,
        "reward/named": 10.5,
        "reward/named/none": 2,
        "longest": 4.0,
    }
    out, err = capfd.readouterr()
    assert not out and "printed" in err and err.count("imported") == 1  # for three functions


def test_a_group_that_fails_is_called_again_answer_by_answer(own, capsys):
    scores = own("picky")([GROUP], 0)  # 1 / 0 for "five"
    assert scores.values[0] == [-1 / 3] and math.isnan(scores.values[1][0])
    assert scores.facts == {"reward/picky": -1 / 3, "reward/picky/failed": 1}
    (line,) = capsys.readouterr().out.splitlines()
    assert "1 of 2 answers failed: ZeroDivisionError" in line and "(random.py:" in line and "'five'" in line


def test_of_several_processes_each_is_heard(own, capsys, monkeypatch):
    """The stdout of all but process 0 is closed."""
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    own("picky")([GROUP], 0)
    out, err = capsys.readouterr()
    assert not out and "process 1: reward picky: 1 of 2 answers failed" in err


def test_whatever_a_reward_does_each_answer_is_counted(own, capsys):
    """A scaled-down version of benchmarks/rewards.py."""
    texts = [f"{n} " for n in range(60)]
    for at, kind in [(3, "hang"), (10, "raise"), (11, "raise"), (20, "nan"), (21, "inf"), (30, "none"), (40, "die")]:
        texts[at] = f"{kind} "
    rewards = own("wild", timeout=2, workers=2)
    rewards.probe(Group("?", {}, ["1"], [[0]]))
    groups = [Group("?", {}, texts[n : n + 6], [[0]] * 6) for n in range(0, 60, 6)]
    start = time.monotonic()
    scores = rewards(groups, 0)
    assert time.monotonic() - start < 20  # it hangs for 60 s
    right = {n: float(n) for n, text in enumerate(texts) if text[0].isdigit()}
    assert {n: value for n, (value,) in enumerate(scores.values) if not math.isnan(value)} == right
    counts = {"failed": 2, "late": 1, "died": 1, "not_finite": 2, "none": 1}
    for kind, count in counts.items():
        assert scores.facts[f"reward/wild/{kind}"] == count
    assert scores.notes[10]["failed"]["wild"].startswith("ValueError: no way (random.py:")
    assert "within 2 s" in scores.notes[3]["failed"]["wild"] and "exit code -11" in scores.notes[40]["failed"]["wild"]
    assert "failed" not in scores.notes[30]
    assert len(capsys.readouterr().out.splitlines()) == 4
    rewards(groups[1:2], 1)
    assert not capsys.readouterr().out  # once for each kind


def test_a_reward_that_cannot_work_ends_the_run(own, folder, tmp_path):
    assert "random.py:unfit: got a function" in refused(own("right", "unfit").probe, GROUP)
    assert "no function or class nothing" in refused(load, f"{folder}/random.py:nothing")
    said = refused(own("needs").probe, GROUP)
    assert "the parameter colour; the row has prompt, answer, level" in said and "timeout" not in said
    assert "; completions are text, as the prompt is" in said
    said = refused(own("needs").probe, dataclasses.replace(GROUP, prompt=[{"role": "user", "content": "?"}]))
    assert "; completions are lists of messages, as the prompt is" in said
    for source, said in [
        ("x = (\n", "(broken.py:1)"),
        ("x = 1\nimport no_such_package", "No module named 'no_such_package' (broken.py:2)"),
        ("import sys\n\nsys.exit(1)", "SystemExit: 1 (broken.py:3)"),
    ]:
        (tmp_path / "broken.py").write_text(source)
        assert said in refused(load, f"{tmp_path}/broken.py:f")
    assert "got --reward" in (said := refused(load, f"{tmp_path}/nowhere.py:f")) and "is no file here" in said


def test_closing_ends_calls_that_run(own):
    """Ctrl-C while a function hangs: 8 calls of 4 s in one process are over at once, and none is started anew."""
    rewards = own("wild", timeout=4)
    rewards.probe(Group("?", {}, ["1"], [[0]]))
    before = [worker for worker in rewards._workers if worker]
    caught = []

    def call():
        try:
            rewards([Group("?", {}, ["hang"] * 8, [[0]] * 8)], 0)
        except CancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    start = time.monotonic()
    rewards.close()
    thread.join()
    assert time.monotonic() - start < 15
    assert before == [worker for worker in rewards._workers if worker]
    assert all(worker.process.poll() is not None for worker in before)


def test_a_probe_prints_nothing_and_needs_one_success(own, capsys):
    rewards = own("wild")
    rewards.probe(Group("?", {}, ["raise", "nan", "die", "1"], [[0]] * 4))
    assert not capsys.readouterr().out
    text = refused(rewards.probe, Group("?", {}, ["raise", "nan", "inf", "raise"], [[0]] * 4))
    assert "all four" in text and "no way" in text
    rewards.probe(Group("?", {}, ["none"] * 4, [[0]] * 4))  # no opinion is no failure


def test_functions_given_from_python(capsys):
    def batch(completions, **columns):
        return [0.5] * len(completions)

    async def waits(answer, row):
        await asyncio.sleep(0.02)
        return 1

    class Judge:
        def __call__(self, answer, row):
            return 1 / 0

    with Rewards([batch, waits, Judge(), batch], [1, 2, 3, 4], timeout=0.01) as rewards:
        assert rewards.names == ["batch", "waits", "Judge", "batch_4"] and rewards.weights == [1, 2, 3, 4]
        scores = rewards([GROUP], 0)
    assert [row[:2] for row in scores.values] == [[0.5, 1.0]] * 2 and scores.facts["reward/Judge/failed"] == 2
    out = capsys.readouterr().out
    assert out.count("waits: took") == 1 and out.count("ZeroDivisionError") == 1
    assert "want one each" in refused(Rewards, [batch], [1, 2])
    assert "f(answer, row)" in refused(Rewards, [lambda answer: 1])


def test_values_and_columns_that_could_hurt_the_run(capsys):
    """Finite, but not when they are added or squared; columns with names of our own; metrics without a mean."""

    def odd(completions, log_extra, log_metric):
        log_extra("rewards", ["a", "b"])
        log_metric("infinite", math.inf)
        log_metric("mixed", -math.inf)
        log_metric("mixed", 2)
        return [{"a": 1.5e308, "b": 1.5e308}, {"a": 2, "b": None}]

    with Rewards([odd, lambda answer, row: 1e30, lambda answer, row: {"a": None}]) as rewards:
        scores = rewards([GROUP], 0)
    assert math.isnan(scores.values[0][0]) and scores.values[1][0] == 2
    assert scores.notes[1]["rewards"]["odd"] == {"a": 2.0, "b": None}
    assert scores.facts == {
        "mixed": 2.0, "reward/odd": 2.0, "reward/odd/a": 2.0, "reward/odd/not_finite": 1,
        "reward/<lambda>/not_finite": 2, "reward/<lambda>_3/none": 2,
    }  # fmt: skip
    assert capsys.readouterr().out.count("want finite numbers") == 2


def test_async_functions_wait_together():
    waiting, most = 0, 0

    async def slow(answer, row):
        nonlocal waiting, most
        waiting += 1  # all run in one thread, that of the loop
        most = max(most, waiting)
        await asyncio.sleep(0.2)
        waiting -= 1
        return 1

    with Rewards([slow]) as rewards:
        assert rewards([Group("?", {}, ["a"] * 16, [[0]] * 16)], 0).values == [[1.0]] * 16
    assert most > 1


def test_an_exception_in_a_library_has_the_line_of_the_function():
    def reads(answer, row):
        return json.loads("{")

    line = reads.__code__.co_firstlineno + 1
    assert Reward(reads)(GROUP, {})["error"].endswith(f"(test_rewards.py:{line})")
    assert "SystemExit: 3" in Reward(lambda answer, row: sys.exit(3))(GROUP, {})["error"]


def test_async_functions_run_where_a_loop_runs_already():
    """As in a notebook."""

    loops = set()

    async def f(answer, row):
        loops.add(asyncio.get_running_loop())
        return len(answer)

    async def cell():
        with Rewards([f]) as rewards:
            return rewards([GROUP], 0).values

    assert asyncio.run(cell()) == [[1.0], [4.0]]
    assert len(loops) == 1  # what a function keeps, such as a session, belongs to one


def test_the_first_calls_share_a_loop_though_they_come_at_once(monkeypatch):
    new = asyncio.new_event_loop

    def slowly():
        time.sleep(0.1)
        return new()

    monkeypatch.setattr(asyncio, "new_event_loop", slowly)
    _new_loop.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda n: _loop(), range(4)))) == 1


@pytest.mark.parametrize(
    "returned",
    [["1.0", 1], [1], [1, object()], 1.0, [1, 2, 3], [1, {"a": {"b": 1}}], [1, 10**400]],
    ids=["text", "few", "object", "number", "many", "nested", "huge"],
)
def test_a_return_that_is_no_list_of_values_fails(returned):
    assert "error" in Reward(lambda completions: returned)(GROUP, {})
    assert "want 2" in Reward(lambda completions, log_extra: log_extra("a", [1]))(GROUP, {})["error"]


def test_values_of_other_libraries():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for returned in (numpy.array([1, 2.5]), torch.tensor([1, 2.5]), (numpy.float32(1), numpy.bool_(1) * 2.5)):
        assert Reward(lambda completions, returned=returned: returned)(GROUP, {})["values"] == [1.0, 2.5]


def test_what_trl_hands_over():
    seen = {}

    def everything(**columns):
        seen.update(columns)
        return [0, 0]

    def form(prompts, **columns):
        return everything(prompts=prompts, **columns)

    assert "error" not in Reward(form)(CHAT, {"global_step": 3, "max_steps": 9})
    state = seen.pop("trainer_state")
    assert (state.global_step, state.max_steps, state.epoch) == (3, 9, 0.0)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": [CHAT.prompt] * 2,
        "completions": [[{"role": "assistant", "content": text}] for text in CHAT.answers],
        "completion_ids": CHAT.ids,
        "answer": ["4", "4"],
    }


def test_functions_of_trls_documentation_run_unchanged(tmp_path):
    """From the page "Reward functions", as they are installed: one of messages, one of token ids with a factory, and
    one that is an object. tests/test_rewards.py::test_math has a fourth."""
    found = importlib.util.find_spec("trl")
    if not found:
        pytest.skip("needs trl: pip install -r requirements-test.txt")
    shipped = Path(found.submodule_search_locations[0]) / "rewards"
    (tmp_path / "mine.py").write_text(
        "from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment\n"
        "soft = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
        "repeats = get_repetition_penalty_reward(ngram_size=1)\n"
    )
    names = [
        f"{shipped}/format_rewards.py:think_format_reward",
        *(f"{tmp_path}/mine.py:{n}" for n in ("soft", "repeats")),
    ]
    with Rewards(names, workers=1) as rewards:
        rewards.probe(CHAT)
        scores = rewards([CHAT], 0)
    assert scores.values == [[1.0, -1.0, -0.75], [0.0, 0.0, 0.0]]


def test_rewards_by_name():
    row = {"answer": "1,234", "zero": 0, "solution": "no", "other": [{"role": "assistant", "content": "cat"}]}
    for text, answer, value in [
        ("exact", " 1,234\n", 1),
        ("exact", "1234", 0),
        ("exact:other", "cat", 1),
        ("exact:solution", "no", 1),
        ("numeric", "It is 1234.0004.", 1),
        ("numeric", "It is 1235", 0),
        ("numeric", "nothing", 0),
        ("numeric:zero", "nothing", 0),
        ("numeric:other", "5", None),
        ("regex:^\\d+$", "12", 1),
        ("regex:^\\d+$", "12a", 0),
        ("format", "<think>\na</think>\n<answer>b</answer>", 1),
        ("format", "<think>a<think></think><answer>b</answer>", 0),
        ("format", "<think>a</think><answer>b</answer> and", 0),
        ("format:a", "<a></a>", 1),
        ("length:4", "abcd", 1),
        ("length:4", "abcdef", 0.5),
        ("length:4", "a" * 20, 0),
        ("similarity:other", "bat", 2 / 3),
        ("keywords:cat, dog", "A Cat.", 0.5),
        ("keywords:cat", "concatenate", 0),
    ]:
        reply = load(text)(Group("?", row, [answer], []), {})
        assert reply["values"] == [value], (text, answer, reply)
    for text in ("length", "length:0", "keywords:,", "regex:(", "judge:nowhere.txt,model=m"):
        refused(load, text)
    assert "no column gone" in load("exact:gone")(GROUP, {})["error"]
    row = {"completion": [{"role": "assistant", "content": "x"}]}
    assert load("exact")(Group("?", row, ["x"], []), {})["values"] == [1.0]
    assert load("exact")(Group("?", row | {"ground_truth": 7}, ["7"], []), {})["values"] == [1.0]


@pytest.mark.parametrize("name, package", [("math", "math_verify"), ("judge:{file},model=m", "openai")])
def test_a_missing_package_is_one_line(name, package, tmp_path, monkeypatch):
    (tmp_path / "judge.txt").write_text("?")
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install" in refused(load, name.format(file=tmp_path / "judge.txt"))


def test_math():
    pytest.importorskip("math_verify", reason="needs pip install -r requirements-extra.txt")
    row = {"answer": r"\frac{1}{2}", "none": "a word and no more"}
    group = Group("?", row, ["So it is $0.5$.", r"\boxed{\frac{2}{4}}", "$1/3$"], [])
    assert load("math")(group, {})["values"] == [1, 1, 0]
    trl = pytest.importorskip("trl.rewards")
    chat = Group([], {"solution": r"\frac{1}{3}"}, [r"My answer is \boxed{\frac{1}{3}}"], [[1]])
    reply = Reward(trl.accuracy_reward)(chat, {})
    assert reply["values"] == [1.0] and reply["extra"]["solution"] == [r"\frac{1}{3}"]


@pytest.fixture
def server():
    """An OpenAI-compatible address: fails once, then says what SAYS has for the answer; and what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = asked[-1]["messages"][0]["content"]
            message = {"role": "assistant", "content": "no idea" if "puzzle" in content else "I say 0.75"}
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
                {"index": 0, "message": message, "finish_reason": "stop"}]}).encode()  # fmt: skip
            self.send_response(500 if len(asked) == 1 else 401 if "forbidden" in content else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
        running.shutdown()


def test_judge(server, tmp_path, monkeypatch):
    """Asked again after a 500; replies are kept, across processes; no number in one is None; an error is a failure."""
    pytest.importorskip("openai", reason="needs pip install -r requirements-extra.txt")
    url, asked = server
    (tmp_path / "judge.txt").write_text("{prompt} {answer} {reference} {level} {unknown} {}")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    text = f"judge:{tmp_path}/judge.txt,model=m,cache={tmp_path}/kept"
    with Rewards([text], workers=1) as rewards:
        values = rewards([GROUP], 0).values
    assert values == [[0.75], [0.75]] and len(asked) == 3
    assert asked[0]["messages"][0]["content"] == "2+2= 4 4 3 {unknown} {}" and asked[0]["model"] == "m"
    judge = load(text)
    assert judge(GROUP, {})["values"] == [0.75, 0.75] and len(asked) == 3
    odd = Group("2+2=", GROUP.row, ["a puzzle"], [])
    assert judge(odd, {})["values"] == [None]
    forbidden = Group("2+2=", GROUP.row, ["forbidden"], [])
    assert "AuthenticationError" in judge(forbidden, {})["error"]
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    assert "model=NAME" in refused(load, f"judge:{tmp_path}/judge.txt")


def test_the_example():
    right = load(f"{ROOT}/examples/reward.py:right_and_short")
    group = Group("?", {"answer": "85"}, ["85", "So it is 84.", "5" * 50], [])
    assert right(group, {})["values"] == [
        {"right": 0.5, "short": 0.5},
        {"right": 0, "short": 0.5},
        {"right": 0, "short": 0},
    ]
    assert right(Group("?", {}, ["85"], []), {})["values"] == [None]


def test_every_name_is_explained():
    text = (ROOT / "nanogspo/tasks/rewards.py").read_text().partition('"""')[2].partition('"""')[0]
    assert all(name in text for name in NAMED)


def test_a_forgotten_return_is_said_once(capsys):
    def forgot(answer, row):
        float(answer == row["answer"])

    with Rewards([forgot]) as rewards:
        for step in (1, 2):
            scores = rewards([Group("p", {"prompt": "p", "answer": "a"}, ["a", "b"], [[1], [2]])], step)
    assert all(math.isnan(value) for [value] in scores.values) and scores.facts["reward/forgot/none"] == 2
    assert capsys.readouterr().out.count("got None for all 2 answers, want numbers; is a `return` missing?") == 1


def test_a_file_that_ends_its_process_while_it_is_imported_is_named(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    with Rewards([f"{tmp_path / 'ends.py'}:f"], workers=1) as rewards, pytest.raises(ValueError) as error:
        rewards.probe(Group("p", {"prompt": "p"}, [], []))
    assert "ends.py:f: its process ended (exit code 3) while it was imported; want a file that" in str(error.value)
