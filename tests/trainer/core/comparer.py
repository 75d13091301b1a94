"""Rewards for a real service: one that compares by brightness and leans to what is shown first, one that is unsure of dark pictures.

Under the name `dark` the latter says that lower is better.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from services.reward import Item, Pair
from shared.schema import RewardInfo, Score

LEAN = 0.1


class Brighter:
    """P(shown first wins) = 1/2 + (its grey - the other's) / 512 + LEAN; grey 14 cannot be judged."""

    def __init__(self, name: str) -> None:
        self.info = RewardInfo(name=name, mode="pairwise", needs=["references"], version=3)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return [Score.failed("references-missing", "compares with references") for _ in batch]

    def compare(self, pairs: Sequence[Pair]) -> list[Score]:
        greys = [(float(pair.image.mean()), float(pair.references[0].mean())) for pair in pairs]
        return [
            Score.failed("answer-unparsable", "no verdict", status="parse_error")
            if 14.0 in both
            else Score.ok(0.5 + (both[0] - both[1]) / 512 + LEAN)
            for both in greys
        ]


class Bright:
    """Grey / 255, with a deviation of 1 - grey / 255 as `sigma` and as part `spread`; grey 14 has none."""

    def __init__(self, name: str) -> None:
        self.info = RewardInfo(name=name, range=(0, 1), higher_is_better=name != "dark")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        out = []
        for item in batch:
            value = float(item.image.mean()) / 255
            unsure = None if item.image.mean() == 14 else 1 - value
            out.append(Score.ok(value, parts={} if unsure is None else {"spread": unsure}, sigma=unsure))
        return out
