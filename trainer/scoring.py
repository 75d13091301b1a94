"""Pictures out, rewards back: the only file here, with adversary.py, that knows services exist.

A group's request is in flight while the next group is sampled. What could not be scored stays NaN and masked, never guessed.
A reward with `compare` is the win rate in its own group, of whole groups, at its service's /v1/compare.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.client import CompareTable, RequestFailed, RewardClientSync, ScoreTable
from shared.errors import ServiceUnreachable
from shared.schema import RewardInfo
from trainer.config import ConfigError, RewardConfig
from trainer.outage import Patient


class NoService(RuntimeError):
    """A reward's service cannot be used; the message holds the URL and the command that starts one."""


@dataclass(frozen=True)
class Rewards:
    """values_RB float64 as the services gave them (NaN where missing), mask_RB, versions, failures by urn.

    `uncertainty`: (B,) of each reward whose recipe asks for it, NaN where missing. `notes` are numbers for the log. `missing` counts the
    scores that were asked for and did not come.
    """

    values_RB: Tensor
    mask_RB: Tensor
    versions: Mapping[str, int]
    failures: Mapping[str, int]
    uncertainty: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    missing: int = 0


@dataclass(frozen=True)
class Pending:
    """A submission of `count` pictures: single scores, and tournaments by reward (none where there are no groups)."""

    count: int
    scores: "Future[ScoreTable] | None"
    compared: "Mapping[str, Future[CompareTable]]"

    def done(self) -> bool:
        """Whether `collect` would not wait for it."""
        return (self.scores is None or self.scores.done()) and all(future.done() for future in self.compared.values())


class Pinned:
    """A reward client whose rewards answer by these `versions` of their weights, or not at all; the others by whichever they have."""

    def __init__(self, client: RewardClientSync) -> None:
        self.client, self.versions, self.compare, self.close = client, dict[str, int](), client.compare, client.close

    def submit(
        self, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str | None], groups: Sequence[str], rewards: Sequence[str]
    ) -> "Future[ScoreTable]":
        """As the client's."""
        pinned = {name: self.versions[name] for name in rewards if name in self.versions}
        return self.client.submit(images, prompts, groups, rewards, pinned)


