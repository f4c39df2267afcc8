"""kernels/delta_rule.py against the rule itself, a loop over tokens in float64, and against laws of the arithmetic.

Run: python -m pytest tests/test_delta_rule.py       HYPOTHESIS_PROFILE=deep for more cases
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor

from kernels import delta_rule as module
from kernels.attention import Segments
from kernels.delta_rule import CHUNKS, delta_rule, delta_rule_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
NAMES = ("q", "k", "v", "g", "beta", "initial")
# (lengths, parents): nothing at all, one token, whole chunks and one more; families; empty prompts, answers, sequences
ROWS = [
    ([1], [-1]),
    ([0], [-1]),
    ([64, 65, 127], [-1, -1, -1]),
    ([70, 3, 0, 66], [-1, 0, 0, 0]),
    ([0, 5, 2, 64, 1], [-1, 0, 0, -1, 3]),
    ([2, 0, 129, 1, 130], [-1, -1, -1, 2, 2]),
]


def segments(lengths: list[int], parents: list[int] | None = None) -> Segments:
    return Segments.build(lengths, parents, DEVICE)


def inputs(lengths: list[int], seed: int, *, H: int = 1, V: int = 2, dk: int = 5, dv: int = 3, fade: float = 0.5):
    """q, k, v, g, beta, initial in float64, rounded to what fp32 holds; k has length 1, as the model's."""
    gen, S = torch.Generator().manual_seed(seed), sum(lengths)
    rand = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64)  # noqa: E731
    q, k = (torch.nn.functional.normalize(rand(S, H, dk), dim=-1) for _ in range(2))
    g, beta = -rand(S, V).abs() * fade, rand(S, V).sigmoid()
    return [x.float().double().to(DEVICE) for x in (q, k, rand(S, V, dv), g, beta, rand(len(lengths), V, dk, dv))]


def oracle(q, k, v, g, beta, initial, lengths, parents) -> tuple[Tensor, Tensor]:
    """Equation (1), a token at a time."""
    repeat, outs, finals, t = v.shape[1] // q.shape[1], [], [], 0
    for i, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        S = initial[i] if parent < 0 else finals[parent]  # (V, dk, dv)
        for _ in range(length):
            key, query = k[t].repeat_interleave(repeat, 0), q[t].repeat_interleave(repeat, 0)  # (V, dk)
            S = g[t].exp()[:, None, None] * S
            held = torch.einsum("hk,hkv->hv", key, S)
            S = S + torch.einsum("hk,hv->hkv", key, beta[t, :, None] * (v[t] - held))
            outs.append(torch.einsum("hk,hkv->hv", query, S))
            t += 1
        finals.append(S)
    return torch.stack([v.new_zeros(v.shape[1:]), *outs])[1:], torch.stack(finals)


def both(xs: list[Tensor], lengths: list[int], parents: list[int], dtype: torch.dtype, backend: str = "torch"):
    """Values and gradients of the oracle and of ours, for one random direction."""
    gen = torch.Generator().manual_seed(7)
    results = []
    for ours in (False, True):
        leaves = [x.detach().to(dtype if ours else torch.float64, copy=True).requires_grad_() for x in xs]
        if ours:
            row = segments(lengths, parents)
            out, final = delta_rule(*leaves[:5], row, initial=leaves[5], backend=backend)
        else:
            out, final = oracle(*leaves, lengths, parents)
        if not results:
            directions = [torch.randn(y.shape, generator=gen).double().to(DEVICE) for y in (out, final)]
        loss = sum((y.double() * d).sum() for y, d in zip((out, final), directions, strict=True))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append(
            [out, final] + [torch.zeros_like(x) if d is None else d for d, x in zip(grads, leaves, strict=True)]
        )
    return results


def close(got: list[Tensor], want: list[Tensor], eps: float) -> None:
    for name, a, b in zip(("out", "final", *NAMES), got, want, strict=True):
        assert a.shape == b.shape, name
        if b.numel():
            # sums of some hundred terms, solved and multiplied three times over: 300 roundings of the largest number
            assert (a.double() - b).abs().max() <= 300 * eps * max(1.0, b.abs().max()), name


