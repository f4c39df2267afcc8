import torch
from torch import Tensor


def delta_chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    A = (k @ k.T * beta[:, None]).tril(-1)  # (T, T)
    missing = beta[:, None] * (v - k @ S)  # (T, dv)
    u = torch.linalg.solve_triangular(A, missing, upper=False, unitriangular=True)  # (T, dv)
    return q @ S + (q @ k.T).tril() @ u, S + k.T @ u
