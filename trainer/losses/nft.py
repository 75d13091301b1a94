"""DiffusionNFT (2509.16117): learn from clean pictures and their advantages, without log-probabilities or an SDE.

A picture x0 of the old policy is noised again to x_t = (1 - t) x0 + t eps. Good pictures pull the velocity towards themselves, bad
ones push it off its reflection about the old velocity. The rollout may use any solver.
"""

import torch
from torch import Tensor

from trainer.losses.common import Loss, mean_dims


def optimality(advantages_B: Tensor, largest: float = 5.0) -> Tensor:
    """(B,) in [0, 1]: the advantage, clipped to +-largest, as the probability that the picture is a good one."""
    return (advantages_B / (2 * largest) + 0.5).clamp(0, 1)


def nft(
    v: Tensor,
    v_old: Tensor,
    x0: Tensor,
    noise: Tensor,
    t_B: Tensor,
    advantages_B: Tensor,
    beta: float = 1.0,
    largest: float = 5.0,
) -> Loss:
    """Loss (B,) at times t in (0, 1); gradient through `v` alone. `beta` 1.0 or 0.1 in the paper; the smaller, the bolder.

    Zero advantage gives zero gradient where v = v_old, and holds the policy to v_old elsewhere.
    """
    t = t_B.view(-1, *(1,) * (x0.ndim - 1))
    noised = (1 - t) * x0 + t * noise
    v_old = v_old.detach()

    def error(velocity: Tensor) -> Tensor:
        guess = noised - t * velocity
        with torch.no_grad():
            scale_B = mean_dims((guess.double() - x0.double()).abs()).clamp(min=1e-5)
        return mean_dims((guess - x0) ** 2) / scale_B

    good_B = optimality(advantages_B, largest)
    towards_B = error(beta * v + (1 - beta) * v_old)
    away_B = error((1 + beta) * v_old - beta * v)
    values = largest * (good_B * towards_B + (1 - good_B) * away_B) / beta
    with torch.no_grad():
        moved = float(mean_dims((v - v_old) ** 2).mean())
    return Loss(values, {"optimality": float(good_B.mean()), "moved": moved})
