"""kernels/seq_logprob.py against log_softmax over the whole matrix in float64, and laws no implementation may break.

Run: python -m pytest tests/test_seq_logprob.py
"""

import math
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import seq_logprob as module
from kernels.seq_logprob import IGNORE, seq_logprob, sequence_sums, token_logprob
from tests import oracles
from tests.strategies import SEEDS, Head, heads

EPS = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


def small_tiles():
    """16 columns and 4 rows (7 rounded down), so that a handful of tokens already crosses tiles."""
    return patch.multiple(module, TILE=112, TILE_VOCAB=16, TALLEST=7, ALIGN=4)


def values_and_grads(fn, case, dlogp, dentropy=None, *, frozen=False, **more):
    """logp, entropy, dhidden and, unless the head is frozen, dweight."""
    hidden = case.hidden.detach().clone().requires_grad_(True)
    weight = case.weight.detach().clone().requires_grad_(not frozen)
    logp, entropy = fn(hidden, weight, case.targets, **case.options, **more)
    loss = (logp * dlogp.to(logp.dtype)).sum()
    if dentropy is not None:
        loss = loss + (entropy * dentropy.to(logp.dtype)).sum()
    loss.backward()
    out = (logp, entropy, hidden.grad) + (() if frozen else (weight.grad,))
    return [x.detach().double() for x in out]


def upstream(case, seed):
    return torch.randn((2, len(case.targets)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_rows_close(got, want, bound):
    """Norm of the error of each row against its own bound. A bound on the largest entry would hide the small rows, and
    the rows of confident tokens are small: they shrink with 1 - p_y."""
    error = (got - want).norm(dim=1)
    assert (error <= bound).all(), (
        f"rows off by {error[error > bound][:4]}, want {bound.expand_as(error)[error > bound][:4]}"
    )


def gradient_scale(case, logp, dlogp):
    """How large the two halves of dhidden[n] = dlogp (1 - p_y) (W_y - mean of others) / T can be, (N,): they may
    cancel, so errors are measured against them. And what float64 is off by itself: autograd subtracts p_y from 1."""
    weight = case.weight.double().norm(dim=1).max() * dlogp.abs() / case.temperature  # (N,)
    return weight * -logp.expm1(), 4 * EPS64 * weight


# ----------------------------------------------------------------------------
# against the oracle


@given(heads(), SEEDS)
def test_matches_float64_oracle(case, seed):
    """fp32 in. The bars are 2e-5 and 1e-5; a logit of size z is only known to a few eps * z, so the larger counts."""
    case, dlogp = case.to(torch.float32), upstream(case, seed)[0]
    with small_tiles():
        got = values_and_grads(token_logprob, case, dlogp)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp)
    noise = 4 * EPS * case.magnitude
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=max(2e-5, noise))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=max(2e-5, noise))
    scale, blur = gradient_scale(case, want[0], dlogp)
    assert_rows_close(got[2], want[2], max(1e-5, noise) * scale + blur)
    # dweight[v] = sum_n dz[n, v] hidden[n] / T, where |dz[n, v]| <= dlogp (1 - p_y); the sum may cancel as well
    size = dlogp.abs() * case.hidden.double().norm(dim=1) / case.temperature  # (N,)
    assert_rows_close(got[3], want[3], max(1e-5, noise) * (size * -want[0].expm1()).sum() + 4 * EPS64 * size.sum())


@given(heads(), SEEDS)
def test_the_tiles_are_exact_in_float64(case, seed):
    """With rounding out of the way every term of every gradient, the entropy's too, must be right to 1e-10."""
    dlogp, dentropy = upstream(case, seed)
    with small_tiles():
        got = values_and_grads(token_logprob, case, dlogp, dentropy)
    want = values_and_grads(oracles.token_logprob, case, dlogp, dentropy)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@given(heads(), SEEDS)
