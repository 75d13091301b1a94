"""The models that every contestant serves: pictures in, one number each, at most CAP in one forward pass.

`sleep` waits 8 + 1.5 n ms, so that only the serving is measured; `fast` waits 2 + 0.1 n ms, as a device does that is quicker than pictures
come; `slow` waits 500 ms; `detector` is world/detector. As a program, it is the yardstick: plain batches without any server. Each line
`side seconds` is answered by pictures per second in batches of CAP.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from services.reward import Item
from shared.schema import RewardInfo, Score

CAP = 32
MS = {"sleep": (8.0, 1.5), "fast": (2.0, 0.1), "slow": (500.0, 0.0)}
Forward = Callable[[Sequence[NDArray[np.uint8]]], list[float]]


class SleepOptions(BaseModel):
    """A batch of n takes base_ms + n per_image_ms."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    base_ms: float
    per_image_ms: float


class Sleep:
    """Waits as a device would, without the GIL, then says the grey of the last pixel in [0, 1], which tells pictures apart."""

    def __init__(self, name: str, options: SleepOptions) -> None:
        self.options = options
        self.info = RewardInfo(name=name, range=(0.0, 1.0), description="a sleep, for benchmarks")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del device
        return cls(name, SleepOptions.model_validate(options))

    def score(self, batch: Sequence[Item]) -> list[Score]:
        time.sleep((self.options.base_ms + self.options.per_image_ms * len(batch)) / 1000)
        return [Score.ok(float(item.image[-1, -1].mean()) / 255) for item in batch]


def options(model: str) -> dict[str, Any]:
    """One reward of a Verism configuration."""
    if model == "detector":
        return {"use": "detector", "folder": "world/detector", "batch_cap": CAP}
    base, per_image = MS[model]
    return {"use": "bench.models:Sleep", "base_ms": base, "per_image_ms": per_image, "batch_cap": CAP}


def load(model: str) -> Forward:
    """The same reward as a plain function, for servers that know nothing of rewards; longer lists go in chunks of CAP."""
    reward: Any
    if model == "detector":
        from services.rewards.detector import Detector

        reward = Detector.load(model, {"folder": "world/detector"}, "cpu")
    else:
        base, per_image = MS[model]
        reward = Sleep(model, SleepOptions(base_ms=base, per_image_ms=per_image))

    def forward(images: Sequence[NDArray[np.uint8]]) -> list[float]:
        items = [Item(image) for image in images]
        return [float(s.value) for start in range(0, len(items), CAP) for s in reward.score(items[start : start + CAP])]

    return forward


def pictures(side: int, count: int) -> list[NDArray[np.uint8]]:
    """Photographs of this repository as uint8 (side, side, 3), enlarged, with the grain that a camera adds (sigma 3)."""
    from PIL import Image

    from world import photographs

    rng = np.random.default_rng(side)
    large = (
        np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) for p in photographs.load("test")[0][:count]
    )
    return [(p + rng.normal(0, 3, p.shape)).clip(0, 255).astype(np.uint8) for p in large]


def main(model: str) -> None:
    forward = load(model)
    pools: dict[int, list[NDArray[np.uint8]]] = {}
    for line in sys.stdin:
        side, seconds = int(line.split()[0]), float(line.split()[1])
        images = pools[side] = pools.get(side) or pictures(side, CAP)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            done += len(forward(images))
        print(done / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
