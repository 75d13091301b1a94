"""MARBLE: several rewards, one step. The shortest vector in the hull of their gradients lowers every loss, unless they are opposed.

Taken: min-norm weights on the simplex (MGDA), kept for some steps and smoothed; one backward pass through the mixed optimality, since
the NFT loss is affine in it. Ours: gradients are compared at unit length, so that a reward with a long one is not voted down by that alone.
"""

import torch
from torch import Tensor

from trainer.losses.nft import optimality


def min_norm(gram_KK: Tensor, tolerance: float = 1e-10, most: int = 10_000) -> Tensor:
    """(K,) float64 >= 0 that sums to 1 and makes a^T G a smallest. Frank-Wolfe with pairwise steps: mass goes from the worst to the best."""
    gram = gram_KK.double()
    a = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    scale = float(gram.diagonal().max().clamp(min=1e-300))
    for _ in range(most):
        slope = gram @ a
        best = int(slope.argmin())
        worst = int(torch.where(a > 0, slope, -torch.inf).argmax())
        gain = float(slope[worst] - slope[best])
        if gain <= tolerance * scale:
            break
        bend = float(gram[best, best] + gram[worst, worst] - 2 * gram[best, worst])
        moved = min(float(a[worst]), gain / bend if bend > 0 else torch.inf)
        a[best] += moved
        a[worst] = 0.0 if moved == float(a[worst]) else a[worst] - moved
    return a / a.sum()


def simplex_weights(gram_KK: Tensor, unit: bool = True) -> Tensor:
    """Weights (K,) of the losses whose mixed gradient is shortest; `unit` compares the gradients at length 1. A zero gradient gets none."""
    gram = gram_KK.double()
    length = gram.diagonal().clamp(min=0).sqrt()
    alive = length > 1e-12 * length.max().clamp(min=1e-300)
    if not bool(alive.any()):
        return torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    scale = length[alive] if unit else torch.ones(int(alive.sum()), dtype=torch.float64)
    out = torch.zeros(len(gram), dtype=torch.float64)
    out[alive] = min_norm(gram[alive][:, alive] / (scale[:, None] * scale)) / scale
    return out / out.sum()


def mixed(per_reward_RB: Tensor, weights_R: Tensor, largest: float = 5.0) -> Tensor:
    """Advantages (B,) whose optimality is the weighted mean of the rewards' optimalities, each after its own clipping."""
    good_RB = optimality(per_reward_RB.double(), largest)
    return ((weights_R.double().to(good_RB.device) @ good_RB - 0.5) * 2 * largest).to(per_reward_RB.dtype)
