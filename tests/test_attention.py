"""kernels/attention.py against a dense float64 mask, on both backends, and the laws that packed attention obeys.

Small tiles and pieces are set where edges are hunted, so that rows of 2 to 80 tokens cross all of them: lengths on both
sides of 16 and 32, segments of no token, prompts of no token, prompts nobody answers.
"""

import contextlib
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.attention
from kernels.attention import Segments, attention
from nanogspo.layouts import attend
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
EPS = torch.finfo(torch.float32).eps / 2  # one rounding to fp32


@contextlib.contextmanager
def small(owned: int = 16, walked: int = 16):
    """Tiles and pieces of 16 tokens, prompts cut from 24 queries on, and unwritten memory full of nan."""
    module, names = kernels.attention, ("_tiling", "WINDOWED", "WRITTEN_OUT", "PART", "PART_TILES")
    old = {name: getattr(module, name) for name in names}
    tiling = (owned, walked, 4, 1)
    module._tiling, module.WINDOWED, module.WRITTEN_OUT = lambda *_: (tiling, tiling), 16, 8
    module.PART, module.PART_TILES = 24, 6
    module._pieces.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives nan
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for name, value in old.items():
            setattr(module, name, value)
        module._pieces.cache_clear()


@dataclasses.dataclass(frozen=True)
class Row:
    """A packed row in float64, and what it is multiplied with to give gradients."""

    lengths: list[int]
    prefix: list[int]
    q: Tensor  # (S, H, D)
    k: Tensor  # (S, K, D)
    v: Tensor  # (S, K, D)
    dout: Tensor  # (S, H, D)
    options: dict

    @property
    def segments(self) -> Segments:
        return Segments.build(self.lengths, self.prefix, DEVICE)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.dout

    def to(self, dtype: torch.dtype) -> "Row":
        """Rounded; .to(dtype).to(float64) is what a kernel in that dtype is asked about."""
        return dataclasses.replace(self, **{n: getattr(self, n).to(DEVICE, dtype) for n in ("q", "k", "v", "dout")})


def make(lengths, prefix=None, H=4, K=2, D=16, seed=0, spread=2.0, **options) -> Row:
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(sum(lengths), n, D, generator=g, dtype=torch.float64) for n in (H, K, K, H))
    prefix = [-1] * len(lengths) if prefix is None else prefix
    return Row(list(lengths), prefix, q * spread, k, v, dout, {"scale": D**-0.5, **options})


