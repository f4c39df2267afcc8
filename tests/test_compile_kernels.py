"""tools/compile_kernels.py: what has to fail fails, by name, and what is right passes. In a process of its own, because
here kernels are interpreted and there they are compiled.

Run: python -m pytest tests/test_compile_kernels.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

# One kernel for each thing that can be wrong, and the entry that launches it.
KERNELS = """
import torch
from kernels.backend import choose, is_hopper, tl, triton

@triton.jit
def helper(x):
    return deeper(x) * 2.0

ONE = tl.constexpr(1.0)

@triton.jit
def deeper(x):
    return x + ONE  # of a helper's helper

@triton.jit
def nobody_calls_this(x):
    return x

@triton.jit
def good(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i * stride, helper(tl.load(x_ptr + i * stride, mask=i < n, other=0.0).to(tl.float32)), mask=i < n)

@triton.jit
def integer_carry(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    s = 0
    for start in range(0, n, BLOCK):
        s += tl.sum(tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32))
    tl.store(y_ptr, s)

@triton.jit
def spilling(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.exp(x - tl.max(x)) / tl.sum(tl.exp(x)))

@triton.jit
def much_shared(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 256)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, 256):
        a = tl.load(x_ptr + i[:, None] * n + start + k[None, :])
        b = tl.load(x_ptr + i[None, :] * n + start + k[:, None] + 256)
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + i[:, None] * BLOCK + i[None, :], acc)

@triton.jit
def never_launched(x_ptr, n):
    tl.store(x_ptr + n, 0.0)

def entry(kernel, *shape, grid=(1,), dtype=torch.float32, offset=0, **constants):
    x = torch.ones(4096 + offset, dtype=dtype)[offset:]
    assert choose("triton", x) == "triton"
    y = torch.empty_like(x)
    kernel[grid](x, y, *shape, **constants)
    return y

def cases():
    return {
        "good": lambda: entry(good, 1, 4096, BLOCK=1024, grid=lambda c: (triton.cdiv(c["n"], c["BLOCK"]),)),
        "twice": lambda: entry(good, 1, 8192, BLOCK=1024),  # another n that 16 divides: the same kernel
        "odd": lambda: entry(good, 3, 4095, BLOCK=1024, offset=1),
        "half": lambda: entry(good, 1, 4096, BLOCK=1024, dtype=torch.bfloat16),
        "integer": lambda: entry(integer_carry, 4096, BLOCK=1024),
        "spill": lambda: entry(spilling, BLOCK=8192, num_warps=1),
        "shared": lambda: entry(much_shared, 512, BLOCK=64, dtype=torch.bfloat16, num_warps=4, num_stages=5),
        "empty": lambda: entry(good, 1, 4096, BLOCK=1024, grid=(0,)),
        "raises": lambda: torch.zeros(2) @ torch.zeros(3),
        "hopper": lambda: entry(good, 1, 4096, BLOCK=2048 if is_hopper(torch.ones(1)) else 512),
        "poisoned": lambda: print("POISON", entry(good, 1, 4096, BLOCK=1024).isnan().all().item()),
    }
"""

SCRIPT = """
import json, pathlib, sys, types
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import compile_kernels as tool
import bad_kernels
report, every = {}, list(tool.TARGETS)
cases = bad_kernels.cases()

def lenient():  # the very launch of "spill" at what is called an odd width: does not excuse it
    with tool.odd_widths():
        cases["spill"]()

report["failures"] = tool.gate(cases | {"lenient": lenient}, [bad_kernels], every)
others = [j for j in tool.JOBS if j.case != "hopper"]
report["jobs"] = [[j.name, j.target, j.signature, sum(map(bool, j.attributes.values()))] for j in others]
report["hopper"] = [[j.target, *j.constants.values()] for j in tool.JOBS if j.case == "hopper"]
good = {k: cases[k] for k in ("good", "odd")}
with tool.odd_widths():
    report["odd"] = tool.gate({"spill": cases["spill"]}, [], ["sm_90"])
