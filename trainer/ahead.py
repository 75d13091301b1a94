"""Groups on their way to the services, and those of the next step where a run samples one step ahead.

Ahead, the network never waits for rewards, and learns from pictures of the weights before its last update: one step off-policy, which the
ratio accounts for. A checkpoint carries the weights that they were drawn with, so that a resumed run draws the same.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer.learning import Learner
from trainer.scoring import Pending
from trainer.sharding import whole
from trainer.snapshots import Snapshot
from trainer.types import Rollout


@dataclass(frozen=True)
class Drawn:
    """A rank's rollouts of a step, and what is asked about each."""

    rollouts: Sequence[Rollout]
    futures: Sequence[Pending]


class Ahead:
    """What was drawn for the next step, if anything."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._drawn: Drawn | None = None
        self._weights: Snapshot | None = None

    def keep(self, drawn: Drawn) -> None:
        """Drawn just now."""
        with self.learner.sampling_weights():
            self._drawn, self._weights = drawn, Snapshot(self.learner.weights)

    def take(self, draw: Callable[[AbstractContextManager[None]], Drawn]) -> Drawn:
        """The step's groups: those that were kept, or drawn again with their weights after a resume, or with the present ones."""
        drawn, weights = self._drawn, self._weights
        self.clear()
        return drawn or draw(weights.worn() if weights is not None else self.learner.sampling_weights())

    def clear(self) -> None:
        self._drawn = self._weights = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights, by all ranks together."""
        return {k: whole(v) for k, v in self._weights.held.items()} if self._weights is not None else {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.clear()
        if tensors:
            self._weights = Snapshot(self.learner.weights)
            self._weights.load(tensors)
