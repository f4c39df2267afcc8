import torch

from lessons.exercises import load

mixture = load("ex16").mixture


class Counted(list):
    """A list of matrices that counts how often each is taken."""

    def __init__(self, matrices):
        super().__init__(matrices)
        self.taken = [0] * len(self)

    def __getitem__(self, e):
        self.taken[e] += 1
        return super().__getitem__(e)


def draw(T, k, E, of):
    g = torch.Generator().manual_seed(T)
    x, matrices = torch.randn(T, 4, generator=g), list(torch.randn(E, 3, 4, generator=g))
    index = torch.rand(T, of, generator=g).argsort(1)[:, :k]
    return x, matrices, index, torch.rand(T, k, generator=g)


def test_it_is_the_sum_over_a_token_s_experts():
    for T, k, E, of in ((1, 1, 1, 1), (7, 2, 4, 4), (20, 3, 6, 5)):
        x, matrices, index, w = draw(T, k, E, of)
        want = torch.stack([sum(w[t, j] * (matrices[index[t, j]] @ x[t]) for j in range(k)) for t in range(T)])
        out, _ = mixture(x, matrices, index, w)
        assert out.shape == want.shape and (out - want).abs().max() < 1e-5


def test_each_expert_with_rows_is_read_once_and_no_other():
    x, matrices, index, w = draw(20, 2, 6, 4)
    experts = Counted(matrices)
    _, load = mixture(x, experts, index, w)
    assert load == [(index == e).sum() for e in range(6)] and load[4:] == [0, 0]
    assert experts.taken == [int(n > 0) for n in load]


def test_gradients_reach_rows_and_weights():
    x, matrices, index, w = draw(5, 2, 3, 3)
    x.requires_grad_(), w.requires_grad_()
    out, _ = mixture(x, matrices, index, w)
    out.sum().backward()
    want = torch.stack([torch.stack([(matrices[e] @ x[t]).sum() for e in index[t].tolist()]) for t in range(5)])
    assert (w.grad - want).abs().max() < 1e-5 and x.grad.abs().min() > 0
