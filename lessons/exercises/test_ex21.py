import pytest
import torch

from lessons.exercises import load

look_inside = load("ex21").look_inside


def unknown(level, average, low, high):
    """The four losses, written for clarity: a loop over answers."""

    def loss(logp, old_logp, advantages, lengths):
        log_ratios = (logp - old_logp).split(lengths.tolist())
        parts = []
        for log_ratio, A in zip(log_ratios, advantages, strict=True):
            ratio = (log_ratio if level == "token" else log_ratio.mean().expand_as(log_ratio)).exp()
            parts.append(-torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A))
        return torch.cat(parts).mean() if average == "tokens" else torch.stack([p.mean() for p in parts]).mean()

    return loss


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.27), (3e-4, 4e-4), (0.0, 0.0)])
@pytest.mark.parametrize("average", ["tokens", "answers"])
@pytest.mark.parametrize("level", ["token", "answer"])
def test_it_is_found_out(level, average, low, high):
    assert look_inside(unknown(level, average, low, high)) == (level, average)


@pytest.mark.parametrize("average", ["tokens", "answers"])
@pytest.mark.parametrize("level", ["token", "answer"])
def test_a_loss_in_float32_rounds_and_is_still_known(level, average):
    exact = unknown(level, average, 3e-4, 4e-4)

    def rounded(logp, old, A, lengths):
        return exact(logp.float(), old.float(), A.float(), lengths)

    assert look_inside(rounded) == (level, average)
