import torch
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import ex13, load

exercise = load("ex13")

H, D = 2, 4
groups = given(
    prompt=st.sampled_from([1, 2, 7, 16]),
    answers=st.lists(st.sampled_from([1, 2, 5]), max_size=4),  # none is legal: a prompt by itself
    size=st.sampled_from([0.1, 1.0, 30.0]),  # 30: scores of thousands, whose exp is inf
    seed=st.integers(0, 2**31 - 1),
)


def a_row(lengths: list[int], size: float, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)  # float64: no tolerance hides a wrong formula
    row = [torch.randn(sum(lengths), H, D, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [x.mul_(size if i < 2 else 1.0).requires_grad_() for i, x in enumerate(row)]


def repeated(q, k, v, lengths: list[int]) -> torch.Tensor:
    """The oracle: the prompt stands before every answer again, and one causal mask does it."""
    P, ends, out = lengths[0], torch.tensor(lengths).cumsum(0).tolist(), []
    for i, n in enumerate(lengths):
        rows = torch.arange(ends[i] - n, ends[i])  # (n,)
        rows = rows if i == 0 else torch.cat([torch.arange(P), rows])
        x, y, z = (t[rows].transpose(0, 1) for t in (q, k, v))  # (H, T, D)
        out.append(torch.nn.functional.scaled_dot_product_attention(x, y, z, is_causal=True, scale=1.0)[:, -n:])
    return torch.cat(out, dim=1).transpose(0, 1)


@groups
def test_values_and_gradients_are_those_of_the_repeated_prompt(prompt, answers, size, seed):
    """Exact: sharing is another order of the same sums. The prompt's gradients are sums over all answers."""
    lengths = [prompt, *answers]
    row = a_row(lengths, size, seed)
    want, got = repeated(*row, lengths), exercise.group_attention(*row, lengths)
    # scores up to 1e4 carry errors of 1e4 * 1e-16 = 1e-12, and exp makes them relative ones
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad(got, row, upstream)
    for x, y in zip(gradients, torch.autograd.grad(want, row, upstream), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * max(1.0, size))


@groups
def test_an_answer_does_not_see_its_neighbours(prompt, answers, size, seed):
    lengths = [prompt, *answers, 3]
    q, k, v = (x.detach() for x in a_row(lengths, size, seed))
    before = exercise.group_attention(q, k, v, lengths)
    k[-3:], v[-3:] = 5.0, -5.0  # the last answer's
    torch.testing.assert_close(exercise.group_attention(q, k, v, lengths)[:-3], before[:-3])


def test_the_prompt_is_taken_once(monkeypatch):
    """Segments of 16, 5, 5 and 2 need 16² + 5² + 5² + 2² own scores and 12 x 16 to the prompt."""
    scores, lengths = [], [16, 5, 5, 2]

    def counted(q, k, v, *, causal):
        scores.append(len(q) * len(k))
        return ex13.piece(q, k, v, causal=causal)

    monkeypatch.setattr(exercise, "piece", counted)
    exercise.group_attention(*a_row(lengths, 1.0, 0), lengths)
    assert sum(scores) == 256 + 25 + 25 + 4 + 192
