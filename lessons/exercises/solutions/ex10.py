import torch
from torch import Tensor


def normal_float(bits: int = 4) -> Tensor:
    count = 2**bits
    last = 1 - (1 / (2 * (count - 1)) + 1 / (2 * count)) / 2
    sides = []
    for steps in (count // 2 - 1, count // 2):
        p = torch.linspace(last, 0.5, steps + 1, dtype=torch.float64)[:-1]  # (steps,)
        sides.append(torch.special.ndtri(p))
    values = torch.cat([-sides[0], torch.zeros(1, dtype=torch.float64), sides[1]]).sort().values  # (count,)
    return values / values.max()
