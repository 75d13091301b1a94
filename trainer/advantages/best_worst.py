"""Only the ends of a group count (Flow-GRPO's modes `dpo` and `sft`): +1 for the best and -1 for the worst, or the best alone.

Those that share a place share its 1. A group in which all are equal has no best, and gives 0.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, usable, weighted_sum, z_scores


def best_worst(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    worst: bool = True,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
    combine: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
) -> Advantages:
    """By the weighted sum of z-scores, or of the rewards themselves (`sum_then_normalize`)."""
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    scores = z_scores(rewards, valid_B, group_B, eps=eps, min_valid=min_valid)
    judged = rewards if combine == "sum_then_normalize" else scores.z_RB
    judged_B = weighted_sum(judged, weights)[0]
    values = torch.zeros_like(judged_B)
    for group in torch.unique(group_B):
        members = (group_B == group) & scores.kept_B.bool()
        inside = judged_B[members]
        if len(inside) == 0:
            continue
        alike = 1e-9 * max(1.0, float(inside.abs().max()))  # sums that rounding alone tells apart share a place
        if float(inside.max() - inside.min()) <= alike:
            continue
        top, bottom = (inside >= inside.max() - alike).double(), (inside <= inside.min() + alike).double()
        values[members] = top / top.sum() - (bottom / bottom.sum() if worst else 0.0)
    return scores.answer(values, clip)


def best(rewards_RB: Tensor, mask_RB: Tensor, group_B: Tensor, weights_R: Tensor, **options: float) -> Advantages:
    """`best_worst` without the worst."""
    return best_worst(rewards_RB, mask_RB, group_B, weights_R, worst=False, **options)  # type: ignore[arg-type]
