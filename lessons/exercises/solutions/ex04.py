import math

import torch
from torch import Tensor

from nanogspo.rollout import sample


def sample_min_p(logits: Tensor, uniform: Tensor, temperature: float, min_p: float) -> tuple[Tensor, Tensor]:
    z = logits / temperature  # (N, V)
    lowest = z.amax(1, keepdim=True) + (math.log(min_p) if min_p else -math.inf)  # (N, 1)
    return sample(z.masked_fill(z < lowest, -torch.inf), uniform, temperature=1.0)
