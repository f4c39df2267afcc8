"""kernels/lora.py: the frozen linear layer and its LoRA update, on both paths, against float64 and against each other.

On a CPU the bf16 path runs too: its kernels in Triton's interpreter, its thin matmuls of widened operands.

Run: python -m pytest tests/test_lora_kernel.py
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import lora as module
from kernels.int8 import dequantize_int8, quantize_int8
from kernels.lora import frozen_linear
from kernels.nf4 import dequantize_nf4, quantize_nf4
from kernels.packed import Packed
from tests.strategies import SEEDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
BF16, FP32 = torch.bfloat16, torch.float32
EPS, HALVES, ROUND = torch.finfo(FP32).eps, 2.0**-17, 2.0**-8  # fp32 addition; (4) of the file; rounding to bf16
# Rows, in and out around the tiles of 64 and 128; ranks of less than a tensor core's 16, and of more than MAX_BLOCK_R
SIZES = {
    "N": st.sampled_from([1, 2, 17, 63, 65]),
    "C": st.sampled_from([1, 33, 64]),
    "F": st.sampled_from([1, 40, 127, 130]),
    "R": st.sampled_from([1, 3, 8, 16, 64, 70]),
}


def cases(**strategies):
    """given, without shrinking: the cases are small as they are, and in the interpreter it would take minutes."""
    return lambda test: settings(phases=[Phase.explicit, Phase.generate])(given(**strategies)(test))


@pytest.fixture(autouse=True, scope="module")
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(N, C, F, R, seed, dtype=BF16):
    """x (N, C), W (F, C), b (F,), A (R, C), B (F, R) and dy (N, F), on DEVICE."""
    g = torch.Generator().manual_seed(seed)
    x, W, b, dy = (torch.randn(*shape, generator=g).to(dtype) for shape in ((N, C), (F, C), (F,), (N, F)))
    A, B = torch.randn(R, C, generator=g), torch.randn(F, R, generator=g)
    return [t.to(DEVICE) for t in (x, W, b, A, B, dy)]


def run(x, W, b, A, B, dy, *, scale=1.5, backend="triton"):
    """y, dx, db, dA, dB."""
    leaves = [t.detach().requires_grad_() for t in (x, b, A, B)]
    y = frozen_linear(leaves[0], W, leaves[1], *leaves[2:], scale=scale, backend=backend)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves)]


def oracle(x, W, b, A, B, dy, scale=1.5):
    """float64, by autograd: y, dx, db, dA, dB. And the same of absolute values, where no terms cancel: their sizes."""

    def results(*tensors):
        x, W, b, A, B, dy = (t.detach().double() for t in tensors)
        leaves = [t.requires_grad_() for t in (x, b, A, B)]
        y = x @ W.T + b + scale * (x @ A.T) @ B.T
        y.backward(dy)
        return [y.detach(), *(t.grad for t in leaves)]

    numbers = (x, W, b, A, B, dy)
    return results(*numbers), results(*(t.abs() for t in numbers))


def assert_within(got, want, bound):
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max()} of what is allowed"


# ----------------------------------------------------------------------------
# against float64


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS)
def test_bf16_matches_float64(backend, N, C, F, R, seed):
    """y and dx: x W^T is rounded to bf16, the sum with the update once more. dA and dB are fp32.

    The bf16 path splits A (or B) and then h (or dh), 2^-17 of all terms each, and leaves out low x low, 2^-16."""
    numbers = draw(N, C, F, R, seed)
    got, (want, size) = run(*numbers, backend=backend), oracle(*numbers)
    sums = (N + C + F + R + 8) * EPS
    split = 2 * HALVES * 1.01 if backend == "triton" else 0.0
    assert [t.dtype for t in got] == [BF16, BF16, BF16, FP32, FP32]
    for i in (0, 1):
        assert_within(got[i], want[i], (2.02 * ROUND + sums + 3 * split) * size[i])
    for i in (3, 4):
        assert_within(got[i], want[i], (sums + split) * size[i])


@cases(N=st.sampled_from([64, 300]), R=st.sampled_from([4, 16]), seed=SEEDS)
def test_gradients_of_adapters_are_as_accurate_as_of_fp32_copies(N, R, seed):
    """By norm, on the same numbers: the error may be the torch path's, and that of two splits, which average out: an
    error of at most 2^-17 has a root mean square of half of that or less. bf16 x and dy stand for numbers 2^-9 off."""
    numbers = draw(N, 96, 80, R, seed)
    new, old, (want, _) = run(*numbers), run(*numbers, backend="torch"), oracle(*numbers)
    for i in (3, 4):
        errors = [((t[i].double() - want[i]).norm() / want[i].norm()).item() for t in (new, old)]
        assert errors[0] <= errors[1] + HALVES, errors
    for i in (0, 1):  # rounded to bf16 at the same places
        errors = [((t[i].double() - want[i]).norm() / want[i].norm()).item() for t in (new, old)]
        assert errors[0] <= 1.001 * errors[1] + HALVES, errors


@cases(**SIZES, seed=SEEDS, padding=st.sampled_from([0, 3]), transposed=st.booleans())
def test_added_in_place_and_rounded_once(N, C, F, R, seed, padding, transposed):
    """y += h b^T in the memory of y, whatever stands around it; h as halves."""
    del C
    *_, b, y = draw(N, 1, F, R, seed)
    h = 0.1 * torch.randn(N, R, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    high = h.bfloat16()
    halves = torch.cat([high, (h - high).bfloat16()], 1)
    assert ((halves[:, :R].double() + halves[:, R:].double() - h).abs() <= HALVES * h.abs()).all()
    frame = torch.full((N + 2, F + padding), 7.0, dtype=BF16, device=DEVICE)
    view = frame[1:-1, :F]
    view.copy_(y)
    b = b.T.contiguous().T if transposed else b
    got = module._add(view, halves, b)
    assert got.data_ptr() == view.data_ptr() and (frame[[0, -1]] == 7).all() and (frame[:, F:] == 7).all()
    want, size = y.double() + h.double() @ b.double().T, h.double().abs() @ b.double().abs().T
    # what is rounded is off by 2^-15 of the update; the result by half a unit of its own last place besides
    assert_within(got, want, (4 * HALVES + (R + 2) * EPS) * size * 1.01 + 1.01 * ROUND * want.abs())
    rows = torch.empty(F, N, dtype=BF16, device=DEVICE).T  # columns lie side by side, not rows
    assert torch.equal(module._add(rows.copy_(y), halves, b), got)


@cases(**SIZES, seed=SEEDS, scale=st.sampled_from([1.0, 0.3]))
def test_a_thin_matmul_comes_as_two_halves_of_fp32(N, C, F, R, seed, scale):
    del F
    x, _, _, A, _, _ = draw(N, C, 1, R, seed)
    h = module._thin(x, A, scale)
    high, low = h[:, :R].double(), h[:, R:].double()
    want, size = scale * x.double() @ A.double().T, scale * x.double().abs() @ A.double().abs().T
    assert h.dtype == BF16 and h.shape == (N, 2 * R)
    assert_within(high + low, want, (2 * HALVES + (C + 4) * EPS) * size * 1.01)
    assert (low.abs() <= 1.01 * ROUND * (high + low).abs()).all()


# ----------------------------------------------------------------------------
# the torch path


def as_it_was(x, W, b, A, B, dy, scale=1.5):
    """nanogspo/lora.py and nanogspo/quant.py before there was one function for both, for an unpacked W."""
    add = lambda y, a, b, scale: torch.addmm(y.float(), a, b, alpha=scale).to(y.dtype)  # noqa: E731
    flat, dys = x.reshape(-1, A.shape[1]), dy.reshape(-1, len(B))
    y = add(linear(x, W, b).reshape(-1, len(B)), flat.float() @ A.T, B.T, scale).view(*x.shape[:-1], -1)
    wide, x_wide = dys.float(), flat.float()
    dh = wide @ B * scale
    dA, dB = dh.T @ x_wide, wide.T @ (x_wide @ A.T * scale)
    return [y, add(dys @ W, dh, A, 1.0).view(x.shape), dys.sum(0), dA, dB]


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@cases(**SIZES, seed=SEEDS, batch=st.sampled_from([(), (1,), (2, 1)]))
def test_the_reference_has_the_bits_it_always_had(kind, dtype, N, C, F, R, seed, batch):
    x, W, b, A, B, dy = draw(N, C, F, R, seed, dtype)
    x, dy = x.expand(*batch, N, C), dy.expand(*batch, N, F)
    quantize, dequantize = {"nf4": (quantize_nf4, dequantize_nf4), "int8": (quantize_int8, dequantize_int8)}.get(
        kind, (lambda w: w, lambda w, dtype: w)
    )
    q = quantize(W)
    got = run(x, q, b, A, B, dy, backend=None if DEVICE == "cpu" else "torch")
    want = as_it_was(x, dequantize(q, dtype), b, A, B, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, FP32])
def test_only_bf16_takes_the_halves(dtype):
    """fp16 runs out at 6e-8, where halves of small numbers are; fp32 models keep their bits on a GPU as well."""
    numbers = draw(5, 33, 40, 3, 0, dtype)
    one, other = run(*numbers, backend="triton"), run(*numbers, backend="torch")
    assert all(map(torch.equal, one, other))


# ----------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
@cases(seed=SEEDS)
def test_no_update_is_the_base(kind, backend, seed):
    """B = 0: y is the base's, bit for bit, and so is dx; A has no gradient, B has one."""
    x, W, b, A, B, dy = draw(17, 64, 40, 3, seed)
    q = {"nf4": quantize_nf4, "int8": quantize_int8}.get(kind, lambda w: w)(W)
    y, dx, db, dA, dB = run(x, q, b, A, torch.zeros_like(B), dy, backend=backend)
    leaf, bias = x.clone().requires_grad_(), b.clone().requires_grad_()
    base = frozen_linear(leaf, q, bias, backend=backend)
    base.backward(dy)
    assert torch.equal(y, base) and torch.equal(dx, leaf.grad) and torch.equal(db, bias.grad)
    assert not dA.any() and dB.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@cases(**SIZES, seed=SEEDS)
