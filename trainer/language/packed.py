"""Linear layers packed for drawing on a CPU: each weight once in oneDNN's own order, with its adapter added, until the drawing is done.

A step of drawing multiplies few rows by every weight, and spends most of its time on putting weights in order. The model's own weights are
not touched, so nothing drifts; sums are rounded in another order.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

MOST = 5 * 10**8  # weights that are packed, 2 GB
_ROWS = 16  # of the products that weights are packed for; others take them too


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, the float32 linear layers of a model on a CPU compute from packed copies, without gradient.

    Nothing changes for other types and devices, for models of more than `MOST` weights, and where torch has no oneDNN.
    """
    changed = _linear(model) if _can_pack() else []
    if sum(_base(module).weight.numel() for module in changed) > MOST:
        changed = []
    try:
        for module in changed:
            weight = torch.ops.mkldnn._reorder_linear_weight(_weight(module), _ROWS)
            module.forward = functools.partial(_product, weight, _base(module).bias)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _linear(model: nn.Module) -> list[Any]:
    """Layers with an adapter, and linear layers that are not a part of one."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    inside = {part for module in adapted for part in module.modules()}
    plain = [m for m in model.modules() if isinstance(m, nn.Linear) and m not in inside]
    found = [module for module in (*adapted, *plain) if isinstance(_base(module), nn.Linear)]
    return [m for m in found if _base(m).weight.dtype == torch.float32 and _base(m).weight.device.type == "cpu"]


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLinear) else module


def _weight(module: Any) -> Tensor:
    weight: Tensor = _base(module).weight.detach()
    if isinstance(module, LoraLinear) and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )
