"""kernels/decode_attention.py against a loop over rows and heads in float64, and laws no implementation may break.

Every case is poisoned: slots behind a length hold nan, and so does all memory that torch.empty gives out. One nan that
reaches a product reaches the result, because 0 * nan is nan.

Run: python -m pytest tests/test_decode_attention.py
"""

import itertools
import re
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import decode_attention as module
from kernels.backend import INTERPRETED
from kernels.decode_attention import DecodePlan, decode_attention
from tests.strategies import SEEDS

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with nan under it
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def small_tiles():
    """16 slots a tile, 2 tiles a split, 3 splits, 16 queries a tile of rows: 50 slots already cross all of them."""
    return patch.multiple(module, TILE_BYTES=1, SPLIT_SLOTS=32, MAX_SPLITS=3, PREFIX_QUERIES=16)


@dataclass(frozen=True)
class Step:
    """What decode_attention takes."""

    q: Tensor  # (N, H, D)
    prefix_k: Tensor  # (K, P, Sp, D)
    prefix_v: Tensor  # (K, P, Sp, D)
    prefix_lengths: Tensor  # (P,)
    k: Tensor  # (K, N, Ss, D)
    v: Tensor  # (K, N, Ss, D)
    lengths: Tensor  # (N,)
    prompt: Tensor  # (N,)
    scale: float
    softcap: float | None = None
    window: int = 0
    copied: int = 0  # torch: below how many slots a block prefixes are copied instead

    def to(self, dtype: torch.dtype, cache: torch.dtype | None = None) -> "Step":
        caches = {x: getattr(self, x).to(cache or dtype) for x in ("prefix_k", "prefix_v", "k", "v")}
        return replace(self, q=self.q.to(dtype), **caches)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        names = ("q", "prefix_k", "prefix_v", "prefix_lengths", "k", "v", "lengths", "prompt")
        return tuple(getattr(self, name) for name in names)

    def run(self, backend: str | None = None, **more) -> Tensor:
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window} | more
        with small_tiles(), patch.object(module, "COPIED", self.copied):
            return decode_attention(*self.arguments, **options, backend=backend)

    def keep(self, rows: list[int]) -> "Step":
        """The same step without the other rows."""
        kept = {x: getattr(self, x)[rows] for x in ("q", "lengths", "prompt")}
        return replace(self, **kept, k=self.k[:, rows], v=self.v[:, rows])

    def seen(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values row n sees, (S, K, D) float64, oldest first."""
        p, end = int(self.prompt[n]), int(self.lengths[n])
        first = int(self.prefix_lengths[p])
        pair = [(self.prefix_k[:, p, :first], self.k[:, n, :end]), (self.prefix_v[:, p, :first], self.v[:, n, :end])]
        return tuple(torch.cat(x, dim=1).transpose(0, 1).double()[-self.window :] for x in pair)  # [-0:] is all

    @property
    def sizes(self) -> tuple[float, float]:
        """max sum_d |q| |k| scale, the size of the terms of a score, and max |v|."""
        score, value = 0.0, 0.0
        for n in range(len(self.q)):
            keys, values = self.seen(n)
            heads = self.q[n].double().abs().unflatten(0, (keys.shape[1], -1))  # (K, H / K, D)
            score = max(score, torch.einsum("kgd,skd->kgs", heads, keys.abs()).max().item() * self.scale)
            value = max(value, values.abs().max().item())
        return score, value

    @property
    def rounding(self) -> float:
        """What fp32 sums may be off by. A score is a sum of terms of size X: a few eps X, and as much again for tanh's
        2 eps softcap. Softmax turns an error of a score into a relative one of a weight, twice over for its sum."""
        score, value = self.sizes
        return 8 * EPS * (1 + score + (self.softcap or 0.0)) * value


def oracle(step: Step) -> Tensor:
    """(N, H, D) float64, one row and head at a time."""
    out = torch.zeros(step.q.shape, dtype=torch.float64, device=DEVICE)
    for n in range(len(step.q)):
        keys, values = step.seen(n)
        for h in range(step.q.shape[1]):
            c = h // (step.q.shape[1] // keys.shape[1])
            x = keys[:, c] @ step.q[n, h].double() * step.scale  # (S,)
            if step.softcap is not None:
                x = step.softcap * torch.tanh(x / step.softcap)
            out[n, h] = torch.softmax(x, 0) @ values[:, c]
    return out


def build(
    rows, prefix_lengths, lengths, *, heads=(4, 2), D=8, room=(0, 0), seed=0, layout="heads first", **options
) -> Step:
    """rows[p] rows of prompt p; float64; nan behind every length. room: slots of capacity that nobody uses."""
    g, (H, K), N, P = torch.Generator().manual_seed(seed), heads, sum(rows), len(rows)
    options = {"scale": D**-0.5} | options

    def cache(n, slots, used):
        x = torch.randn(n, slots, K, D, generator=g, dtype=torch.float64)
        for i, end in enumerate(used):
            x[i, end:] = torch.nan
        x = x.to(DEVICE).permute(2, 0, 1, 3)  # (K, n, slots, D)
        if layout == "a slice":
            return torch.nn.functional.pad(x, (0, 3), value=torch.nan)[..., :D]
        return x if layout == "rows first" else x.contiguous()

    Sp, Ss = max(prefix_lengths) + room[0], max(lengths) + room[1]
    prefix_k, prefix_v = cache(P, Sp, prefix_lengths), cache(P, Sp, prefix_lengths)
    k, v = cache(N, Ss, lengths), cache(N, Ss, lengths)
    q = torch.randn(N, H, D, generator=g, dtype=torch.float64).to(DEVICE)
    numbers = [torch.tensor(x, device=DEVICE) for x in (prefix_lengths, lengths)]
    prompt = torch.arange(P, device=DEVICE).repeat_interleave(torch.tensor(rows, device=DEVICE))
    return Step(q, prefix_k, prefix_v, numbers[0], k, v, numbers[1], prompt, **options)


# On both sides of a tile (16), a split (32), and beyond two; 0 is an empty prompt
SLOTS = (1, 2, 15, 16, 17, 33, 50)


@st.composite
def steps(draw, windows=(0, 0, 0, 1, 7, 33, 1000), softcaps=(None, None, 1.0, 20.0)) -> Step:
    rows = draw(st.sampled_from([[1], [3], [2, 2], [1, 0, 4], [0, 2, 0], [4, 1], [1, 1, 1]]))
    N, P = sum(rows), len(rows)
    alike, ragged = draw(st.booleans()), draw(st.booleans())
    prefixes = draw(st.lists(st.sampled_from((0, *SLOTS)), min_size=P, max_size=P))
    lengths = draw(st.lists(st.sampled_from(SLOTS), min_size=N, max_size=N))
    return build(
        rows,
        prefixes[:1] * P if alike else prefixes,
        lengths if ragged else lengths[:1] * N,
        heads=draw(st.sampled_from([(1, 1), (2, 2), (6, 2), (5, 1)])),
        D=draw(st.sampled_from([1, 3, 16, 33])),
        room=draw(st.sampled_from([(0, 0), (5, 3)])),
        layout=draw(st.sampled_from(["heads first", "rows first", "a slice"])),
        seed=draw(SEEDS),
        scale=draw(st.sampled_from([0.3, 1.0])),
        window=draw(st.sampled_from(windows)),
        softcap=draw(st.sampled_from(softcaps)),
        copied=draw(st.sampled_from([0, 10**9])),
    )


# ----------------------------------------------------------------------------
# against the oracle


def check(step: Step, backend: str) -> None:
    """fp32 against the truth."""
    got = step.run(backend)
    assert got.shape == step.q.shape and got.dtype == step.q.dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), oracle(step), rtol=0, atol=step.rounding)


@BACKENDS
@pytest.mark.parametrize("window", [0, 20, 60])
def test_all_tiles_and_splits(backend, window):
    """What a dozen draws may miss: two tiles of rows, a prompt cut by them, three splits of each part. Runs first,
    because its failures need no shrinking."""
    step = build([1, 0, 4, 1], [70, 9, 33, 0], [1, 70, 33, 17, 50, 40], heads=(3, 1), D=9, room=(7, 11), window=window)
    check(step.to(torch.float32), backend)
    check(replace(step, softcap=2.0).to(torch.float32), backend)


@given(step=steps())
def test_torch_matches_float64_oracle(step):
    check(step.to(torch.float32), "torch")


@settings(max_examples=12)  # 0.2 s each where kernels are interpreted
@given(step=steps())
def test_triton_matches_float64_oracle(step):
    check(step.to(torch.float32), "triton")


@given(step=steps())
def test_torch_is_exact_in_float64(step):
    """With rounding out of the way nothing but the formula is left. q is fp64, and so are all sums."""
    torch.testing.assert_close(step.run("torch"), oracle(step), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "cache"), [("triton", "as q"), ("torch", "as q"), ("torch", "fp32")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_lose_little_but_their_own_rounding(backend, dtype, cache):
    """The inputs are rounded first. Then the result is rounded once, by half an eps of itself; and Triton's weights,
    which a matrix unit takes in the dtype of the values, by as much each: half an eps of what they average."""
    step = build([2, 1], [50, 17], [33, 17, 2], heads=(6, 2), D=33, softcap=20.0)
    step = step.to(dtype, torch.float32 if cache == "fp32" else None)
    roundings = 2 if backend == "triton" else 1
    half = torch.finfo(dtype).eps / 2
    want, got = oracle(step), step.run(backend)
    assert got.dtype == dtype
    atol = step.rounding + half * step.sizes[1] * (roundings - 1)
    torch.testing.assert_close(got.double(), want, rtol=half * 1.01, atol=atol * 1.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BACKENDS
def test_no_further_from_the_truth_than_sdpa(backend, dtype):
    """The rule of CCE's tests, over a context of 300: |ours - truth| <= |SDPA - truth| + one rounding of a unit."""
    step = build([2, 2], [200, 200], [100] * 4, heads=(2, 1), D=32).to(dtype)
    want, pairs = oracle(step), [step.seen(n) for n in range(4)]
    keys, values = (torch.stack(x).to(dtype).transpose(1, 2) for x in zip(*pairs, strict=True))  # (N, K, S, D)
    theirs = scaled_dot_product_attention(step.q[:, :, None], keys, values, scale=step.scale, enable_gqa=True)[:, :, 0]
    error = (step.run(backend).double() - want).abs().mean()
    assert error <= (theirs.double() - want).abs().mean() * 1.1 + torch.finfo(dtype).eps * 2**-4


# ----------------------------------------------------------------------------
# laws


@BACKENDS
@pytest.mark.parametrize("cut", [0, 17, 40])
def test_where_the_prefix_ends_does_not_matter(backend, cut):
    """Prompts of 40 tokens, of which the first `cut` are shared and the rest is repeated in every row: one answer.
    Catches a merge without its weights, and a second part that is masked by positions of the first."""
    whole = build([2, 1], [40, 40], [20] * 3, heads=(2, 1)).to(torch.float32)
    keys, values = (
        torch.cat((prefix[:, whole.prompt, cut:], own), dim=2)
        for prefix, own in ((whole.prefix_k, whole.k), (whole.prefix_v, whole.v))
    )
    short = torch.full_like(whole.prefix_lengths, cut)
    moved = replace(whole, k=keys, v=values, prefix_lengths=short, lengths=whole.lengths + 40 - cut)
    for window in (0, 30):
        a, b = (replace(x, window=window).run(backend) for x in (whole, moved))
        torch.testing.assert_close(a, b, rtol=0, atol=2 * replace(whole, window=window).rounding)


@BACKENDS
def test_no_prefix_storage_at_all(backend):
    step = build([1, 2], [0, 0], [5, 17, 33]).to(torch.float32)
    assert step.prefix_k.shape[2] == 0
    torch.testing.assert_close(step.run(backend).double(), oracle(step), rtol=0, atol=step.rounding)


@BACKENDS
def test_a_window_as_long_as_everything_is_none(backend):
    step = build([2, 1], [20, 33], [17, 3, 1]).to(torch.float32)
    torch.testing.assert_close(step.run(backend, window=37), step.run(backend), rtol=0, atol=0)
    assert not torch.equal(step.run(backend, window=36), step.run(backend))  # one key less, for row 0


@BACKENDS
def test_a_window_of_one_is_the_newest_value(backend):
    step = build([2, 1], [20, 33], [17, 3, 1], heads=(4, 2)).to(torch.float32)
    newest = step.v[:, torch.arange(3), step.lengths - 1]  # (K, N, D)
    newest = newest.transpose(0, 1).repeat_interleave(2, dim=1)  # (N, H, D) head h reads h // 2
    assert torch.equal(step.run(backend, window=1), newest)


@BACKENDS
def test_equal_values_come_out_unchanged(backend):
    """Weights sum to 1 over both parts."""
    step = build([2, 2], [20, 33], [40, 3, 1, 1]).to(torch.float32)
    alike = replace(step, v=torch.where(step.v.isnan(), step.v, 3.0), prefix_v=torch.full_like(step.prefix_v, 3.0))
    torch.testing.assert_close(alike.run(backend), torch.full_like(step.q, 3.0), rtol=64 * EPS, atol=0)


@BACKENDS
@pytest.mark.parametrize("where", ["prefix", "suffix"])
def test_huge_scores_pick_one_key(backend, where):
    """Scores of 1e4 and more: exp of any of them overflows without its maximum, in the merge as well."""
    step = build([2], [20], [20, 20], heads=(2, 1), D=4).to(torch.float32)
    keys = step.prefix_k if where == "prefix" else step.k
    keys[:, :, 3] = step.q[0, 0] * 1e5
    values = (step.prefix_v if where == "prefix" else step.v)[:, :, 3]  # (K, P or N, D)
    got = step.run(backend)
    assert got.isfinite().all()
    assert torch.equal(got[0, 0], values[0, 0])


@BACKENDS
def test_softcap_bounds_the_scores(backend):
    """All scores far beyond the cap, half of each sign: weights exp(c) and exp(-c), whatever the scores were."""
    step = build([1], [8], [8], heads=(1, 1), D=1, softcap=1.5, scale=1.0).to(torch.float32)
    step.q.fill_(1e3)
    for keys in (step.prefix_k, step.k):
        keys.copy_(torch.tensor([1.0, -1.0], device=DEVICE).repeat(4).view(1, 1, 8, 1) * 50)
    for values in (step.prefix_v, step.v):
        values.copy_(torch.tensor([1.0, 0.0], device=DEVICE).repeat(4).view(1, 1, 8, 1))
    want = torch.full_like(step.q, torch.sigmoid(torch.tensor(3.0)).item())
    torch.testing.assert_close(step.run(backend), want, rtol=8 * EPS, atol=0)


@pytest.mark.isa
@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 0), (torch.bfloat16, 9), (torch.float32, 40)])
def test_triton_is_batch_invariant(dtype, window):
    """A row's bits are the same whoever else is there: rows leave, prompts empty, tiles of rows are cut elsewhere.
    Catches splits that depend on the batch, and a neighbour's window that moves where tiles begin."""
    options = {"window": window, "softcap": 20.0, "heads": (3, 1), "D": 16}
    step = build([4, 1, 2], [50, 17, 33], [1, 50, 17, 33, 2, 16, 31], **options).to(dtype)
    whole = step.run("triton")
    for rows in ([0], [1, 2, 6], [3, 5], [0, 1, 2, 3, 4, 5, 6]):
        assert torch.equal(step.keep(rows).run("triton"), whole[rows])


