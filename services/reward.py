"""What a reward is: a few items in, one score for each, in order. It never sees HTTP or asyncio."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.errors import WrongVersion
from shared.schema import RewardInfo, Score


@dataclass(frozen=True)
class Item:
    """One question: a picture (H, W, 3) uint8, and what else the reward may need."""

    image: NDArray[np.uint8]
    prompt: str | None = None
    references: tuple[NDArray[np.uint8], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair(Item):
    """`image` is shown first, `references[0]` second, in this order only; `meta` is empty."""

    @property
    def swapped(self) -> "Pair":
        """The same two, the other one first."""
        return Pair(self.references[0], self.prompt, (self.image,))


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


@runtime_checkable
class Comparer(Reward, Protocol):
    """A reward that `POST /v1/compare` can ask; its info.mode is `pairwise`."""

    def compare(self, pairs: Sequence[Pair]) -> list[Score]:
        """Same length and order: P(the picture that is shown first wins) in [0, 1], a tie 0.5, or Score.failed(...)."""
        ...


def require_version(wanted: int | None, info: RewardInfo) -> None:
    """WrongVersion when a caller wants other weights than these."""
    if wanted is not None and wanted != info.version:
        raise WrongVersion(f"{info.name} is at version {info.version}, not {wanted}", observed=info.version, limit=wanted)
