"""GDPO (2601.05242; Flow-Factory's `gdpo`): each reward's z-score in its group, their weighted sum, and a last z-score over the batch.

The sum's mean over the batch is 0 by construction, so the last step divides by its deviation alone, and a group of equal rewards stays
exactly 0. Looks at the whole batch.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, given, usable, z_scores, z_scores_each


def gdpo(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
    ddof: int = 0,
    missing: Literal["mask", "skip"] = "mask",
) -> Advantages:
    """float64 arithmetic, float32 answer; |A| <= clip. `ddof` 1 and `missing` skip are TRL's, as in group_relative."""
    options: dict[str, Any] = {"eps": eps, "min_valid": min_valid, "ddof": ddof}
    if missing == "skip":
        rewards, weights, known_RB = given(rewards_RB, mask_RB, weights_R)
        scores = z_scores_each(rewards, known_RB, group_B, **options)
    else:
        rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
        scores = z_scores(rewards, valid_B, group_B, **options)
    summed = (weights[:, None] * scores.z_RB).sum(0)
    kept = summed[scores.kept_B.bool()]
    spread = kept.std(correction=ddof) if len(kept) > ddof else torch.zeros((), dtype=torch.float64)
    return scores.answer(summed / (spread + eps), clip)
