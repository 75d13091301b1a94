"""Rewards that say when they worked, by the clock that all processes share: `parts.began` and `parts.ended`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from services.reward import Item
from services.rewards.forensic_chat import ForensicChat
from shared.schema import RewardInfo, Score


def timed(score: Score, began: float) -> Score:
    return score.model_copy(update={"parts": {**score.parts, "began": began, "ended": time.monotonic()}})


class Sleeper:
    """A device that takes `seconds` for a batch and no core."""

    def __init__(self, name: str, seconds: float) -> None:
        self.seconds, self.info = seconds, RewardInfo(name=name, description="a test's")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name, float(options["seconds"]))

    def score(self, batch: Sequence[Item]) -> list[Score]:
        began = time.monotonic()
        time.sleep(self.seconds)
        return [timed(Score.ok(0.5), began) for _ in batch]


class Judge(ForensicChat):
    """Forensic-Chat, in this process."""

    def score(self, batch: Sequence[Item]) -> list[Score]:
        began = time.monotonic()
        return [timed(score, began) for score in super().score(batch)]
