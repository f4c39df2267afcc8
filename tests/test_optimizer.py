"""nanogspo/optimizer.py: AdamW written out in float64, fp32 masters of bf16 weights, and a state that loses nothing.

Run: python -m pytest tests/test_optimizer.py
"""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanogspo.optimizer import Optimizer, learning_rate
from tests.strategies import SEEDS

HUGE = 1e30  # a clipping threshold that is never reached


def module(seed=0, dtype=torch.float32, scale=1.0):
    """A matrix, a bias, a norm of both kinds of decay, and a parameter that is frozen."""
    g = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"linear": nn.Linear(5, 3), "norm": nn.LayerNorm(3), "frozen": nn.Linear(2, 2)})
    for p in model.parameters():
        p.data.normal_(0, scale, generator=g)
    model["frozen"].requires_grad_(False)
    return model.to(dtype)


def set_gradients(model, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update(optimizer, lr, grad_clip=HUGE):
    optimizer.accumulate()
    return optimizer.step(lr, grad_clip)


# ----------------------------------------------------------------------------
# AdamW


@given(seed=SEEDS, decay=st.sampled_from([0.0, 0.1]), clip=st.sampled_from([0.5, HUGE]))
def test_is_adamw_in_fp32(seed, decay, clip):
    """Algorithm 2 of arXiv 1711.05101, in float64, with the gradient's norm over all parameters scaled down first."""
    model = module(seed)
    optimizer = Optimizer(model, weight_decay=decay)
    w = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    m = {name: torch.zeros_like(x) for name, x in w.items()}
    v = {name: torch.zeros_like(x) for name, x in w.items()}
    for t, lr in enumerate([1e-2, 1e-3, 5e-3], start=1):
        set_gradients(model, seed + t)
        g = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
        norm = math.sqrt(sum(x.square().sum().item() for x in g.values()))
        got_norm = update(optimizer, lr, clip)
        assert got_norm.item() == pytest.approx(norm, rel=1e-5)  # before clipping
        for name in w:
            x = g[name] * min(1, clip / norm)
            w[name] = w[name] * (1 - lr * (decay if x.ndim >= 2 else 0))  # norms and biases are not decayed
            m[name] = 0.9 * m[name] + 0.1 * x
            v[name] = 0.999 * v[name] + 0.001 * x * x
            w[name] -= lr * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            # a step of size lr, off by a few fp32 units, and the weight's own rounding
            torch.testing.assert_close(model.get_parameter(name).double(), w[name], rtol=1e-6, atol=lr * 1e-4)


def test_equals_torchs_adamw_bit_for_bit():
    """In fp32 there is no master and nothing of ours in between: torch's fused AdamW on the same groups."""
    ours, theirs = module(), module()
    optimizer = Optimizer(ours, weight_decay=0.1)
    groups = [
        {"params": [theirs["linear"].weight], "weight_decay": 0.1},
        {"params": [theirs["linear"].bias, *theirs["norm"].parameters()], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, fused=True)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        update(optimizer, 0.01)
        torch.nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], HUGE)
        adamw.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@given(seed=SEEDS, factor=st.sampled_from([1e-3, 1.0, 1e3]))
def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up(seed, factor):
    """AdamW itself forgets the gradient's scale, so this looks at its first moment, (1 - 0.9) times the gradient."""
    model = module()
    optimizer = Optimizer(model)
    set_gradients(model, seed, factor)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = update(optimizer, 1e-3, 1.0)
    moments = [t.flatten() for name, t in optimizer.state().items() if name.endswith("exp_avg")]
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-5)
    want = flat * min(1.0, 1 / norm.item()) * 0.1
    torch.testing.assert_close(torch.cat(moments), want, rtol=1e-5, atol=0)


def test_leaves_frozen_parameters_alone_and_clears_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        model = module(dtype=dtype)
        before = values(model)
        optimizer = Optimizer(model, weight_decay=0.5)
        set_gradients(model, 0)
        update(optimizer, 0.1)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == name.startswith("frozen")
        assert all(p.grad is None for p in (*model.parameters(), *optimizer.masters))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="without trainable parameters; add a LoRA adapter"):
        Optimizer(module().requires_grad_(False))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    model = module(dtype=dtype)
    optimizer = Optimizer(model)
    set_gradients(model, 0)
    update(optimizer, 1e-2)
    before, state = values(model), copy.deepcopy(optimizer.state())
    set_gradients(model, 1)
    model["norm"].bias.grad[1] = bad
    with pytest.raises(FloatingPointError, match="norm is (inf|nan); the weights are as they were"):
        update(optimizer, 1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(t, state[name]) for name, t in optimizer.state().items())


# ----------------------------------------------------------------------------
# masters


def test_bf16_weights_move_by_steps_too_small_for_bf16():
    """Around 0.02 neighbouring bf16 numbers are 2^-13 = 1.2e-4 apart, and a step at learning rate 1e-6 is 1e-6:
    AdamW on the bf16 weights themselves rounds every one of 200 steps away, the masters add up to 2e-4."""
    torch.manual_seed(0)
    ours, plain = (nn.Linear(4, 4, bias=False).to(torch.bfloat16) for _ in range(2))
    for model in (ours, plain):
        model.weight.data.fill_(0.02)
    start = ours.weight.item() if ours.weight.numel() == 1 else ours.weight[0, 0].item()
    optimizer = Optimizer(ours)
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.0)
    for _ in range(200):
        for model in (ours, plain):
            model.weight.grad = torch.ones_like(model.weight)
        update(optimizer, 1e-6)
        adamw.step()
    assert (plain.weight == start).all()
    # a constant gradient makes every step exactly lr; 200 fp32 subtractions are off by 200 * 2^-30 at most
    master = optimizer.state()["weight.master"]
    torch.testing.assert_close(master, torch.full_like(master, start - 200e-6), rtol=0, atol=2e-7)
    assert torch.equal(ours.weight, master.bfloat16())  # the weight is its master, rounded once
    assert (ours.weight < start).all()


