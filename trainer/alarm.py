"""Is the reward being hacked? Looks at evaluations only, and decides nothing else.

A rising reward proves nothing. An evaluation is suspicious when the trained reward stands above where it started while the
distance to photographs, or the class hit, or all that is held out stands clearly worse. Held out are the monitors' detectors and rewards
of weight 0. `patience` evaluations in a row are an alarm. The best checkpoint is, unless the recipe chooses otherwise, the one nearest to
photographs among those whose class hit has not fallen.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from trainer.config import AlarmConfig, ConfigError

Evaluation = Mapping[str, float]
Signs = Mapping[str, float]  # of held-out rewards: -1 where lower is better


@dataclass(frozen=True)
class Alarm:
    """What is wrong, and where it was still right."""

    step: int
    reason: str
    best_step: int


def best(
    evaluations: Sequence[Evaluation],
    class_hit_drop: float = 0.01,
    by: str = "distance",
    held_out: Signs | None = None,
    among: Collection[int] | None = None,
) -> Evaluation:
    """The best evaluation, of those at the steps `among`.

    By `distance`: the nearest to photographs whose class hit is within `class_hit_drop` of the first's; without monitors by `total`, the
    trained reward. By `heldout:NAME`: a reward of weight 0, or one of the monitors.
    """
    if not evaluations:
        raise ValueError("there is no evaluation yet")
    some = [e for e in evaluations if among is None or e["step"] in among] or list(evaluations)
    if by.startswith("heldout:"):
        key, sign = measure_of(by, evaluations[0], held_out or {})
        return max(some, key=lambda e: sign * e[key] if _has(e, key) else -math.inf)
    if by == "total" or not _has(evaluations[0], "distance"):
        return max(some, key=lambda e: e["reward/total_mean"] if _has(e, "reward/total_mean") else -math.inf)
    good = [e for e in some if _has(e, "distance")]
    if _has(evaluations[0], "class_hit"):
        floor = evaluations[0]["class_hit"] - class_hit_drop
        good = [e for e in good if _has(e, "class_hit") and e["class_hit"] >= floor]
    return min(good, key=lambda e: e["distance"]) if good else some[0]


def measure_of(by: str, evaluation: Evaluation, held_out: Signs) -> tuple[str, float]:
    """Key in an evaluation, and sign, of `heldout:NAME`; ConfigError names what there is."""
    name = by.removeprefix("heldout:")
    if name in held_out:
        return f"reward/{name}/mean", held_out[name]
    known = {k.removeprefix("heldout_"): (k, 1.0) for k in evaluation if k.startswith("heldout_")}
    known |= {k: (k, sign) for k, sign in (("class_hit", 1.0), ("kernel_distance", -1.0)) if k in evaluation}
    known |= {f"heldout_{k}": v for k, v in known.items() if v[0].startswith("heldout_")}
    if name not in known:
        there = ", ".join(f"heldout:{k}" for k in (*held_out, *known) if not k.startswith("heldout_")) or "none"
        raise ConfigError(
            f"checkpoint_best={by} names nothing that is held out here; there is {there}. Give a reward weight=0, or set eval.monitors"
        )
    return known[name]


def sound(evaluations: Sequence[Evaluation], config: AlarmConfig, held_out: Signs | None = None) -> list[int]:
    """Steps of the evaluations that do not look hacked; the first never does."""
    return [int(e["step"]) for i, e in enumerate(evaluations) if suspicion(evaluations[: i + 1], config, held_out) is None]


def check(
    evaluations: Sequence[Evaluation],
    config: AlarmConfig,
    held_out: Signs | None = None,
    since: int = -1,
    best_step: int | None = None,
) -> Alarm | None:
    """An alarm when the last `patience` evaluations, all after step `since`, are suspicious."""
    if config.action == "off" or len(evaluations) <= config.patience or evaluations[-config.patience]["step"] <= since:
        return None
    reasons = [
        suspicion(evaluations[: i + 1], config, held_out) for i in range(len(evaluations) - config.patience, len(evaluations))
    ]
    if not all(reasons):
        return None
    step = best_step if best_step is not None else int(best(evaluations)["step"])
    return Alarm(int(evaluations[-1]["step"]), str(reasons[-1]), step)


def suspicion(evaluations: Sequence[Evaluation], config: AlarmConfig, held_out: Signs | None = None) -> str | None:
    """Why the last evaluation looks hacked, or None. A held-out reward counts in standard deviations of the first evaluation."""
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
    drops = {k: first[k] - last[k] for k in last if k.startswith("heldout_") and _has(last, k) and _has(first, k)}
    for name, sign in (held_out or {}).items():
        mean, std = f"reward/{name}/mean", f"reward/{name}/std"
        if _has(first, mean) and _has(last, mean) and _has(first, std):
            drops[name] = sign * (first[mean] - last[mean]) / max(first[std], 1e-9)
    if drops and all(drop > config.heldout_drop for drop in drops.values()):
        worse.append(f"all that is held out stands lower than at the start ({', '.join(drops)})")
    if not worse:
        return None
    rise = last["reward/total_mean"] - first["reward/total_mean"]
    return f"the trained reward rose by {rise:.2f}, but " + " and ".join(worse)


def _has(evaluation: Evaluation, key: str) -> bool:
    value = evaluation.get(key)
    return value is not None and math.isfinite(value)
