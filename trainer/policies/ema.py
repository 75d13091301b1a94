"""An exponential moving average of the trained weights, as Flow-GRPO keeps it.

decay_t = min((1 + t) / (10 + t), decay) at optimiser step t, applied every `every` steps. Evaluations look through it.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

from trainer.sharding import wearing


class EMA:
    """The average of named parameters; `update(t)` after optimiser step t = 0, 1, ..."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float = 0.9, every: int = 8) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise ValueError("ema.decay lies in [0, 1) and ema.every is at least 1")
        self.parameters, self.decay, self.every = parameters, decay, every
        self.average = {k: p.detach().clone() for k, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        if (step + 1) % self.every == 0:
            decay = min((1 + step) / (10 + step), self.decay)
            for k, average in self.average.items():
                average.lerp_(self.parameters[k].detach(), 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model holds the average."""
        with wearing(self.parameters, self.average):
            yield
