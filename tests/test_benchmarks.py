"""The benchmarks on a machine without a GPU: what they print, that every variant computes the same function, and that
one that fails costs its own line and nothing else. A GPU is rare; what can be tried without one is tried here.

Run: python -m pytest tests/test_benchmarks.py
"""

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks import generate, gpu_suite, kernels
from nanogspo import tiny

ROOT = Path(__file__).resolve().parent.parent
BELOW = kernels.seq_logprob.EPILOGUE_BELOW  # as it is before any test
CPU, MACHINE = torch.device("cpu"), {"name": "a test", "bandwidth": 1e9, "rate": 1e12}


def once(run):
    """A timer that runs and measures nothing."""
    run()
    return 0.5


@pytest.fixture(scope="module")
def rows():
    todo = kernels.cases(kernels.TINY)
    return kernels.measure(todo, MACHINE, once, CPU, compiled=False, show=lambda line: None)


# ----------------------------------------------------------------------------
# floors: KERNELS by hand


@pytest.mark.parametrize(
    "name, shape, want",
    [
        ("log-prob, forward + backward", "C 1024, V 151936", 6.454e-3),  # 2 * 2 * 8192 * 1024 * 151936 / 790e12
        ("log-prob, forward + backward", "C 4096, V 151936", 25.81e-3),
        ("log-prob, forward + backward", "C 2304, V 256000", 24.46e-3),
        ("log-prob, no gradient", "C 1024, V 151936", 3.227e-3),
        ("NF4 dequantise", "4096 x 12288", 42.2e-6),  # 25.96 MB read, 100.66 MB written
        ("NF4 product", "M 1, 12288 x 4096", 8.66e-6),
        ("add + RMSNorm, forward", "W 1024", 22.4e-6),  # 8 * 8192 * 1024 bytes
        ("SwiGLU, forward", "F 12288", 201.3e-6),
        ("qk-norm + RoPE, forward", "16 + 8 of 128", 34.95e-6),  # q, k read and written; cos and sin read
    ],
)
def test_floors(name, shape, want):
    [case] = [c for c in kernels.cases(kernels.REAL) if c.name == name and shape in c.shape]
    assert math.isclose(case.floor(kernels.ASSUMED), want, rel_tol=3e-3)


def test_the_floor_is_the_slower_of_the_two():
    case = kernels.Case("x", "y", bytes=4e9, operations=1e12, make=dict)
    assert case.floor({"bandwidth": 1e9, "rate": 1e12}) == 4.0
    assert case.floor({"bandwidth": 1e9, "rate": 1e11}) == 10.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU prints")