@pytest.mark.parametrize("capacity", [1, 100, 512, 2000, 5000, 131072])
def test_splits_cover_the_capacity_once(capacity):
    for block in (16, 64, 128):
        splits, chunk = module._split(capacity, block)
        assert 1 <= splits <= module.MAX_SPLITS and chunk % block == 0 and chunk >= module.SPLIT_SLOTS
        assert (splits - 1) * chunk < capacity <= splits * chunk
    assert module._split(0, 64)[0] == 0


def test_triton_reads_nothing_back():
    """Lengths stay on the device: a step can be captured in a CUDA graph. (Interpreted kernels read, so none runs.)"""
    step = build([2, 2], [20, 33], [17, 3, 1, 1]).to(torch.float32)
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    def refuse(self, *_):
        raise AssertionError("read back by the host")

    kernels = {name: Recorded() for name in ("_prefix_kernel", "_suffix_kernel", "_merge_kernel")}
    with patch.multiple(module, **kernels), patch.multiple(Tensor, item=refuse, tolist=refuse, __bool__=refuse):
        step.run("triton")
        replace(step, lengths=step.lengths * 0 + 1, prompt=step.prompt * 0).run("triton")
    assert grids[:3] == grids[3:] == [(1, 2, 2), (4, 2, 1), (16,)]  # 33 slots are 2 splits, 17 are 1


