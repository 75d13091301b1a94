"""A base that counts by itself and bonuses that count only on top of it, as FIRM's rewards: base * (s + (1 - s) bonus).

FIRM for generation has s = 0.4 (base: the instruction followed, bonus: quality) and 0.5 in its older form; for editing s = 0.6 (base: the
edit done, bonus: the rest kept), and there a base of at most 2 of 5 gets no bonus: `base_guard` 0.25 on [0, 1].
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.advantages.common import Advantages, in_unit, one_row, usable, z_scores


def base_bonus(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    base: int = 0,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
    std: Literal["group", "global"] = "group",
    base_share: float = 0.4,
    base_guard: float | None = None,
) -> Advantages:
    """z-scores of the total in the group; `base` is the row of the base in rewards_RB, all others with a weight are bonuses.

    The bonus is their weighted mean. ValueError for a reward outside [0, 1], or without a bonus.
    """
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    used = weights_R > 0
    if not bool(used[base]) or len(rewards) < 2:
        raise ValueError("advantages.use=base_bonus needs one reward with role=base and one with role=bonus, each with a weight")
    in_unit(rewards, valid_B, "base_bonus")
    row = int(used[:base].sum())
    shares = torch.where(torch.arange(len(weights)) == row, 0.0, weights)

    def total(columns: Tensor) -> Tensor:
        bonus = (shares[:, None] * columns).sum(0) / shares.sum()
        if base_guard is not None:
            bonus = torch.where(columns[row] <= base_guard, 0.0, bonus)
        return columns[row] * (base_share + (1 - base_share) * bonus)

    scores = z_scores(one_row(rewards, total), valid_B, group_B, eps=eps, min_valid=min_valid, of_batch=std == "global")
    return scores.answer(scores.z_RB[0], clip)
