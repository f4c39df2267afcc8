import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.seq_logprob import sequence_sums
from lessons.exercises import load
from nanogspo.objectives import gspo_loss

gspo_token_loss = load("ex12").gspo_token_loss

CLIP = {"clip_low": 3e-4, "clip_high": 4e-4}
answers = given(
    lengths=st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=5),
    drift=st.sampled_from([0.0, 1e-4, 1e-3, 0.3]),  # inside the clip range, around it, far outside
    seed=st.integers(0, 2**31 - 1),
)


def a_batch(lengths: list[int], drift: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    S = sum(lengths)
    old = -3 * torch.rand(S, generator=generator, dtype=torch.float64)  # float64: no tolerance hides a wrong formula
    logp = (old + drift * torch.randn(S, generator=generator, dtype=torch.float64)).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    A = torch.randn(len(lengths), generator=generator, dtype=torch.float64)  # (N,)
    return logp, old, cu_seqlens, A


@answers
def test_with_one_advantage_an_answer_it_is_gspo(lengths, drift, seed):
    logp, old, cu_seqlens, A = a_batch(lengths, drift, seed)
    n = cu_seqlens.diff()
    want, _ = gspo_loss(sequence_sums(logp, cu_seqlens), sequence_sums(old, cu_seqlens), n, A, **CLIP)
    [want_gradient] = torch.autograd.grad(want, logp)
    got = gspo_token_loss(logp, old, cu_seqlens, A.repeat_interleave(n), **CLIP)
    [gradient] = torch.autograd.grad(got, logp)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, want_gradient)


@answers
def test_every_token_has_its_own_advantage(lengths, drift, seed):
    logp, old, cu_seqlens, _ = a_batch(lengths, drift, seed)
    n, A = cu_seqlens.diff(), torch.cos(torch.arange(sum(lengths), dtype=torch.float64))  # (N,), (S,) of both signs
    gspo_token_loss(logp, old, cu_seqlens, A, **CLIP).backward()
    s = (sequence_sums((logp - old).detach(), cu_seqlens) / n).exp().repeat_interleave(n)  # (S,)
    clipped = ((s > 1 + 4e-4) & (A > 0)) | ((s < 1 - 3e-4) & (A < 0))
    want = -s * A / (n.repeat_interleave(n) * len(n))
    torch.testing.assert_close(logp.grad, want.masked_fill(clipped, 0.0))


def test_the_first_update_prints_zero_and_still_learns():
    logp, old, cu_seqlens, _ = a_batch([3, 3], drift=0.0, seed=0)
    loss = gspo_token_loss(logp, old, cu_seqlens, torch.tensor([1.0, 1, 1, -1, -1, -1]).double(), **CLIP)
    loss.backward()
    assert loss.item() == 0.0 and logp.grad.abs().min() > 0