@pytest.mark.skipif(not INTERPRETED, reason="counts the loads of interpreted kernels")
@pytest.mark.parametrize("window", [0, 20])
def test_triton_reads_q_only_where_keys_are_seen(window):
    """96 and 70 slots are 3 splits each, of 32. A program whose split holds no key that is seen does not read q."""
    step = build([1, 0, 1, 1], [70, 9, 0, 33], [1, 70, 33], heads=(1, 1), room=(26, 0), window=window).to(torch.float32)
    step.lengths[2] = 0  # finished
    count, load = [], InterpreterBuilder.create_masked_load

    def counted(self, ptrs, mask, *rest):
        count.append(int((mask.data & (ptrs.data >= start) & (ptrs.data < start + step.q.nbytes)).sum()))
        return load(self, ptrs, mask, *rest)

    start = step.q.data_ptr()
    with patch.object(InterpreterBuilder, "create_masked_load", counted):
        step.run("triton")
    # splits with a key that is seen: of row 0's prefix 3 and its own slots 1, of row 1's own 3. With the window, row 0
    # sees slots 51 to 69 of its prefix, which are in 2 splits, and row 1 slots 50 to 69: 2 splits
    assert sum(count) == (3 + 1 + 3 if not window else 2 + 1 + 2) * step.q.shape[2]


