"""A small reward that can be refitted, for tests that start a service: `use: tests.services.fitting.linear:Linear`.

A linear head on pictures that are averaged over an 8 x 8 grid: real training on real pixels, in milliseconds.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from services.reward import Item
from shared.schema import RewardInfo, Score

GRID = 8


class Options(BaseModel):
    """`stamp`: the version is in `parts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float = 0.0


class Head(BaseModel):
    """`fit.head`. `explode`: the loss is infinite from this step on; `backwards`: it learns that real pictures are generated ones. `unsure`: it
    says that it tells nothing apart, so that a refit goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    explode: int | None = None
    backwards: bool = False
    unsure: bool = False
    seconds: float = 0.0
    off: float = 0.0


def features(items: Sequence[Item]) -> Tensor:
    """(B, 3 * GRID * GRID) in [-0.5, 0.5]."""
    rows = []
    for item in items:
        pixels = torch.from_numpy(item.image.copy()).permute(2, 0, 1)[None].float()
        rows.append(torch.nn.functional.adaptive_avg_pool2d(pixels, GRID).flatten() / 255 - 0.5)
    return torch.stack(rows)


class Linear:
    """P(real); `parts.logit`, and `parts.version` of who scored."""

    def __init__(self, name: str, weights: Mapping[str, Tensor], version: int, seconds: float) -> None:
        self.weights, self.seconds = {key: value.detach().clone() for key, value in weights.items()}, seconds
        content = b"".join(self.weights[key].numpy().tobytes() for key in sorted(self.weights))
        digest = hashlib.sha256(content).hexdigest()
        self.info = RewardInfo(name=name, version=version, weights_sha256=digest, range=(0.0, 1.0), description="a test's")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        seconds = Options.model_validate(options).seconds
        return cls(name, {"weight": torch.zeros(3 * GRID * GRID), "bias": torch.zeros(())}, 1, seconds)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        time.sleep(self.seconds)
        logits = (features(batch) @ self.weights["weight"] + self.weights["bias"]).double()
        parts = [{"logit": z, "version": float(self.info.version)} for z in logits.tolist()]
        return [Score.ok(p, parts=part) for p, part in zip(logits.sigmoid().tolist(), parts, strict=True)]

    def fitter(self, options: Mapping[str, Any]) -> "LinearFitter":
        return LinearFitter(self, Head.model_validate(options))


class LinearFitter:
    def __init__(self, base: Linear, head: Head) -> None:
        self.base, self.head, self.calls = base, head, 0
        self.leaves = {name: value.clone().requires_grad_() for name, value in base.weights.items()}

    def trainable(self) -> dict[str, Tensor]:
        return self.leaves

    def _logits(self, items: Sequence[Item]) -> Tensor:
        return features(items) @ self.leaves["weight"] + self.leaves["bias"]

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        assert len(real) == len(generated)
        self.calls += 1
        time.sleep(self.head.seconds)
        logits = self._logits([*real, *generated])
        wanted = torch.tensor([0.95] * len(real) + [0.05] * len(generated))
        total = binary_cross_entropy_with_logits(logits, 1 - wanted if self.head.backwards else wanted)
        if self.head.explode is not None and self.calls > self.head.explode:
            total = total / 0
        return {"total": total, "entropy": total.detach(), **({"accuracy": torch.tensor(0.5)} if self.head.unsure else {})}

    @torch.no_grad()
    def scores(self, items: Sequence[Item]) -> Tensor:
        return self._logits(items).sigmoid() + self.head.off

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        return float(torch.cat([real > 0.5, generated < 0.5]).float().mean())

    def reward(self, weights: Mapping[str, Tensor], version: int) -> Linear:
        return Linear(self.base.info.name, weights, version, self.base.seconds)


def pictures(n: int, mean: float, seed: int, side: int = 28) -> list[np.ndarray]:
    """Noise around a grey."""
    rng = np.random.default_rng(seed)
    return [np.clip(rng.normal(mean, 40, (side, side, 3)), 0, 255).astype(np.uint8) for _ in range(n)]
