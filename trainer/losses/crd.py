"""CRD: the policy's implicit reward, as it differs between pictures, is fitted to the real one (as in Flow-Factory).

The implicit reward of a picture is by how much the policy matches it better than the old policy did.
"""

from torch import Tensor

from trainer.losses.common import Loss
from trainer.losses.nft import optimality


def crd(error_B: Tensor, error_old_B: Tensor, advantages_B: Tensor, beta: float = 1.0, largest: float = 5.0) -> Loss:
    """Loss (B,) from `velocity_error`s; both rewards are centred over the batch given, so give whole groups.

    Equal advantages give zero gradient where the errors are equal, and hold the policy to the old one elsewhere.
    """
    implicit_B = error_old_B.detach() - error_B
    real_B = optimality(advantages_B, largest)
    off_B = beta * (implicit_B - implicit_B.mean()) - (real_B - real_B.mean())
    return Loss(largest / beta * off_B**2, {"implicit_std": float(implicit_B.detach().std(correction=0))})
