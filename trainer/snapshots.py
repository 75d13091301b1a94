"""Other weights beside the trained ones: the old policy that pictures are drawn from, and the reference that a KL holds to."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.sharding import like, wearing


class Snapshot:
    """A copy of named parameters that the model can wear; `take` the present ones, or `mix` them in."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.held = {k: p.detach().clone() for k, p in parameters.items()}

    @contextlib.contextmanager
    def worn(self) -> Iterator[None]:
        """Inside, the model has these weights; what it learned meanwhile would be lost."""
        with wearing(self.parameters, self.held):
            yield

    @torch.no_grad()
    def mix(self, decay: float) -> None:
        """held <- decay held + (1 - decay) present."""
        for k, p in self.parameters.items():
            self.held[k].lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `held` was; KeyError for other names."""
        for k in self.parameters:
            self.held[k].copy_(like(tensors[k], self.held[k]))


def old_decay(kind: int, updates: int) -> float:
    """How much of the old policy stays after a step, `updates` optimiser steps into the run (DiffusionNFT, 2509.16117).

    Type 1 rises slowly to a half; type 2 follows the policy for 75 updates, then rises to 0.999.
    """
    if kind == 1:
        return min(0.001 * updates, 0.5)
    return min(max(0.0, 0.0075 * (updates - 75)), 0.999)
