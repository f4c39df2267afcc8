import pytest
import torch

from lessons.exercises import load

ring = load("ex20").ring


class Wires:
    """Process r's only wire leads to process r + 1."""

    def __init__(self, world):
        self.world, self.boxes, self.sent = world, {}, [0] * world

    def __call__(self, r, chunk):
        assert (r + 1) % self.world not in self.boxes, "one chunk a round"
        self.boxes[(r + 1) % self.world] = chunk.clone()
        self.sent[r] += 1

    def received(self, r):
        return self.boxes.pop(r)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_everybody_has_the_sum(world):
    draw = torch.Generator().manual_seed(world)
    vectors = [[torch.randn(4, generator=draw, dtype=torch.float64) for _ in range(world)] for _ in range(world)]
    want = [sum(vectors[r][c] for r in range(world)) for c in range(world)]
    wires = Wires(world)
    ring(vectors, wires)
    for mine in vectors:
        assert all(torch.allclose(a, b) for a, b in zip(mine, want, strict=True))
    assert wires.sent == [2 * (world - 1)] * world
