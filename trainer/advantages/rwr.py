"""Flow-GRPO's mode `rwr`: the weighted mean of the rewards themselves. No group is looked at, so equal rewards are not 0."""

from torch import Tensor

from trainer.advantages.common import Advantages, usable, weighted_sum, z_scores


def rwr(
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
    return scores.answer(weighted_sum(rewards, weights)[0] / weights.sum(), clip)
