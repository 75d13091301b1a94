"""What a reward is fitted by: pure functions, tensors in, a scalar with its gradient out.

A logit is the log-odds of "photograph"; a score is any number that is higher for the better picture. R pictures are real, G generated; where
a loss compares pairs, position i of one tensor meets position i of the other.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(real_R: Tensor, generated_G: Tensor, real: float = 0.95, generated: float = 0.05) -> Tensor:
    """Half of each side's mean of -t log sigmoid(z) - (1 - t) log sigmoid(-z), z the logit and t the target of its side.

    With two classes this is the cross-entropy of softmax, z the difference of its logits. Soft targets keep logits near
    +-log(t / (1 - t)), where the reward is not saturated. RealGen V2 (2512.00473; its code: 0.95 and 0.05).
    """

    def side(logits: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    return (side(real_R, real) + side(generated_G, generated)) / 2


def hinge(real_R: Tensor, generated_G: Tensor) -> Tensor:
    """Half of mean relu(1 - s(real)) + mean relu(1 + s(generated)); of any shape. Adv-GRPO (2511.20256), Lim and Ye (1705.02894)."""
    return (F.relu(1 - real_R).mean() + F.relu(1 + generated_G).mean()) / 2


def preference(better_P: Tensor, worse_P: Tensor) -> Tensor:
    """Mean of -log sigmoid(better - worse) over P pairs: Bradley-Terry. Adv-GRPO refits PickScore by it, real over generated."""
    return F.softplus(worse_P - better_P).mean()


def bradley_terry_ties(first_P: Tensor, second_P: Tensor, tied_P: Tensor, k: float = 5.0) -> Tensor:
    """Mean -log P of what was seen of P pairs: the first is better, or, where `tied_P`, neither is. k > 1: the larger, the more ties.

    With d = first - second, P(first) = e^d / (e^d + k) and P(tie) = (k^2 - 1) / ((1 + k e^-d)(1 + k e^d)): Rao and Kupper (1967), as
    EditReward (2509.26346) has it with k = 5.
    """
    if k <= 1:
        raise ValueError(f"k is {k}; above 1 there are ties, and without ties `preference` is the loss")
    won, lost = F.softplus(math.log(k) - (first_P - second_P)), F.softplus(math.log(k) + (first_P - second_P))
    return torch.where(tied_P, won + lost - math.log(k * k - 1), won).mean()


def gaussian_ranking(
    better_mean_P: Tensor, better_sigma_P: Tensor, worse_mean_P: Tensor, worse_sigma_P: Tensor, nodes: int = 64
) -> Tensor:
    """Mean of -E log sigmoid(z) over P pairs, z normal with mean better - worse and variance the sum of both: EditReward (2509.26346).

    Its code draws 1000 numbers a pair; here Gauss-Hermite quadrature takes the expectation, to 1e-4 where sigma is below 5.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    at = torch.from_numpy(points).to(better_mean_P)
    share = torch.from_numpy(weights / weights.sum()).to(better_mean_P)
    spread_P = (better_sigma_P.square() + worse_sigma_P.square()).sqrt()
    z_PN = (better_mean_P - worse_mean_P)[:, None] + spread_P[:, None] * at
    return (F.softplus(-z_PN) @ share).mean()


def triplet(anchor_PD: Tensor, better_PD: Tensor, worse_PD: Tensor, margin: float = 0.2) -> Tensor:
    """Mean of relu(margin + cos(anchor, worse) - cos(anchor, better)): a prompt nearer to its better picture. After Social Reward.

    Its page names the loss and the margin of 0.2; the cosine is a choice of this code, as embeddings of CLIP-like models are compared by it.
    """
    return F.relu(margin + F.cosine_similarity(anchor_PD, worse_PD) - F.cosine_similarity(anchor_PD, better_PD)).mean()


def orthogonality(frozen_WN: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """How far the spaces of OmniAID's experts (W, r) overlap each other and the frozen space: 0 where all are at right angles.

    Mean over all pairs of bases of the Frobenius norm of A'B, columns of experts divided by their lengths (2511.08423, its code). The frozen
    basis, W - r singular directions, is given by its complement `frozen_WN`, orthonormal (W, N), for |U'e| = |e - N N'e|.
    """
    units = [F.normalize(expert, dim=0) for expert in experts]
    apart = [unit - frozen_WN @ (frozen_WN.T @ unit) for unit in units]
    apart += [a.T @ b for i, a in enumerate(units) for b in units[i + 1 :]]
    return torch.stack([torch.linalg.matrix_norm(one) for one in apart]).mean()
