import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load
from nanogspo.rollout import sample

sample_min_p = load("ex04").sample_min_p


def a_draw(seed: int, N: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(N, V, generator=generator), torch.rand(N, generator=generator, dtype=torch.float64)


cases = given(
    seed=st.integers(0, 2**31 - 1),
    N=st.sampled_from([1, 7]),
    V=st.sampled_from([1, 2, 29]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    min_p=st.sampled_from([0.01, 0.1, 0.5, 0.99]),
)


@cases
def test_it_draws_from_what_is_kept_and_renormalises(seed, N, V, temperature, min_p):
    logits, uniform = a_draw(seed, N, V)
    token, logp = sample_min_p(logits, uniform, temperature, min_p)
    p = (logits.double() / temperature).softmax(1)  # (N, V)
    p[p < min_p * p.amax(1, keepdim=True)] = 0
    p = p / p.sum(1, keepdim=True)
    chosen = p.gather(1, token[:, None]).squeeze(1)  # (N,)
    assert (chosen > 0).all()  # nothing outside of what is kept
    # logits below 50 in fp32, a quotient and a log-softmax: a few roundings of 50 * 2**-24 = 3e-6 each
    torch.testing.assert_close(logp.double(), chosen.log(), rtol=0, atol=3e-5)


def test_without_a_limit_it_is_plain_sampling():
    logits, uniform = a_draw(seed=0, N=50, V=29)
    token, logp = sample_min_p(logits, uniform, 0.7, 0.0)
    want_token, want_logp = sample(logits, uniform, 0.7)
    assert torch.equal(token, want_token)
    torch.testing.assert_close(logp, want_logp)


def test_with_the_tightest_limit_it_is_greedy():
    logits, uniform = a_draw(seed=1, N=50, V=29)
    token, logp = sample_min_p(logits, uniform, 1.0, 1.0)
    assert torch.equal(token, logits.argmax(1))
    assert torch.equal(logp, torch.zeros(50))  # the only token that is left is certain


@pytest.mark.parametrize("temperature, kept", [(1.0, 2), (2.0, 3)])
def test_the_limit_is_set_after_the_temperature(temperature, kept):
    logits = torch.log(torch.tensor([[0.6, 0.36, 0.04]])).expand(1000, 3)  # at temperature 2: ratios 1, 0.77, 0.26
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    token, _ = sample_min_p(logits, uniform, temperature, 0.2)
    assert token.unique().tolist() == list(range(kept))
