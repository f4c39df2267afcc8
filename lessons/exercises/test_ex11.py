import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lessons.exercises import load
from nanogspo.lora import LoRALinear

stack = load("ex11").stack

sizes = st.sampled_from([1, 2, 7])


def an_adapter(r: int, width: int, out: int, scale: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), scale


def layer_with(weight, A, B, scale) -> LoRALinear:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight
    layer = LoRALinear(base, r=len(A), scale=scale)
    layer.lora_A.weight.data, layer.lora_B.weight.data = A, B
    return layer


@given(r1=sizes, r2=sizes, width=sizes, out=sizes, seed=st.integers(0, 2**31 - 2))
def test_one_adapter_does_what_both_do(r1, r2, width, out, seed):
    first, second = an_adapter(r1, width, out, 2.0, seed), an_adapter(r2, width, out, 0.3, seed + 1)
    A, B, scale = stack(first, second)
    assert A.shape == (r1 + r2, width) and B.shape == (out, r1 + r2) and scale == 1.0
    x, weight = torch.randn(5, width), torch.randn(out, width)
    alone = [layer_with(weight, *adapter)(x) - x @ weight.T for adapter in (first, second)]
    together = layer_with(weight, A, B, scale)(x) - x @ weight.T  # (5, out)
    # sums of at most 2 * 7 * 7 products of a few units each, in another order: 98 * 2**-24 * 100 = 6e-4 at the worst
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=0, atol=6e-4)


def test_the_adapters_given_are_not_changed():
    first, second = an_adapter(2, 3, 4, 2.0, 0), an_adapter(2, 3, 4, 0.5, 1)
    copies = [tensor.clone() for tensor in (*first[:2], *second[:2])]
    stack(first, second)
    assert all(torch.equal(a, b) for a, b in zip((*first[:2], *second[:2]), copies, strict=True))
