"""Runs before any test module is imported: what holds for every test."""

import os
import signal
import sys
from pathlib import Path

# test tensors are tiny: threads only cost, and sums over them may differ in the last bit; before torch is imported, and
# for the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at every @triton.jit, when kernels are imported

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from interpreter import exact_bf16  # noqa: E402

exact_bf16()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started by a script in the background: a run that a test
    signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupts would leave the signal ignored, as it should

torch.set_num_threads(1)  # whatever OMP_NUM_THREADS says

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)  # the same cases every run
without_shrinking = [Phase.explicit, Phase.generate]
settings.register_profile("mutants", settings.get_profile("ci"), phases=without_shrinking)
settings.register_profile("deep", max_examples=500, deadline=None)  # HYPOTHESIS_PROFILE=deep, by hand or nightly
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

pytest_plugins = ["suite"]  # tools/suite.py: two files at a time, and a budget of seconds for each


def pytest_configure(config):
    config.option.reportchars += "s"  # a skipped test always says why, without anybody asking


def pytest_ignore_collect(collection_path, config):
    # An exercise fails until its reader has solved it, so it runs only when its folder or file is named.
    unsolved = "exercises" in collection_path.parts and not any("exercises" in argument for argument in config.args)
    return True if unsolved else None  # None: pytest decides as usual