def test_doubled_scale_is_a_doubled_update(backend, N, C, F, R, seed):
    """In all three places: with W = 0 everything is linear in scale, and a factor of 2 is exact."""
    x, W, b, A, B, dy = draw(N, C, F, R, seed)
    one, two = (run(x, 0 * W, 0 * b, A, B, dy, scale=scale, backend=backend) for scale in (1.5, 3.0))
    for i in (0, 1, 3, 4):
        assert torch.equal(2 * one[i], two[i]) and one[i].abs().max() > 0


@pytest.mark.isa
@cases(N=st.sampled_from([2, 17, 65]), seed=SEEDS)
def test_the_same_call_gives_the_same_bits(N, seed):
    """With gradients or without: the first ratio is exactly 1. And rows do not see each other in part 2's kernel."""
    numbers = draw(N, 33, 40, 3, seed)
    one, again = run(*numbers), run(*numbers)
    assert all(map(torch.equal, one, again))
    x, W, b, A, B, dy = numbers
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, W, b, A, B, scale=1.5, backend="triton"), one[0])
    h = module._thin(x, A, 1.5)
    alone = [module._add(dy[n : n + 1].clone(), h[n : n + 1].clone(), B) for n in range(N)]
    assert torch.equal(module._add(dy.clone(), h, B), torch.cat(alone))


