"""As `trainer.scoring.Scorer`, for pictures that have two prompts: the user's own, and the rewrite that was painted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.language.config import LanguageRewardConfig, LanguageRunConfig
from trainer.scoring import Pending, Rewards, Scorer


@dataclass(frozen=True)
class Weighed:
    """What a total is made of: names, signs, weights, and which rewards say something across groups."""

    names: tuple[str, ...]
    signs_R: Tensor
    weights_R: Tensor
    single_R: Tensor


class Judges:
    """`submit` trees, `collect` them; rows stand in the order of the recipe. `weights_R` are the image policy's, `language_R` the
    rewriter's."""

    def __init__(self, config: LanguageRunConfig) -> None:
        self.names = tuple(config.rewards)
        by = {name: config.language.rewards.get(name, LanguageRewardConfig()).judged_by for name in self.names}
        groups = [[name for name in self.names if by[name] == kind] for kind in ("prompt", "rewrite")]
        self._kinds = [kind for kind, names in zip(("prompt", "rewrite"), groups, strict=True) if names]
        self._scorers: list[Scorer] = []
        try:
            for names in filter(None, groups):
                rewards = {name: config.rewards[name] for name in names}
                self._scorers.append(Scorer(rewards, config.reward_timeout_s, config.reward_outage_s))
        except Exception:
            self.close()
            raise
        told = [name for scorer in self._scorers for name in scorer.names]
        self._order = torch.tensor([told.index(name) for name in self.names])
        self.infos = {name: scorer.infos[name] for scorer in self._scorers for name in scorer.names}
        self.signs_R, self.weights_R, self.single_R = (
            torch.cat([getattr(scorer, key) for scorer in self._scorers])[self._order]
            for key in ("signs_R", "weights_R", "single_R")
        )
        self.language_R = torch.tensor([config.language_weight(name) for name in self.names], dtype=torch.float64)
        shares = [self.weights_R] * config.paints + [self.language_R] * config.writes
        whole_R = torch.stack([share / share.sum() for share in shares]).mean(0)
        self.whole = Weighed(self.names, self.signs_R, whole_R, self.single_R)
        self.patient = self

    @property
    def waiting(self) -> Callable[[str], None]:
        """Hears that a service is waited for."""
        return self._scorers[0].patient.waiting

    @waiting.setter
    def waiting(self, told: Callable[[str], None]) -> None:
        for scorer in self._scorers:
            scorer.patient.waiting = told

    def submit(
        self, images: NDArray[np.uint8], prompts: Sequence[str], rewrites: Sequence[str], groups: Sequence[str]
    ) -> tuple[Pending, ...]:
        """Start scoring pictures (B, H, W, 3) and return at once; see Scorer.submit."""
        texts = {"prompt": prompts, "rewrite": rewrites}
        return tuple(s.submit(images, texts[kind], groups) for s, kind in zip(self._scorers, self._kinds, strict=True))

    def collect(self, futures: Sequence[tuple[Pending, ...]]) -> Rewards:
        """Wait; their columns stand in the order of `futures`."""
        parts = [scorer.collect([future[n] for future in futures]) for n, scorer in enumerate(self._scorers)]
        failures: dict[str, int] = {}
        for part in parts:
            for kind, count in part.failures.items():
                failures[kind] = failures.get(kind, 0) + count
        return Rewards(
            torch.cat([part.values_RB for part in parts])[self._order],
            torch.cat([part.mask_RB for part in parts])[self._order],
            {name: version for part in parts for name, version in part.versions.items()},
            failures,
            uncertainty={name: row for part in parts for name, row in part.uncertainty.items()},
            notes={name: number for part in parts for name, number in part.notes.items()},
            missing=sum(part.missing for part in parts),
        )

    def close(self) -> None:
        """Close the connections."""
        for scorer in self._scorers:
            scorer.close()