@pytest.mark.parametrize("window", [0, 2, 6])
def test_triton_gives_zeros_to_a_row_that_sees_nothing(window):
    """Finished rows of a CUDA graph: length 0, whatever their prompt. Lengths beyond the memory end where it ends."""
    step = build([2, 1], [3, 5], [4, 4, 4], window=window).to(torch.float32)
    none = replace(step, lengths=torch.tensor([0, 4, 4], device=DEVICE))
    got = none.run("triton")
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert torch.equal(got[1:], step.run("triton")[1:])
    if not window:
        step = build([1, 2], [5, 5], [4, 4, 4]).to(torch.float32)
        endless = replace(step, lengths=step.lengths + 100, prefix_lengths=step.prefix_lengths * 100)
        assert torch.equal(endless.run("triton"), step.run("triton"))


# ----------------------------------------------------------------------------
# the torch backend's plan and storage


def test_a_plan_serves_all_layers():
    for window, copied in itertools.product((0, 9), (0, 10**9)):
        step = build([2, 0, 3], [20, 7, 33], [17, 3, 1, 33, 2], window=window, copied=copied).to(torch.float32)
        with patch.object(module, "COPIED", copied):
            plan = DecodePlan.build(step.prompt, step.prefix_lengths, step.lengths, window=window)
        assert torch.equal(step.run("torch", plan=plan), step.run("torch"))


