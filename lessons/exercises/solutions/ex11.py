import torch
from torch import Tensor

Adapter = tuple[Tensor, Tensor, float]


def stack(first: Adapter, second: Adapter) -> Adapter:
    A = torch.cat((first[0], second[0]))  # (r1 + r2, in)
    B = torch.cat((first[1] * first[2], second[1] * second[2]), dim=1)  # (out, r1 + r2)
    return A, B, 1.0