@st.composite
def rows(
    draw, sizes=(0, 1, 2, 7, 15, 16, 17, 33), widths=(16, 20, 64), heads=((4, 2), (2, 2), (3, 1), (1, 1)), families=3
):
    """Families of a prompt and 0 to 3 answers; an ordinary sequence is a prompt that nobody answers."""
    lengths, prefix = [], []
    for _ in range(draw(st.integers(1, families))):
        answers = draw(st.lists(st.sampled_from(sizes), max_size=3))
        prefix += [-1] + [len(prefix)] * len(answers)
        lengths += [draw(st.sampled_from(sizes)), *answers]
    H, K = draw(st.sampled_from(heads))
    return make(
        *(lengths, prefix, H, K, draw(st.sampled_from(widths)), draw(SEEDS)),
        spread=draw(st.sampled_from([0.0, 2.0, 20.0])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        window=draw(st.sampled_from([0, 0, 1, 2, 7, 18, 40])),
    )


def run(row: Row, backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    *inputs, dout = row.to(dtype).tensors
    inputs = [x.requires_grad_() for x in inputs]
    out = attention(*inputs, row.segments, **row.options, backend=backend)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def visible(row: Row) -> Tensor:
    """(S, S) bool: row i sees column j."""
    lengths = torch.tensor(row.lengths, dtype=torch.int64)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths)  # (S,)
    prompt = torch.tensor(row.prefix, dtype=torch.int64)[segment]  # (S,)
    index = torch.arange(len(segment)) - (lengths.cumsum(0) - lengths)[segment]  # (S,)
    position = index + torch.where(prompt >= 0, lengths[prompt.clamp(min=0)], 0)  # (S,)
    mine = (segment[:, None] == segment) & (index <= index[:, None])  # (S, S)
    of_prompt = prompt[:, None] == segment  # (S, S)
    near = position[:, None] - position < (row.options.get("window") or len(segment) + 1)  # (S, S)
    return ((mine | of_prompt) & near).to(DEVICE)


def oracle(row: Row) -> tuple[Tensor, ...]:
    """out, dq, dk, dv by one dense softmax and autograd in float64; and for each the same sums with every term made
    positive: a result may be off by some roundings of these."""
    *inputs, dout = row.to(torch.float64).tensors
    inputs = [x.requires_grad_() for x in inputs]
    q, k, v = inputs
    G, scale, cap = q.shape[1] // k.shape[1], row.options["scale"], row.options.get("softcap")
    wide = [x.repeat_interleave(G, 1) for x in (k, v)]  # (S, H, D)
    scores = torch.einsum("ihd,jhd->hij", q, wide[0]) * scale  # (H, S, S)
    if cap:
        scores = torch.tanh(scores / cap) * cap
    p = scores.masked_fill(~visible(row), -float("inf")).softmax(-1)  # (H, S, S)
    out = torch.einsum("hij,jhd->ihd", p, wide[1])  # (S, H, D)
    truth = out.detach(), *torch.autograd.grad(out, inputs, dout)
    with torch.no_grad():
        k_, v_, d_ = wide[0].abs(), wide[1].abs(), dout.abs()
        out_ = torch.einsum("hij,jhd->ihd", p, v_)  # (S, H, D)
        ds = p * (torch.einsum("ihd,jhd->hij", d_, v_) + (d_ * out_).sum(-1).T[..., None]) * scale  # (H, S, S)
        dq_ = torch.einsum("hij,jhd->ihd", ds, k_)  # (S, H, D)
        dk_, dv_ = (torch.einsum("hij,ihd->jhd", a, b) for a, b in ((ds, q.abs()), (p, d_)))  # (S, H, D) each
        sizes = (out_, dq_, *(x.unflatten(1, (k.shape[1], G)).sum(2) for x in (dk_, dv_)))
    return truth, sizes


def assert_exact(row: Row, backend: str, dtype: torch.dtype) -> None:
    """A score is a sum of D products, each off by a rounding, and a softmax turns that into a relative error of p.
    16 bits round p and dscore before the product with v, k and q, out before delta, and the result: 4 roundings."""
    truth, sizes = oracle(row.to(dtype).to(torch.float64))
    magnitude = (
        (row.q.abs().amax() * row.k.abs().amax() * row.q.shape[2] * row.options["scale"]).item() if len(row.q) else 0
    )
    fine = torch.finfo(dtype).eps / 2 if dtype == torch.float64 else EPS
    tolerance = 4 * fine * (8 + magnitude) + (4 * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
    tiny = 2e-6 if dtype == torch.float16 else 1e-30  # fp16 has nothing below 6e-8: a sum of some of these
    for name, got, want, size in zip(("out", "dq", "dk", "dv"), run(row, backend, dtype), truth, sizes, strict=True):
        assert got.dtype == dtype and not got.isnan().any(), name
        excess = (got.double() - want).abs() - tolerance * size - tiny
        assert excess.numel() == 0 or excess.max() <= 0, (name, excess.max())


# ----------------------------------------------------------------------------
# exact


@given(rows(sizes=(0, 1, 2, 7, 15, 16, 17, 33, 50)), st.booleans())
def test_torch_matches_a_dense_float64_mask(row, cut):
    """With rounding out of the way, every piece: 1e-12 would show a pair forgotten or taken twice."""
    with small() if cut else contextlib.nullcontext():
        assert_exact(row, "torch", torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(rows())
def test_torch_matches_in_the_dtypes_of_models(dtype, row):
    assert_exact(row, "torch", dtype)


SMALL = {"heads": ((2, 1), (2, 2), (1, 1)), "families": 1}  # the interpreter takes a millisecond for each tile


@settings(max_examples=8)
@given(rows(sizes=(0, 1, 2, 15, 16, 17, 33), **SMALL), st.sampled_from([(16, 16), (16, 32), (32, 16)]))
def test_triton_matches_a_dense_float64_mask(row, tile):
    with small(*tile):
        assert_exact(row, "triton", torch.float32)


@settings(max_examples=3)
@given(rows(sizes=(1, 16, 33), widths=(16, 20), **SMALL), st.sampled_from([torch.bfloat16, torch.float16]))
def test_triton_matches_in_16_bits(row, dtype):
    with small():
        assert_exact(row, "triton", dtype)


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_at_the_real_tile_sizes(D, dtype):
    """Heads of every family, one with a soft-cap; 80 and 96 fill a tile of 128 with zeros."""
    lengths = [40, 5, 33] if dtype == torch.float32 else [70, 9, 131]
    softcap = 5.0 if D == 64 else None
    assert_exact(
        make(lengths, [-1, 0, 0], H=2, K=1, D=D, softcap=softcap, window=50 if D == 96 else 0), "triton", dtype
    )


def test_triton_with_the_tiles_of_an_h100(monkeypatch):
    """128 keys and queries a tile in backward where they fit into registers; other cards keep 64."""
    owned = {}
    for hopper in (False, True):
        monkeypatch.setattr("kernels.backend.HOPPER", hopper)
        for D, softcap in ((128, None), (80, None), (128, 5.0), (64, None)):
            options = kernels.attention._Options(1.0, softcap, 0, "triton")
            owned[hopper, D, softcap] = kernels.attention._tiling(torch.empty(3, 1, D).bfloat16(), options)[1][0]
    assert [key for key, tokens in owned.items() if tokens == 128] == [(True, 128, None), (True, 80, None)]
    assert set(owned.values()) == {64, 128}
    assert_exact(make([131, 9], [-1, 0], H=2, K=1, D=128), "triton", torch.bfloat16)


def test_torch_at_the_real_piece_sizes():
    """Longer than a piece of 256 and a tile of torch's own kernel (512 keys), with and without window and cap."""
    for options in ({}, {"window": 100}, {"softcap": 5.0}, {"softcap": 5.0, "window": 290}):
        assert_exact(make([301, 130, 7, 540], [-1, 0, 0, -1], H=2, K=1, D=4, **options), "torch", torch.float64)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 4}, {"softcap": 2.0, "window": 4}])
