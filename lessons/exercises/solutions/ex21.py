"""Solution of exercise 21."""

from collections.abc import Callable

import torch


def look_inside(loss: Callable) -> tuple[str, str]:
    lengths, old = torch.tensor([2, 6]), -torch.ones(8, dtype=torch.float64)
    # on-policy, only the first answer has an advantage: minus 1/2 of it over answers, minus 2/8 over tokens
    average = abs(float(loss(old, old, torch.tensor([1.0, 0.0], dtype=torch.float64), lengths)))
    # the first answer's ratios become e and 1/e, its mean log-ratio stays 0; with A < 0 no clip takes the token at e
    new, bad = old.clone(), torch.tensor([-1.0, 0.0], dtype=torch.float64)
    new[0] += 1
    new[1] -= 1
    moved = abs(float(loss(new, old, bad, lengths)) - float(loss(old, old, bad, lengths))) > 1e-9
    return "token" if moved else "answer", "answers" if average > 0.375 else "tokens"
