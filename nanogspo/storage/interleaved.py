"""Qwen3-Next's files hold the projections of a gated DeltaNet layer two by two, rows of one key head side by side:

    in_proj_qkvz    for each key head    q (dk) | k (dk) | v of its value heads (r dv) | z of them (r dv)
    in_proj_ba      for each key head    b of its value heads (r) | a of them (r)

The model has in_proj_qkv, in_proj_z, in_proj_b and in_proj_a, as Qwen 3.5's files do: all q, all k, all v. So rows are
put in order when they are read, and back when they are written.

Tests: tests/test_delta_net.py
"""

import dataclasses

import torch
from torch import Tensor

from nanogspo.families import ModelConfig
from nanogspo.storage.experts import Writable
from nanogspo.storage.safetensors import Stored


@dataclasses.dataclass(frozen=True)
class SomeRows(Stored):
    """Rows of a stored matrix, in the model's order."""

    index: Tensor

    def read(self, rows: slice | None = None) -> Tensor:
        return super().read()[self.index][rows or slice(None)]


def orders(config: ModelConfig) -> dict[str, dict[str, Tensor]]:
    """Projection in a file -> projections of the model -> which of the file's rows each consists of."""
    if config.family != "qwen3_next":
        return {}
    H, r = config.linear_key_heads, config.linear_value_heads // config.linear_key_heads
    dk, dv = config.linear_key_dim, config.linear_value_dim

    def parts(*sizes: int) -> list[Tensor]:
        row = torch.arange(H * sum(sizes), device="cpu").view(H, -1)  # (H, rows of a key head)
        return [part.flatten() for part in row.split(sizes, dim=1)]

    (*qkv, z), (b, a) = parts(dk, dk, r * dv, r * dv), parts(r, r)
    return {
        "in_proj_qkvz": {"in_proj_qkv": torch.cat(qkv), "in_proj_z": z},
        "in_proj_ba": {"in_proj_b": b, "in_proj_a": a},
    }


def split(name: str, stored: Stored, config: ModelConfig) -> dict[str, Stored]:
    """A stored tensor, of our name -> what it is of the model, by the model's names."""
    owner, _, leaf = name.removesuffix(".weight").rpartition(".")
    order = orders(config).get(leaf, {})
    if sum(map(len, order.values())) != (stored.shape or (0,))[0]:
        return {name: stored}  # another tensor; or one of another shape, which is named as unexpected
    facts = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)}
    return {
        f"{owner}.{ours}.weight": SomeRows(**facts | {"shape": (len(index), *stored.shape[1:])}, index=index)
        for ours, index in order.items()
    }


def joined(tensors: Writable, config: ModelConfig) -> Writable:
    """What is to be written, in the model's names -> in those of files."""
    out = dict(tensors)
    for theirs, order in orders(config).items():
        back = torch.cat(list(order.values())).argsort()
        for name in [n for n in tensors if n.endswith(f".{next(iter(order))}.weight")]:
            owner = name.removesuffix(f"{next(iter(order))}.weight")
            sizes, gets = zip(*(out.pop(f"{owner}{ours}.weight") for ours in order), strict=True)
            make = lambda gets=gets, back=back: torch.cat([get().detach().cpu() for get in gets])[back]  # noqa: E731
            out[f"{owner}{theirs}.weight"] = (sum(sizes), make)
    return out
