"""Pictures out, rewards back: the only file here, with adversary.py, that knows services exist.

A group's request is in flight while the next group is sampled. What could not be scored stays NaN and masked, never guessed.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.client import RequestFailed, RewardClientSync, ScoreTable
from shared.errors import ServiceUnreachable
from shared.schema import RewardInfo
from trainer.config import RewardConfig


class NoService(RuntimeError):
    """A reward's service cannot be used; the message holds the URL and the command that starts one."""


@dataclass(frozen=True)
class Rewards:
    """values_RB float64 as the services gave them (NaN where missing), mask_RB, versions, failures by urn."""

    values_RB: Tensor
    mask_RB: Tensor
    versions: Mapping[str, int]
    failures: Mapping[str, int]


class Scorer:
    """`submit` groups, `collect` them. `signs_R` is -1 where lower is better, `weights_R` is the recipe's."""

    def __init__(self, rewards: Mapping[str, RewardConfig], timeout_s: float) -> None:
        urls = {name: r.url for name, r in rewards.items()}
        self.names, self._parts = tuple(rewards), {name: r.part for name, r in rewards.items()}
        self.infos = _infos(urls, timeout_s)
        signs = [1.0 if self.infos[name].higher_is_better else -1.0 for name in self.names]
        self.signs_R = torch.tensor(signs, dtype=torch.float64)
        self.weights_R = torch.tensor([r.weight for r in rewards.values()], dtype=torch.float64)
        self._client = RewardClientSync(urls, timeout_s=timeout_s)

    def submit(self, images: NDArray[np.uint8], prompts: Sequence[str], groups: Sequence[str]) -> "Future[ScoreTable]":
        """Start scoring pictures (B, H, W, 3), of one group or several, and return at once."""
        future: Any = self._client.submit(list(images), list(prompts), list(groups))
        return cast("Future[ScoreTable]", future)

    def collect(self, futures: Sequence["Future[ScoreTable]"]) -> Rewards:
        """Wait; their columns stand in the order of `futures`."""
        tables = [future.result() for future in futures]
        values = np.concatenate([self._values(table) for table in tables], axis=1)
        failures: dict[str, int] = {}
        versions: dict[str, int] = {}
        for table in tables:
            for kind, count in table.failures.items():
                failures[kind] = failures.get(kind, 0) + count
            versions.update(table.versions)
        mask = torch.from_numpy(np.isfinite(values))
        return Rewards(torch.from_numpy(values), mask, versions, failures)

    def _values(self, table: ScoreTable) -> NDArray[np.float64]:
        """(R, B): the value of each score, or the part that the recipe asks for."""
        rows = []
        for r, name in enumerate(self.names):
            part = self._parts[name]
            rows.append(table.values_RB[r] if part is None else table.part(name, part))
        return np.stack(rows).astype(np.float64)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _infos(urls: Mapping[str, str | list[str]], timeout_s: float) -> dict[str, RewardInfo]:
    """What each service says of itself; NoService lists every reward that cannot be had."""
    found: dict[str, RewardInfo] = {}
    problems: list[str] = []
    for name, url in urls.items():
        with RewardClientSync({name: url}, timeout_s=timeout_s) as client:
            try:
                found.update(client.info())
            except (ServiceUnreachable, RequestFailed) as error:
                problems.append(str(error))
    if problems:
        raise NoService(
            "\n".join(problems) + "\nStart the small world's services with `make serve` "
            "(verism-serve examples/serve/world.yaml), or point rewards.NAME.url=http://HOST:PORT at running ones."
        )
    return found
