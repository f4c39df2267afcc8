import pytest
import torch

from lessons.exercises import load

exercise = load("ex18")
PAPER = (3e-4, 4e-4)

# share of answers outside the paper's range, by sigma: at 64, 256, 1024 and 4096 tokens
TABLE = {0.06: (0.96, 0.92, 0.85, 0.71), 0.01: (0.78, 0.58, 0.27, 0.03), 0.003: (0.36, 0.07, 0.001, 0.0)}


@pytest.mark.parametrize("sigma", TABLE)
def test_the_table_of_lesson_18(sigma):
    got = [exercise.outside(sigma, length, *PAPER) for length in (64, 256, 1024, 4096)]
    assert got == pytest.approx(TABLE[sigma], abs=0.007)


def test_it_agrees_with_drawn_noise():
    """200,000 answers of 16 tokens; a share near 0.3 has a standard error of 0.001. The range is not symmetric."""
    noise = 0.02 * torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0)).mean(1)
    for low, high in ((0.004, 0.01), (0.01, 0.004)):
        drawn = ((noise.exp() < 1 - low) | (noise.exp() > 1 + high)).float().mean().item()
        assert exercise.outside(0.02, 16, low, high) == pytest.approx(drawn, abs=0.005)


@pytest.mark.parametrize("sigma, share", [(0.06, 0.5), (0.06, 0.01), (0.003, 0.05), (1e-5, 0.01)])
def test_the_length_is_the_smallest(sigma, share):
    length = exercise.length_needed(sigma, *PAPER, share)
    assert exercise.outside(sigma, length, *PAPER) <= share
    assert length == 1 or exercise.outside(sigma, length - 1, *PAPER) > share