report["good"] = tool.gate(good, [], every)
tool.LEDGER, tool.ledger.drawn_again = pathlib.Path(sys.argv[2], "compiled"), lambda root, keys: set()
for step in ("first", "second", "changed", "wrong", "deep"):
    if step == "changed":
        bad_kernels.ONE = bad_kernels.tl.constexpr(2.0)
        tool.closure.cache_clear()
        before = tool.ledger.read(tool.LEDGER / "bad_kernels.jsonl")
        tool.gate({"good": cases["good"]}, [], ["sm_90"], memory=tool.Ledger(tool.LEDGER, False))  # a part
        report["part writes"] = tool.ledger.read(tool.LEDGER / "bad_kernels.jsonl") != before
    if step == "wrong":  # too much of everything, as the ledger says
        path = tool.LEDGER / "bad_kernels.jsonl"
        entries = tool.ledger.read(path)
        tool.ledger.write(path, [entry | {"spills": 8} for entry in entries])
    memory = tool.Ledger(tool.LEDGER, step == "deep")
    failures = tool.gate({"good": cases["good"]}, [], every, memory=memory)
    report["ledger " + step] = [failures, len(tool.KNOWN), len(tool.JOBS)]
report["closure"] = tool.closure(bad_kernels.good)
report["entries"] = entries
for name in ("much_shared", "spilling"):
    tool.EXCUSED[("bad_kernels." + name, "sm_90")] = "shared memory", "a test"
report["excused"] = tool.gate({"shared": cases["shared"]}, [bad_kernels], ["sm_90"], "much_shared")
report["inexcusable"] = tool.gate({"spill": cases["spill"]}, [bad_kernels], ["sm_90"], "spilling")
tool.EXCUSED[("bad_kernels.good", "sm_90")] = "spills", "not needed"
report["needless"] = tool.gate(good, [bad_kernels], ["sm_90"], "good")
command = ["--case", "token_logp", "--only", "token_logp_v3._forward", "--targets", "sm_80"]
report["code"] = [tool.main(command)]
from kernels.decode_attention import decode_attention

def rollout(rows):  # a cache grows by 128 slots at a time; prompts of any length
    for slots, prompt in [*((128 * n, 192) for n in range(1, 9)), (1792, 192), (128, 20), (128, 2032)]:
        pair, own = [tool.randn(2, n, s, 128) for n, s in ((2, prompt), (rows, slots))]
        numbers = {"prefix_lengths": tool.torch.full((2,), 9), "lengths": tool.torch.full((rows,), 9)}
        numbers["prompt"] = tool.torch.arange(rows) * 2 // rows
        decode_attention(
            tool.randn(rows, 4, 128), pair, pair, k=own, v=own, scale=0.1, backend="triton", **numbers
        )

report["rollout"] = []
for rows in (32, 6):
    launches, failures = tool.record({"rollout": lambda: rollout(rows)}, True)
    kinds = {tool.specialise(launch, "sm_90").key for launch in launches}
    report["rollout"].append([failures, len(launches), len(kinds)])
tool.CASES = {}
report["code"] += [tool.main(command), tool.main(command[2:])]
from kernels import backend
report["nvcc"] = []
for said in ("Compiling entry function 'k' for 'sm_90'\\nUsed 40 registers, 16 bytes smem\\n", "other words"):
    tool.subprocess.run = lambda *a, said=said, **b: types.SimpleNamespace(returncode=0, stderr=said)
    report["nvcc"].append([[name, r.registers, r.shared, r.error] for name, r in tool.compile_cuda("sm_90")])
report["restored"] = not backend.INTERPRETED and tool.JITFunction.run.__name__ == "run"
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_kernels.py").write_text(KERNELS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1"  # as in CI's shell: the tool has to switch it off
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "tools"), str(folder)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report(run):
    assert run.returncode == 0, run.stderr
    [line] = [line for line in run.stdout.splitlines() if line.startswith("REPORT")]
    return json.loads(line.removeprefix("REPORT"))


