"""Advantage weighted matching (2509.25050): the clipped loss with the negative flow-matching error for a log-probability."""

from typing import Literal

import torch
from torch import Tensor

from trainer.losses.common import Loss, clipped

Weighting = Literal["uniform", "t", "t2", "huber"]


def weighted(error_B: Tensor, t_B: Tensor, how: Weighting) -> Tensor:
    """(B,) errors weighted by their time: 1, t, t^2, or `huber` t (sqrt(error + 1e-10) - 1e-5), as Flow-Factory has them."""
    if how == "huber":
        return t_B * ((error_B + 1e-10).sqrt() - 1e-5)
    return error_B * t_B ** {"uniform": 0, "t": 1, "t2": 2}[how]


def awm(error_B: Tensor, error_old_B: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float) -> Loss:
    """Loss (B,). Errors are `velocity_error` of the policy and of the old one at the same noise and time, weighted alike if at all."""
    return clipped(torch.exp(error_old_B.detach() - error_B), advantages_B, clip_low, clip_high)
