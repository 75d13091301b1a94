"""Is the reward being hacked? Looks at evaluations only, and decides nothing else.

A rising reward proves nothing. An evaluation is suspicious when the trained reward stands above where it started while the
distance to photographs, or the class hit, or every held-out detector stands clearly below the best so far. `patience` of them in
a row are an alarm. The best checkpoint is the one nearest to photographs among those whose class hit has not fallen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config import AlarmConfig

Evaluation = Mapping[str, float]


@dataclass(frozen=True)
class Alarm:
    """What is wrong, and where it was still right."""

    step: int
    reason: str
    best_step: int


def best(evaluations: Sequence[Evaluation], class_hit_drop: float = 0.01) -> Evaluation:
    """The evaluation with the smallest distance whose class hit is within `class_hit_drop` of the first's.

    Without a distance (no monitors) it is the one with the highest total reward.
    """
    if not evaluations:
        raise ValueError("there is no evaluation yet")
    if not _has(evaluations[0], "distance"):
        return max(evaluations, key=lambda e: e["reward/total_mean"] if _has(e, "reward/total_mean") else -math.inf)
    good = [e for e in evaluations if _has(e, "distance")]
    if _has(evaluations[0], "class_hit"):
        floor = evaluations[0]["class_hit"] - class_hit_drop
        good = [e for e in good if _has(e, "class_hit") and e["class_hit"] >= floor]
    return min(good, key=lambda e: e["distance"])


def check(evaluations: Sequence[Evaluation], config: AlarmConfig) -> Alarm | None:
    """An alarm when the last `patience` evaluations are all suspicious."""
    if config.action == "off" or len(evaluations) <= config.patience:
        return None
    reasons = [suspicion(evaluations[: i + 1], config) for i in range(len(evaluations) - config.patience, len(evaluations))]
    if not all(reasons):
        return None
    return Alarm(int(evaluations[-1]["step"]), str(reasons[-1]), int(best(evaluations)["step"]))


def suspicion(evaluations: Sequence[Evaluation], config: AlarmConfig) -> str | None:
    """Why the last evaluation looks hacked, or None."""
    first, last, before = evaluations[0], evaluations[-1], evaluations[:-1]
    if not before or not (_has(first, "reward/total_mean") and _has(last, "reward/total_mean")):
        return None
    if not last["reward/total_mean"] > first["reward/total_mean"]:
        return None
    worse = []
    if _has(last, "distance"):
        nearest = min((e["distance"] for e in before if _has(e, "distance")), default=math.inf)
        if last["distance"] > config.distance_factor * nearest:
            worse.append(f"the distance to photographs is {last['distance']:.1f}, it was {nearest:.1f}")
    if _has(last, "class_hit"):
        highest = max((e["class_hit"] for e in before if _has(e, "class_hit")), default=-math.inf)
        if last["class_hit"] < highest - config.class_hit_drop:
            worse.append(f"the class hit is {last['class_hit']:.2f}, it was {highest:.2f}")
    held_out = [k for k in last if k.startswith("heldout_") and _has(last, k) and _has(first, k)]
    fallen = [k for k in held_out if last[k] < first[k] - 0.5]
    if held_out and len(fallen) == len(held_out):
        worse.append("every held-out detector believes the pictures less than at the start")
    if not worse:
        return None
    rise = last["reward/total_mean"] - first["reward/total_mean"]
    return f"the trained reward rose by {rise:.2f}, but " + " and ".join(worse)


def _has(evaluation: Evaluation, key: str) -> bool:
    value = evaluation.get(key)
    return value is not None and math.isfinite(value)
