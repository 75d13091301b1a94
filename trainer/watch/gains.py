"""How far the trained reward has moved away from what is held out, in units that can stand on one axis.

Each is a gain since the first evaluation, and up is better: the trained reward and held-out rewards in standard deviations of the first
evaluation, held-out detectors in log-odds of "photograph", the class hit in log-odds, the distance to photographs as the logarithm of how
many times nearer they are. `apart` is the trained gain above the lowest of the others: about 0 while what is trained is what is meant, and
growing while the reward is hacked. The lowest, for one fooled detector proves nothing (alarm.py looks at the same).
"""

import math
from collections.abc import Mapping
from typing import Any

from trainer.watch.table import finite

TRAINED = "reward/total_mean"


def gains(first: Mapping[str, Any], now: Mapping[str, Any], held: Mapping[str, float]) -> dict[str, float]:
    """`gain/trained`, `gain/NAME` of what is held out, `apart`; without what cannot be said. `held` has signs of held-out rewards."""
    out: dict[str, float] = {}
    trained, others = _rise(first, now, TRAINED), {}
    for key in now:
        if key.startswith("heldout_") and (rise := _rise(first, now, key)) is not None:
            others[key] = rise
    for name, sign in held.items():
        rise, spread = _rise(first, now, f"reward/{name}/mean"), finite(first.get(f"reward/{name}/std"))
        if rise is not None and spread:
            others[name] = sign * rise / spread
    before, after = finite(first.get("distance")), finite(now.get("distance"))
    if before and after is not None and before > 0:
        others["distance"] = -math.log(max(after / before, 1e-3))
    hits = [_odds(finite(row.get("class_hit")), finite(row.get("n"))) for row in (first, now)]
    if hits[0] is not None and hits[1] is not None:
        others["class hit"] = hits[1] - hits[0]
    if trained is not None:
        out["gain/trained"] = trained
    out |= {f"gain/{name}": value for name, value in others.items()}
    if trained is not None and others:
        out["apart"] = trained - min(others.values())
    return out


def _rise(first: Mapping[str, Any], now: Mapping[str, Any], key: str) -> float | None:
    before, after = finite(first.get(key)), finite(now.get(key))
    return None if before is None or after is None else after - before


def _odds(share: float | None, count: float | None) -> float | None:
    """Log-odds of a share of `count`, moved by half a one so that none and all have some too."""
    if share is None or not 0 <= share <= 1:
        return None
    n = count if count is not None and count >= 1 else 100.0
    return math.log((share * n + 0.5) / ((1 - share) * n + 0.5))
