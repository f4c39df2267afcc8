"""Runs before any test module is imported: what holds for every test."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it at every @triton.jit, when kernels are imported

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from interpreter import exact_bf16  # noqa: E402

exact_bf16()

torch.set_num_threads(1)  # test tensors are tiny: threads only cost, and sums over them may differ in the last bit

settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)  # the same cases every run
settings.register_profile(
    "mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)  # no shrinking
settings.register_profile("deep", max_examples=500, deadline=None)  # HYPOTHESIS_PROFILE=deep, by hand or nightly
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config):
    config.option.reportchars += "s"  # a skipped test always says why, without anybody asking


def pytest_ignore_collect(collection_path, config):
    # An exercise fails until its reader has solved it, so it runs only when its folder or file is named.
    unsolved = "exercises" in collection_path.parts and not any("exercises" in argument for argument in config.args)
    return True if unsolved else None  # None: pytest decides as usual
