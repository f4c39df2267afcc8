"""kernels/seq_logprob.py by its two Triton paths, against float64 and against its own promises about bits.

On a machine without a GPU the kernels run in Triton's interpreter: tiles of 16, a few rows, since each program costs
milliseconds. Values, masks and offsets are proved there; types and registers by tools/compile_kernels.py.

Run: python -m pytest tests/test_seq_logprob_triton.py
"""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import seq_logprob as module
from kernels.backend import HAVE_TRITON, INTERPRETED
from kernels.seq_logprob import IGNORE, token_logprob
from tests import oracles
from tests.strategies import SEEDS, Head, heads
from tests.test_seq_logprob import EPS, assert_rows_close, gradient_scale, upstream, values_and_grads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not HAVE_TRITON or not (INTERPRETED or DEVICE == "cuda"), reason="Triton needs a GPU, or its interpreter"
    ),
    # NumPy tells of the inf and nan that a GPU just returns
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
paths = pytest.mark.parametrize("path", ["rows", "epilogue"])
few = settings(max_examples=4)  # an example takes 0.1 to 0.3 s in the interpreter


def small(path, **changes):
    """4 or 16 rows and 32 columns at a time, tiles of 16 (32 deep, twice ALIGN: half of one is masked): 17 rows and 33
    tokens already need two of everything."""
    tiles = dict.fromkeys(module.PRODUCT, (16, 16, 32, 4, 2))
    sizes = {
        "ROWS": 16 if path == "epilogue" else 4,
        "COLUMNS": 32,
        "ROW_BLOCK": 16,
        "STEP": 2,
        "PRODUCT": tiles,
    } | changes
    return patch.multiple(module, EPILOGUE_BELOW=10**9 if path == "epilogue" else 0, **sizes)


def on_device(case):
    tensors = (x.to(DEVICE) for x in (case.hidden, case.weight, case.targets))
    return Head(*tensors, case.temperature, case.softcap)


def run(case, dlogp, dentropy=None, **options):
    """As values_and_grads, on the device and back, through Triton."""
    upstream = [None if x is None else x.to(DEVICE) for x in (dlogp, dentropy)]
    return [x.cpu() for x in values_and_grads(token_logprob, on_device(case), *upstream, backend="triton", **options)]


def score(hidden, weight, targets, **options):
    out = token_logprob(*(x.to(DEVICE) for x in (hidden, weight, targets)), backend="triton", **options)
    return [x.cpu() for x in out]


def logits(rows, targets, **options):
    """Scores chosen logits, a row at a time: hidden is 1 and weight the logits. (With more rows, 0 * inf is nan.)"""
    one = torch.ones(1, 1)
    parts = [
        score(one, torch.tensor([row]).T, torch.tensor([y]), **options) for row, y in zip(rows, targets, strict=True)
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


# ----------------------------------------------------------------------------
# against the oracle


@paths
@few
@given(heads(rows=(1, 5, 17), vocabulary=(1, 16, 17, 33)), SEEDS, st.booleans())
def test_matches_float64_oracle(path, case, seed, frozen):
    """fp32 in, bars 2e-5 and 1e-5. tanh by exp is off by 1e-7, so a capped logit by that much of the cap."""
    case, dlogp = case.to(torch.float32), upstream(case, seed)[0]
    with small(path):
        got = run(case, dlogp, frozen=frozen)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp, frozen=frozen)
    noise = 4 * EPS * (case.magnitude + (case.softcap or 0.0))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=max(2e-5, noise))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=max(2e-5, noise))
    scale, blur = gradient_scale(case, want[0], dlogp)
    assert_rows_close(got[2], want[2], max(1e-5, noise) * scale + blur)
    if not frozen:
        size = dlogp.abs() * case.hidden.double().norm(dim=1) / case.temperature  # (N,)
        assert_rows_close(got[3], want[3], max(1e-5, noise) * (size * -want[0].expm1()).sum() + 1e-15 * size.sum())


