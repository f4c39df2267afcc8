"""Exercise 3. Which tensors differ between two checkpoints, and by how much?

Make this pass:  python -m pytest lessons/exercises/test_ex03.py        (about 12 lines)

Hints: weight_files(folder) lists the safetensors of a checkpoint, sharded or not; read_header(file)[0] maps names to
entries; read_tensor(file opened with "rb", entry) gives one tensor. What if the two folders are cut into different
shards, or hold different dtypes? And what would a checkpoint of 140 GB need?
"""

from pathlib import Path


def changed(a: str | Path, b: str | Path) -> dict[str, float]:
    """Name -> largest absolute difference, of those tensors that differ at all.

    Raises ValueError naming the tensors that only one of the folders has.
    """
    raise NotImplementedError("exercise 3: lessons/exercises/ex03.py")
