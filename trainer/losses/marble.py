"""MARBLE: several rewards, one step. The shortest vector in the hull of their gradients lowers every loss, unless they are opposed.

Taken: min-norm weights on the simplex (MGDA), kept for some steps and smoothed; one backward pass through the mixed optimality, since
the NFT loss is affine in it. Ours: gradients are compared at unit length, so that a reward with a long one is not voted down by that alone.
"""

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from trainer.losses.nft import optimality


def min_norm(gram_KK: Tensor) -> Tensor:
    """(K,) float64 >= 0 that sums to 1 and makes a^T G a smallest.

    With G = R^T R, the u >= 0 that makes |R u|^2 + (1 - sum u)^2 smallest is that mix times a number, so scipy's
    non-negative least squares finds it exactly, however badly conditioned G is.
    """
    gram = gram_KK.double().cpu()
    scale = float(gram.diagonal().max())
    if not scale > 0:
        return torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram / scale)
    root = values.clamp(min=0).sqrt()[:, None] * vectors.T
    found, _ = nnls(torch.cat([root, torch.ones(1, len(gram), dtype=torch.float64)]).numpy(), np.eye(len(gram) + 1)[-1])
    a = torch.from_numpy(found)
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