@pytest.mark.parametrize("row, dk", [*((row, 5) for row in ROWS), (ROWS[2], 65)], ids=str)
def test_values_and_gradients_are_the_rule_s(row, dk):
    """fp32; and in fp64, where nothing but the formula can differ. Wide heads have chunks of 64, others of 32."""
    xs = inputs(row[0], 0, dk=dk)
    for dtype in (torch.float32, torch.float64):
        want, got = both(xs, *row, dtype)
        assert got[0].dtype == got[1].dtype == dtype
        close(got, want, torch.finfo(dtype).eps)


@pytest.fixture
def triton_alone(monkeypatch):
    """No reference behind the kernels, and memory that they are given holds nan: 0 * nan would be seen."""
    monkeypatch.setattr(module, "delta_rule_reference", None)
    new_empty = Tensor.new_empty  # the interpreter asks for integers, too
    nan = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: nan(new_empty(*args, **kwargs)))


# three chunks and two answers; small chunks of wide heads, that key heads share, in two blocks of values; empty ones
TRITON = [
    (([33, 2, 0, 17], [-1, 0, 0, -1]), {"V": 1, "dk": 5, "dv": 3}),
    (([0, 17], [-1, 0]), {"H": 2, "V": 4, "dk": 17, "dv": 18}),
    (([16], [-1]), {"V": 1, "dk": 1, "dv": 1}),
    (([1, 0, 3], [-1, 0, 0]), {"V": 1}),
    (([0, 0], [-1, 0]), {"V": 1}),
]


@pytest.mark.parametrize("row, sizes", TRITON, ids=str)
def test_triton_values_and_gradients_are_the_rule_s(row, sizes, triton_alone, monkeypatch):
    """Widths that are no powers of two, in the interpreter; backward for the value heads of one key head at a time.
    What is scored without a gradient has the same bits: the first ratio is 1."""
    monkeypatch.setattr(module, "SCRATCH", 1)
    xs = inputs(row[0], 0, **sizes)
    want, got = both(xs, *row, torch.float32, "triton")
    close(got, want, EPS)
    q, k, v, g, beta, initial = (x.float() for x in xs)
    scored = delta_rule(q, k, v, g, beta, segments(*row), initial=initial, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(scored, got[:2], strict=True))


def test_triton_where_nothing_fades_all_is_forgotten_or_nothing_is_written(triton_alone):
    """g of 0, -1e4 and -3e38, beta of 0 and 1, equal keys, side by side in a prompt of two chunks and its answer."""
    xs = inputs([24, 3], 8, V=1)
    xs[3][:12], xs[3][15], xs[3][20] = 0, -1e4, -3e38
    xs[4][3:18:2], xs[4][4:19:2], xs[1][8:12] = 0, 1, xs[1][8]
    want, got = both(xs, [24, 3], [-1, 0], torch.float32, "triton")
    close(got, want, EPS)


