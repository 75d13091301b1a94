"""A reward with a known cost and known faults, for services that tests start as processes: `use: tests.e2e.faulty:Faulty`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from services.reward import Item
from shared.schema import RewardInfo, Score

POISON, NAN = 13, 14


class Options(BaseModel):
    """A batch of n takes a n + b seconds; more than `room` pictures do not fit; `offset` stands for the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    a: float = 0.0
    b: float = 0.0
    room: int = 1 << 30
    offset: int = 1


class Faulty:
    """offset + mean / 1000: the integer part names the weights, the rest the picture."""

    def __init__(self, name: str, options: Options) -> None:
        self.options = options
        self.info = RewardInfo(name=name, description="a test's", weights_sha256=f"{options.offset:064d}")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name, Options.model_validate(options))

    def score(self, batch: Sequence[Item]) -> list[Score]:
        o = self.options
        if len(batch) > o.room:
            raise MemoryError
        time.sleep(o.a * len(batch) + o.b)
        greys = [float(item.image.mean()) for item in batch]
        if POISON in greys:
            raise ValueError("secret: poison")
        return [Score.ok(float("nan") if g == NAN else o.offset + g / 1000) for g in greys]
