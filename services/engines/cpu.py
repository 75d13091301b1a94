"""What makes a transformers model quicker on a CPU, its answers as before but for the last bits."""

import platform

import torch
from torch import Tensor, nn


class _Product(nn.Linear):
    """A convolution of one place, as the product that it is: several times faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def patches_as_products(model: nn.Module) -> None:
    """Of the patch embeddings of the Qwen-VL family, which get every patch by itself."""
    for embed in [one for one in model.modules() if ".qwen" in type(one).__module__ and type(one).__name__.endswith("PatchEmbed")]:
        old = getattr(embed, "proj", None)
        if isinstance(old, nn.Conv3d) and old.kernel_size == old.stride and not any(old.padding) and old.groups == 1:
            with torch.device("meta"):
                new = _Product(old.weight[0].numel(), old.out_channels, bias=old.bias is not None, dtype=old.weight.dtype)
            state = {name: tensor.flatten(1) if name == "weight" else tensor for name, tensor in old.state_dict().items()}
            new.load_state_dict(state, assign=True)
            embed.proj = new.requires_grad_(False)


class _OneDnn(nn.Linear):
    """By oneDNN, which takes all of a core's vector width; MKL, torch's own choice in float32, takes half of it on cores not Intel's."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def linears_by_onednn(model: nn.Module) -> int:
    """How many layers were changed: float32 on a CPU of x86 where torch has oneDNN, else none."""
    known = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if platform.machine() not in ("x86_64", "AMD64") or not known or not _has_op():
        return 0
    found = [
        one
        for one in model.modules()
        if type(one) is nn.Linear and one.weight.device.type == "cpu" and one.weight.dtype == torch.float32
    ]
    for linear in found:
        linear.__class__ = _OneDnn
    return len(found)


def _has_op() -> bool:
    """Whether torch has the operator, and it does what a linear layer does: it is torch's own, but not public."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (5, 8), (5,)))
    try:
        made = torch.ops.mkldnn._linear_pointwise(x[:, 1:], weight, bias, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.allclose(made, nn.functional.linear(x[:, 1:], weight, bias), atol=1e-4))