def test_gradcheck(options):
    row = make([3, 2, 4, 3], [-1, 0, 0, -1], H=2, K=1, D=2, **options)
    inputs = [x.requires_grad_() for x in row.to(torch.float64).tensors[:3]]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, row.segments, **row.options, backend="torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_saturated_scores_keep_their_gradient(dtype, softcap):
    """Scores of 1e4 on the axis of one key: p is 0 or 1, exp must never see them bare, and the slope of the cap there,
    4 exp(-2 |x| / cap), is smaller than 1 - tanh^2 can say."""
    row = make([9, 4], [-1, 0], spread=1.0, softcap=softcap)
    row.q.mul_(1e4)
    for backend in BACKENDS:
        got = run(row, backend, dtype)
        assert all(x.isfinite().all() for x in got)
        if softcap:
            truth, _ = oracle(row.to(dtype).to(torch.float64))
            # no cap of 30 reaches its 1 - 1e-7 here: dk and dq are exact zeros but for pairs that are near 0 by chance
            assert (got[1].double() - truth[1]).abs().max() <= 1e-2 * (1e-6 + truth[1].abs().max())


# ----------------------------------------------------------------------------
# laws


FAMILIES = [([17, 3, 9, 0], [-1, 0, 0, 0]), ([0, 5], [-1, 0]), ([21], [-1]), ([2, 2, 2], [-1, 0, 0])]
OPTIONS = [{}, {"softcap": 5.0}, {"window": 18}]


