"""Products with frozen weights by oneDNN on a CPU, forward and backward, in float32.

torch leaves them to MKL, which takes half of the vector width of cores that are not Intel's. Only the input gets a gradient, as a LoRA's
base layers need it. The sums are rounded in another order. Small products stay with MKL: there is little to gain, and every shape of
product costs memory for kernels of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**27  # multiplications


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _by_onednn(gradients[0].contiguous(), weight.t(), None), None, None


class FrozenLinear(nn.Linear):
    """A linear layer whose weights get no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() * self.out_features < LARGE:
            return super().forward(input)
        out: Tensor = _Product.apply(input, self.weight, self.bias)
        return out


def by_onednn(model: nn.Module) -> int:
    """Change the frozen float32 linear layers that lie on the CPU; how many. None where torch has no oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    found = [m for m in model.modules() if type(m) is nn.Linear and _fits(m.weight)]
    for linear in found:
        linear.__class__ = FrozenLinear
    return len(found)


def _fits(weight: Tensor) -> bool:
    return not weight.requires_grad and weight.dtype == torch.float32 and weight.device.type == "cpu"


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