@paths
@few
@given(heads(rows=(1, 5, 17), vocabulary=(1, 16, 17, 33)), SEEDS, st.booleans())
def test_bf16_inputs(path, case, seed, frozen):
    """exp(z - m), G or dz, and dhidden are each rounded to bf16, by at most 2^-8 of themselves; logits and sums never.
    The two halves of G may cancel, so what is rounded before their difference is measured against the halves."""
    case, dlogp = case.to(torch.bfloat16), upstream(case, seed)[0]
    with small(path):
        got = run(case, dlogp, frozen=frozen)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp)
    noise = 4 * EPS * (case.magnitude + (case.softcap or 0.0))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=max(1e-4, noise))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=max(1e-4, noise))
    scale, blur = gradient_scale(case, want[0], dlogp)
    before = 2**-8 * scale * (1 if frozen else 2)  # of the target's own half, dz is rounded as well
    assert_rows_close(got[2], want[2], 2**-7 * want[2].norm(dim=1) + before + noise * scale + blur)


@paths
@few
@given(heads(rows=(5,), vocabulary=(17, 33), margins=(0, 3)), SEEDS, st.booleans())
def test_entropy_has_a_gradient(path, case, seed, frozen):
    case, (dlogp, dentropy) = case.to(torch.float32), upstream(case, seed)
    with small(path):
        got = run(case, dlogp, dentropy, frozen=frozen)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), dlogp, dentropy, frozen=frozen)
    # |log p| multiplies the error of p, hence one more factor of the logits' size
    atol = 8 * EPS * (1 + case.magnitude) ** 2 / case.temperature
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=atol * case.weight.norm(dim=1).max().item())


@pytest.mark.isa
@paths
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_confident_tokens_keep_their_digits(path, dtype, rtol, softcap):
    """p_y from 0.999 to 1 - 1e-12, as a row of its own bound: in bf16 onehot - p costs G up to 38 %."""
    g = torch.Generator().manual_seed(0)
    N, C, V = 6, 64, 90
    weight = torch.randn(V, C, generator=g) / C**0.5  # rows of norm 1
    targets = torch.arange(N) * 15
    hidden = weight[targets] * torch.linspace(20, 45, N)[:, None]  # (N, C)
    case = Head(hidden.to(dtype), weight.to(dtype), targets, 1.0, softcap)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(N))
    assert (want[0].exp() > 0.999).all() and (want[0] > -1e-10).any()  # else this tests something else
    with small(path):
        got = run(case, torch.ones(N), frozen=True)
    # a logit of 45 is off by 4 eps of itself (8 where a tanh made it), and 1 - p_y by as much of itself
    noise = 4 * EPS * (case.magnitude + (softcap or 0.0))
    torch.testing.assert_close(got[0], want[0], rtol=max(2e-5, noise), atol=1e-14)
    torch.testing.assert_close(got[1], want[1], rtol=max(2e-5, noise), atol=1e-13)
    assert_rows_close(
        got[2], want[2], max(rtol, noise) * want[2].norm(dim=1) + gradient_scale(case, want[0], torch.ones(N))[1]
    )


def test_the_tiles_that_are_launched_on_a_gpu():
    """The real constants: one program of the product, 2048 rows of the second one."""
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 70, (3,), generator=g)
    case = Head(torch.randn(3, 40, generator=g), torch.randn(70, 40, generator=g) / 4, targets, 0.7, None)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(3))
    got = run(case, torch.ones(3), frozen=True)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5)
    assert_rows_close(got[2], want[2], 1e-5 * want[2].norm(dim=1))


# ----------------------------------------------------------------------------
# bits


