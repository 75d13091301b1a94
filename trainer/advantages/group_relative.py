"""How much better than its own group: z-scores per prompt, per reward, then weighted.

A_i = (r_i - mean) / (std + eps) inside the group, population std (Flow-GRPO, RealGen; TRL divides by n - 1: ddof 1). A missing reward is
NaN or masked: its sample gets weight 0, never a number. Equal rewards give exactly zero.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, given, usable, weighted_sum, z_scores, z_scores_each


def group_relative(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    eps: float = 1e-4,
    ddof: int = 0,
    clip: float = 5.0,
    min_valid: int = 2,
    std: Literal["group", "global", "none"] = "group",
    combine: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
    missing: Literal["mask", "skip"] = "mask",
) -> Advantages:
    """float64 arithmetic, float32 answer; |A| <= clip.

    A sample counts only when every reward with a weight scored it. A group with fewer than `min_valid` such members is dropped
    (weights 0). `normalize_then_sum` (RealGen) z-scores each reward and divides by the sum of the weights;
    `sum_then_normalize` (Flow-GRPO) z-scores the weighted sum. `std` none divides by nothing (Dr. GRPO, 2503.20783). With `missing` skip
    (TRL) a reward that a sample lacks is left out of its sum, and a sample counts when any reward scored it.
    """
    options: dict[str, Any] = {
        "eps": eps,
        "min_valid": min_valid,
        "ddof": ddof,
        "of_batch": std == "global",
        "divide": std != "none",
    }
    if missing == "skip":
        rewards, weights, known_RB = given(rewards_RB, mask_RB, weights_R)
        if combine == "normalize_then_sum":
            scores = z_scores_each(rewards, known_RB, group_B, **options)
            return scores.answer(scores.summed(weights), clip)
        valid_B = known_RB.any(0)
    else:
        rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    if combine == "sum_then_normalize":
        rewards, weights = weighted_sum(rewards, weights), torch.ones(1, dtype=torch.float64)
    scores = z_scores(rewards, valid_B, group_B, **options)
    return scores.answer(scores.summed(weights), clip)
