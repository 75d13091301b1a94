"""How far the policy has moved from its reference, per sample.

`v_kl` compares velocities (RealGen's guard scripts); `x_kl` the means of a step, divided by 2 g^2 without dt (Flow-GRPO), so
published betas carry over. The gradient flows through the policy only.
"""

from torch import Tensor

from trainer.losses.common import mean_dims


def v_kl(v: Tensor, v_reference: Tensor) -> Tensor:
    """(B,) mean squared difference of velocities."""
    return mean_dims((v - v_reference.detach()) ** 2)


def x_kl(mean: Tensor, mean_reference: Tensor, diffusion_B: Tensor) -> Tensor:
    """(B,) squared difference of means over 2 g^2."""
    return mean_dims((mean - mean_reference.detach()) ** 2) / (2 * diffusion_B**2)
