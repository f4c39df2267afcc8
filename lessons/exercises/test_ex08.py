import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lessons.exercises import load

join = load("ex08").join


def found_by_tiles(z: torch.Tensor, y: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    others = z.scatter(1, y[:, None], -math.inf)  # (N, V)
    tiles = [tile for tile in others.split(width, 1)]
    m = torch.stack([tile.amax(1) for tile in tiles], 1)  # (N, tiles)
    s = torch.stack([(tile - tile.amax(1, keepdim=True)).exp().nansum(1) for tile in tiles], 1)  # (N, tiles)
    return m, s


@given(
    seed=st.integers(0, 2**31 - 1),
    N=st.sampled_from([1, 5]),
    V=st.sampled_from([1, 2, 7, 40]),
    width=st.sampled_from([1, 4, 64]),
    scale=st.sampled_from([0.0, 3.0, 300.0]),
)
def test_it_is_the_log_softmax_of_the_whole_row(seed, N, V, width, scale):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(N, V, generator=g) * scale, torch.randint(0, V, (N,), generator=g)
    got = join(z.gather(1, y[:, None]).squeeze(1), *found_by_tiles(z, y, width))
    want = torch.log_softmax(z.double(), 1).gather(1, y[:, None]).squeeze(1)
    # logits of up to 1200 in fp32, and a handful of roundings
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * 2**-23 * (1 + 4 * scale))


def test_the_order_of_the_tiles_does_not_matter():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(3, 40, generator=g) * 30, torch.tensor([0, 13, 39])
    m, s = found_by_tiles(z, y, 4)
    z_y = z.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(join(z_y, m, s), join(z_y, m.flip(1), s.flip(1)), rtol=1e-6, atol=1e-6)


def test_confident_targets_are_not_rounded_to_certain():
    logp = join(torch.tensor([18.0, 60.0]), torch.zeros(2, 1), torch.ones(2, 1))
    want = torch.tensor([-math.log1p(math.exp(-18)), -math.exp(-60)], dtype=torch.float64)  # -1.5e-8, -8.8e-27
    torch.testing.assert_close(logp.double(), want, rtol=1e-5, atol=0)


def test_empty_tiles_and_rows_without_others():
    inf = math.inf
    m, s = torch.tensor([[-inf, 1.0], [-inf, -inf]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    logp = join(torch.tensor([1.0, 5.0]), m, s)
    torch.testing.assert_close(logp, torch.tensor([-math.log(2), 0.0]))