def pack(parts: list[Row], options: dict) -> Row:
    prefix, count = [], 0
    for part in parts:
        prefix += [p + count if p >= 0 else -1 for p in part.prefix]
        count += len(part.prefix)
    tensors = (torch.cat(x) for x in zip(*(part.tensors for part in parts), strict=True))
    return Row(sum((part.lengths for part in parts), []), prefix, *tensors, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_family_does_not_know_its_neighbours(backend, options):
    """Packed, alone, in another order, beside rows full of nan: the same bits, of values and of all gradients. A tile
    or a sum across a seam would show."""
    parts = [make(*family, seed=i, H=2, K=1, **options) for i, family in enumerate(FAMILIES)]
    poison = [dataclasses.replace(p, **{n: getattr(p, n) * float("nan") for n in ("q", "k", "v")}) for p in parts]
    row = pack([poison[0], parts[2], parts[1], poison[3], parts[0]], parts[0].options)
    sizes = [len(parts[i].q) for i in (0, 2, 1, 3, 0)]
    for dtype in (torch.float32, torch.bfloat16):
        with small():
            alone = {i: run(parts[i], backend, dtype) for i in (0, 1, 2)}
            together = run(row, backend, dtype)
        for column, whole in enumerate(together):
            _, c, b, _, a = whole.split(sizes)
            assert all(torch.equal(x, alone[i][column]) for i, x in enumerate((a, b, c)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_shared_prompt_is_a_repeated_prompt(backend, options):
    """Values of the answers are those of prompt + answer as one sequence, and the gradients of the prompt's copies sum
    up to the shared one's. The copies' own queries get no gradient: in training the prompt carries no loss."""
    P, answers = 19, [5, 17, 1, 0]
    shared = make([P, *answers], [-1, 0, 0, 0, 0], H=2, K=1, **options)
    shared.dout[:P] = 0.0
    slices, start = [], P
    for n in answers:
        slices.append(torch.cat([torch.arange(P), torch.arange(start, start + n)]))
        start += n
    index = torch.cat(slices)  # (tokens of the repeated row,)
    repeated = Row([P + n for n in answers], [-1] * 4, *(x[index] for x in shared.tensors), shared.options)
    dtype, bar = (torch.float64, 1e-13) if backend == "torch" else (torch.float32, 2e-6)
    with small():
        one, many = run(shared, backend, dtype), run(repeated, backend, dtype)
    index = index.to(DEVICE)
    torch.testing.assert_close(one[0][P:], many[0][index >= P], rtol=bar, atol=bar)
    for a, b in zip(one[1:], many[1:], strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a).index_add(0, index, b), rtol=10 * bar, atol=10 * bar)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_as_long_as_the_longest_sequence_is_none(backend):
    """To the last bit; one shorter is not."""
    lengths, prefix = [17, 3, 20, 30], [-1, 0, 0, -1]
    with small(32, 16):
        none, exact, short = (
            run(make(lengths, prefix, H=1, K=1, window=window), backend, torch.float32) for window in (0, 37, 36)
        )
    assert all(torch.equal(a, b) for a, b in zip(none, exact, strict=True))
    assert not torch.equal(none[0], short[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_window_of_one_is_the_token_itself(backend, softcap):
    row = make([17, 3, 20], [-1, 0, 0], window=1, softcap=softcap)
    with small():
        out, dq, dk, dv = run(row, backend, torch.float32)
    v, dout = (x.float().to(DEVICE) for x in (row.v, row.dout))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dv, dout.unflatten(1, (2, 2)).sum(2), rtol=1e-6, atol=1e-6)
    for x in (dq, dk):  # one key, p = 1: nothing to choose
        assert x.abs().max() <= 1e-5


def test_a_high_cap_is_no_cap():
    """The two paths of the reference, torch's kernel and written-out scores, say the same; tanh x = x - x^3 / 3."""
    row = make([17, 3, 20, 30], [-1, 0, 0, -1])
    capped = dataclasses.replace(row, options={**row.options, "softcap": 1e6})
    for a, b in zip(run(row, "torch", torch.float64), run(capped, "torch", torch.float64), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.isa
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [0, 6])
def test_packed_is_padded(softcap, window):
    """What the model does without packing, nanogspo.model.attend, on rows padded on the right."""
    lengths, row = [5, 12, 1], make([5, 12, 1], H=4, K=2, softcap=softcap, window=window)
    row = row.to(torch.float32)
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in row.tensors[:3]]
    mask = None
    if window:
        i = torch.arange(max(lengths), device=DEVICE)
        mask = ((i <= i[:, None]) & (i > i[:, None] - window))[None, None]  # (1, 1, T, T)
    out = attend(*padded, mask, row.options["scale"], softcap or 0.0)  # (B, T, H, D)
    want = torch.cat([x[:n] for x, n in zip(out, lengths, strict=True)])
    got = attention(*row.tensors[:3], row.segments, **row.options, backend="torch")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.isa
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bits_with_and_without_gradients(backend, dtype, options):
    """GSPO's first ratio is exactly 1 only if scoring without gradients, with them, again, or under autocast is one."""
    row = make([17, 3, 20, 30], [-1, 0, 0, -1], H=2, K=1, **options).to(dtype)
    call = lambda *x: attention(*x, row.segments, **row.options, backend=backend)  # noqa: E731
    with torch.no_grad():
        plain = call(*row.tensors[:3])
    inputs = [x.clone().requires_grad_() for x in row.tensors[:3]]
    first, again = call(*inputs), call(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = call(*inputs)
    assert torch.equal(plain, first) and torch.equal(plain, again) and torch.equal(plain, under)
    a, b = (torch.autograd.grad(x, inputs, row.dout) for x in (first, again))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """q, k, v as parts of one projection, with nan where they must not read; every other channel; a gradient that is
    one number expanded, as .sum() makes it."""
    row = make([17, 3, 20], [-1, 0, 0]).to(torch.float32)
    row = dataclasses.replace(row, dout=torch.ones_like(row.dout))
    want = run(row, backend, torch.float32)
    q, k, v = row.tensors[:3]
    joint = torch.full((len(q), 11, 16), float("nan"), device=DEVICE)  # (S, 1 + H + 1 + K + 1 + K, D)
    parts = joint[:, 1:5], joint[:, 6:8], joint[:, 9:]
    channels = [torch.full((*x.shape[:2], 32), float("nan"), device=DEVICE) for x in (q, k, v)]
    for views in (parts, tuple(x[..., ::2] for x in channels)):
        for view, x in zip(views, (q, k, v), strict=True):
            view.copy_(x.detach())
        inputs = [view.detach().requires_grad_() for view in views]
        out = attention(*inputs, row.segments, **row.options, backend=backend)
        got = (out.detach(), *torch.autograd.grad(out.sum(), inputs))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    for lengths in ([], [0], [0, 0]):
        got = run(make(lengths), backend, torch.float32)
        assert [len(x) for x in got] == [0, 0, 0, 0]
    row = make([5, 3], [-1, 0]).to(torch.float32)
    k = row.k.clone().requires_grad_()  # only one of the three wants a gradient
    attention(row.q, k, row.v, row.segments, **row.options, backend=backend).sum().backward()
    assert k.grad.isfinite().all() and k.grad.abs().sum() > 0


# ----------------------------------------------------------------------------
# plans


# Prompts on both sides of a tile (16), of two and of PART_TILES (6); answers that make 1, 2 and many parts of 24, with
# none, one token, and the last part cut short
CUT = [
    ([33, 17, 1, 0, 40], [-1, 0, 0, 0, 0]), ([16, 9], [-1, 0]), ([1, 50], [-1, 0]), ([40, 20], [-1, 0]),
    ([97, 60], [-1, 0]), ([40], [-1]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "dtype"), [({}, torch.bfloat16), ({"softcap": 5.0, "window": 18}, torch.float32)])
def test_a_prompt_of_many_answers_is_cut_into_parts(options, dtype):
    """dk and dv against float64, families side by side, within what an uncut sum may be off by: a part is a sum in
    fp32 as the whole is, and adding P parts rounds P - 1 times, by EPS of the size each, of the 32 that are allowed."""
    parts = [make(*family, seed=i, H=2, K=1, **options) for i, family in enumerate(CUT[1:4])]
    with small():
        assert_exact(pack(parts, parts[0].options), "triton", dtype)


def test_key_tiles_cover_every_query_once(monkeypatch):
    """Each tile's parts meet end to end, slots are used once, and a prompt of many tiles is cut less, or not at all."""
    monkeypatch.setattr(kernels.attention, "PART", 24)
    monkeypatch.setattr(kernels.attention, "PART_TILES", 6)
    lengths, prefix = sum((n for n, _ in CUT), []), []
    for _, own in CUT:
        prefix += [p + len(prefix) if p >= 0 else -1 for p in own]
    segments = Segments.build(lengths, prefix, DEVICE)
    table, prompts = segments.key_tiles(16)
    assert segments.key_tiles(16)[0] is table and segments.tiles(16).shape[1] == 6
    rows = sorted(table.tolist())
    walked = [row[5] - row[4] for row in table.tolist()]
    assert walked == sorted(walked, reverse=True)
    for tile in segments.tiles(16).tolist():
        parts = [row for row in rows if row[0] == tile[0]]
        assert all(row[1:4] == [tile[1], tile[2], tile[4]] for row in parts)
        assert parts[0][4] == tile[0] and parts[-1][5] == tile[5]
        assert all(a[5] == b[4] for a, b in zip(parts, parts[1:], strict=False))
    assert sorted(row[6] for row in rows if row[6] >= 0) == list(range(3 * 2 + 3 * 2 + 1 * 3 + 1 * 2))
    # 91 and 60 tokens are 4 and 3 parts, of which 3 tiles allow 2; 51 are 3, 25 are 2; 97 are 7 tiles, and fill a GPU
    assert [(end - start, parts) for start, end, _, parts in prompts] == [(33, 2), (40, 2), (1, 3), (16, 2)]


def test_segments():
    segments = Segments.build([4, 2, 0, 3, 5], [-1, 0, 0, 0, -1], DEVICE)
    assert segments.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 2, 3, 4]
    assert segments.cu_seqlens.tolist() == [0, 4, 6, 6, 9, 14] and segments.cu_seqlens.dtype == torch.int32
    assert segments.prefix.tolist() == [-1, 0, 0, 0, -1] and segments.positions.dtype == torch.int64
    assert segments.tiles(3) is segments.tiles(3)  # made once, not for every layer
    assert segments.tiles(3).tolist() == [
        [0, 0, 4, 0, 0, 9],  # 9 tokens look at this tile of keys: the most, so it starts first
        [3, 0, 4, 0, 0, 9],
        [9, 9, 14, 0, 0, 14],
        [6, 6, 9, 0, 4, 9],
        [4, 4, 6, 0, 4, 6],
        [12, 9, 14, 0, 0, 14],
    ]


def test_the_reference_makes_few_calls_and_small_masks():
    """Four groups of a prompt and 8 answers of one length: a call for each prompt, for its answers' own keys, and for
    what they read of the prompt. And no written-out or masked block of a long row is larger than it has to be."""
    pieces = kernels.attention._pieces
    lengths, parents = ([40] + [64] * 8) * 4, [p for g in range(4) for p in [-1] + [9 * g] * 8]
    assert len(pieces(tuple(lengths), tuple(parents), 0, True)) == 12
    for window, fused, widest in ((100, True, 255 + 100), (0, False, 5000), (100, False, 127 + 100)):
        for piece in pieces((5000, 700, 3000), (-1, 0, -1), window, fused):
            assert piece.count * piece.rows <= (256 if fused else 128) and piece.keys <= widest


# ----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 5, 4, 16)}, r"got q, k, v of shapes \(1, 5, 4, 16\).*drop the batch dimension"),
        ({"q": torch.zeros(5, 3, 16)}, r"\(5, 3, 16\), \(5, 2, 16\).*H a multiple of K"),
        ({"v": torch.zeros(5, 2, 8)}, r"shapes .*\(5, 2, 8\), want"),
        ({"k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16)}, "shapes"),
        ({"q": torch.zeros(5, 4, 16, dtype=torch.bfloat16)}, "torch.bfloat16, torch.float32, torch.float32, want one"),
        ({"segments": Segments.build([5], device="meta")}, "got q on cpu and segments on meta, want one device"),
        ({"segments": Segments.build([4])}, "got 5 tokens, want the 4 of the segments"),
        ({"scale": 0.0}, "got scale 0.0, want a number above 0"),
        ({"softcap": 0.0}, "got softcap 0.0, want a number above 0; pass None"),
        ({"window": -1}, "got window -1, want 0 for no window"),
        ({"backend": "cuda"}, "want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, message):
    arguments = {
        "q": torch.zeros(5, 4, 16),
        "k": torch.zeros(5, 2, 16),
        "v": torch.zeros(5, 2, 16),
        "segments": Segments.build([5]),
        "scale": 0.25,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_says_what_triton_cannot():
    row = make([5])
    with pytest.raises(ValueError, match="float64 with backend 'triton'"):
        run(row, "triton", torch.float64)
    with pytest.raises(ValueError, match="got heads of width 288, want at most 256"):
        run(make([5], D=288), "triton", torch.float32)


@pytest.mark.parametrize(
    "lengths, prefix",
    [
        ([3, -1], None),
        ([3, 4], [-1]),
        ([3, 4], [-1, 1]),  # itself
        ([3, 4], [1, -1]),  # a later one
        ([3, 4], [-1, -2]),
        ([3, 4, 5], [-1, 0, 1]),  # two levels
        ([3, 4, 5], [-1, -1, 0]),  # not behind its prompt
        ([3, 4, 5, 6], [-1, 0, -1, 0]),
    ],
)
def test_says_which_segment_is_wrong(lengths, prefix):
    with pytest.raises(ValueError, match=r"got (lengths|prefix\[\d\])"):
        Segments.build(lengths, prefix)