def test_without_a_gpu_it_prints_floors_and_writes_nothing(capsys, tmp_path):
    assert kernels.main(["--out", str(tmp_path / "results")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(kernels.cases(kernels.REAL)) >= 30
    assert all(line.endswith("| not measured |") for line in lines)
    assert not (tmp_path / "results").exists()


def test_only(capsys):
    if not torch.cuda.is_available():
        assert kernels.main(["--only", "SwiGLU, forward, N 8192, F 3072"]) == 0
        assert "50.3 us" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        kernels.main(["--only", "no such case"])
    assert stop.value.code == 2 and "which no case holds" in capsys.readouterr().err


# ----------------------------------------------------------------------------
# running


def test_ours_runs_in_every_case(rows):
    ours = {(row["case"], row["shape"]): row for row in rows if row["variant"] == "ours"}
    assert len(ours) == len(kernels.cases(kernels.TINY))
    for row in ours.values():
        assert row["seconds"] == 0.5 and row["over_floor"] == 0.5 / row["floor_s"] and not row["note"], row


def test_variants_compute_the_same_function(rows):
    """Not where a peer is missing; but where it is there, in its own rounding. log-prob: bf16 logits are off by 1 %."""
    compared = [row for row in rows if row["differs"] is not None]
    assert {row["variant"] for row in compared} >= {"ours", "torch", "dequantise + cuBLAS", "ours, rows"}
    for row in compared:
        allowed = 0.25 if row["variant"] == "bf16 cuBLAS" else 0.05  # not quantised at all: 4 bits are off by 10 %
        assert row["differs"] < allowed, row
    exact = [row for row in compared if row["case"] == "NF4 dequantise"]
    assert exact and all(row["differs"] == 0 for row in exact)


def test_what_fails_says_why_and_keeps_its_line(rows):
    failed = [row for row in rows if row["seconds"] is None]
    assert failed and all(row["note"].startswith("not measured: ") for row in failed)
    if not torch.cuda.is_available():
        by_hand = [row for row in failed if row["variant"] == "ours, CUDA C++"]
        assert len(by_hand) == 1 and "ValueError" in by_hand[0]["note"]


def test_one_failure_costs_one_line():
    def broken_build():
        raise MemoryError("no | room\nleft")

    def broken_make(device):
        raise RuntimeError("no inputs")

    good = {"ours": lambda: lambda: torch.ones(3), "late": lambda: lambda: torch.ones(3) * 1.5}
    cases = [
        kernels.Case("a", "1", 1e9, 0, lambda device: {"broken": broken_build, **good}),
        kernels.Case("b", "2", 1e9, 0, broken_make),
        kernels.Case("c", "3", 1e9, 0, lambda device: good),
    ]
    shown = []
    rows = kernels.measure(cases, MACHINE, once, CPU, show=shown.append)
    assert [(row["case"], row["variant"]) for row in rows] == [
        ("a", "broken"), ("a", "ours"), ("a", "late"), ("b", "ours"), ("c", "ours"), ("c", "late")
    ]  # fmt: skip
    assert rows[0]["note"] == "not measured: MemoryError: no / room left"  # one line, and no column of its own
    assert rows[3]["note"] == "not measured: RuntimeError: no inputs"
    assert rows[2]["differs"] == 0.5 and rows[1]["differs"] == 0.0
    assert len(shown) == 5


def test_torch_compile_comes_last():
    order = []

    def variant(name):
        return lambda: lambda: order.append(name) or torch.ones(1)

    cases = [
        kernels.Case(c, c, 1, 1, lambda device, c=c: {n: variant(f"{c} {n}") for n in ("torch.compile", "ours")})
        for c in "ab"
    ]
    rows = kernels.measure(cases, MACHINE, once, CPU, show=lambda line: None)
    assert list(dict.fromkeys(order)) == ["a ours", "b ours", "a torch.compile", "b torch.compile"]
    assert [row["variant"] for row in rows] == [
        "ours",
        "torch.compile",
        "ours",
        "torch.compile",
    ]  # but stands with its case
    assert len(kernels.measure(cases, MACHINE, once, CPU, compiled=False, show=lambda line: None)) == 2


def test_the_deadline_leaves_lines_behind():
    todo = kernels.cases(kernels.TINY)
    rows = kernels.measure(todo, MACHINE, once, CPU, deadline=time.monotonic() - 1, show=lambda line: None)
    assert len(rows) == len(todo) and {row["note"] for row in rows} == {"not measured: out of time"}
    assert "| not measured: out of time | | | | |" in kernels.markdown(rows, MACHINE, facts(), kernels.bars(rows))


def test_forcing_a_path_leaves_no_trace(rows):
    import kernels.seq_logprob as file

    assert file.EPILOGUE_BELOW == kernels.seq_logprob.EPILOGUE_BELOW == BELOW


def test_the_machine_is_measured(monkeypatch):
    machine = kernels.measure_machine(once, CPU, size=2**10, width=8)
    assert machine["bandwidth"] == 2 * 2**10 / 0.5 and machine["rate"] == 2 * 8**3 / 0.5


def facts():
    return {"date": "2026-01-02T03:04:05+00:00", "gpu": "NVIDIA H100 80GB", "torch": "t", "triton": "u", "driver": "v"}


def test_environment_and_file(tmp_path):
    found = kernels.environment()
    assert {"date", "commit", "torch", "triton", "driver", "gpu", "trl", "bitsandbytes"} <= set(found)
    file = kernels.save(tmp_path / "new", "kernels", facts(), {"rows": [1]})
    assert file.name == "kernels_2026-01-02_NVIDIA-H100-80GB.json"
    assert json.loads(file.read_text()) == {"environment": facts(), "rows": [1]}


# ----------------------------------------------------------------------------
# bars


def measured(case, shape, variant, seconds, over, extra=None):
    return {
        "case": case, "shape": shape, "variant": variant, "seconds": seconds, "over_floor": over, "floor_s": 1.0,
        "extra_bytes": extra, "differs": None, "bytes": 1e9, "flops": 0, "note": "",
    }  # fmt: skip


def verdicts(*rows):
    return {bar["bar"].rpartition(": ")[2]: bar["passed"] for bar in kernels.bars(list(rows))}


def test_bars_of_the_log_prob():
    case, shape = "log-prob, forward + backward", "N 8192, C 1024, V 151936"
    G = 2 * 8192 * 1024
    good = measured(case, shape, "ours", 9e-3, 1.45, extra=2 * G + 350e6)
    bad = measured(case, shape, "ours", 9e-3, 1.46, extra=2 * G + 351e6)
    slower, faster = measured(case, shape, "liger_kernel", 10e-3, 2.0), measured(case, shape, "trl", 8e-3, 2.0)
    other = measured(case, shape, "ours, rows", 1e-3, 2.0)  # ours too: no rival
    assert verdicts(good, slower, other) == {"time over floor": True, "fastest other / ours": True, "extra bytes": True}
    assert verdicts(bad, slower, faster) == {
        "time over floor": False,
        "fastest other / ours": False,
        "extra bytes": False,
    }
    wide = measured(case, "N 8192, C 4096, V 151936", "ours", 9e-3, 1.31)
    assert verdicts(wide) == {"time over floor": False, "fastest other / ours": None}
    assert verdicts(measured(case, shape, "ours", None, None))["time over floor"] is None


def test_bars_of_the_others():
    nf4 = [
        measured("NF4 dequantise", "s", "ours", 1.0, 1.25),
        measured("NF4 dequantise", "s", "bitsandbytes", 1.2, 1.5),
    ]
    assert verdicts(*nf4) == {"share of copy bandwidth": True, "bitsandbytes / ours": True}
    nf4[0] |= {"seconds": 1.01, "over_floor": 1.26}
    assert verdicts(*nf4) == {"share of copy bandwidth": False, "bitsandbytes / ours": False}
    for M, expected in ((16, {"dequantise + cuBLAS / ours": True}), (32, {})):
        pair = [measured("NF4 product", f"M {M}, 4 x 4", v, s, 1) for v, s in (("ours", 1), ("dequantise + cuBLAS", 2))]
        assert verdicts(*pair) == expected
    assert verdicts(measured("SwiGLU, forward", "s", "ours", 1.0, 1.2)) == {"share of copy bandwidth": True}
    assert verdicts(measured("RMSNorm, backward", "s", "ours", 1.0, 1.3)) == {"share of copy bandwidth": False}


def test_the_table_says_what_was_missed():
    rows = [measured("RMSNorm, backward", "s", "ours", 2e-3, 1.3, extra=5_000_000)]
    table = kernels.markdown(rows, MACHINE, facts(), kernels.bars(rows))
    assert "| ours | 2.000 ms | 1.30 x floor | 0.50 TB/s | 5 MB | - |" in table
    assert "| 0.769 | >= 0.8 | MISSED |" in table


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux counts it")
def test_memory_is_measured_in_a_fresh_process():
    extra = kernels.cpu_memory(N=600, C=32, V=20_000)
    assert set(extra) == {"without a gradient", "with a gradient"}
    # the matrix of logits would be 48 MB in fp32. There may be: two tiles of 2 MB, a slice of the head, G in fp32
    assert all(1e6 < bytes_ < 30e6 for bytes_ in extra.values()), extra


# ----------------------------------------------------------------------------
# the suite


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_the_suite_needs_a_gpu():
    run = subprocess.run(
        [sys.executable, "benchmarks/gpu_suite.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "no GPU" in run.stderr


SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.mark.isa
@pytest.mark.skipif(not kernels.seq_logprob.triton.__dict__.get("__version__"), reason="Triton is not installed")
@pytest.mark.parametrize("name", sorted(set(gpu_suite.CHECKS) - gpu_suite.NEEDS_CUDA))
def test_checks_pass_here_as_well(name, capsys):
    """The code of the suite's checks, on small tensors and in the interpreter: a GPU hour is no place for a typo."""
    module = kernels.seq_logprob
    small = {"ROWS": 16, "COLUMNS": 32, "ROW_BLOCK": 16, "PRODUCT": dict.fromkeys(module.PRODUCT, (16, 16, 16, 4, 2))}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with patch.multiple(module, **small):
        [row] = gpu_suite.run_checks(torch.device(device), False, [name])
    assert row["passed"], row["said"]
    assert json.loads(capsys.readouterr().out.removeprefix("RESULT ")) == row
    assert module.EPILOGUE_BELOW == BELOW


def test_a_failing_check_says_where(capsys, monkeypatch):
    def check(device, big):
        assert 1 + 1 == 3, "one and\none is two"

    monkeypatch.setitem(gpu_suite.CHECKS, "broken", check)
    [row] = gpu_suite.run_checks(CPU, False, ["broken"])
    assert not row["passed"] and row["said"].startswith("AssertionError: one and one is two")
    assert "(test_benchmarks.py:" in row["said"]


def test_the_gspo_step_runs(capsys):
    shape = {"prompts": 2, "group": 4, "prompt_tokens": 5, "tokens": 6, "updates": 2, "max_tokens": 64}
    rows = gpu_suite.run_step(CPU, {**gpu_suite.QWEN3_0_6B, **SIZES}, shape, cycles=2)
    assert len(rows) == 2 and all(row["passed"] and row["first_ratios_are_1"] for row in rows)
    assert all(row["decode_over_floor"] > 1 and row["trained_tokens_per_s"] > 0 for row in rows)
    assert "rollout" in rows[0]["said"] and "x its reading" in rows[0]["said"]
    assert rows[0]["sampled_tokens"] == 2 * 4 * 6 and len(rows[0]["grad_norms"]) == 2
    assert rows[1]["last_ratios"] != (1.0, 1.0)  # the second update sees what the first has done
    assert capsys.readouterr().out.count("RESULT ") == 2


SHAPE = {"prompts": 2, "group": 2, "prompt_tokens": 5, "tokens": 24, "updates": 1, "max_tokens": 64}
ON_A_CPU = ["decode_profile", "decode", "micro_batch", "rollouts", "waits", "kernels"]


@pytest.mark.parametrize("part", ON_A_CPU)
def test_measured_parts_run_here_as_well(part, capsys):
    """Small, and without what CUDA alone can count. Each result has a name and a line."""
    gpu_suite.run_inside(part, CPU, {**gpu_suite.QWEN3_0_6B, **SIZES}, SHAPE)
    rows = [json.loads(line.removeprefix("RESULT ")) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(row["name"] and row["said"] and row.get("passed", True) for row in rows), rows[-1]
    if part == "kernels":
        assert {row["variant"] for row in rows if "variant" in row} <= {"ours", "ours, rows", "ours, epilogue"}
    if part == "decode":
        assert [row["name"] for row in rows[:2]] == ["4 rows, adapters", "4 rows, no adapters"]


def test_a_part_that_raises_keeps_what_it_found(capsys, monkeypatch):
    def broken(device, file, shape):
        yield {"name": "a", "said": "b"}
        raise RuntimeError("one\nline")

    monkeypatch.setitem(gpu_suite.INSIDE, "card", broken)
    gpu_suite.run_inside("card", CPU, {}, {})
    first, last = (json.loads(x.removeprefix("RESULT ")) for x in capsys.readouterr().out.splitlines())
    assert first == {"name": "a", "said": "b"} and not last["passed"] and "RuntimeError: one line (" in last["said"]


def test_the_peer_is_measured():
    pytest.importorskip("transformers")
    file = {**gpu_suite.QWEN3_0_6B, **SIZES}
    peer = gpu_suite.against_transformers(gpu_suite.policy(CPU, file), CPU, file, SHAPE, torch.bfloat16)
    assert (peer["rows"], peer["tokens"]) == (4, 24) and peer["ratio"] > 0


def test_what_a_decode_step_reads():
    """By hand: 2 layers, 2 kv heads of 64, bf16; 3 steps of 6 answers to 2 prompts of 5 tokens, at 1 byte a second."""
    model, _ = gpu_suite.small_model(CPU)
    shape = {"prompts": 2, "group": 3, "prompt_tokens": 5}
    weights = sum(p.nbytes for p in model.parameters())
    slot = 2 * 2 * 2 * 64 * 2
    want = 3 * weights + slot * (3 * 2 * 5 + 6 * (1 + 2 + 3))
    assert gpu_suite.decode_floor(model, shape, 4, 1.0) == want


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_a_part_is_kept_until_it_ends_or_its_limit(tmp_path):
    row = 'print(\'RESULT {"check": "a", "passed": true, "seconds": 1, "said": "b"}\', flush=True);'
    late = tmp_path / "late"
    hang = "import subprocess, time; print('begun', flush=True);" + row
    hang += f"subprocess.Popen(['sh', '-c', 'sleep 5; touch {late}']); time.sleep(60)"
    shown, started = [], time.monotonic()
    part = gpu_suite.run_part(python(hang), 4, shown.append)
    assert time.monotonic() - started < 20 and shown[0] == "begun"
    time.sleep(2)
    assert not late.exists()  # what it had started is ended with it, and does not hold the GPU
    assert not part["passed"] and part["said"] == "ended after 4 s, its limit"
    assert [r["check"] for r in part["results"]] == ["a"]  # what it had found
    assert gpu_suite.run_part(python(row), 60, shown.append)["passed"]
    assert not gpu_suite.run_part(python(row.replace("true", "false")), 60, shown.append)["passed"]
    assert gpu_suite.run_part(python("import sys; sys.exit(3)"), 60, shown.append)["said"] == "exit code 3"
    half = gpu_suite.run_part(python("print('RESULT {\"che')"), 60, shown.append)
    assert half["passed"] and half["results"] == [] and half["tail"] == ['RESULT {"che']
    assert "could not start" in gpu_suite.run_part(["/no/such/program"], 60, shown.append)["said"]


def test_a_part_that_fails_costs_no_other(tmp_path, capsys):
    """Parts run in their order, the file holds each result before the next, and one part's end is no other's."""
    row = {"name": "fast", "said": "1 ms", "passed": True}
    seen = f"import glob; print('SEEN', open(glob.glob({str(tmp_path)!r} + '/*.json')[0]).read().count('1 ms') > 0)"
    late = f"print('RESULT {json.dumps(row)}', flush=True); import time; time.sleep(0.5); {seen}"
    commands = {
        "card": "import os; os.abort()",
        "decode": late,
        "kernels": f"print('RESULT {json.dumps(row | {'name': 'slow'})}', flush=True); import time; time.sleep(60)",
        "checks": f"print('RESULT {json.dumps({'check': 'c', 'passed': False, 'said': 'no'})}')",
        "tests": "print('3 passed')",
    }
    limits = dict.fromkeys(commands, 20) | {"kernels": 5}
    out = gpu_suite.run_suite(
        list(commands), 100, tmp_path, facts() | {"commit": "c"}, lambda part: python(commands[part]), limits
    )
    assert {name: part["passed"] for name, part in out.items()} == {
        "card": False, "decode": True, "kernels": False, "checks": False, "tests": True
    }  # fmt: skip
    assert list(out) == list(commands) and "SEEN True" in out["decode"]["tail"]
    assert [r["name"] for r in out["kernels"]["results"]] == ["slow"]
    [file] = tmp_path.iterdir()
    saved = json.loads(file.read_text())
    assert list(saved["parts"]) == list(commands) and file.name.startswith("suite_2026-01-02")
    assert "| decode: fast | passed | 1 ms |" in saved["markdown"]
    assert "| checks: c | FAILED | no |" in saved["markdown"]
    said = capsys.readouterr().out
    assert "\nfast | passed | 1 ms\n" in said and "RESULT" not in said and "| kernels | FAILED |" in said
    late = gpu_suite.run_suite(["tests"], 1, tmp_path, facts() | {"commit": "c"}, lambda part: ["never"], limits)
    assert late["tests"]["said"] == "not run: out of time"


def test_the_parts_and_their_commands():
    order = "card checks decode_profile decode micro_batch rollouts kernels waits cycle peers tests nvcc"
    assert list(gpu_suite.LIMITS) == order.split() and sum(list(gpu_suite.LIMITS.values())[:9]) < 600
    assert set(gpu_suite.INSIDE) == set(gpu_suite.LIMITS) - {"tests"}
    tests = gpu_suite.command_of("tests")
    assert "tests/test_nf4.py" in tests and "tests/test_seq_logprob_triton.py" in tests and "tests/test_glu.py" in tests
    assert "tests/test_kernel_sample.py" in tests and "tests/test_train.py" not in tests
    assert tests[4:6] == ["-v", "--tb=line"]  # what is ended half-way has said what failed
    assert gpu_suite.command_of("cycle")[-2:] == ["--inside", "cycle"]
    first = ["products_come_out_as_fp32", "model_scores_itself", "model_against_cpu", "decode_graph"]
    assert list(gpu_suite.CHECKS)[:4] == first and len(gpu_suite.CHECKS) > 9


def test_an_unknown_part(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_suite.main(["--parts", "checks,magic"])
    assert stop.value.code == 2 and "got the part 'magic', want some of card, checks" in capsys.readouterr().err


# ----------------------------------------------------------------------------
# sampling


def test_sampling_alone_measures_late_tokens_and_shared_prompts():
    """With times that are known: a clock that moves by 1 at every look."""
    _, model = tiny.build("abc", seed=0)
    with patch.object(generate.time, "perf_counter", itertools.count().__next__):
        late = generate.late_tokens(model, [[3, 4], [4]], early=4, late=12, around=2)
        shared = generate.shared_prompt(model, tokens=20, group=4, answer=3, rounds=1)
    assert late["early_s"] == late["late_s"] == 1 and late["rows"] == 2 * generate.GROUP
    # 8 slots more of each row, two numbers of fp32 for each channel of keys, read at 400 MB a second
    c = model.config
    assert late["bytes_s"] == 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim * 16 * 8 / 4e8
    assert late["beyond"] == pytest.approx(-late["bytes_s"], rel=1e-9)
    assert generate.said(late).startswith("16 rows: 1000.0 ms a step around token 4, 1000.0 around 12; reading their")
    # a prompt's last token stands once for each answer, an answer's last token never
    assert {name: row["share"] for name, row in shared.items()} == {
        "prefill": 1 / 4,
        "training forward": (19 + 4 * 3) / (4 * 22),
        "forward and backward": (19 + 4 * 3) / (4 * 22),
    }
    assert all(row["over_share"] == 1 / row["share"] for row in shared.values())
