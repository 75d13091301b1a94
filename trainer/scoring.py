"""Pictures out, rewards back: the only file here, with adversary.py, that knows services exist.

A group's request is in flight while the next group is sampled. What could not be scored stays NaN and masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.client import RewardClientSync, ScoreTable
from shared.schema import RewardInfo
from trainer.config import RewardConfig
from trainer.types import Rollout


@dataclass(frozen=True)
class Rewards:
    """values_RB float64 (NaN where missing; lower-is-better rewards already negated), mask_RB, failures by urn."""

    names: tuple[str, ...]
    values_RB: Tensor
    mask_RB: Tensor
    failures: Mapping[str, int]
    versions: Mapping[str, int]


class Scorer:
    """`submit` a rollout, `collect` its rewards."""

    def __init__(self, rewards: Mapping[str, RewardConfig], timeout_s: float) -> None:
        self.rewards = dict(rewards)
        self.client = RewardClientSync({name: r.url for name, r in rewards.items()}, timeout_s=timeout_s)
        self.info: dict[str, RewardInfo] = {}

    def check(self) -> dict[str, RewardInfo]:
        """Ask every service what it is; ServiceUnreachable or RequestFailed says which URL and what to do."""
        self.info = self.client.info()
        return self.info

    def submit(self, rollout: Rollout) -> Any:
        return self.client.submit(
            list(rollout.images_BHWC),
            [p.text for p in rollout.prompts],
            [str(rollout.group)] * len(rollout.prompts),
        )

    def collect(self, future: Any) -> Rewards:
        """Wait for the answer of `submit`."""
        table: ScoreTable = future.result()
        rows = []
        for name, values in zip(table.rewards, table.values_RB, strict=True):
            part = self.rewards[name].part
            row = values if part is None else table.part(name, part)
            rows.append(row if self.info[name].higher_is_better else -row)
        values_RB = np.stack(rows)
        return Rewards(
            table.rewards,
            torch.from_numpy(values_RB),
            torch.from_numpy(np.isfinite(values_RB)),
            table.failures,
            table.versions,
        )

    def close(self) -> None:
        self.client.close()
