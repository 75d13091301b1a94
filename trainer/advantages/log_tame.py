"""PaCo-GRPO's (2512.04784) taming: a reward that varies much more than the others, for its size, enters the sum as log(1 + r).

h = std / (mean + 1e-6) over the batch, population std; a reward with h above the threshold is tamed, and the threshold is the mean of all h
unless given. Looks at the whole batch.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, usable, weighted_sum, z_scores


def log_tame(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
    std: Literal["group", "global"] = "group",
    tame_above: float | None = None,
) -> Advantages:
    """z-scores of the weighted sum in the group; ValueError for a reward of -1 or below."""
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    inside = rewards[:, valid_B]
    if inside.numel() and float(inside.min()) <= -1:
        raise ValueError(
            f"advantages.use=log_tame takes log(1 + reward), and one was {float(inside.min()):.4g} (turned round where lower is better): "
            "give it rewards.NAME.map, e.g. {use: affine, zero: -5, one: 5}"
        )
    tamed = torch.zeros(len(rewards), dtype=torch.bool)
    if inside.numel():
        varies = inside.std(1, correction=0) / (inside.mean(1) + 1e-6)
        flat = inside.amax(1) == inside.amin(1)
        varies = torch.where(flat, 0.0, varies)
        threshold = float(varies.mean()) if tame_above is None else tame_above
        tamed = varies > threshold + 1e-9 * max(1.0, abs(threshold))  # not above by rounding alone
    row = weighted_sum(torch.where(tamed[:, None], rewards.log1p(), rewards), weights)
    scores = z_scores(row, valid_B, group_B, eps=eps, min_valid=min_valid, of_batch=std == "global")
    return replace(scores.answer(scores.z_RB[0], clip), numbers={"tamed_rewards": float(tamed.sum())})