@pytest.mark.isa
@paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_see_its_batch_or_who_asks(path, dtype):
    """Alone, in another order, among fewer, again, without gradients, with a trained head: one number. One of the rows
    has a logit 300 above its target's (the epilogue scores it a second time), one is nan."""
    g, N = torch.Generator().manual_seed(1), 18 if path == "epilogue" else 6
    hidden, weight = torch.randn(N, 20, generator=g), torch.randn(40, 20, generator=g)
    targets = torch.randint(0, 40, (N,), generator=g)
    hidden[3], hidden[5] = (weight[7] - weight[targets[3]]) * 15, math.nan
    case = Head(hidden.to(dtype), weight.to(dtype), targets, 0.7, None)
    dlogp = torch.randn(N, generator=g, dtype=torch.float64)

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    with small(path, ROW_BLOCK=32):  # one step a row: this test is about rows, and 14 runs long
        want = run(case, dlogp, frozen=True)
        assert want[0][3] < -300
        for rows in (torch.randperm(N, generator=g), torch.tensor([3]), torch.tensor([N - 1, 4])):
            some = Head(case.hidden[rows], case.weight, case.targets[rows], 0.7, None)
            for a, b in zip(run(some, dlogp[rows], frozen=True), want, strict=True):
                same(a, b[rows])
        with torch.no_grad():
            plain = score(case.hidden, case.weight, targets, temperature=0.7)
        trained = run(case, dlogp)
    for i in range(2):
        same(plain[i].double(), want[i])
        same(trained[i], want[i])


@paths
def test_ignored_rows_are_not_there(path):
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(6, 5, generator=g), torch.randn(40, 5, generator=g)
    targets, keep = torch.tensor([3, IGNORE, 39, 0, IGNORE, 7]), torch.tensor([0, 2, 3, 5])
    clean = Head(hidden[keep], weight, targets[keep], 1.0, None)
    hidden = hidden.clone()
    hidden[[1, 4]] = math.nan
    with small(path):
        got = run(Head(hidden, weight, targets, 1.0, None), torch.ones(6), frozen=True)
        want = run(clean, torch.ones(4), frozen=True)
        nothing = run(Head(hidden, weight, torch.full((6,), IGNORE), 1.0, None), torch.ones(6), frozen=True)
    for a, b, c in zip(got, want, nothing, strict=True):
        assert torch.equal(a[keep], b) and (a[[1, 4]] == 0).all() and (c == 0).all()


# ----------------------------------------------------------------------------
# nasty but legal


@paths
@pytest.mark.parametrize("C", [1, 15, 17])
def test_nothing_is_read_beyond_the_tensors(path, C):
    """Operands are views into nan, every fresh buffer is nan, and so is the next row: 0 * nan = nan, so that a mask on
    one operand of a product is not enough."""
    g = torch.Generator().manual_seed(C)
    weight = torch.full((60, C + 9), math.nan)
    weight[3:44, :C] = torch.randn(41, C, generator=g)
    hidden = torch.full((9, 2 * C + 5), math.nan)
    hidden[:8, : 2 * C : 2] = torch.randn(8, C, generator=g)
    targets = torch.tensor([0, 40, 31, 32, 15, 16, 1, 5, 3])
    case = Head(hidden[:, : 2 * C : 2], weight[3:44, :C], targets, 1.0, None)
    plain = Head(case.hidden[:8].double(), case.weight.double(), targets[:8], 1.0, None)
    torch.use_deterministic_algorithms(True)  # it also fills torch.empty with nan
    try:
        with small(path):
            got = run(case, torch.ones(9), frozen=True)
    finally:
        torch.use_deterministic_algorithms(False)
    want = values_and_grads(oracles.token_logprob, plain, torch.ones(8), frozen=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g[:8], w, rtol=0, atol=2e-5)
        assert g[8].isnan().all()


@paths
def test_a_nan_in_the_head_is_not_hidden(path):
    """A maximum that drops nan, or a comparison the wrong way round, would give that token a probability of 0."""
    weight = torch.ones(20, 3)
    weight[17] = math.nan
    with small(path):
        logp, entropy = score(torch.ones(2, 3), weight, torch.tensor([0, 5]))
    assert logp.isnan().all() and entropy.isnan().all()


