"""What the rules share: their answer, which samples count, one row made of several."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """values_B (0 where not scored), weights_B in {0, 1}, and what happened to the groups.

    `per_reward_RB`: z-scores of each reward with a weight, where a loss mixes their gradients. `kl_gate_B` in {0, 1}: the samples that the
    KL holds back; None holds all. `numbers` are for the log.
    """

    values_B: Tensor
    weights_B: Tensor
    zero_variance_groups: int
    dropped_groups: int
    per_reward_RB: Tensor | None = None
    kl_gate_B: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


def given(rewards_RB: Tensor, mask_RB: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards (R', B), weights (R',), known (R', B)) of the rewards with a weight, float64, 0 where not known."""
    if bool((weights_R < 0).any()) or float(weights_R.sum()) <= 0:
        raise ValueError("reward weights must be >= 0 and not all 0; for a reward to be lowered, set higher_is_better: false")
    used = weights_R > 0
    rewards = rewards_RB.double()[used]
    known_RB = mask_RB[used] & rewards.isfinite()
    return torch.where(known_RB, rewards, 0.0), weights_R.double()[used], known_RB


def usable(rewards_RB: Tensor, mask_RB: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards (R', B), weights (R',), valid_B) of the rewards with a weight, float64; a sample is valid when all of these scored it, and
    has 0 everywhere when it is not."""
    rewards, weights, known_RB = given(rewards_RB, mask_RB, weights_R)
    valid_B = known_RB.all(0)
    return torch.where(valid_B, rewards, 0.0), weights, valid_B


@dataclass(frozen=True)
class Scores:
    """z_RB float64 (0 where not kept) of the rewards in their groups, kept_B in {0, 1}, and what happened to the groups."""

    z_RB: Tensor
    kept_B: Tensor
    flat: int
    dropped: int

    def summed(self, weights_R: Tensor) -> Tensor:
        """(B,): the weighted mean over the rewards."""
        return (weights_R[:, None] * self.z_RB).sum(0) / weights_R.sum()

    def answer(self, values_B: Tensor, clip: float) -> Advantages:
        """float32, |A| <= clip, 0 where not kept."""
        clipped = torch.where(self.kept_B.bool(), values_B.clamp(-clip, clip), 0.0)
        return Advantages(clipped.float(), self.kept_B, self.flat, self.dropped)


def z_scores(
    rewards_RB: Tensor,
    valid_B: Tensor,
    group_B: Tensor,
    *,
    eps: float,
    min_valid: int,
    ddof: int = 0,
    of_batch: bool = False,
    divide: bool = True,
) -> Scores:
    """(r - mean) / (std + eps) of each reward in its group, exactly 0 where all are equal; `of_batch` takes the batch's deviation, without
    `divide` it is r - mean.

    A group with fewer than `min_valid` valid members is dropped.
    """
    z, kept = torch.zeros_like(rewards_RB), torch.zeros(rewards_RB.shape[1])
    flat = dropped = 0
    spread = rewards_RB[:, valid_B].std(1, correction=ddof) if int(valid_B.sum()) > ddof else torch.zeros(len(rewards_RB))
    for group in torch.unique(group_B):
        members = (group_B == group) & valid_B
        if int(members.sum()) < max(min_valid, ddof + 1):
            dropped += 1
            continue
        kept[members] = 1.0
        inside = rewards_RB[:, members]
        centred = inside - inside.mean(1, keepdim=True)
        constant = inside.amax(1) == inside.amin(1)
        centred[constant] = 0.0
        flat += int(constant.all())
        scale = spread if of_batch else inside.std(1, correction=ddof)
        z[:, members] = centred / (scale[:, None] + eps) if divide else centred
    return Scores(z, kept, flat, dropped)


def z_scores_each(rewards_RB: Tensor, known_RB: Tensor, group_B: Tensor, **options: Any) -> Scores:
    """`z_scores` of each reward among the samples that it scored, 0 for the others; a sample is kept when any reward's is."""
    each = [z_scores(rewards_RB[r : r + 1], known_RB[r], group_B, **options) for r in range(len(rewards_RB))]
    z, kept = torch.cat([scores.z_RB for scores in each]), torch.stack([scores.kept_B for scores in each]).amax(0)
    groups = [group_B == group for group in torch.unique(group_B)]
    dropped = sum(not bool(kept[members].any()) for members in groups)
    return Scores(z, kept, sum(not bool(z[:, members].any()) for members in groups) - dropped, dropped)


def one_row(rewards_RB: Tensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """formula((R, B)) -> (B,) as (1, B), computed once for each different column: equal rewards give equal bits, in any order."""
    columns, place_B = torch.unique(rewards_RB, dim=1, return_inverse=True)
    return formula(columns)[place_B][None]


def weighted_sum(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    """(1, B)."""
    return one_row(rewards_RB, lambda columns: (weights_R[:, None] * columns).sum(0))


def in_unit(rewards_RB: Tensor, valid_B: Tensor, rule: str) -> None:
    """ValueError unless all valid rewards lie in [0, 1]."""
    inside = rewards_RB[:, valid_B]
    if inside.numel() and not (float(inside.min()) >= 0 and float(inside.max()) <= 1):
        raise ValueError(
            f"advantages.use={rule} multiplies rewards in [0, 1], and one was between {float(inside.min()):.4g} and "
            f"{float(inside.max()):.4g}: give it rewards.NAME.map, e.g. {{use: sigmoid, centre: 0, scale: 1}}"
        )
