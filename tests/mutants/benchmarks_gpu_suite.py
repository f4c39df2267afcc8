"""Wrong edits of benchmarks/gpu_suite.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "benchmarks/gpu_suite.py"
MUTANTS = {
    "tests/test_benchmarks.py": [
        (
            "        os.killpg(child.pid, signal.SIGKILL)",
            "        child.kill()",
            "what a part started holds the pipe and the GPU",
        ),
        (
            '    passed = code == 0 and all(row.get("passed", True) for row in results)',
            "    passed = code == 0",
            "a failed check passes when the process ends well",
        ),
        ("    passed = code == 0 and all(", "    passed = code is not None and all(", "a part that crashed passes"),
        (
            "        with contextlib.nullcontext() if train else torch.no_grad():\n            logp, entropy",
            "        with torch.no_grad():\n            logp, entropy",
            "the check of the first ratio compares two passes without gradients",
        ),
        (
            'save(out, "suite", facts, {',
            "save(out, part, facts, {",
            "a file for each part and none of the whole",
        ),
        (
            "                keep(results)\n",
            "                pass\n",
            "what a part found is lost when the suite is ended in it",
        ),
        (
            '        result({"name": part, "passed": False, "said": said})',
            '        result({"name": part, "said": said})',
            "a part that raised passes",
        ),
        (
            "CHECKS = {name: CHECKS[name] for name in [*FIRST, *CHECKS]}",
            "CHECKS = dict(CHECKS)",
            "the checks that everything depends on come last",
        ),
        ('"-v", "--tb=line"', '"-q", "--tb=line"', "tests ended half-way do not say which failed"),
        (
            '        print("gpu_suite.py: got no GPU',
            '        print("gpu_suite.py: no',
            "the message does not say what is missing",
        ),
        (
            '    assert sure >= 3, f"only {sure} rows',
            '    assert sure >= 300, f"only {sure} rows',
            "a check that can never pass",
        ),
        (
            '        row["passed"] = row["first_ratios_are_1"] and',
            '        row["passed"] = not row["first_ratios_are_1"] and',
            "the step passes when its first ratio is not 1",
        ),
    ],
}
