"""What two orders of a pair say, and how sure a mean of verdicts is. Pure numbers, for the services and for who asks them."""

from typing import Any

import numpy as np

EVEN = 1e-9  # a probability this near to one half prefers neither


def consistent(forward: float | None, backward: float | None) -> float | None:
    """1 or 0 when both orders name the same picture, 0.5 when they do not or are even; None when either is missing. P(what is shown first
    wins), with the first picture first and then second."""
    if forward is None or backward is None:
        return None
    first, second = (0.0 if abs(p - 0.5) <= EVEN else p - 0.5 for p in (forward, 1 - backward))
    return 0.5 if first * second <= 0 else float(first > 0)


def plus_four(total: Any, count: Any) -> Any:
    """Standard error of a mean verdict, from the sum of `count` of them (floats or arrays): the plus-four one of a proportion (Agresti
    and Coull, 1998), sqrt(q (1 - q) / (m + 2)) with q = (sum + 1) / (m + 2). It is never 0, and for soft verdicts it errs on the large side.
    """
    q = (total + 1) / (count + 2)
    return np.sqrt(q * (1 - q) / (count + 2))
