"""Who meets whom in a group, and what the verdicts add up to. Pure: positions and numbers, no pictures, no HTTP.

p_NN[i, j] is P(i beats j), NaN where they did not meet or the verdict is missing; p_NN[j, i] = 1 - p_NN[i, j].
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.schema import Plan, swiss_rounds
from shared.verdicts import EVEN, plus_four


@dataclass(frozen=True)
class Rates:
    """Of each picture the mean of its verdicts (NaN without any), its standard error, and how many verdicts there were."""

    rate_N: NDArray[np.float64]
    error_N: NDArray[np.float64]
    known_N: NDArray[np.int64]


def both_orders(forward: float | None, backward: float | None) -> float | None:
    """P(i beats j) from P(shown first wins) with i first and with j first; None when either is missing, for one order alone is biased."""
    return None if forward is None or backward is None else (forward + 1 - backward) / 2


def win_rates(p_NN: NDArray[np.float64], hard: bool = False) -> Rates:
    """Mean verdict by row; `hard` makes each a win, a tie or a loss first, as Pref-GRPO counts: (wins + ties/2) / pairs."""
    known_NN = np.isfinite(p_NN)
    won_NN = np.where(known_NN, p_NN, 0.0)
    if hard:
        won_NN = np.where(known_NN, np.where(np.abs(won_NN - 0.5) <= EVEN, 0.5, np.round(won_NN)), 0.0)
    m_N, sum_N = known_NN.sum(1), won_NN.sum(1)
    none_N = m_N == 0
    rate_N = np.where(none_N, np.nan, sum_N / np.maximum(m_N, 1))
    return Rates(rate_N, np.where(none_N, np.nan, plus_four(sum_N, m_N)), m_N)


class Tournament:
    """One group of n pictures: `next` gives the pairs of each round until none are left, `record` takes their verdicts."""

    def __init__(self, n: int, plan: Plan, anchors: Sequence[int] = (), rounds: int | None = None) -> None:
        """`anchors` are positions (default: the first picture); `rounds` of Swiss, at most those in which everyone can be paired."""
        self.n, self.p_NN = n, np.full((n, n), np.nan)
        self._anchors = tuple(anchors) or (0,)
        self._plan, self._left = plan, swiss_rounds(n, rounds) if plan == "swiss" else 1
        even = n + n % 2  # an odd one out meets nobody, once
        self._met_MM = np.eye(even, dtype=bool)

    def next(self) -> list[tuple[int, int]]:
        """The pairs of the next round; all verdicts of the last one are recorded."""
        if self._left == 0:
            return []
        self._left -= 1
        if self._plan == "swiss":
            pairs = self._swiss()
        else:
            everyone = itertools.combinations(range(self.n), 2)
            pairs = [(i, j) for i, j in everyone if self._plan == "all" or i in self._anchors or j in self._anchors]
        return pairs

    def record(self, pair: tuple[int, int], p: float | None) -> None:
        """P(the first beats the second), or None for a missing verdict."""
        i, j = pair
        if p is not None:
            self.p_NN[i, j], self.p_NN[j, i] = p, 1 - p

    def _swiss(self) -> list[tuple[int, int]]:
        """Nearest standings first, nobody twice. While a picture has met fewer than half of the others, everyone is paired."""
        standing = np.append(np.nan_to_num(win_rates(self.p_NN).rate_N, nan=0.5), -1.0)
        waiting = sorted(range(len(self._met_MM)), key=lambda i: (-standing[i], i))
        pairs: list[tuple[int, int]] = []
        alone: list[int] = []
        while waiting:
            one = waiting.pop(0)
            other = next((i for i in waiting if not self._met_MM[one, i]), None)
            if other is None:
                alone.append(one)
            else:
                waiting.remove(other)
                pairs.append((one, other))
        while len(alone) >= 2 and self._exchange(alone[-2], alone[-1], pairs):
            del alone[-2:]
        for i, j in pairs:
            self._met_MM[i, j] = self._met_MM[j, i] = True
        return [(min(pair), max(pair)) for pair in pairs if max(pair) < self.n]

    def _exchange(self, u: int, v: int, pairs: list[tuple[int, int]]) -> bool:
        """Two that have met each other take the two of a later pair as theirs."""
        met = self._met_MM
        for k in reversed(range(len(pairs))):
            for a, b in (pairs[k], pairs[k][::-1]):
                if not met[u, a] and not met[v, b]:
                    pairs[k : k + 1] = [(u, a), (v, b)]
                    return True
        return False
