"""Rewards in [0, 1] multiplied, so that one bad reward spoils the sample (GoT-R1's product); weights are exponents."""

from typing import Literal

from torch import Tensor

from trainer.advantages.common import Advantages, in_unit, one_row, usable, z_scores


def product(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    *,
    eps: float = 1e-4,
    clip: float = 5.0,
    min_valid: int = 2,
    std: Literal["group", "global"] = "group",
) -> Advantages:
    """z-scores of prod_r u_r ** w_r in the group; ValueError for a reward outside [0, 1]."""
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    in_unit(rewards, valid_B, "product")
    row = one_row(rewards, lambda columns: (columns ** weights[:, None]).prod(0))
    scores = z_scores(row, valid_B, group_B, eps=eps, min_valid=min_valid, of_batch=std == "global")
    return scores.answer(scores.z_RB[0], clip)
