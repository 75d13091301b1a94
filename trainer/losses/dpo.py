"""Diffusion-DPO (2311.12908) on pairs: the best picture of a group against the worst, at the same noise and time."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from trainer.losses.common import Loss


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, chosen_reference_P: Tensor, rejected_reference_P: Tensor, beta: float = 2000.0
) -> Loss:
    """Loss (P,) per pair from `velocity_error`s of the policy and of the reference; -log sigmoid(beta / 2 * margin)."""
    margin_P = (chosen_reference_P.detach() - chosen_P) - (rejected_reference_P.detach() - rejected_P)
    return Loss(-logsigmoid(beta / 2 * margin_P), {"accuracy": float((margin_P > 0).float().mean())})