def test_equal_prompts_are_one_product_and_need_no_mask():
    lengths = torch.tensor([5] * 6)
    plan = DecodePlan.build(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([7, 7, 7]), lengths)
    assert plan.blocks == ((slice(0, 3), slice(0, 6), slice(0, 7)),)
    assert (plan.width, plan.suffix, plan.hidden, plan.unused) == (7, slice(0, 5), None, None)
    # one row less, or one token: a product for each prompt that has rows and tokens
    ragged = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([7, 7, 7, 0]), lengths[:5]
    with patch.object(module, "COPIED", 0):
        plan = DecodePlan.build(*ragged)
    assert plan.blocks == ((slice(0, 1), slice(0, 2), slice(0, 7)), (slice(1, 2), slice(2, 3), slice(0, 7)))
    assert plan.hidden is not None and plan.unused is None
    # unless copying is less work: 5 rows x 7 slots for 2 products
    for few, copied in ((17, False), (18, True)):
        with patch.object(module, "COPIED", few):
            plan = DecodePlan.build(*ragged)
        assert (plan.copied is not None) == copied and (plan.blocks == ()) == copied
    assert plan.copied[1] == slice(0, 7) and plan.width == 0
    assert plan.unused[0, :, :, 0].tolist() == [[n > 2] * 7 + [False] * 5 for n in range(5)]


