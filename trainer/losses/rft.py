"""Reward-filtered fine-tuning: flow matching on the better pictures of each group, as in curated retraining on a model's own output.

In the limit that finds the highest reward; a share of real pictures keeps it from collapsing (self-consuming generative models).
"""

import torch
from torch import Tensor

from trainer.losses.common import Loss


def kept(advantages_B: Tensor, weights_B: Tensor, size: int, share: float | None = None, above: float | None = None) -> Tensor:
    """0/1 (B,): in each group of `size` rows the best `share` of the scored ones (rounded, one at least), or all above a threshold.

    A group whose members are all alike has no better ones, and none is kept.
    """
    out = torch.zeros_like(weights_B)
    for start in range(0, len(advantages_B), size):
        rows = torch.arange(start, min(start + size, len(advantages_B)))
        rows = rows[weights_B[rows] > 0]
        if len(rows) == 0 or bool(advantages_B[rows].max() == advantages_B[rows].min()):
            continue
        if above is not None:
            out[rows[advantages_B[rows] > above]] = 1.0
        else:
            assert share is not None
            count = max(1, round(share * len(rows)))
            out[rows[advantages_B[rows].argsort(descending=True, stable=True)[:count]]] = 1.0
    return out


def rft(error_B: Tensor) -> Loss:
    """Loss (B,): the `velocity_error` itself."""
    return Loss(error_B, {"error": float(error_B.detach().mean())})
