"""Which candidates are worth going on with, from pictures that are not finished.

TTSnap scores what a picture would become, by the one-step estimate x0 = x - sigma v, and stops poor candidates early; several rewards are
added up as ranks. Its reward models are tuned to such blurred previews (noise-aware); those weights are not public, and here the ordinary
rewards see them. So a stage is a guess: `docs/rewriting.md` has how well previews foretell finished pictures on the small world.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ranks(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for the worst, equal ones share their mean; NaN (not scored) is below everything, 0."""
    known = np.isfinite(values_N)
    out = np.zeros(len(values_N))
    seen = values_N[known]
    lower = (seen[None, :] < seen[:, None]).sum(1)
    equal = (seen[None, :] == seen[:, None]).sum(1)
    out[known] = lower + (equal + 1) / 2
    return out


def survivors(values_RN: NDArray[np.float64], weights_R: Sequence[float] | NDArray[np.float64], keep: int) -> list[int]:
    """The `keep` best of N by the weighted sum of their ranks, in their old order. Higher values are better; of equals the first stays."""
    total_N = sum(weight * ranks(values_N) for weight, values_N in zip(weights_R, values_RN, strict=True))
    order = np.argsort(-np.asarray(total_N, dtype=np.float64), kind="stable")
    return sorted(int(i) for i in order[:keep])