def test_triton_gradients_of_a_sequence_that_is_cut(triton_alone):
    """Two calls with the state carried have the gradients of the whole, the initial state's among them."""
    leaves = [x.float().requires_grad_() for x in inputs([20], 9, V=1)]
    *xs, initial = leaves
    whole, final = delta_rule(*xs, segments([20]), initial=initial, backend="triton")
    first, carried = delta_rule(*(x[:7] for x in xs), segments([7]), initial=initial, backend="triton")
    second, end = delta_rule(*(x[7:] for x in xs), segments([13]), initial=carried, backend="triton")
    direction = torch.randn(20, 1, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = torch.autograd.grad((whole * direction).sum() + final.square().sum(), leaves)
    got = torch.autograd.grad((torch.cat((first, second)) * direction).sum() + end.square().sum(), leaves)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert (a - b).abs().max() <= 300 * EPS * b.abs().max(), name


def test_triton_gradients_do_not_cross_sequences(triton_alone):
    """Poison in the first of three, and in its gradient: not a bit of the others moves, from what they are alone."""
    *xs, initial = (x.float() for x in inputs([17, 18, 1], 10, V=1))
    dout = torch.ones(36, 1, 3, device=DEVICE)
    for x in (*xs, dout):
        x[:17] = torch.nan
    leaves = [x.requires_grad_() for x in xs]
    out, final = delta_rule(*leaves, segments([17, 18, 1]), initial=initial, backend="triton")
    got = torch.autograd.grad((out, final), leaves, (dout, torch.ones_like(final)))
    alone = [x.detach()[17:].clone().requires_grad_() for x in leaves]
    out, final = delta_rule(*alone, segments([18, 1]), initial=initial[1:], backend="triton")
    want = torch.autograd.grad((out, final), alone, (dout[17:], torch.ones_like(final)))
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert torch.equal(a[17:], b) and not b.isnan().any(), name


def test_triton_s_backward_works_on_what_it_says(triton_alone, monkeypatch):
    """Every tensor that it makes: those of backward_bytes, the gradients of v, g and beta, and two sets of states."""
    leaves = [x.float().requires_grad_() for x in inputs([16, 16], 12)]
    made, empty_like, new_empty = [], torch.empty_like, Tensor.new_empty
    out, final = delta_rule(*leaves[:5], segments([16, 16]), initial=leaves[5], backend="triton")
    monkeypatch.setattr(torch, "empty_like", lambda x: made.append((y := empty_like(x)).nbytes) or y)
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: made.append((y := new_empty(*a, **k)).nbytes) or y)
    torch.autograd.grad(out.sum() + final.sum(), leaves)
    returned = sum(x.nbytes for x in leaves[2:5]) + 2 * final.nbytes
    assert sum(made) - returned == module.backward_bytes(32, 2, 5, 3)


def test_triton_keeps_its_inputs_alone_for_backward(triton_alone):
    """4 (2 dk H / V + dv + 2) bytes a token and value head, and the initial states, or one 0."""
    *xs, initial = (x.float().requires_grad_() for x in inputs([3], 11, H=1, V=2, dk=5, dv=3))
    for start in (initial, None):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            out, _ = delta_rule(*xs, segments([3]), initial=start, backend="triton")
        bytes_kept = sum(x.untyped_storage().nbytes() for x in kept)
        assert bytes_kept == 3 * 2 * 4 * (2 * 5 // 2 + 3 + 2) + (4 if start is None else initial.nbytes)
    want = torch.autograd.grad(delta_rule(*xs, segments([3]), initial=0 * initial, backend="triton")[0].sum(), xs)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), xs), want, strict=True))


@settings(max_examples=8)
@given(
    seed=SEEDS,
    H=st.sampled_from([1, 2]),
    repeat=st.sampled_from([1, 3]),
    dk=st.integers(1, 6),
    dv=st.integers(1, 6),
    fade=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    lengths=st.sampled_from([[n + extra, 2, 1] for n in CHUNKS for extra in (0, 1)]),
)
def test_every_shape_and_decay(seed, H, repeat, dk, dv, fade, lengths):
    parents = [-1, 0, 0]
    want, got = both(inputs(lengths, seed, H=H, V=H * repeat, dk=dk, dv=dv, fade=fade), lengths, parents, torch.float32)
    close(got, want, EPS)


def test_forgetting_all_at_once_loses_no_digit_of_what_follows():
    """A token with g = -1e4 (or -inf) among small ones: sums from the chunk's start would cancel to 1e-3."""
    xs = inputs([40], 3, fade=0.01)
    for low in (-1e4, -3e38):
        xs[3][10] = low
        want, got = both(xs, [40], [-1], torch.float32)
        close(got, want, EPS)


def test_equal_keys_that_are_overwritten():
    """beta 1 and one key: A is all ones, whose powers grow like binomials; the memory holds the newest value alone."""
    q, k, v, g, beta, initial = inputs([130], 1, H=2)
    k, q = k[:1].expand_as(k), k[:1].expand_as(k)
    out, _ = delta_rule(*(x.float() for x in (q, k, v, g, beta.new_ones(130, 2))), segments([130]))
    assert (out - v).abs().max() <= 100 * EPS * v.abs().max()


