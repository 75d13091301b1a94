"""What config.yaml and versions.json of a run say, as far as the page shows it: no address of a service, for one may hold a password."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.watch.files import plain, small
from trainer.watch.table import finite

LIMIT, REWARDS = 256 << 10, 32


class _Plain(yaml.SafeLoader):
    """Without aliases: a short file of those can stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class Described:
    """`held` has the sign of each reward that nobody is trained on."""

    name: str = ""
    text: str = ""
    steps: int | None = None
    mode: str | None = None
    rewards: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> dict[str, float]:
        return {one["name"]: one["sign"] for one in self.rewards if one["held_out"]}


def described(folder: Path) -> Described:
    """What can be read; of a file that cannot, nothing."""
    config, versions = loaded(folder, "config.yaml"), loaded(folder, "versions.json")
    steps, language = config.get("steps"), config.get("language")
    told = _map(versions.get("rewards"))
    rewards = []
    for name, weights in list(learned(config).items())[:REWARDS]:
        info = _map(told.get(name))
        rewards.append(
            {
                "name": plain(name, 80),
                "held_out": not any(weights),
                "weight": weights[0],
                "sign": -1.0 if info.get("higher_is_better") is False else 1.0,
                "version": info["version"] if isinstance(info.get("version"), int) else None,
                "sha256": plain(info.get("weights_sha256"), 64),
                "text": plain(info.get("description"), 300),
            }
        )
    mode = plain(_map(language).get("mode"), 40) if language else None
    known = isinstance(steps, int) and 0 < steps < 1 << 40
    return Described(plain(config.get("name"), 80), plain(config.get("description"), 400), steps if known else None, mode, rewards)


def learned(config: Mapping[str, Any]) -> dict[Any, tuple[float | None, float | None]]:
    """Of each reward of a run's plain configuration its weight for the painter, and the rewriter's own: nobody learns from one with neither."""
    own = _map(_map(config.get("language")).get("rewards"))
    return {
        name: (finite(_map(one).get("weight", 1.0)), finite(_map(own.get(name)).get("weight", 0.0)))
        for name, one in _map(config.get("rewards")).items()
    }


def loaded(folder: Path, *parts: str) -> Mapping[str, Any]:
    """A small YAML or JSON file that is a mapping; an empty one for all else."""
    data = small(folder, *parts, limit=LIMIT) or b""
    if not data or len(data) == LIMIT:
        return {}
    try:
        text = data.decode(errors="replace")
        return _map(json.loads(text) if parts[-1].endswith(".json") else yaml.load(text, _Plain))  # a SafeLoader
    except (ValueError, yaml.YAMLError, RecursionError, TypeError, AttributeError, KeyError, OverflowError):
        return {}


def _map(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