# ----------------------------------------------------------------------------
# nasty but legal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1,), (2, 1, 3)])
def test_any_number_of_dimensions(backend, shape):
    x, W, b, A, B, _ = draw(1, 33, 40, 3, 0)
    x, dy = x[0].expand(*shape, 33), torch.ones(1, dtype=BF16, device=DEVICE).expand(*shape, 40)  # strides of 0
    y, dx, db, dA, dB = run(x, W, b, A, B, dy, backend=backend)
    assert y.shape == dy.shape and dx.shape == x.shape and dA.shape == A.shape and dB.shape == B.shape
    if y.numel():
        want, size = oracle(x, W, b, A, B, dy)
        for got, w, s in zip((y, dx, dA, dB), want[:2] + want[3:], size[:2] + size[3:], strict=True):
            assert_within(got, w, 0.01 * s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    """The first layer's x wants no gradient: W is not unpacked for it. A frozen bias gets none."""
    x, W, b, A, B, dy = draw(3, 64, 40, 3, 0)
    A, B, q = A.requires_grad_(), B.requires_grad_(), quantize_nf4(W)
    y = frozen_linear(x, q, b, A, B, backend=backend)
    with patch.object(Packed, "dequantize", None):
        y.backward(dy)
    assert A.grad.any() and x.grad is None and b.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_saved_but_x_and_the_adapter(backend):
    x, W, b, A, B, _ = draw(3, 33, 40, 3, 0)
    leaves, saved = [t.requires_grad_() for t in (x, A, B)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_linear(x, W, b, A, B, backend=backend)
        assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves} and len(saved) == 3
        frozen_linear(x, W, b, backend=backend)
    assert len(saved) == 3


# ----------------------------------------------------------------------------
# bytes


class Bytes(TorchDispatchMode):
    """Bytes that operations read and write, each operand once; views are none. As CUDA does it: an addmm that is not in
    place first copies its input (read and write)."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if any(a.alias_info is not None for a in func._schema.arguments) or name.startswith("empty"):
            return out
        flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        self.total += sum(t.numel() * t.element_size() for t in (*flat, out))
        self.total += 2 * args[0].nbytes if name == "addmm" else 0
        return out


def bytes_a_token(backend, monkeypatch):
    """Of the adapters of one layer of Qwen3-0.6B, forward and backward, without the base's matmuls."""
    C, Q, K, M, R = 1024, 2048, 1024, 3072, 16
    layers, totals = [(C, Q), (C, K), (C, K), (Q, C), (C, M), (C, M), (M, C)], []
    mode = Bytes()

    def mm(a, b):
        """bf16 in, fp32 out, as on a GPU"""
        mode.total += a.nbytes + b.nbytes + 4 * len(a) * b.shape[1]
        return torch.empty(len(a), b.shape[1])

    class Launch:
        """A kernel reads its arguments; the halves are written elsewhere, y where it was read."""

        def __getitem__(self, grid):
            def launch(*args, **_):
                mode.total += sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
                mode.total += args[0].nbytes if args[0].dtype == BF16 else 0

            return launch

    monkeypatch.setattr(module, "_mm", mm)
    monkeypatch.setattr(module, "_add_kernel", Launch())
    monkeypatch.setattr(module, "_halves_kernel", Launch())
    monkeypatch.setattr(module, "_split_kernel", Launch())
    for direction in ("forward", "backward"):
        counted = []
        for N in (16, 32):  # two sizes: what does not grow with N is the adapter itself
            mode.total = 0
            for inputs, outputs in layers:
                x, A, B = torch.zeros(N, inputs, dtype=BF16), torch.zeros(R, inputs), torch.zeros(outputs, R)
                y, W = torch.zeros(N, outputs, dtype=BF16), torch.zeros(outputs, inputs, dtype=BF16)
                x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
                base = lambda *_, y=y: y  # noqa: E731
                with patch.object(module._Frozen, "linear", base):
                    if direction == "forward":
                        with mode:
                            frozen_linear(x, W, None, A, B, backend=backend)
                        continue
                    before = mode.total
                    out = frozen_linear(x, W, None, A, B, backend=backend)
                mode.total = before
                with mode:
                    torch.autograd.grad(out, (x, A, B), y)
                mode.total -= 2 * (N * outputs + outputs * inputs + N * inputs)  # dy W
            counted.append(mode.total)
        grows = (counted[1] - counted[0]) / 16
        totals.append((grows, counted[0] - 16 * grows))
    return totals


def test_bytes_moved_are_a_fifth_of_what_fp32_copies_move(monkeypatch):
    """A micro-batch of 16,384 tokens. GPU or not: bytes are counted from shapes and dtypes, each operand once."""
    old, new = bytes_a_token("torch", monkeypatch), bytes_a_token("triton", monkeypatch)
    tokens = 16_384
    whole = [[grows + fixed / tokens for grows, fixed in each] for each in (old, new)]
    assert sum(whole[1]) <= 0.2 * sum(whole[0])


# ----------------------------------------------------------------------------
# what is said when it is wrong


@pytest.mark.parametrize(
    "change, text",
    [
        ({"A": None}, "got one of A and B, want both or neither"),
        ({"A": torch.ones(3, 5)}, r"got A \(3, 5\) torch.float32 and B \(4, 3\).*beside a weight \(4, 6\), want"),
        ({"B": torch.ones(4, 2)}, r"B \(4, 2\) torch.float32 beside a weight \(4, 6\), want \(R, in\) and \(out, R\)"),
        ({"A": torch.ones(3, 6).bfloat16()}, r"got A \(3, 6\) torch.bfloat16.*in float32; cast with .float\(\)"),
        ({"B": torch.ones(4, 3, device="meta")}, "got x on cpu, A on cpu, B on meta, want one device"),
        ({"backend": "cuda"}, "got backend 'cuda', want 'torch', 'triton' or None"),
    ],
)
def test_says_what_is_wrong(change, text):
    call = {"x": torch.ones(2, 6), "weight": torch.ones(4, 6), "A": torch.ones(3, 6), "B": torch.ones(4, 3)} | change
    with pytest.raises(ValueError, match=text):
        frozen_linear(**call)