def test_beta_0_writes_nothing_and_g_0_keeps_all():
    q, k, v, g, beta, initial = (x.float() for x in inputs([70], 2))
    out, final = delta_rule(q, k, v, 0 * g, 0 * beta, segments([70]), initial=initial)
    assert torch.equal(final, initial)
    want = torch.einsum("shk,hkv->shv", q.repeat_interleave(2, 1), initial[0])
    assert (out - want).abs().max() <= 10 * EPS * want.abs().max()


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_a_sequence_may_be_cut_anywhere(cut):
    """Two calls with the state carried, or a prompt and its answer in one row: the same as the whole."""
    *xs, initial = (x.float() for x in inputs([150], 4))
    whole, final = delta_rule(*xs, segments([150]), initial=initial)
    first, carried = delta_rule(*(x[:cut] for x in xs), segments([cut]), initial=initial)
    second, end = delta_rule(*(x[cut:] for x in xs), segments([150 - cut]), initial=carried)
    zeros = torch.zeros_like(initial)
    family, states = delta_rule(*xs, segments([cut, 150 - cut], [-1, 0]), initial=torch.cat((initial, zeros)))
    for got, want in ((torch.cat((first, second)), whole), (end, final), (family, whole), (states[1:], final)):
        assert (got - want).abs().max() <= 100 * EPS * want.abs().max()


@pytest.mark.parametrize("backend, T", [("torch", 70), ("triton", 3)])
def test_steps_are_the_chunks(backend, T):
    q, k, v, g, beta, initial = (x.float() for x in inputs([T, T], 5, H=2, V=4, dk=17, dv=70))
    want, final = delta_rule(q, k, v, g, beta, segments([T, T]), initial=initial)
    state = initial.clone()
    rows = [x.unflatten(0, (2, T)).transpose(0, 1) for x in (q, k, v, g, beta)]  # (T, n, ...)
    out = torch.stack(
        [delta_rule_step(*parts, state, backend=backend) for parts in zip(*rows, strict=True)], 1
    )  # (n, T, V, dv)
    assert (out.flatten(0, 1) - want).abs().max() <= 100 * EPS * want.abs().max()
    assert (state - final).abs().max() <= 100 * EPS * final.abs().max()


def test_no_sequence_touches_another():
    """Poison in one of them stays there, forward and backward; and neighbours change no bit."""
    lengths = [70, 3, 66, 5]  # all of one size of chunks
    xs = [x.float() for x in inputs(lengths, 6)[:5]]
    alone, _ = delta_rule(*(x[73:139] for x in xs), segments([66]))
    xs[2][:70] = torch.nan
    v = xs[2].requires_grad_()
    out, final = delta_rule(xs[0], xs[1], v, *xs[3:], segments(lengths))
    assert torch.equal(out[73:139], alone)
    assert out[:70].isnan().all() and not out[70:].isnan().any() and not final[1:].isnan().any()
    [dv] = torch.autograd.grad(out[73:139].sum(), v)
    assert not dv[73:139].isnan().any() and (dv[139:] == 0).all() and (dv[70:73] == 0).all()


def test_says_what_is_wrong():
    q, k, v, g, beta, initial = (x.float() for x in inputs([4], 0))
    row = segments([4])
    with pytest.raises(ValueError, match="want q, k"):
        delta_rule(q, k[:3], v, g, beta, row)
    with pytest.raises(ValueError, match="want q, k"):
        delta_rule(q, k, v, g[:, :1], beta, row)
    with pytest.raises(ValueError, match="multiple"):
        delta_rule(q.repeat(1, 3, 1), k.repeat(1, 3, 1), v, g, beta, row)
    with pytest.raises(ValueError, match="got 4 tokens and segments of 5"):
        delta_rule(q, k, v, g, beta, segments([5]))
    with pytest.raises(ValueError, match="initial states"):
        delta_rule(q, k, v, g, beta, row, initial=initial[:, :1])
    with pytest.raises(ValueError, match="for Triton"):
        delta_rule(q.double(), k.double(), v.double(), g, beta, row, backend="triton")
    with pytest.raises(ValueError, match="float32"):
        delta_rule_step(q, k, v, g, beta, initial.expand(4, -1, -1, -1).double())
    with pytest.raises(ValueError, match="want q, k"):
        delta_rule_step(q, k, v[:, :, 0], g, beta, initial)
