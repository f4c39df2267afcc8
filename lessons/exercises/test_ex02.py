import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.rope import rotate
from lessons.exercises import load
from nanogspo.layouts import attend

ex02 = load("ex02")

HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 3), (5, 1)])
SIZES = {"T": st.integers(1, 9), "heads": HEADS, "D": st.sampled_from([2, 4, 6]), "seed": st.integers(0, 2**31 - 1)}


def qkvf(T, heads, D, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, heads[0], D), (T, heads[1], D), (T, heads[1], D)
    row = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for shape in shapes]
    return *row, torch.rand(D // 2, generator=generator, dtype=torch.float64)  # pairs at unlike speeds


@given(window=st.integers(0, 11), softcap=st.sampled_from([0.0, 0.5, 50.0]), **SIZES)
def test_is_what_the_model_does(window, softcap, T, heads, D, seed):
    q, k, v, f = qkvf(T, heads, D, seed)
    age = torch.arange(T)[:, None] - torch.arange(T)  # (T, S) how far back a key lies
    allowed = (age >= 0) & (age < (window or T))
    angle = (torch.arange(T)[:, None] * f).repeat(1, 2)[None, :, None]  # (1, T, 1, D)
    turned_q, turned_k = (rotate(x[None], angle.cos(), angle.sin()) for x in (q, k))
    want = attend(turned_q, turned_k, v[None], allowed[None, None], scale=0.4, softcap=softcap)[0]
    got = ex02.attention(q, k, v, f, scale=0.4, window=window, softcap=softcap)
    # with a cap the model's softmax is fp32 by design; its weights sum to 1, so the error is some eps of fp32 times v
    atol = 8 * torch.finfo(torch.float32).eps * v.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@given(**SIZES)
def test_a_window_of_one_reads_its_own_value(T, heads, D, seed):
    q, k, v, f = qkvf(T, heads, D, seed)
    got = ex02.attention(q, k, v, f, scale=1.0, window=1)
    torch.testing.assert_close(got, v.repeat_interleave(heads[0] // heads[1], dim=1))


@given(window=st.integers(0, 4), **SIZES)
def test_the_future_changes_nothing(window, T, heads, D, seed):
    q, k, v, f = qkvf(T + 1, heads, D, seed)
    whole = ex02.attention(q, k, v, f, scale=0.4, window=window)[:T]
    torch.testing.assert_close(whole, ex02.attention(q[:T], k[:T], v[:T], f, scale=0.4, window=window))