@given(seed=SEEDS, passes=st.integers(1, 5))
def test_gradients_of_several_passes_are_summed_in_fp32(seed, passes):
    """In bf16 the small ones of many micro-batches would vanish beside the first: 256 + 1 is 256 there."""
    model = module(dtype=torch.bfloat16)
    optimizer = Optimizer(model)
    want = None
    for n in range(passes):
        set_gradients(model, seed + n, 256.0 if n == 0 else 1.0)
        grads = [p.grad.float() for p in model.parameters() if p.requires_grad]
        want = grads if want is None else [a + b for a, b in zip(want, grads, strict=True)]
        optimizer.accumulate()
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(m.grad, w) for m, w in zip(optimizer.masters, want, strict=True))


def test_fp32_gradients_are_summed_by_autograd_alone():
    model = module()
    optimizer = Optimizer(model)
    set_gradients(model, 0)
    grads = {name: p.grad for name, p in model.named_parameters()}
    optimizer.accumulate()
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_a_parameter_without_a_gradient_stays():
    """A pass that does not reach a parameter is no error, in either dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        model = module(dtype=dtype)
        optimizer = Optimizer(model)
        before = values(model)
        set_gradients(model, 0)
        model["norm"].weight.grad = None
        update(optimizer, 0.1)
        assert torch.equal(model["norm"].weight, before["norm.weight"])
        assert not torch.equal(model["norm"].bias, before["norm.bias"])


# ----------------------------------------------------------------------------
# state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=SEEDS, steps=st.integers(1, 3))
def test_a_loaded_state_goes_on_bit_for_bit(dtype, seed, steps):
    model = module(seed, dtype)
    optimizer = Optimizer(model, weight_decay=0.1)
    for n in range(steps):
        set_gradients(model, seed + n)
        update(optimizer, 1e-2)
    saved = copy.deepcopy(optimizer.state())
    resumed = copy.deepcopy(model)
    other = Optimizer(resumed, weight_decay=0.1)
    other.load_state(saved)
    for name, t in other.state().items():
        assert torch.equal(t, saved[name]) and t.dtype == saved[name].dtype
    assert set(other.state()) == set(saved)
    for n in range(3):
        for m, o in ((model, optimizer), (resumed, other)):
            set_gradients(m, n)
            update(o, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(t, optimizer.state()[name]) for name, t in other.state().items())
    # what was loaded is a copy: the optimiser that saved it and the one that loaded it do not share memory
    assert not any(torch.equal(t, saved[name]) for name, t in other.state().items() if name.endswith("exp_avg"))


def test_state_is_flat_and_named_by_parameter():
    model = module(dtype=torch.bfloat16)
    optimizer = Optimizer(model)
    set_gradients(model, 0)
    update(optimizer, 1e-2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = ("step", "exp_avg", "exp_avg_sq", "master")
    assert set(optimizer.state()) == {f"{name}.{part}" for name in trained for part in parts}
    assert all(t.dtype == torch.float32 for t in optimizer.state().values())


# ----------------------------------------------------------------------------
# the schedule


SCHEDULES = st.sampled_from(["constant", "linear", "cosine"])


@given(
    schedule=SCHEDULES,
    peak=st.floats(1e-7, 1e-2),
    warmup=st.integers(0, 20),
    total=st.integers(1, 60),
)
def test_learning_rate_rises_then_never_rises_again(schedule, peak, warmup, total):
    rates = [learning_rate(s, peak=peak, warmup=warmup, total=total, schedule=schedule) for s in range(total)]
    assert all(0 < rate <= peak for rate in rates)  # the first update already does something, and so does the last
    rising, falling = rates[:warmup], rates[warmup:]
    for step, rate in enumerate(rising):
        assert rate == pytest.approx(peak * (step + 1) / (warmup + 1))
    if falling:
        assert falling[0] == peak
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    if schedule == "constant":
        assert all(rate == peak for rate in falling)
    elif len(falling) > 1:
        assert falling[1] < peak


def test_schedules_end_at_zero_and_meet_at_half_way():
    arguments = {"peak": 2.0, "warmup": 10, "total": 110}
    assert learning_rate(60, **arguments, schedule="linear") == pytest.approx(1.0)
    assert learning_rate(60, **arguments, schedule="cosine") == pytest.approx(1.0)
    assert learning_rate(35, **arguments, schedule="linear") == pytest.approx(1.5)
    assert learning_rate(35, **arguments, schedule="cosine") == pytest.approx(1 + math.cos(math.pi / 4))
    for schedule in ("linear", "cosine"):
        assert learning_rate(110, **arguments, schedule=schedule) == pytest.approx(0.0, abs=1e-12)
        assert learning_rate(10**6, **arguments, schedule=schedule) == pytest.approx(0.0, abs=1e-12)  # and stay there


@given(step=st.integers(0, 100), warmup=st.integers(0, 20), total=st.integers(1, 100), more=st.integers(0, 100))
def test_a_constant_schedule_does_not_know_where_the_run_ends(step, warmup, total, more):
    """So --steps may be raised on --resume, and N steps plus N more are 2N."""
    one, other = (
        learning_rate(step, peak=1e-3, warmup=warmup, total=t, schedule="constant") for t in (total, total + more)
    )
    assert one == other