def test_entropy_gradient_in_float32(case, seed):
    """d entropy / dz = -p (log p + H) cancels where p is uniform: so the bound is the largest row of weight."""
    case, dentropy = case.to(torch.float32), upstream(case, seed)[1]
    nothing = torch.zeros_like(dentropy)
    with small_tiles():
        got = values_and_grads(token_logprob, case, nothing, dentropy)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), nothing, dentropy)
    # |log p| multiplies the error of p, hence one more factor of the logits' size
    atol = 8 * EPS * (1 + case.magnitude) ** 2 / case.temperature
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=atol * case.weight.norm(dim=1).max().item())
    torch.testing.assert_close(got[3], want[3], rtol=0, atol=atol * case.hidden.norm(dim=1).sum().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(heads(), SEEDS)
def test_16_bit_inputs_lose_nothing_but_their_own_rounding(dtype, case, seed):
    """The inputs are rounded first, then float64 is the truth: logits, sums and gradients are fp32 inside, so that only
    the last cast of the gradient shows: in bf16 at most 2^-8 of each entry, and so of a row."""
    case, dlogp = case.to(dtype), upstream(case, seed)[0]
    with small_tiles():
        got = values_and_grads(token_logprob, case, dlogp)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp)
    noise = 4 * EPS * case.magnitude
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=max(1e-4, noise))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=max(1e-4, noise))
    scale, blur = gradient_scale(case, want[0], dlogp)
    # the smallest fp16 above 0 is 6e-8: a gradient below it is that far off in each entry
    blur = blur + (6e-8 * case.hidden.shape[1] ** 0.5 if dtype == torch.float16 else 0)
    assert_rows_close(got[2], want[2], 2**-8 * want[2].norm(dim=1) + max(1e-5, noise) * scale + blur)


def test_dweight_is_summed_in_fp32():
    """Positive hidden, so nothing cancels over 256 rows in 22 tiles: one rounding to bf16 at the end is 2^-8 at most.
    Summed in bf16 it would be twice that here, and grow with N."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(256, 3, generator=g).abs().bfloat16(), torch.randn(5, 3, generator=g).bfloat16()
    case = Head(hidden, weight, torch.zeros(256, dtype=torch.long), 1.0, None)
    with small_tiles():
        got = values_and_grads(token_logprob, case, torch.ones(256))[3]
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(256))[3]
    torch.testing.assert_close(got, want, rtol=2**-8, atol=0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_confident_tokens_keep_their_digits(dtype, rtol, softcap, frozen):
    """p_y from 0.999 to 1 - 1e-12. In fp32 1 - p_y is 0 from 6e-8 on; onehot - p in bf16 costs G up to 38 %."""
    g = torch.Generator().manual_seed(0)
    N, C, V = 24, 64, 300
    weight = torch.randn(V, C, generator=g) / C**0.5  # rows of norm 1
    targets = torch.arange(N) * 11  # (N,) each its own token
    hidden = weight[targets] * torch.linspace(20, 45, N)[:, None]  # (N, C) z_y = 20 to 45, the others ~ z_y / 8
    case = Head(hidden.to(dtype), weight.to(dtype), targets, 1.0, softcap)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(N))
    assert (want[0].exp() > 0.999).all() and (want[0] > -1e-10).any()  # else this tests something else
    got = values_and_grads(token_logprob, case, torch.ones(N), frozen=frozen)
    noise = 4 * EPS * case.magnitude  # 2e-5: what a logit of 45 is off by, and so 1 - p_y, relatively
    # relative! float64 itself subtracts numbers of 45 to find a logp of 1e-12
    torch.testing.assert_close(got[0], want[0], rtol=max(2e-5, noise), atol=EPS64 * case.magnitude)
    torch.testing.assert_close(got[1], want[1], rtol=max(2e-5, noise), atol=EPS64 * case.magnitude)
    blur = gradient_scale(case, want[0], torch.ones(N))[1]
    assert_rows_close(got[2], want[2], max(rtol, noise) * want[2].norm(dim=1) + blur)


@given(heads(rows=(1, 3, 5), vocabulary=(1, 2, 17, 33), margins=(0, 3)))
def test_gradcheck(case):
    case = Head(case.hidden, case.weight, case.targets.clone(), case.temperature, case.softcap)
    if len(case.targets) > 1:
        case.targets[0] = IGNORE
    inputs = (case.hidden.requires_grad_(True), case.weight.requires_grad_(True))

    def score(h, w):
        return token_logprob(h, w, case.targets, **case.options)

    with small_tiles():
        assert torch.autograd.gradcheck(score, inputs, fast_mode=True)


@pytest.mark.parametrize("V", [4095, 4096, 4097])
@pytest.mark.parametrize("N", [1, 1023, 1024, 1025])
def test_at_the_borders_of_the_real_tiles(N, V):
    g = torch.Generator().manual_seed(N + V)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[-1] = V - 1
    case = Head(torch.randn(N, 2, generator=g), torch.randn(V, 2, generator=g), targets, 1.0, None)
    got = values_and_grads(token_logprob, case, torch.ones(N))
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(N))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5)
    # a matrix product adds V (or N) fp32 numbers one by one; plain torch is off by as much as ours here, 1.1e-5
    rtol = 4 * EPS * 4097**0.5
    assert_rows_close(got[2], want[2], rtol * gradient_scale(case, want[0], torch.ones(N))[0])
    assert_rows_close(got[3], want[3], rtol * want[3].norm(dim=1).max())


# ----------------------------------------------------------------------------
# a frozen head: forward sums up G, backward scales it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(heads(), SEEDS)
def test_frozen_head_against_the_oracle(dtype, case, seed):
    """G = d logp / d hidden, made before the loss is known. In bf16 G is rounded, by 2^-8 at most, and dlogp * G."""
    case, dlogp = case.to(dtype), upstream(case, seed)[0]
    with small_tiles():
        got = values_and_grads(token_logprob, case, dlogp, frozen=True)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp)
    noise = 4 * EPS * case.magnitude
    scale, blur = gradient_scale(case, want[0], dlogp)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    blur = blur + (6e-8 * case.hidden.shape[1] ** 0.5 if dtype == torch.float16 else 0)
    assert_rows_close(got[2], want[2], rounding * want[2].norm(dim=1) + max(1e-5, noise) * scale + blur)


@given(heads(), SEEDS, st.booleans())
def test_frozen_head_is_exact_in_float64(case, seed, with_entropy):
    """The entropy's gradient as well, which forward has not summed: it brings the tiles back."""
    dlogp, dentropy = upstream(case, seed)
    dentropy = dentropy if with_entropy else None
    with small_tiles():
        got = values_and_grads(token_logprob, case, dlogp, dentropy, frozen=True)
    want = values_and_grads(oracles.token_logprob, case, dlogp, dentropy, frozen=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype, stored", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")])
