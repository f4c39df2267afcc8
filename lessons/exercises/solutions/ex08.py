from torch import Tensor
from torch.nn.functional import logsigmoid


def join(z_y: Tensor, m: Tensor, s: Tensor) -> Tensor:
    top = m.amax(1).clamp_min(-1e30)  # (N,)
    total = (s * (m - top[:, None]).exp()).sum(1)  # (N,) a tile at -inf gets exp(-inf) = 0
    return logsigmoid(z_y - top - total.log())  # (N,)
