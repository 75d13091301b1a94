"""The clipped policy gradient of GRPO on one stochastic step (Flow-GRPO, 2505.05470)."""

import torch
from torch import Tensor

from trainer.losses.common import Loss, clipped


def grpo(logp_B: Tensor, logp_old_B: Tensor, advantages_B: Tensor, clip_low: float, clip_high: float) -> Loss:
    """Loss (B,). Log-probabilities are means over dimensions, so sensible ranges are 1e-5 to 1e-3, not 0.2."""
    loss = clipped(torch.exp(logp_B - logp_old_B), advantages_B, clip_low, clip_high)
    kl = float(0.5 * (logp_B.detach() - logp_old_B).square().mean())
    return Loss(loss.values_B, {**loss.diagnostics, "approx_kl": kl})