def test_two_products_and_one_gradient_are_kept(dtype, stored):
    """No gradient: one product. Frozen head: two, and none in backward. Trained: one, and three. What stays is G."""
    dtype, stored = getattr(torch, dtype), getattr(torch, stored)
    weight, targets = torch.randn(5, 16).to(dtype), torch.tensor([0, 4, 2])

    def count(run):
        with (
            patch.object(module, "_mm", wraps=module._mm) as x,
            patch.object(module, "_addmm", wraps=module._addmm) as y,
        ):
            out = run()
        return x.call_count + y.call_count, out

    for frozen in (True, False):
        hidden = torch.randn(3, 16).to(dtype).requires_grad_()
        head = weight.clone().requires_grad_(not frozen)
        with torch.no_grad():
            assert count(lambda h=hidden, w=head: token_logprob(h, w, targets))[0] == 1
        products, (logp, entropy) = count(lambda h=hidden, w=head: token_logprob(h, w, targets))
        saved = logp.grad_fn.saved_tensors
        assert products == (2 if frozen else 1) and len(saved) == (8 if frozen else 7)
        assert not frozen or (saved[7].shape == (3, 16) and saved[7].dtype == stored)
        assert count(logp.sum().backward)[0] == (0 if frozen else 3)
        assert hidden.grad.dtype == dtype
        products, (logp, entropy) = count(lambda h=hidden, w=head: token_logprob(h, w, targets))
        assert count((logp + entropy).sum().backward)[0] == (2 if frozen else 3)  # the entropy brings x and dx back


