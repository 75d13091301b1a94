"""DGPO (2510.08425): a preference between the good and the bad half of a group, weighted by advantages."""

import torch
from torch import Tensor

from trainer.losses.common import Loss


def dgpo(error_B: Tensor, error_reference_B: Tensor, advantages_B: Tensor, group_B: Tensor, beta: float = 100.0) -> Loss:
    """Loss (B,) from `velocity_error`s; the members of a group share noise and time. Whole groups only: their sum is in the weight."""
    with torch.no_grad():
        _, place_B, size_G = torch.unique(group_B, return_inverse=True, return_counts=True)
        share_B = beta * advantages_B * (error_B - error_reference_B) / size_G[place_B]
        total_G = torch.zeros(len(size_G), dtype=share_B.dtype, device=share_B.device).index_add_(0, place_B, share_B)
        weight_B = torch.sigmoid(total_G)[place_B]
    return Loss(weight_B * advantages_B * error_B, {"weight": float(weight_B.mean())})
