"""GDPO (2601.05242; Flow-Factory's `gdpo`): each reward's z-score in its group, their weighted sum, and a last z-score over the batch.

The sum's mean over the batch is 0 by construction, so the last step divides by its deviation alone, and a group of equal rewards stays
exactly 0. Looks at the whole batch.
"""

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, usable, z_scores


def gdpo(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
) -> Advantages:
    """float64 arithmetic, float32 answer; |A| <= clip."""
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    scores = z_scores(rewards, valid_B, group_B, eps=eps, min_valid=min_valid)
    summed = scores.summed(weights)
    kept = summed[scores.kept_B.bool()]
    spread = kept.std(correction=0) if len(kept) else torch.zeros((), dtype=torch.float64)
    return scores.answer(summed / (spread + eps), clip)