class Scorer:
    """`submit` groups, `collect` them. `signs_R` is -1 where lower is better, `weights_R` is the recipe's.

    `single_R` is False for win rates: they say which picture of a group is better, and nothing across groups or evaluations.
    """

    def __init__(self, rewards: Mapping[str, RewardConfig], timeout_s: float, outage_s: float = 0.0) -> None:
        urls = {name: r.url for name, r in rewards.items()}
        self.names, self._rewards = tuple(rewards), dict(rewards)
        self.infos = _infos(urls, timeout_s)
        for name, reward in rewards.items():
            _check_kind(name, reward, self.infos[name])
        self.single_R = torch.tensor([r.compare is None for r in rewards.values()])
        self._single = [name for name, r in rewards.items() if r.compare is None]
        self._pairwise = {name: r.compare for name, r in rewards.items() if r.compare is not None}
        signs = [1.0 if self.infos[name].higher_is_better else -1.0 for name in self.names]
        self.signs_R = torch.tensor(signs, dtype=torch.float64)
        self.weights_R = torch.tensor([r.weight for r in rewards.values()], dtype=torch.float64)
        self._pinned = Pinned(RewardClientSync(urls, timeout_s=timeout_s))
        self._client = self.patient = Patient(self._pinned, outage_s)
        self._threads = ThreadPoolExecutor(64, "compare") if self._pairwise else None  # each waits for one answer

    def pin(self, versions: Mapping[str, int]) -> None:
        """From here on these rewards are asked for by version; with another one their service answers 409, and there is no score."""
        self._pinned.versions = dict(versions)

    def values(self, name: str, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str | None]) -> NDArray[np.float64]:
        """(B,) of one reward that scores single pictures, as the recipe takes it; NaN where missing. Waits."""
        scores = self._client.submit(list(images), list(prompts), [""] * len(images), [name]).result()
        return self._row(name, len(images), scores, {})[0]

    def submit(self, images: NDArray[np.uint8], prompts: Sequence[str], groups: Sequence[str]) -> Pending:
        """Start scoring pictures (B, H, W, 3), of one whole group or several, and return at once. Group "" is none: nothing is compared."""
        shown, told = list(images), list(prompts)
        scores: Any = self._client.submit(shown, told, list(groups), self._single) if self._single else None
        compared = {}
        if self._threads is not None and any(groups):
            for name, plan in self._pairwise.items():
                first = _first(groups, plan.anchors or 1) if plan.plan == "anchor" else []
                options = {"reward": name, "plan": plan.plan, "anchors": first, "rounds": plan.rounds, "hard": plan.hard}
                compared[name] = self._threads.submit(self._client.compare, shown, list(groups), told, **options)
        return Pending(len(shown), scores, compared)

    def collect(self, futures: Sequence[Pending]) -> Rewards:
        """Wait; their columns stand in the order of `futures`."""
        tables = [
            (p.count, None if p.scores is None else p.scores.result(), {name: f.result() for name, f in p.compared.items()})
            for p in futures
        ]
        values: list[NDArray[np.float64]] = []
        unsure: dict[str, NDArray[np.float64]] = {}
        for name in self.names:
            rows = [self._row(name, *table) for table in tables]
            values.append(np.concatenate([row for row, _ in rows]))
            if self._rewards[name].uncertainty is not None:
                unsure[name] = np.concatenate([u for _, u in rows])
        failures: dict[str, int] = {}
        versions: dict[str, int] = {}
        for _, scores, compared in tables:
            for one in (scores, *compared.values()):
                for kind, count in (one.failures if one is not None else {}).items():
                    failures[kind] = failures.get(kind, 0) + count
            versions.update(scores.versions if scores is not None else {})
            versions.update({name: table.version for name, table in compared.items() if table.version is not None})
        values_RB = torch.from_numpy(np.stack(values).astype(np.float64))
        mask = values_RB.isfinite()
        asked = [sum(p.count for p in futures if single or p.compared) for single in self.single_R.tolist()]
        return Rewards(
            values_RB,
            mask,
            versions,
            failures,
            uncertainty={name: torch.from_numpy(u) for name, u in unsure.items()},
            notes=_notes([compared for *_, compared in tables]),
            missing=sum(asked) - int(mask.sum()),
        )

    def _row(
        self, name: str, count: int, scores: ScoreTable | None, compared: Mapping[str, CompareTable]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(B,) values of a reward, or of the part that the recipe asks for, and their uncertainty; NaN where missing."""
        reward, nothing = self._rewards[name], np.full(count, np.nan)
        if reward.compare is not None:
            table = compared.get(name)
            return (nothing, nothing) if table is None else (table.rates_B, table.errors_B)
        assert scores is not None
        values = scores.values_RB[scores.rewards.index(name)] if reward.part is None else scores.part(name, reward.part)
        return values, nothing if reward.uncertainty is None else _unsure(scores, name, reward.uncertainty.part)

    def close(self) -> None:
        """Close the connections."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _unsure(scores: ScoreTable, name: str, part: str) -> NDArray[np.float64]:
    """(B,): each score's own sigma, or a part."""
    if part != "sigma":
        return scores.part(name, part)
    row = scores.scores[scores.rewards.index(name)]
    return np.array([np.nan if score.sigma is None else score.sigma for score in row], dtype=np.float64)


def _notes(compared: Sequence[Mapping[str, CompareTable]]) -> dict[str, float]:
    """Of each tournament reward the mean standard error of a win rate, and how often what is shown first wins (0.5 has no leaning)."""
    out: dict[str, float] = {}
    for name in dict.fromkeys(name for tables in compared for name in tables):
        own = [tables[name] for tables in compared if name in tables]
        errors = np.concatenate([table.errors_B for table in own])
        first = [g.shown_first for table in own for g in table.groups.values() if g.shown_first is not None]
        if np.isfinite(errors).any():
            out[f"reward/{name}/standard_error"] = float(np.nanmean(errors))
        if first:
            out[f"reward/{name}/shown_first"] = float(np.mean(first))
    return out


def _first(groups: Sequence[str], count: int) -> list[int]:
    """Positions of the first `count` members of each group."""
    seen: dict[str, int] = {}
    out = []
    for place, group in enumerate(groups):
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= count:
            out.append(place)
    return out


def _check_kind(name: str, reward: RewardConfig, info: RewardInfo) -> None:
    """ConfigError when a reward is asked for what its service does not do."""
    if reward.compare is not None and info.mode != "pairwise":
        raise ConfigError(
            f"rewards.{name}.compare: the service at {reward.url} scores single pictures of {name} and has no /v1/compare for it: leave "
            "`compare` away, or serve a reward that compares (`use: unified_compare`, see examples/serve/judge.yaml)"
        )
    if reward.compare is None and "references" in info.needs:
        fix = f"set rewards.{name}.compare.plan=swiss" if info.mode == "pairwise" else "take another reward"
        raise ConfigError(
            f"rewards.{name}: {name} at {reward.url} judges a picture against references, which a run has none of: {fix}"
        )


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
