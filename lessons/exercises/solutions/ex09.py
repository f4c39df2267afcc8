import math

from torch import Tensor
from torch.nn.functional import logsigmoid


def direction(hidden: Tensor, weight: Tensor, targets: Tensor, c: Tensor, e: Tensor) -> Tensor:
    z = hidden @ weight.T  # (N, V)
    y = targets[:, None]  # (N, 1)
    z_y = z.gather(1, y)  # (N, 1)
    logp = logsigmoid(z_y - z.scatter(1, y, -math.inf).logsumexp(1, keepdim=True))  # (N, 1)
    log_p = (z - z_y + logp).scatter(1, y, logp)  # (N, V)
    p = log_p.exp()  # (N, V)
    others = p.scatter(1, y, 0.0)  # (N, V)
    entropy = -(others * log_p).sum(1, keepdim=True) - logp.exp() * logp  # (N, 1)
    dz = -others * (c[:, None] + e[:, None] * (log_p + entropy))  # (N, V)
    own = -logp.expm1() * c[:, None] - logp.exp() * e[:, None] * (logp + entropy)  # (N, 1)
    return dz.scatter(1, y, own) @ weight  # (N, C)