@pytest.mark.isa
@given(heads(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_bits_do_not_depend_on_what_is_trained(case, seed, dtype):
    """A scoring pass, LoRA and full training: three ways through the file, one number each for logp and entropy."""
    case = case.to(dtype)
    with small_tiles():
        with torch.no_grad():
            want = token_logprob(case.hidden, case.weight, case.targets, **case.options)
        for frozen in (True, False):
            got = values_and_grads(token_logprob, case, upstream(case, seed)[0], frozen=frozen)
            assert torch.equal(got[0], want[0].double()) and torch.equal(got[1], want[1].double())


# ----------------------------------------------------------------------------
# laws


@pytest.mark.isa
@given(heads(rows=(9, 13)), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_row_does_not_see_its_batch(case, seed, dtype, frozen):
    """Bit for bit: alone, in another order, among fewer. Fails as soon as a product's shape follows N."""
    case, dlogp = case.to(dtype), upstream(case, seed)[0]
    N, order = len(dlogp), torch.randperm(len(dlogp), generator=torch.Generator().manual_seed(seed))
    with small_tiles():
        want = values_and_grads(token_logprob, case, dlogp, frozen=frozen)
        for rows in (order, order[: N // 2], order[:1]):
            some = Head(case.hidden[rows], case.weight, case.targets[rows], case.temperature, case.softcap)
            got = values_and_grads(token_logprob, some, dlogp[rows], frozen=frozen)
            for g, w in zip(got[:3], want[:3], strict=True):
                assert torch.equal(g, w[rows])


@pytest.mark.isa
@pytest.mark.parametrize("C, V", [(9, 2), (34, 7), (33, 20), (64, 17), (64, 515), (100, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_see_its_batch_in_real_tiles(C, V, dtype):
    """The real heights, where a library has something to choose: one row alone is a matrix times a vector to it. 64 by
    17 stands for a vocabulary that leaves room for 9 rows, where MKL's bits follow a row's place among the nine."""
    tile = 9 * V if V == 17 else module.TILE
    g = torch.Generator().manual_seed(V)
    targets = torch.randint(0, V, (300,), generator=g)
    case = Head(torch.randn(300, C, generator=g), torch.randn(V, C, generator=g) / 4, targets, 0.7, 20.0).to(dtype)
    with patch.object(module, "TILE", tile):
        want = values_and_grads(token_logprob, case, torch.ones(300), frozen=True)
        for rows in (torch.randperm(300, generator=g), torch.arange(100, 177), torch.tensor([299])):
            some = Head(case.hidden[rows], case.weight, case.targets[rows], 0.7, 20.0)
            got = values_and_grads(token_logprob, some, torch.ones(len(rows)), frozen=True)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b[rows])


@pytest.mark.parametrize("path", ["torch", "rows"])
@pytest.mark.parametrize("V", [1, 2, 20, 1499, 2048, 151_936])
def test_blocks_do_not_follow_the_batch(path, V):
    """Here equal bits can be luck: this machine's library may treat two heights alike, and another's may not."""
    options = module._Options(1.0, None, path, keep=True)
    heights = {module._tiles(N, V, options)[2] for N in (1, 9, 300, 5000)}
    assert len(heights) == 1 and heights.pop() % module.ALIGN == 0


@given(heads(), st.sampled_from([-64.0, 0.5, 256.0]))
def test_shift_invariance(case, shift):
    """softmax(z + c) = softmax(z): a column of ones in hidden adds c to every logit. Catches a missing running max."""
    column = torch.ones(len(case.hidden), 1, dtype=torch.float64)
    shifted = torch.full((len(case.weight), 1), shift, dtype=torch.float64)
    with small_tiles():
        a = token_logprob(case.hidden, case.weight, case.targets, temperature=case.temperature)
        b = token_logprob(
            torch.cat([case.hidden, column], 1),
            torch.cat([case.weight, shifted], 1),
            case.targets,
            temperature=case.temperature,
        )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(heads(), SEEDS)
def test_gradient_of_a_row_sums_to_zero(case, seed):
    """sum_v dz[v] = 0 for logp and entropy alike: where all rows of weight agree, hidden gets no gradient at all.
    Catches a missed tile and a target counted twice. (Not with a soft-cap: it scales each dz by its own slope.)"""
    case = Head(case.hidden, case.weight.clone(), case.targets, case.temperature, None)
    case.weight[:, 0] = 1.0
    with small_tiles():
        dhidden = values_and_grads(token_logprob, case, *upstream(case, seed))[2]
    torch.testing.assert_close(dhidden[:, 0], torch.zeros(len(dhidden), dtype=torch.float64), rtol=0, atol=1e-10)


@given(heads(rows=(1,)))
def test_probabilities_sum_to_one_and_give_the_entropy(case):
    """One hidden state scored against every token: no oracle needed. Which one was the target changes nothing."""
    V = len(case.weight)
    hidden, targets = case.hidden.expand(V, -1), torch.arange(V)
    with small_tiles():
        logp, entropy = token_logprob(hidden, case.weight, targets, **case.options)
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(logp.exp().sum(), one, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum().expand(V), rtol=0, atol=1e-10)


@given(heads(), SEEDS)
def test_order_of_the_vocabulary_does_not_matter(case, seed):
    order = torch.randperm(len(case.weight), generator=torch.Generator().manual_seed(seed))  # (V,)
    with small_tiles():
        a = token_logprob(case.hidden, case.weight, case.targets, **case.options)
        b = token_logprob(case.hidden, case.weight[order], order.argsort()[case.targets], **case.options)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(heads(), SEEDS, st.integers(0, 9))
def test_a_batch_may_be_split(case, seed, cut):
    """Rows do not see each other, and the weight's gradient is a sum over them."""
    dlogp, dentropy = upstream(case, seed)
    with small_tiles():
        whole = values_and_grads(token_logprob, case, dlogp, dentropy)
        parts = [
            values_and_grads(
                token_logprob,
                Head(case.hidden[s], case.weight, case.targets[s], case.temperature, case.softcap),
                dlogp[s],
                dentropy[s],
            )
            for s in (slice(0, cut), slice(cut, None))
        ]
    for i in range(3):
        torch.testing.assert_close(torch.cat([p[i] for p in parts]), whole[i], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(parts[0][3] + parts[1][3], whole[3], rtol=1e-9, atol=1e-10)


@given(heads(), st.sampled_from([0.5, 2.0, 4.0]))
def test_temperature_divides_the_logits(case, temperature):
    """Bit for bit where T is a power of two: dividing hidden or the logits by it rounds nothing."""
    hidden, weight = case.hidden.float(), case.weight.float()
    with small_tiles():
        a = token_logprob(hidden, weight, case.targets, temperature=temperature)
        b = token_logprob(hidden / temperature, weight, case.targets)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.isa
@given(heads(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_bits_do_not_depend_on_who_asks(case, dtype):
    """GSPO's first ratio is exactly 1 only if scoring without gradients, with them, again, or under autocast is one
    and the same number."""
    case = case.to(dtype)

    def score():
        return token_logprob(case.hidden, case.weight, case.targets, **case.options)

    with small_tiles():
        with torch.no_grad():
            want = score()
        case.hidden.requires_grad_(True)
        case.weight.requires_grad_(True)
        again = [score(), score()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again.append(score())
    for got in again:
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@given(heads(), SEEDS)
def test_ignored_rows_are_not_there(case, seed):
    """Value 0, gradient exactly 0, whatever the row holds; all else has the bits it has without them."""
    case = case.to(torch.float32)
    N, g = len(case.targets), torch.Generator().manual_seed(seed)
    ignored = torch.rand(N, generator=g) < 0.5  # (N,) none and all of them happen
    hidden = case.hidden.clone()
    hidden[ignored] = math.nan
    targets = case.targets.masked_fill(ignored, IGNORE)
    poisoned = Head(hidden, case.weight, targets, case.temperature, case.softcap)
    clean = Head(hidden[~ignored], case.weight, targets[~ignored], case.temperature, case.softcap)
    dlogp, dentropy = upstream(case, seed)
    with small_tiles():
        got = values_and_grads(token_logprob, poisoned, dlogp, dentropy)
        want = values_and_grads(token_logprob, clean, dlogp[~ignored], dentropy[~ignored])
    for i in range(3):
        assert (got[i][ignored] == 0).all()
        assert torch.equal(got[i][~ignored], want[i])
    assert torch.equal(got[3], want[3])


def test_only_what_needs_a_gradient_gets_one():
    case = Head(torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 4, 2]), 1.0, None)
    for on in ("hidden", "weight"):
        hidden, weight = case.hidden.clone(), case.weight.clone()
        (hidden if on == "hidden" else weight).requires_grad_(True)
        token_logprob(hidden, weight, case.targets)[0].sum().backward()
        assert (hidden.grad is not None) == (on == "hidden") and (weight.grad is not None) == (on == "weight")


def test_entropy_alone_has_a_gradient():
    case = Head(torch.randn(3, 2).double(), torch.randn(5, 2).double(), torch.tensor([0, 4, 2]), 1.0, None)
    grads = []
    for fn in (token_logprob, oracles.token_logprob):
        hidden = case.hidden.clone().requires_grad_(True)
        fn(hidden, case.weight, case.targets)[1].sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------
# nasty but legal


def logits(rows, targets, dtype=torch.float32, **options):
    """Scores chosen logits: hidden is the identity, so that weight.T is exactly the matrix of logits asked for."""
    z = torch.tensor(rows, dtype=dtype)  # (N, V)
    return token_logprob(torch.eye(len(z), dtype=dtype), z.T, torch.tensor(targets), **options)


@pytest.mark.parametrize(
    "row", [[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4 + 1], [3.0, 3.0, 3.0], [1e30] * 3]
)
@pytest.mark.parametrize("width", [1, 2, 16])
def test_huge_equal_and_duplicate_logits(row, width):
    """Also one tile per logit. exp(1e4) is inf; a target at -1e4 under a maximum of 1e4 has logp -20000, not -inf."""
    with patch.multiple(module, TILE=width * 2, TILE_VOCAB=width):
        logp, entropy = logits([row] * 3, [0, 1, 2])
    z = torch.tensor([row], dtype=torch.float64)
    want = torch.log_softmax(z, 1)[0]
    torch.testing.assert_close(logp.double(), want, rtol=EPS, atol=2 * EPS)
    h = torch.special.entr(want.exp()).sum()
    torch.testing.assert_close(entropy.double(), h.expand(3), rtol=EPS, atol=4 * EPS)


def test_gradient_of_large_logits():
    """1e4 + {0, 1, 3, 2} is exact in fp32 and so are the differences; a saved logsumexp of 10003.4 is off by 5e-4."""
    small = torch.tensor([[0.0], [1.0], [3.0], [2.0]])  # (V, 1)
    grads = []
    for shift, fn, dtype in ((1e4, token_logprob, torch.float32), (0.0, oracles.token_logprob, torch.float64)):
        case = Head(torch.ones(1, 1, dtype=dtype), small.to(dtype) + shift, torch.tensor([3]), 1.0, None)
        grads.append(values_and_grads(fn, case, torch.ones(1), torch.ones(1))[3])
    torch.testing.assert_close(*grads, rtol=0, atol=4 * EPS)


def test_a_margin_of_18_is_minus_1e_8_and_not_zero():
    logp, entropy = logits([[18.0, 0.0], [60.0, 0.0], [0.0, 18.0]], [0, 0, 0])
    x = math.exp(-18)
    want = [-math.log1p(x), -math.exp(-60), -18 - math.log1p(x)]  # -1.5e-8, -8.8e-27, -18
    torch.testing.assert_close(logp.double(), torch.tensor(want, dtype=torch.float64), rtol=4e-6, atol=0)
    h = math.log1p(x) + 18 * x / (1 + x)
    torch.testing.assert_close(entropy[:1].double(), torch.tensor([h], dtype=torch.float64), rtol=4e-6, atol=0)


def test_banned_tokens():
    """-inf logits are legal values (a masked vocabulary), whole tiles of them, all but the target, and the target."""
    inf = math.inf
    rows = [
        [-inf] * 16 + [-inf, 1.0, 2.0, -inf],  # the first tile holds no finite logit
        [2.0, 1.0] + [-inf] * 18,  # nor do the last ones
        [-inf] * 19 + [5.0],  # only the target is left: certain
        [0.0] * 19 + [-inf],  # the target itself is banned
    ]
    targets = [17, 1, 19, 19]
    with small_tiles():
        logp, entropy = logits_of(rows, targets)
    z = torch.tensor(rows, dtype=torch.float64)
    want = torch.log_softmax(z, 1).gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=4 * EPS)
    torch.testing.assert_close(entropy.double(), torch.special.entr(torch.softmax(z, 1)).sum(1), rtol=0, atol=8 * EPS)


def logits_of(rows, targets):
    """As `logits`, a row at a time: 0 * -inf of another row would be nan."""
    one = torch.ones(1, 1)
    pairs = [token_logprob(one, torch.tensor([r]).T, torch.tensor([t])) for r, t in zip(rows, targets, strict=True)]
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


@given(heads(), SEEDS)
def test_with_top_is_token_accuracy(case, seed):
    """Whether the target is an argmax, tie or not: on a margin of 0 with weights of 0 every token is one."""
    ignored = torch.rand(len(case.targets), generator=torch.Generator().manual_seed(seed)) < 0.3  # (N,)
    targets = case.targets.masked_fill(ignored, IGNORE)
    with small_tiles():
        logp, entropy, first = token_logprob(case.hidden, case.weight, targets, **case.options, with_top=True)
        plain = token_logprob(case.hidden, case.weight, targets, **case.options)
    assert torch.equal(logp, plain[0]) and torch.equal(entropy, plain[1]) and first.dtype == torch.bool
    z = torch.log_softmax(case.hidden @ case.weight.T, 1)  # (N, V) float64: a soft-cap of 5 or more keeps the order
    gap = z.max(1).values - z.gather(1, case.targets[:, None]).squeeze(1)  # (N,)
    clear = (gap == 0) | (gap > 1e-9)  # what is closer than that is a tie only to one of the two
    assert torch.equal(first[clear], (~ignored & (gap == 0))[clear])


def test_ties_count_as_top():
    _, _, first = logits([[3.0, 3.0, 1.0], [0.1] * 3, [1.0, 2.0, 0.0]], [1, 2, 0], with_top=True)
    assert first.tolist() == [True, True, False]


def test_a_vocabulary_of_one():
    case = Head(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.long), 1.0, None)
    for x in values_and_grads(token_logprob, case, torch.ones(3), torch.ones(3)):
        assert (x == 0).all()


def test_no_rows():
    case = Head(torch.randn(0, 2), torch.randn(5, 2), torch.zeros(0, dtype=torch.long), 1.0, None)
    logp, entropy, dhidden, dweight = values_and_grads(token_logprob, case, torch.ones(0), torch.ones(0))
    assert logp.shape == entropy.shape == (0,) and dhidden.shape == (0, 2) and (dweight == 0).all()


def test_a_nan_stays_in_its_row():
    hidden = torch.randn(5, 3)
    hidden[2, 1] = math.nan
    with small_tiles():
        logp, entropy = token_logprob(hidden, torch.randn(40, 3), torch.arange(5))
        dhidden = values_and_grads(
            token_logprob, Head(hidden, torch.randn(40, 3), torch.arange(5), 1.0, None), torch.ones(5), frozen=True
        )[2]
    for x in (logp, entropy, dhidden.sum(1)):
        assert x.isnan().tolist() == [False, False, True, False, False]


def test_softcap_far_above_and_below():
    """|x| = 10 softcap: tanh is 1 in fp32, 1 - tanh^2 would be 0 and the gradient lost; 1 / cosh^2 still has it."""
    weight = torch.tensor([[40.0, 1.0], [-38.0, 2.0], [30.0, -1.0]])
    case = Head(torch.tensor([[1.0, 0.1], [-1.0, 0.2]]), weight, torch.tensor([1, 0]), 1.0, 4.0)
    got = values_and_grads(token_logprob, case, torch.ones(2))
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(2))
    # the float64 oracle itself subtracts tanh^2 from 1: at a slope of 1e-8 it is good to 1e-8. fp32 |x| / softcap = 10
    # moves the slope by 2 * 10 * eps
    assert_rows_close(got[2], want[2], 1e-5 * want[2].norm(dim=1))
    loose = Head(case.hidden, weight, case.targets, 1.0, 1e6)  # and a cap far away is no cap: x - x^3 / (3 cap^2)
    free = Head(case.hidden, weight, case.targets, 1.0, None)
    for a, b in zip(
        values_and_grads(token_logprob, loose, torch.ones(2)),
        values_and_grads(token_logprob, free, torch.ones(2)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_any_strides():
    """A column slice, a transpose and a view with an offset give what their contiguous copies give."""
    base = torch.randn(8, 6)
    cases = [
        (torch.randn(4, 12)[:, ::2], base),
        (torch.randn(6, 4).T, base),
        (torch.randn(4, 6), torch.randn(6, 8).T),
        (torch.randn(4, 6), torch.randn(10, 6)[2:]),
        (torch.randn(1, 6).expand(4, 6), base),
    ]
    targets = torch.tensor([0, 7, 3, 3], dtype=torch.int32)
    for hidden, weight in cases:
        strided = Head(hidden, weight, targets, 1.0, None)
        plain = Head(hidden.contiguous(), weight.contiguous(), targets, 1.0, None)
        pairs = zip(
            values_and_grads(token_logprob, strided, torch.ones(4)),
            values_and_grads(token_logprob, plain, torch.ones(4)),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=16 * EPS * 6)  # sums of 6 in another order


# ----------------------------------------------------------------------------
# whole sequences


@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 31]), min_size=1, max_size=5),
    SEEDS,
    st.sampled_from([torch.int32, torch.int64]),
)
def test_seq_logprob_sums_each_answer(lengths, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    S = sum(lengths)
    hidden, weight = torch.randn(S, 3, generator=g), torch.randn(17, 3, generator=g)
    targets = torch.randint(0, 17, (S,), generator=g).masked_fill(torch.rand(S, generator=g) < 0.3, IGNORE)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    hidden.requires_grad_(True)
    got = seq_logprob(hidden, weight, targets, cu_seqlens, temperature=0.7, softcap=9.0)
    got.sum().backward()
    logp, _ = oracles.token_logprob(hidden.detach(), weight, targets, temperature=0.7, softcap=9.0)
    want = torch.tensor([math.fsum(part) for part in logp.split(lengths)], dtype=torch.float64)
    # 2e-5 is the bar of one token; independent errors of 31 add up to sqrt(31) = 6 of them at most
    torch.testing.assert_close(got.detach().double(), want, rtol=0, atol=6 * 2e-5)
    assert (got[torch.tensor(lengths) == 0] == 0).all() and got.dtype == torch.float32
    assert (hidden.grad[targets == IGNORE] == 0).all()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6), SEEDS)
def test_a_sum_does_not_see_its_neighbours(lengths, seed):
    """Bit for bit: alone, in a row, or with other neighbours. And rounded once: the additions are fp64."""
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)) * 100
    parts = values.split(lengths)
    together = sequence_sums(values, torch.tensor([0, *lengths]).cumsum(0))
    alone = [sequence_sums(part, torch.tensor([0, len(part)])) for part in parts]
    assert torch.equal(together, torch.cat(alone))
    want = torch.tensor([math.fsum(part.tolist()) for part in parts], dtype=torch.float64)
    torch.testing.assert_close(together.double(), want, rtol=EPS / 2 * 1.001, atol=1e-9)


def test_gradient_of_the_sums():
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: sequence_sums(v, torch.tensor([0, 3, 3, 7])), values)


