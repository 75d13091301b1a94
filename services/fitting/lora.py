"""Low-rank adapters (2106.09685) on the linear layers and convolutions of a frozen network, by torch's own parametrizations.

A weight W (out, in, ...) becomes W + alpha / rank * B A in the shape of W, A (rank, in ...) random and B (out, rank) zero: at first nothing
changes, to the bit. Adapters live in a copy of the network that shares every frozen tensor with it; `merged` gives plain weights to serve.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

_KERNELS = ((1, 1), (3, 3))


class LoraOptions(BaseModel):
    """Which layers, and how much they may change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=4, ge=1, le=1024)
    alpha: float | None = Field(default=None, gt=0, description="scale of the change times `rank`; default: the rank")
    targets: tuple[str, ...] = Field(
        default=(),
        description="regular expressions, one of which is found in a layer's name; default: every layer that takes adapters",
    )

    @property
    def scale(self) -> float:
        """alpha / rank, 1 unless told otherwise."""
        return (self.alpha or self.rank) / self.rank


def changed(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale * B A, in the shape, type and layout of W."""
    return weight + (scale * (b @ a)).view(weight.shape).to(weight.dtype)


class _Delta(nn.Module):
    """The parametrization of one weight."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        inside = weight[0].numel()
        a = (torch.rand(rank, inside, generator=generator) * 2 - 1) * (3 / inside) ** 0.5
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return changed(weight, self.a, self.b, self.scale)


def shared_copy(module: nn.Module, own: Iterable[str] = ()) -> nn.Module:
    """A network of the same layers whose tensors are the very same, but for those named in `own`: float32 leaves with a gradient.

    The copy may be changed layer by layer, and used by another thread, while the first one serves.
    """
    memo: dict[int, object] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    copy = deepcopy(module, memo)
    for name in own:
        path, _, last = name.rpartition(".")
        was = copy.get_parameter(name)
        copy.get_submodule(path).register_parameter(last, nn.Parameter(was.detach().float().clone()))
    return copy


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A network whose tensors are the very same, but for these parameters: frozen, in the type and place of those they stand for."""
    copy = shared_copy(module)
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        whole = value.detach().to(copy.get_parameter(name))
        copy.get_submodule(path).register_parameter(last, nn.Parameter(whole, requires_grad=False))
    return copy


def adaptable(module: nn.Module) -> list[str]:
    """Names of the layers that take adapters: linear ones, and convolutions of 1x1 and 3x3 that are not split into groups."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.kernel_size in _KERNELS)
    ]


def adapted(module: nn.Module, options: LoraOptions, generator: torch.Generator) -> nn.Module:
    """A copy with adapters on its layers. ValueError names what cannot be adapted."""
    known = adaptable(module)
    try:
        chosen = [n for n in known if not options.targets or any(re.search(t, n) for t in options.targets)]
    except re.error as error:
        raise ValueError(f"`lora.targets` holds no regular expression: {error}") from error
    if not chosen:
        shown = ", ".join([*known[:3], "...", *known[-3:]] if len(known) > 6 else known) or "none"
        raise ValueError(
            f"`lora.targets` {list(options.targets)} finds no linear layer or convolution of 1x1 or 3x3; there are: {shown}"
        )
    copy = shared_copy(module).requires_grad_(False)
    for name in chosen:
        layer = copy.get_submodule(name)
        weight = layer.get_parameter("weight")
        if options.rank > min(len(weight), weight[0].numel()):
            rank = min(len(weight), weight[0].numel())
            raise ValueError(
                f"`lora.rank` {options.rank} is more than {name} has, {rank}: lower it, or leave the layer out of `targets`"
            )
        delta = _Delta(weight, options.rank, options.scale, generator)
        parametrize.register_parametrization(layer, "weight", delta)
    return copy


def adapters(module: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors of an adapted network: LAYER.a and LAYER.b."""
    return {
        f"{name.removesuffix('.parametrizations.weight.0')}.{which}": getattr(layer, which)
        for name, layer in module.named_modules()
        if isinstance(layer, _Delta)
        for which in ("a", "b")
    }


@torch.no_grad()
def merged(module: nn.Module, options: LoraOptions, values: Mapping[str, Tensor]) -> nn.Module:
    """The frozen network with W + alpha / rank * B A in the layers of `values` (those of `adapters`), plain weights; all else is shared."""
    whole: dict[str, Tensor] = {}
    for name in (key.removesuffix(".b") for key in values if key.endswith(".b")):
        weight = module.get_parameter(f"{name}.weight")
        a, b = (values[f"{name}.{which}"].to(weight.device, torch.float32) for which in ("a", "b"))
        whole[f"{name}.weight"] = changed(weight, a, b, options.scale)
    return with_values(module, whole)