def about(report, *words):
    return [failure for failure in report["failures"] if all(word in failure for word in words)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_an_integer_that_a_loop_turns_into_a_float_is_refused(report, target):
    [failure] = about(report, "integer_carry", target)  # the interpreter runs this kernel without a word
    assert "CompilationError" in failure


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_spills_are_refused(report, target):
    [failure] = about(report, "spilling", target)  # 256 numbers a thread and 255 registers
    assert "spills: " in failure and "bytes a thread" in failure


def test_spills_at_odd_widths_are_only_shown(run, report):
    assert report["odd"] == [] and "(may spill)" in run.stdout


@pytest.mark.parametrize("target, limit", [("sm_80", 166912), ("sm_90", 232448), ("gfx942", 65536)])
def test_too_much_shared_memory_is_refused(report, target, limit):
    [failure] = about(report, "much_shared", target, "memory")  # two tiles of 32 KB, four times over
    assert f"bytes of shared memory, {target} has {limit}" in failure


def test_no_kernel_escapes(report):
    assert about(report, "never_launched") == ["bad_kernels.never_launched: no case launches it"]
    assert about(report, "nobody_calls_this") == ["bad_kernels.nobody_calls_this: no case launches it"]
    assert not about(report, "helper") and not about(report, "deeper")  # called, and by what is called


def test_an_entry_that_fails_is_not_passed_over(report):
    assert about(report, "raises: RuntimeError") and about(report, "empty: ValueError", "want positive ints")


def test_nothing_else_is_refused(report):
    bad = ("integer_carry", "spilling", "much_shared", "no case launches it", "raises: ", "empty: ")
    assert [f for f in report["failures"] if not any(word in f for word in bad)] == []
    assert report["good"] == []


def test_launches_are_specialised_as_on_a_gpu(report):
    """A stride of 1 becomes a constant, what 16 divides is known to be divisible, equal ones compile once."""
    good = [job for job in report["jobs"] if job[0].endswith(".good") and job[1] == "sm_90"]
    fp32 = [(signature, divisible) for _, _, signature, divisible in good if signature["x_ptr"] == "*fp32"]
    assert len(good) == 3 and len(fp32) == 2  # fp32 twice (four launches), bf16 once
    unit, odd = sorted(fp32, key=lambda pair: pair[0]["stride"], reverse=False)
    assert unit[0]["stride"] == "constexpr" and unit[1] == 3  # two pointers and n
    assert odd[0]["stride"] == "i32" and odd[1] == 1  # only y: x starts 4 bytes into its memory


def test_hopper_is_recorded_with_its_own_tiles(report):
    assert sorted(report["hopper"]) == [["gfx942", 1, 512], ["sm_80", 1, 512], ["sm_90", 1, 2048]]


def test_a_longer_cache_compiles_nothing(report):
    """Eleven caches of a decode step, three launches each: prompts of 192, 20 and 2032 slots, rows of up to 14 splits.
    20 is not a multiple of 16, so the kernel that reads these prompts is another one."""
    assert report["rollout"] == [[[], 33, 4], [[], 33, 4]]


def test_what_a_kernel_would_write_is_nan(run):
    assert "POISON True" in run.stdout  # an entry that looks at it does the same every time


def test_excuses(report):
    assert report["excused"] == []
    assert "spills: " in report["inexcusable"][0]  # another fault than the excused one
    assert [f for f in report["needless"] if "delete the excuse" in f] == [
        "bad_kernels.good for sm_90: is excused and compiles; delete the excuse"
    ]


def test_exit_codes(report):
    assert report["code"] == [0, 0, 1]  # with --case others are left out; without, a kernel without a case is a fault
    assert report["restored"]


def test_a_cuda_file_of_which_nvcc_says_nothing_is_a_failure(report):
    files = sorted(path.name for path in (ROOT / "kernels").glob("*.cu"))
    assert report["nvcc"] == [
        [[f"{file}: k", 40, 16, ""] for file in files],
        [[file, 0, 0, "nvcc names no kernel and its registers"] for file in files],
    ]


def test_the_table_names_registers_shared_memory_and_spills(run):
    assert "sm_90 regs shared spill" in run.stdout and "*bf16 *fp32 BLOCK" not in run.stderr


def test_what_is_known_is_not_compiled_again(report):
    assert report["ledger first"] == [[], 0, 3] and report["ledger second"] == [[], 3, 3]
    assert report["ledger changed"] == [[], 0, 3]  # a constant that a function of a function reads
    assert {"return x + ONE", "return deeper(x) * 2.0"} <= {line.strip() for line in report["closure"]}
    assert [entry["kernel"] for entry in report["entries"]] == ["bad_kernels.good"] * 3  # those that were are gone
    assert not report["part writes"]


def test_limits_hold_for_what_is_known(report):
    failures, known, _ = report["ledger wrong"]
    assert known == 3 and len(failures) == 3 and all("spills: 8 bytes a thread" in failure for failure in failures)


def test_deep_contradicts_a_wrong_ledger(report):
    failures, known, _ = report["ledger deep"]
    assert known == 0 and len(failures) == 3 and all("tests/compiled says" in failure for failure in failures)
