"""Numbers and how sure they are: bootstrap over prompts, Bradley-Terry, AUC, average precision, calibration. numpy, vectorised.

A resample draws prompts with replacement and takes all that belongs to them along, so that contestants of the same prompts are compared
on the same draws. It is held as counts: how often each prompt was drawn.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
ELO = 400 / np.log(10)  # rating points of a factor e in the odds of winning
_PRIOR = 0.5  # ties added to every pair of contestants that met: a rating stays finite when one wins everything


@dataclass(frozen=True)
class Figure:
    """A number with its interval; NaN where there is none. `n` is what it rests on."""

    value: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.value))


NOTHING = Figure(float("nan"), float("nan"), float("nan"), 0)


class Resamples:
    """`counts_RK` (rounds, keys): how often each key was drawn, within its stratum (the prompts; each contestant's own pictures)."""

    def __init__(self, strata: Mapping[str, Sequence[Hashable]], rounds: int, seed: int, level: float = 0.95) -> None:
        rng = np.random.default_rng(seed)
        self.level, self._place = level, dict[Hashable, int]()
        parts = []
        for keys in strata.values():
            for key in keys:
                self._place[key] = len(self._place)
            n = len(keys)
            parts.append(
                rng.multinomial(n, np.full(n, 1 / n), size=rounds).astype(np.float32) if n else np.zeros((rounds, 0), np.float32)
            )
        self.counts_RK = np.concatenate(parts, axis=1) if parts else np.zeros((rounds, 0), np.float32)

    def of(self, keys: Sequence[Hashable]) -> NDArray[np.float32]:
        """(rounds, len(keys)); a key that stands there twice has its column twice."""
        return self.counts_RK[:, [self._place[key] for key in keys]]

    def met(self, keys: Sequence[Sequence[Hashable]]) -> NDArray[np.float32]:
        """(rounds, len(keys)) of what belongs to more than one key, as a bout does to two pictures: drawn with those of its keys that others
        have too, and with its first where none is shared.

        What shares both of its keys is drawn as often as one times the other, which makes intervals too wide rather than too narrow
        (Owen, The pigeonhole bootstrap, 2007).
        """
        often = Counter(key for own in keys for key in own)
        by = [[key for key in own if often[key] > 1] or own[:1] for own in keys]
        out = self.of([own[0] for own in by])
        for place, own in enumerate(by):
            for key in own[1:]:
                out[:, place] *= self.counts_RK[:, self._place[key]]
        return out

    def mean(self, keys: Sequence[Hashable], values: Floats, share: bool = False) -> Figure:
        """Of the values that are there. `share`: values are 0 to 1, so that an interval of no width is widened to Wilson's."""
        known = np.isfinite(values)
        if not known.any():
            return NOTHING
        kept = [key for key, yes in zip(keys, known, strict=True) if yes]
        return self.average(self.of(kept), values[known], len(kept), share)

    def average(self, counts: NDArray[np.float32], values: Floats, n: int, share: bool = False) -> Figure:
        """`mean` of values by how often each was drawn, (rounds, values); it rests on `n`."""
        value = float(values.mean())
        figure = interval(value, weighted(counts, values), n, self.level)
        if share and values.min() == values.max() and value in (0.0, 1.0):
            z2 = float(stats.norm.ppf((1 + self.level) / 2)) ** 2
            edge = z2 / (n + z2)  # Wilson's score interval of n out of n
            figure = Figure(value, 1 - edge if value == 1 else 0.0, 1.0 if value == 1 else edge, n)
        return figure

    def difference(self, one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> tuple[Figure, bool]:
        """Mean of `one` less mean of `other`: over the prompts of both where they share any (paired), else of all of each."""
        shared = [key for key in one if key in other and np.isfinite(one[key]) and np.isfinite(other[key])]
        if shared:
            values = np.array([one[key] - other[key] for key in shared])
            return interval(float(values.mean()), weighted(self.of(shared), values), len(shared), self.level), True
        sides = [[key for key, value in side.items() if np.isfinite(value)] for side in (one, other)]
        if not all(sides):
            return NOTHING, False
        a, b = (np.array([side[key] for key in keys]) for side, keys in zip((one, other), sides, strict=True))
        draws = weighted(self.of(sides[0]), a) - weighted(self.of(sides[1]), b)
        return interval(float(a.mean() - b.mean()), draws, min(map(len, sides)), self.level), False


def weighted(counts: NDArray[np.float32], values: Floats) -> Floats:
    """(rounds,) means of values by how often each was drawn; NaN where a draw has none of them."""
    total = counts.sum(1, dtype=np.float64)
    return np.divide(counts.astype(np.float64) @ values, total, out=np.full(len(total), np.nan), where=total > 0)


def interval(value: float, draws: Floats, n: int, level: float = 0.95, centred: bool = False) -> Figure:
    """Percentiles of the draws, set a little farther apart for small n (Hesterberg, 1411.5279, section 3.3). One value has no interval.

    `centred` moves the draws so that their mean is the value: for what resampling itself makes larger, such as distances.
    """
    draws = draws[np.isfinite(draws)]
    if n < 2 or not len(draws) or not np.isfinite(value):
        return Figure(value, float("nan"), float("nan"), n)
    tail = float(stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    if centred:
        low, high = low + value - draws.mean(), high + value - draws.mean()
    return Figure(value, float(low), float(high), n)


def bradley_terry(wins: Floats, rounds: int = 1000) -> Floats:
    """(..., C, C) wins of row over column (ties half to each) to ratings (..., C): log-strengths of mean 0, NaN for who met nobody.

    Bradley and Terry (1952) by the MM steps of Hunter (2004), with _PRIOR ties added where two met.
    """
    games = wins + wins.swapaxes(-1, -2)
    met = (games > 0).astype(np.float64)
    won = wins + _PRIOR / 2 * met
    games = games + _PRIOR * met
    total, active = won.sum(-1), met.any(-1)
    strength = np.ones_like(total)
    for _ in range(rounds):
        shares = games / (strength[..., :, None] + strength[..., None, :])
        new = np.where(active, total / np.where(active, shares.sum(-1), 1), 1.0)
        new /= np.exp(np.where(active, np.log(new), 0).sum(-1, keepdims=True) / np.maximum(active.sum(-1, keepdims=True), 1))
        step = np.abs(np.log(new) - np.log(strength)).max(initial=0)
        strength = new
        if step < 1e-9:
            break
    return np.where(active, np.log(strength), np.nan)


def auc(real: Floats, fake: Floats, counts: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None) -> tuple[float, Floats]:
    """P(a real one scores above a fake one), ties half; and the same of each resample."""
    above = (real[:, None] > fake[None, :]).astype(np.float32) + 0.5 * (real[:, None] == fake[None, :]).astype(np.float32)
    if counts is None:
        return float(above.mean()), np.zeros(0)
    a, b = counts
    both = a.sum(1, dtype=np.float64) * b.sum(1, dtype=np.float64)
    hits = ((a @ above) * b).sum(1, dtype=np.float64)
    return float(above.mean()), np.divide(hits, both, out=np.full(len(both), np.nan), where=both > 0)


def average_precision(scores: Floats, labels: Floats, counts: NDArray[np.float32] | None = None) -> Floats:
    """(R,) area under precision and recall of label 1, in steps at distinct scores; without counts (1,)."""
    weights = np.ones((1, len(scores))) if counts is None else counts.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(weights[:, order] * labels[order], axis=1)[:, ends]
    shown = np.cumsum(weights[:, order], axis=1)[:, ends]
    precision = np.divide(hits, shown, out=np.zeros_like(hits), where=shown > 0)
    gained = np.diff(hits, axis=1, prepend=0)
    total = hits[:, -1]
    return np.divide((gained * precision).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)


def balanced(labels: Floats) -> Floats:
    """Weights with which both labels count half."""
    real = labels.sum()
    return np.where(labels > 0.5, 0.5 / max(real, 1), 0.5 / max(len(labels) - real, 1))


def bins_of(p: Floats, count: int = 10) -> NDArray[np.int64]:
    """Which of `count` equal bins of [0, 1] each lies in."""
    return np.minimum((p * count).astype(np.int64), count - 1)


def calibration_error(p: Floats, labels: Floats, counts: NDArray[np.float32] | None = None, count: int = 10) -> Floats:
    """(R,) mean |share of real ones - mean p| over equal bins, both labels counting half (expected calibration error); without counts (1,)."""
    weights = (np.ones((1, len(p))) if counts is None else counts.astype(np.float64)) * balanced(labels)
    inside = np.eye(count)[bins_of(p, count)]
    gap = np.abs((weights * (labels - p)) @ inside).sum(1)
    total = weights.sum(1)
    return np.divide(gap, total, out=np.full(len(total), np.nan), where=total > 0)


def reliability(p: Floats, labels: Floats, count: int = 10) -> list[tuple[float, float, int]]:
    """(mean p, share of real ones with both labels counting half, pictures) of each bin that has any."""
    weights, place = balanced(labels), bins_of(p, count)
    out = []
    for i in range(count):
        inside = place == i
        if inside.any():
            w = weights[inside]
            out.append((float(p[inside] @ w / w.sum()), float(labels[inside] @ w / w.sum()), int(inside.sum())))
    return out


def spearman(a: Floats, b: Floats, counts: NDArray[np.float32]) -> tuple[float, Floats]:
    """Rank correlation, and of each resample (ranks are taken once); NaN where one side is constant."""
    x, y = (stats.rankdata(side) - (len(side) + 1) / 2 for side in (a, b))

    def of(weights: Floats) -> Floats:
        total = weights.sum(1)
        mx, my = weights @ x / total, weights @ y / total
        cov = weights @ (x * y) / total - mx * my
        spread = (weights @ (x * x) / total - mx**2) * (weights @ (y * y) / total - my**2)
        return np.divide(cov, np.sqrt(spread.clip(0)), out=np.full(len(total), np.nan), where=spread > 1e-12)

    return float(of(np.ones((1, len(a))))[0]), of(counts.astype(np.float64))
