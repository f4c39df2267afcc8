import torch
from torch import Tensor

from kernels.backend import tl, triton


@triton.jit
def _entropy_kernel(logits_ptr, entropy_ptr, stride_n, V, BLOCK_V: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    m = -3.4028234663852886e38
    s = 0.0
    a = 0.0
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
        x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        e = tl.exp(x - m_new)  # (BLOCK_V,)
        scale = tl.exp(m - m_new)
        a = (a + s * (m - m_new)) * scale + tl.sum(tl.where(v < V, e * (x - m_new), 0.0), axis=0)
        s = s * scale + tl.sum(e, axis=0)
        m = m_new
    tl.store(entropy_ptr + n, tl.log(s) - a / s)


def row_entropy(logits: Tensor) -> Tensor:
    N, V = logits.shape
    entropy = torch.full((N,), float("nan"), device=logits.device)  # (N,)
    _entropy_kernel[(N,)](logits, entropy, logits.stride(0), V, BLOCK_V=1024)
    return entropy
