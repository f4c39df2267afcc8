import torch
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load

direction = load("ex09").direction


def by_autograd(hidden, weight, targets, c, e):
    """float64, the whole matrix, and the target kept apart: 1 - p would cancel in float64 as well."""
    hidden = hidden.double().requires_grad_()
    z = hidden @ weight.double().T  # (N, V)
    z_y = z.gather(1, targets[:, None])  # (N, 1)
    others = z.scatter(1, targets[:, None], -torch.inf) - z_y  # (N, V)
    total = others.exp().sum(1)  # (N,) odds against the target
    logp = -torch.log1p(total)  # (N,)
    p = others.exp() / (1 + total[:, None])  # (N, V)
    plogp = torch.where(p > 0, p * (others.clamp_min(-700) + logp[:, None]), 0.0)  # (N, V)
    entropy = -plogp.sum(1) - logp.exp() * logp  # (N,)
    (c.double() * logp + e.double() * entropy).sum().backward()
    return hidden.grad


cases = given(seed=st.integers(0, 2**31 - 1), N=st.sampled_from([1, 6]), V=st.sampled_from([2, 9, 50]))


@cases
def test_both_gradients_at_once(seed, N, V):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, 8, generator=g), torch.randn(V, 8, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)
    c, e = torch.randn(2, N, generator=g)
    want = by_autograd(hidden, weight, targets, c, e)
    torch.testing.assert_close(direction(hidden, weight, targets, c, e).double(), want, rtol=1e-4, atol=1e-4)


@cases
def test_confident_tokens_keep_three_digits(seed, N, V):
    """A margin of 18 to 27: 1 - p is 1e-8 to 1e-12, the gradient as small, and still right to 1e-3 of itself."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.nn.functional.normalize(torch.randn(V, 8, generator=g), dim=1)
    targets = torch.randint(0, V, (N,), generator=g)
    weight = torch.cat([weight, torch.zeros(V, 1)], 1)
    weight[targets[0], -1] = 1.0
    targets[:] = targets[0]
    hidden = torch.cat([torch.randn(N, 8, generator=g) / 8, torch.linspace(18, 27, N)[:, None]], 1)
    c, e = torch.ones(N), torch.full((N,), 0.01)
    want = by_autograd(hidden, weight, targets, c, e)
    got = direction(hidden, weight, targets, c, e).double()
    assert ((got - want).norm(dim=1) <= 1e-3 * want.norm(dim=1)).all()
