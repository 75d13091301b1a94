"""What a reward offers to be refitted, and what the room does with it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from services.reward import Item, Reward


class Fitter(Protocol):
    """The trainable weights of one reward, a copy beside the live model; frozen parts are shared with it. Used by one thread at a time."""

    def trainable(self) -> dict[str, Tensor]:
        """Name to leaf tensor with requires_grad, float32: what an optimiser steps, an average follows and a version holds."""
        ...

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        """`total` with its gradient, and its parts for the log. Pictures pass the path that scoring passes, after augmentation.

        As many of one side as of the other, and at one place a pair: of one group, else of one prompt where there is one. A part named
        `accuracy`, of these pictures before the step, saves scoring them once more to know when to stop.
        """
        ...

    def scores(self, items: Sequence[Item]) -> Tensor:
        """(B,) float32, no gradient: the value (or the part) that /score gives, from the weights as they are now."""
        ...

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        """In [0, 1], of `scores` of both sides: as many of one as of the other, at one place a pair."""
        ...

    def reward(self, weights: Mapping[str, Tensor], version: int) -> Reward:
        """A reward that serves these `trainable()` values under this version, sharing what is frozen; info.weights_sha256 is of all weights."""
        ...


@runtime_checkable
class Fittable(Protocol):
    """A reward that can be refitted."""

    def fitter(self, options: Mapping[str, Any]) -> Fitter:
        """From `fit.head` options (loss, soft targets, LoRA, ...), checked here. ValueError says what cannot be."""
        ...
