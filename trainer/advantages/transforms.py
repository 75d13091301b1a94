"""What is done to rewards before a rule, and to advantages after it: maps to [0, 1], gates, weights of the uncertain."""

from typing import Literal

import torch
from torch import Tensor


def affine(values_B: Tensor, zero: float, one: float) -> Tensor:
    """[0, 1]: 0 at `zero`, 1 at `one` (which may be the smaller), clipped beyond."""
    return ((values_B - zero) / (one - zero)).clamp(0, 1)


def sigmoid(values_B: Tensor, centre: float, scale: float) -> Tensor:
    """(0, 1): 0.5 at `centre`, 0.73 at `centre + scale`; a negative scale turns it round."""
    return torch.sigmoid((values_B - centre) / scale)


def gate(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    passes_B: Tensor,
    known_B: Tensor,
    below: Literal["worst", "mask"],
) -> tuple[Tensor, Tensor]:
    """(rewards, mask) under a condition: who fails gets each reward's worst value in its group, or is masked.

    Where the condition itself is not known (`known_B` false) the sample is masked. The worst is that of the members scored; a group
    in which all fail is left with equal rewards, and so with nothing to learn.
    """
    mask = mask_RB & known_B
    fails_B = known_B & ~passes_B
    if below == "mask":
        return rewards_RB, mask & ~fails_B
    rewards = rewards_RB.clone()
    for group in torch.unique(group_B[fails_B]):
        members = group_B == group
        for row, seen in zip(rewards, mask, strict=True):
            there = members & seen & row.isfinite()
            if bool(there.any()):
                row[members & fails_B] = row[there].min()
    return rewards, mask


def trusted(advantages_B: Tensor, uncertainty_B: Tensor) -> Tensor:
    """A exp(-U): Ctrl-U's (2410.11236) weight of a reward loss, here of the advantage. U >= 0 is already over its temperature."""
    return (advantages_B.double() * torch.exp(-uncertainty_B)).float()
