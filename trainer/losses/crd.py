"""Centred reward distillation (2603.14128): the policy's implicit reward is fitted to the real one, both centred within their prompt.

The implicit reward of a picture is by how much the policy matches it better than the old policy did; centring cancels the unknown
normaliser. Without the paper's adaptive weights and its guided teacher.
"""

import torch
from torch import Tensor

from trainer.losses.common import Loss
from trainer.losses.nft import optimality


def crd(
    error_B: Tensor, error_old_B: Tensor, advantages_B: Tensor, group_B: Tensor, beta: float = 1.0, largest: float = 5.0
) -> Loss:
    """Loss (B,) from `velocity_error`s of whole groups.

    Equal advantages give zero gradient where the errors equal the old ones, and hold the policy to the old one elsewhere.
    """
    implicit_B = error_old_B.detach() - error_B
    off_B = beta * _centred(implicit_B, group_B) - _centred(optimality(advantages_B, largest), group_B)
    return Loss(largest / beta * off_B**2, {"implicit_std": float(implicit_B.detach().std(correction=0))})


def _centred(values_B: Tensor, group_B: Tensor) -> Tensor:
    """(B,) minus the mean of its group."""
    _, place_B, size_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    sum_G = torch.zeros(len(size_G), dtype=values_B.dtype, device=values_B.device).index_add(0, place_B, values_B)
    return values_B - (sum_G / size_G)[place_B]