@paths
def test_a_head_that_is_stored_the_other_way_round(path):
    g = torch.Generator().manual_seed(3)
    case = Head(torch.randn(7, 18, generator=g).T, torch.randn(7, 40, generator=g).T, torch.arange(18), 1.0, None)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(18))
    with small(path):
        for a, b in zip(run(case, torch.ones(18)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@paths
@pytest.mark.parametrize("row", [[1e4, -1e4, 0.0], [1e4] * 3, [-1e4, -1e4, -1e4 + 1], [3.0] * 3, [1e30] * 3])
def test_huge_equal_and_duplicate_logits(path, row):
    with small(path):
        logp, entropy = logits([row] * 3, [0, 1, 2])
    want = torch.log_softmax(torch.tensor(row, dtype=torch.float64), 0)
    torch.testing.assert_close(logp.double(), want, rtol=EPS, atol=2 * EPS)
    h = torch.special.entr(want.exp()).sum()
    torch.testing.assert_close(entropy.double(), h.expand(3), rtol=EPS, atol=4 * EPS)


@paths
def test_banned_tokens(path):
    """-inf logits: whole tiles of them, all but the target, and the target itself."""
    inf = math.inf
    rows = [[-inf] * 33 + [1.0, 2.0, -inf], [2.0, 1.0] + [-inf] * 34, [-inf] * 35 + [5.0], [0.0] * 35 + [-inf]]
    targets = [33, 1, 35, 35]
    with small(path):
        logp, entropy = logits(rows, targets)
    z = torch.tensor(rows, dtype=torch.float64)
    want = torch.log_softmax(z, 1).gather(1, torch.tensor(targets)[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), want, rtol=0, atol=4 * EPS)
    torch.testing.assert_close(entropy.double(), torch.special.entr(torch.softmax(z, 1)).sum(1), rtol=0, atol=8 * EPS)


@paths
def test_a_margin_of_18_is_minus_1e_8_and_not_zero(path):
    with small(path):
        logp, _ = logits([[18.0, 0.0], [60.0, 0.0], [0.0, 18.0]], [0, 0, 0])
    x = math.exp(-18)
    want = torch.tensor([-math.log1p(x), -math.exp(-60), -18 - math.log1p(x)], dtype=torch.float64)
    torch.testing.assert_close(logp.double(), want, rtol=8e-6, atol=0)  # exp(x) is off by eps |x|, here 60 eps


def test_targets_far_below_the_maximum():
    """Shifted by the target's logit, exp overflows from 88 on, and sums of it earlier. The path must be left, and only
    by these rows: 61 below is scored again, 59 below is not."""
    rows, targets = [[float(gap)] * 20 + [0.0] for gap in (59, 61, 87, 100, 400)], [20] * 5
    calls = []
    forward = module._forward

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return forward(*arguments)

    with small("epilogue"), patch.object(module, "_forward", counted):
        logp, entropy = logits(rows, targets)
    want = torch.log_softmax(torch.tensor(rows, dtype=torch.float64), 1)
    torch.testing.assert_close(logp.double(), want[:, 20], rtol=2 * EPS, atol=0)
    torch.testing.assert_close(entropy.double(), torch.special.entr(want.exp()).sum(1), rtol=1e-5, atol=0)
    assert calls == [1, 1, 1, 1]


@paths
def test_ties_count_as_top(path):
    """A twin of the target has the same logit to the last bit; the other rows are clear."""
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(40, 20, generator=g)
    twin = 35 if path == "epilogue" else 29  # in "rows" of the same product: a library adds otherwise in a narrower one
    weight[twin] = weight[2]
    hidden = torch.stack([weight[2], weight[2], weight[7], -weight[7]])
    for softcap in (None, 9.0):
        with small(path):
            *_, first = score(
                hidden, weight, torch.tensor([2, twin, 7, 7]), with_top=True, softcap=softcap, temperature=0.7
            )
        assert first.tolist() == [True, True, True, False]


@paths
def test_no_rows_and_a_vocabulary_of_one(path):
    with small(path):
        empty = run(
            Head(torch.randn(0, 2), torch.randn(5, 2), torch.zeros(0, dtype=torch.long), 1.0, None), torch.ones(0)
        )
        alone = run(
            Head(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.long), 1.0, None), torch.ones(3)
        )
        kept = run(
            Head(torch.randn(3, 2), torch.randn(1, 2), torch.zeros(3, dtype=torch.long), 1.0, None),
            torch.ones(3),
            frozen=True,
        )
    assert empty[0].shape == (0,) and empty[2].shape == (0, 2) and (empty[3] == 0).all()
    assert all((x == 0).all() for x in alone + kept)


@paths
def test_softcap_far_above(path):
    """|x| = 10 softcap: tanh is 1 in fp32, 1 - tanh^2 would be 0 and the gradient lost."""
    weight = torch.tensor([[40.0, 1.0], [-38.0, 2.0], [30.0, -1.0]])
    case = Head(torch.tensor([[1.0, 0.1], [-1.0, 0.2]]), weight, torch.tensor([1, 0]), 1.0, 4.0)
    want = values_and_grads(oracles.token_logprob, case.to(torch.float64), torch.ones(2))
    for frozen in (True, False):
        with small(path):
            got = run(case, torch.ones(2), frozen=frozen)
        assert_rows_close(got[2], want[2], 1e-5 * want[2].norm(dim=1))


# ----------------------------------------------------------------------------
# which path


def test_the_width_chooses_the_path():
    # the epilogue's sizes serve both paths: with those of rows, a wrong choice would write beyond its buffers
    g = torch.Generator().manual_seed(5)
    weight, targets = torch.randn(20, 24, generator=g), torch.tensor([3])
    for width, path in ((24, "rows"), (25, "epilogue")):
        with small("epilogue"), patch.multiple(module, EPILOGUE_BELOW=width):
            with patch.object(module, "_forward_epilogue", wraps=module._forward_epilogue) as epilogue:
                score(torch.randn(1, 24, generator=g), weight, targets)
        assert epilogue.called == (path == "epilogue")
    assert module._path(weight.double().to(DEVICE), weight, None) == "torch"  # fp64: no tensor cores, no Triton
    assert module._path(torch.ones(1, 1), weight, None) == "torch"  # a CPU


@pytest.mark.skipif(DEVICE == "cpu", reason="counts the bytes of a GPU's allocator")
@pytest.mark.parametrize("below", [0, 10**9])
def test_memory_of_8192_tokens_of_qwen3(below):
    """Beside hidden, weight and G at most 350 MB, in either path. (All logits would be 5 GB in fp32.)"""
    N, V, C = 8192, 151936, 1024
    hidden = torch.randn(N, C, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, C, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with patch.multiple(module, EPILOGUE_BELOW=below):
        token_logprob(hidden, weight, targets)
    assert torch.cuda.max_memory_allocated() - before - 2 * N * C < 350e6


@pytest.mark.parametrize("hopper", [False, True])
def test_only_bf16_on_an_h100_has_fewer_registers(hopper, monkeypatch):
    """A limit that AMD's compiler refuses, that an A100 and fp32 do not need, and that the soft-cap's 16 warps keep
    anyway. tests/compiled shows what it comes to: 128 registers, no spill."""
    limits, kernel = {}, module._epilogue_kernel

    class Recorded:
        def __getitem__(self, grid):
            return lambda *arguments, **options: (
                limits.update({case: options.get("maxnreg")}),
                kernel[grid](*arguments, **options),
            )

    monkeypatch.setattr("kernels.backend.HOPPER", hopper)
    monkeypatch.setattr(module, "_epilogue_kernel", Recorded())
    with small("epilogue"):
        for case in ((torch.bfloat16, None), (torch.bfloat16, 5.0), (torch.float32, None), (torch.float16, None)):
            score(torch.ones(3, 16, dtype=case[0]), torch.ones(5, 16, dtype=case[0]), torch.arange(3), softcap=case[1])
    assert len(limits) == 4
    assert {case: n for case, n in limits.items() if n} == ({(torch.bfloat16, None): 128} if hopper else {})