def test_only_slots_in_use_are_read():
    """A capacity of 10^6 slots costs nothing; nor does what a window has left behind."""
    plan = DecodePlan.build(torch.tensor([0, 0]), torch.tensor([100]), torch.tensor([50, 60]), window=70)
    assert plan.blocks == ((slice(0, 1), slice(0, 2), slice(80, 100)),) and plan.suffix == slice(0, 60)
    plan = DecodePlan.build(torch.tensor([0, 0]), torch.tensor([100]), torch.tensor([50, 60]), window=20)
    assert plan.blocks == () and plan.width == 0 and plan.suffix == slice(30, 60)


def test_storage_does_not_change_bits():
    """Contiguous storage is read in place, anything else may be copied: same products."""
    layouts = ("heads first", "rows first", "a slice")
    results = [build([2, 2], [20, 20], [9] * 4, layout=x).to(torch.float32).run("torch") for x in layouts]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@BACKENDS
def test_a_strided_query(backend):
    """Heads of q, k and v often lie side by side in one projection."""
    step = build([2, 1], [20, 33], [17, 3, 1]).to(torch.float32)
    wide = torch.cat((step.q, step.q.new_full((3, 5, 8), torch.nan)), dim=1)[:, :4]
    assert torch.equal(replace(step, q=wide).run(backend), step.run(backend))


@BACKENDS
def test_inputs_are_left_alone_and_no_gradient_comes_out(backend):
    step = build([2, 1], [20, 33], [17, 3, 1], softcap=5.0).to(torch.float32)
    copies = [x.clone() for x in step.arguments]
    out = replace(step, q=step.q.requires_grad_(True)).run(backend)
    assert not out.requires_grad
    for x, copy in zip(step.arguments, copies, strict=True):
        assert torch.equal(x.nan_to_num(-1e9), copy.nan_to_num(-1e9))


@BACKENDS
def test_no_rows(backend):
    step = build([1], [3], [3]).to(torch.float32).keep([])
    assert step.run(backend).shape == (0, 4, 8)


@BACKENDS
def test_int32_and_int64_lengths(backend):
    step = build([2, 1], [20, 33], [17, 3, 1]).to(torch.float32)
    names = ("lengths", "prefix_lengths", "prompt")
    narrow = replace(step, **{name: getattr(step, name).to(torch.int32) for name in names})
    assert torch.equal(narrow.run(backend), step.run(backend))


