"""How much better than its own group: z-scores per prompt, per reward, then weighted.

A_i = (r_i - mean) / (std + eps) inside the group, population std (Flow-GRPO, RealGen). A missing reward is NaN or masked: its
sample gets weight 0, never a number. Equal rewards give exactly zero.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, usable, weighted_sum, z_scores


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
    std: Literal["group", "global"] = "group",
    combine: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
) -> Advantages:
    """float64 arithmetic, float32 answer; |A| <= clip.

    A sample counts only when every reward with a weight scored it. A group with fewer than `min_valid` such members is dropped
    (weights 0). `normalize_then_sum` (RealGen) z-scores each reward and divides by the sum of the weights;
    `sum_then_normalize` (Flow-GRPO) z-scores the weighted sum.
    """
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    if combine == "sum_then_normalize":
        rewards, weights = weighted_sum(rewards, weights), torch.ones(1, dtype=torch.float64)
    scores = z_scores(rewards, valid_B, group_B, eps=eps, min_valid=min_valid, ddof=ddof, of_batch=std == "global")
    return scores.answer(scores.summed(weights), clip)
