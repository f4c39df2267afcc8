"""The slow versions of lessons 08 and 09 and the real one: the same tests for all of them.

Run: python -m pytest tests/test_lesson_kernels_seq_logprob.py
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import seq_logprob
from kernels.backend import INTERPRETED
from lessons.kernels import seq_logprob_v1, seq_logprob_v2, seq_logprob_v3
from tests import oracles
from tests.strategies import SEEDS, heads

EPS = torch.finfo(torch.float32).eps
VERSIONS = {
    "v1": seq_logprob_v1.token_logprob,
    "v2": seq_logprob_v2.token_logprob,
    "v3": seq_logprob_v3.token_logprob,
    "real": lambda *case: seq_logprob.token_logprob(*case)[0],
}
versions = pytest.mark.parametrize(
    "version",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name == "v3" and not INTERPRETED, reason="these tensors are on a CPU")
        )
        for name in VERSIONS
    ],
)


def tiles():
    """16 rows and columns, so that V = 17 already needs two of them."""
    return (
        patch.object(seq_logprob_v2, "WIDTH", 16),
        patch.multiple(seq_logprob_v3, BLOCK_N=16, BLOCK_V=16, BLOCK_C=16),
        patch.multiple(seq_logprob, TILE=64, TILE_VOCAB=16),
    )


def run(token_logprob, case, dlogp):
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    logp = token_logprob(hidden, weight, case.targets)
    (logp * dlogp.to(logp.dtype)).sum().backward()
    return [x.detach().double() for x in (logp, hidden.grad, weight.grad)]


@versions
@settings(max_examples=8)
@given(heads(rows=(1, 5, 17), vocabulary=(1, 2, 16, 17, 33)), SEEDS)
def test_every_version_computes_the_same(version, case, seed):
    """fp32 in. A logit of size z is known to a few eps z; the gradients here are measured against the largest row of
    weight and hidden, which is all that versions 1 to 3 can promise: they form 1 - p."""
    dlogp = torch.randn(len(case.targets), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b, c = tiles()
    with a, b, c:
        got = run(VERSIONS[version], case.to(torch.float32), dlogp)
    hidden, weight = (x.float().double().requires_grad_() for x in (case.hidden, case.weight))
    want = oracles.token_logprob(hidden, weight, case.targets)[0]
    (want * dlogp).sum().backward()
    noise = max(2e-5, 8 * EPS * case.magnitude * case.temperature)
    size = dlogp.abs().sum().item()
    torch.testing.assert_close(got[0], want.detach(), rtol=0, atol=noise)
    torch.testing.assert_close(got[1], hidden.grad, rtol=0, atol=noise * size * (1 + weight.abs().max().item()))
    torch.testing.assert_close(got[2], weight.grad, rtol=0, atol=noise * size * (1 + hidden.abs().max().item()))


@versions
@given(st.sampled_from([-64.0, 256.0]))
@settings(max_examples=2)
def test_a_shift_of_all_logits_changes_nothing(version, shift):
    """Catches a missing running maximum: exp(256) is inf in fp32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=g), torch.randn(33, 4, generator=g)
    hidden[:, 0] = 1.0
    a, b, c = tiles()
    with a, b, c:
        want = VERSIONS[version](hidden, weight, torch.tensor([0, 16, 32]))
        weight[:, 0] += shift
        got = VERSIONS[version](hidden, weight, torch.tensor([0, 16, 32]))
    torch.testing.assert_close(got, want, rtol=0, atol=8 * EPS * 256)