# ----------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(3, 8)}, "got q, prefix_k, prefix_v, k, v [(3, 8)"),
        ({"q": torch.zeros(3, 3, 8)}, "want one N, K and D, and H a multiple of K; layout is (heads, rows, slots, D)"),
        ({"q": torch.zeros(2, 4, 8)}, "got q, prefix_k, prefix_v, k, v [(2, 4, 8), (2, 2, 33, 8)"),
        ({"v": torch.zeros(2, 3, 16, 8)}, "(2, 3, 17, 8), (2, 3, 16, 8)], want one N"),
        ({"prefix_v": torch.zeros(1, 2, 33, 8)}, "(2, 2, 33, 8), (1, 2, 33, 8)"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, "got lengths of shape (2,) and torch.int64, want (3,)"),
        ({"prompt": torch.zeros(3)}, "got prompt of shape (3,) and torch.float32, want (3,) of int32 or int64"),
        ({"k": torch.zeros(2, 3, 17, 8, dtype=torch.bfloat16)}, "keys and values of bfloat16, float32, want one dtype"),
        ({"q": torch.zeros(3, 4, 8, dtype=torch.float64)}, "got q of torch.float64 and keys and values of float32"),
        ({"q": torch.zeros(3, 8, 4).mT}, "want stride 1 in the last dimension; call .contiguous()"),
        ({"softcap": 0.0}, "got softcap 0.0, want a number above 0; pass None for no soft-cap"),
        ({"window": -1}, "got window -1, want at least 1 position, or 0 for no window"),
        ({"prompt": torch.tensor([0, 1, 0])}, "got prompt [0, 1, 0], want numbers from 0 to 1 that never fall"),
        ({"prompt": torch.tensor([0, 1, 2])}, "got prompt [0, 1, 2], want numbers from 0 to 1 that never fall"),
        ({"lengths": torch.tensor([1, 0, 1])}, "a length of 0, want at least 0 and 1; a row's newest token counts"),
        ({"prefix_lengths": torch.tensor([-1, 0])}, "got a prefix_length of -1 and a length of 1"),
        ({"lengths": torch.tensor([1, 18, 1])}, "got lengths up to 33 and 18 for 33 and 17 slots"),
        ({"prefix_lengths": torch.tensor([20, 34])}, "got lengths up to 34 and 17 for 33 and 17 slots"),
    ],
)
def test_says_what_is_wrong(changes, message):
    step = build([2, 1], [20, 33], [17, 3, 1]).to(torch.float32)
    changes = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(step, **changes).run("torch")


def test_a_plan_of_another_step_is_refused():
    step = build([2, 1], [20, 33], [17, 3, 1]).to(torch.float32)
    plan = DecodePlan.build(step.prompt[:2], step.prefix_lengths, step.lengths[:2])
    with pytest.raises(
        ValueError, match="got a plan of 2 rows and window 0 for 3 rows and window 0, want its own plan"
    ):
        step.run("torch", plan=plan)
    plan = DecodePlan.build(step.prompt, step.prefix_lengths, step.lengths, window=3)
    with pytest.raises(ValueError, match="got a plan of 3 rows and window 3 for 3 rows and window 0"):
        step.run("torch", plan=plan)


def test_triton_says_what_it_cannot():
    step = build([1], [2], [2], heads=(1, 1), D=257).to(torch.float32)
    with pytest.raises(
        ValueError, match="got D = 257, q of torch.float32 and keys of torch.float32 for Triton, want at most 256"
    ):
        step.run("triton")
    with pytest.raises(ValueError, match="got D = 8, q of torch.float64 and keys of torch.float64 for Triton"):
        build([1], [2], [2]).run("triton")
    assert step.run(None).shape == (1, 1, 257)
    with pytest.raises(ValueError, match="q of torch.bfloat16 and keys of torch.float32 for Triton"):
        build([1], [2], [2]).to(torch.bfloat16, torch.float32).run("triton")
