"""How the steps that are not trained are walked: deterministic, along any table of sigmas, one instance for each unbroken stretch.

Both are exact solutions of the flow with a guess of the clean picture x0 = x - s v held fixed over a step from s to n,

    x' = (n / s) x + (1 - n / s) x0

`euler` takes the guess at s, which is the Euler step x + (n - s) v; `dpm2m` (DPM-Solver++(2M), 2211.01095) the guess at the middle of the
step in lambda = log((1 - s) / s), from this guess and the one before: second order for the same number of passes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.policies import flow


class Euler:
    """First order."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def step(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        """x at sigmas[i + 1], float32 like x (B, ...)."""
        return flow.step(x, v, self.sigmas, torch.full((len(x),), i, device=x.device), 0.0, "ode").prev


class DPM2M:
    """Second order, multistep; the first step has no past and the last (to sigma 0) no middle, so both are first order."""

    def __init__(self, sigmas: Tensor) -> None:
        self.table = sigmas.double().tolist()
        self.before: tuple[Tensor, float] | None = None

    def step(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        """x at sigmas[i + 1], float32 like x (B, ...); to be called for i = 0, 1, 2, ..."""
        s, n = self.table[i], self.table[i + 1]
        x = x.float()
        aim = guess = x - s * v.float()
        if self.before is not None and n > 0:
            earlier, was = self.before
            share = (_log_ratio(n) - _log_ratio(s)) / (2 * (_log_ratio(s) - _log_ratio(was)))
            aim = guess + share * (guess - earlier)
        self.before = guess, s
        return (n / s) * x + (1 - n / s) * aim


def _log_ratio(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def spaced(sigmas: Tensor, first: int, count: int | None) -> tuple[Tensor, Sequence[float]]:
    """The table from step `first` on in `count` steps, along the same curve (straight between its points), and each step's place on it.

    Null, or as many as there are: the table's own end.
    """
    left = len(sigmas) - 1 - first
    if count is None or count >= left:
        return sigmas[first:], range(first, first + left)
    places = [first + left * k / count for k in range(count)]
    low = torch.tensor([int(place) for place in places], device=sigmas.device)
    part = torch.tensor([place - int(place) for place in places], device=sigmas.device, dtype=sigmas.dtype)
    points = sigmas[low] + part * (sigmas[low + 1] - sigmas[low])
    return torch.cat([points, sigmas[-1:]]), places