# ----------------------------------------------------------------------------
# memory, and what is said when it is wrong


def test_the_matrix_of_logits_never_exists():
    """N * V * 4 = 246 MB here. What may exist: a few tiles of 2 MB, hidden, weight, their gradients and padded copies
    (9 MB), and what BLAS and the allocator keep; seen: 13 MB with a frozen head, 22 MB with a trained one. Measured as
    the peak of a fresh process above that of a small call."""
    script = """
import resource, torch
from kernels.seq_logprob import token_logprob
torch.set_num_threads(1)
def run(N, V, frozen):
    h, w = torch.randn(N, 32, requires_grad=True), torch.randn(V, 32, requires_grad=not frozen)
    logp, entropy = token_logprob(h, w, torch.randint(0, V, (N,)))
    (logp.sum() if frozen else logp.sum() + entropy.sum()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(8, 100, True)
print(*((run(2048, 30000, frozen) - before) * 1024 for frozen in (True, False)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(int(peak) < 60e6 for peak in run.stdout.split())


def test_little_is_saved_for_backward():
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    logp, _ = token_logprob(hidden, weight, torch.arange(64))
    saved = sum(t.numel() for t in logp.grad_fn.saved_tensors)
    assert saved <= hidden.numel() + weight.numel() + 5 * 64  # targets and four floats a row


@pytest.mark.parametrize(
    "change, text",
    [
        ({"targets": torch.tensor([0, 5])}, r"got targets\[1\] = 5, want 0 <= target < 5 or -100"),
        ({"targets": torch.tensor([-1, 9])}, r"got targets\[0\] = -1, want"),
        ({"targets": torch.tensor([0, 1, 2])}, r"shapes \(2, 3\), \(5, 3\), \(3,\), want \(N, C\), \(V, C\), \(N,\)"),
        ({"hidden": torch.zeros(2, 1, 3)}, r"shapes \(2, 1, 3\)"),
        ({"targets": torch.tensor([0.0, 1.0])}, "of float32, float32, float32, want floats, floats and int64"),
        ({"weight": torch.zeros(5, 3, dtype=torch.int8)}, "of float32, int8, int64, want floats"),
        (
            {"backend": "triton", "weight": torch.zeros(5, 3).double()},
            "got float64 with backend 'triton', want float32",
        ),
        ({"weight": torch.zeros(3, 5)}, r"shapes \(2, 3\), \(3, 5\)"),
        ({"weight": torch.zeros(())}, r"shapes \(2, 3\), \(\)"),
        (
            {"weight": torch.zeros(5, 3, device="meta")},
            "got hidden on cpu, weight on meta, targets on cpu, want one device",
        ),
        (
            {"backend": "tritn", "weight": torch.zeros(5, 3).double()},
            "got backend 'tritn', want 'torch', 'triton' or None",
        ),
        ({"temperature": 0.0}, "got temperature 0.0, want a number above 0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"softcap": 0.0}, "got softcap 0.0, want a number above 0; pass None"),
        ({"backend": "cuda"}, "got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, text):
    call = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=text):
        token_logprob(**call)


@pytest.mark.parametrize("cuts", [[0, 2], [1, 3], [0, 2, 1, 3], [], [0, 5]])
def test_cu_seqlens_must_cut_the_whole_row(cuts):
    with pytest.raises(ValueError, match=r"want it to rise from 0 to 3 \(the tokens\)"):
        sequence_sums(torch.zeros(3), torch.tensor(cuts, dtype=torch.int64))


@pytest.mark.parametrize("cuts", [torch.tensor(3), torch.tensor([0.0, 3.0]), torch.tensor([0, 3], dtype=torch.int16)])
def test_cu_seqlens_are_integers_in_a_row(cuts):
    with pytest.raises(
        ValueError, match=r"got values \(3,\) and cu_seqlens .*, want \(S,\) and \(N \+ 1,\) of int32 or int64"
    ):
        sequence_sums(torch.zeros(3), cuts)


def test_backend_torch_is_the_default():
    case = Head(torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 4, 2]), 1.0, None)
    a = token_logprob(case.hidden, case.weight, case.targets, backend="torch")
    b = token_logprob(case.hidden, case.weight, case.targets)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
