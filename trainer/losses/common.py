"""What the losses share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Loss per sample (B,), and numbers to log."""

    values_B: Tensor
    diagnostics: Mapping[str, float]


def clipped(ratio_B: Tensor, advantages_B: Tensor, low: float, high: float) -> Loss:
    """PPO's pessimistic bound with an asymmetric range: max(-A r, -A clip(r, 1 - low, 1 + high))."""
    bounded = ratio_B.clamp(1 - low, 1 + high)
    values = torch.maximum(-advantages_B * ratio_B, -advantages_B * bounded)
    with torch.no_grad():
        off = ratio_B - 1
        diagnostics = {
            "clipfrac": float(((off > high) | (off < -low)).float().mean()),
            "ratio_dev": float(off.abs().max()),
        }
    return Loss(values, diagnostics)


def mean_dims(x: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return x.flatten(1).mean(1)


def velocity_error(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """(B,) mean squared error of a velocity at x = (1 - t) x0 + t noise, whose target is noise - x0: what flow matching trains on."""
    return mean_dims((v - (noise - x0)) ** 2)
