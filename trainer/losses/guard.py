"""GRPO-Guard: a ratio with zero mean and equal scale at every step (2510.22319; RealGen's variant divides by -dt).

The bias is reduced per sample; RealGen's released code averages it over the micro-batch by accident.
"""

import torch
from torch import Tensor

from trainer.losses.common import Loss, clipped, mean_dims


def guard(
    logp_B: Tensor,
    logp_old_B: Tensor,
    mean: Tensor,
    mean_old: Tensor,
    diffusion: float,
    root_dt: float,
    advantages_B: Tensor,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """Loss (B,) for a step of kind `sde` only; `diffusion` is g, `root_dt` sqrt(-dt)."""
    scale = diffusion * root_dt
    bias = mean_dims((mean - mean_old) ** 2) / (2 * scale**2)
    loss = clipped(torch.exp((logp_B - logp_old_B + bias) * scale), advantages_B, clip_low, clip_high)
    return Loss(loss.values_B / root_dt**2, loss.diagnostics)
