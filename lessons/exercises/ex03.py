"""Exercise 3. Which tensors differ between two checkpoints, and by how much?

Make this pass:  python -m pytest lessons/exercises/test_ex03.py        (about 12 lines)

To use, from nanogspo.checkpoint: weight_files(folder) lists the safetensors of a folder; read_header(file)[0] maps the
names in a file to its tensors; stored.read() gives one of those as a torch.Tensor. A checkpoint of 140 GB must do.
"""

from pathlib import Path


def changed(a: str | Path, b: str | Path) -> dict[str, float]:
    """Name -> largest absolute difference, of those tensors that differ at all.

    Raises ValueError naming the tensors that only one of the folders has.
    """
    raise NotImplementedError("exercise 3: lessons/exercises/ex03.py")
