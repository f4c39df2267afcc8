"""Exercises. A reader edits exNN.py until test_exNN.py passes; CI runs the same tests on solutions/."""

import importlib
import os
from types import ModuleType


def load(name: str) -> ModuleType:
    """The reader's file; with EXERCISES=solutions, ours."""
    folder = "lessons.exercises.solutions" if os.environ.get("EXERCISES") == "solutions" else "lessons.exercises"
    return importlib.import_module(f"{folder}.{name}")
