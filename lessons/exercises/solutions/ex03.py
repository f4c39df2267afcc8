"""Solution of exercise 3."""

from pathlib import Path

from nanogspo.checkpoint import read_header, weight_files


def changed(a: str | Path, b: str | Path) -> dict[str, float]:
    one, other = (
        {name: stored for file in weight_files(Path(folder)) for name, stored in read_header(file)[0].items()}
        for folder in (a, b)
    )
    if alone := sorted(one.keys() ^ other.keys()):
        raise ValueError(f"got {', '.join(alone)} in one folder only, want the same tensors in both")
    gaps = {}
    for name in one:
        gap = (one[name].read().float() - other[name].read().float()).abs().max().item()
        if gap:
            gaps[name] = gap
    return gaps
