"""Advantage weighted matching (2509.25050): the clipped loss with the negative flow-matching error for a log-probability."""

import torch
from torch import Tensor

from trainer.losses.common import Loss, clipped


def awm(error_B: Tensor, error_old_B: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float) -> Loss:
    """Loss (B,). Errors are `velocity_error` of the policy and of the old one at the same noise and time, weighted alike if at all."""
    return clipped(torch.exp(error_old_B.detach() - error_B), advantages_B, clip_low, clip_high)
