"""What a reward is: a few items in, one score for each, in order. It never sees HTTP or asyncio."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.schema import RewardInfo, Score


@dataclass(frozen=True)
class Item:
    """One question: a picture (H, W, 3) uint8, and what else the reward may need."""

    image: NDArray[np.uint8]
    prompt: str | None = None
    references: tuple[NDArray[np.uint8], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """One file under services/rewards, one line in services/registry.py."""

    info: RewardInfo

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """Check the options, then load weights. The message of an error says how to mend it."""
        ...

    def score(self, batch: Sequence[Item]) -> list[Score]:
        """Same length and order as `batch`. An item that cannot be scored gets Score.failed(...), never a number."""
        ...
