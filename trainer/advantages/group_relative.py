"""How much better than its own group: z-scores per prompt, per reward, then weighted.

A_i = (r_i - mean) / (std + eps) inside the group, population std (Flow-GRPO, RealGen). A missing reward is NaN or masked: its
sample gets weight 0, never a number. Equal rewards give exactly zero.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """values_B (0 where not scored), weights_B in {0, 1}, and what happened to the groups."""

    values_B: Tensor
    weights_B: Tensor
    zero_variance_groups: int
    dropped_groups: int


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
    if bool((weights_R < 0).any()) or float(weights_R.sum()) <= 0:
        raise ValueError("reward weights must be >= 0 and not all 0; for a reward to be lowered, set higher_is_better: false")
    rewards = rewards_RB.double()
    used = weights_R > 0
    valid_B = (mask_RB & rewards.isfinite())[used].all(0)
    weights = weights_R.double()
    if combine == "sum_then_normalize":
        rewards = (weights[used, None] * rewards[used]).sum(0, keepdim=True)
        weights, used = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    values = torch.zeros(rewards.shape[1], dtype=torch.float64)
    kept = torch.zeros(rewards.shape[1])
    flat = dropped = 0
    spread = rewards[:, valid_B].std(1, correction=ddof) if int(valid_B.sum()) > ddof else torch.zeros(len(rewards))
    for group in torch.unique(group_B):
        members = (group_B == group) & valid_B
        if int(members.sum()) < max(min_valid, ddof + 1):
            dropped += 1
            continue
        kept[members] = 1.0
        inside = rewards[used][:, members]
        centred = inside - inside.mean(1, keepdim=True)
        constant = inside.amax(1) == inside.amin(1)
        centred[constant] = 0.0
        flat += int(constant.all())
        scale = inside.std(1, correction=ddof) if std == "group" else spread[used]
        z = centred / (scale[:, None] + eps)
        values[members] = (weights[used, None] * z).sum(0) / weights[used].sum()
    return Advantages(values.clamp(-clip, clip).float(), kept, flat, dropped)
