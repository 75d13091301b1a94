"""The MobileNetV2 (1801.04381) that npm's nsfwjs carries, its weights as shipped in services/weights/nsfwjs.

Keras' layout: kernels (H, W, in, out), batch norms with epsilon 0.001, strided convolutions padded at the far side only. The norms
are folded into the kernels when the weights are read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

CLASSES = ("drawing", "hentai", "neutral", "porn", "sexy")
SIDE = 224
_STRIDED = (1, 3, 6, 13)


def read(path: Path) -> dict[str, Tensor]:
    """float64 tensors by Keras name, from bytes and the ranges in the header: min + scale * byte."""
    with safe_open(path, "pt") as file:
        ranges = json.loads((file.metadata() or {}).get("ranges", "{}"))
        if not ranges:
            raise ValueError(f"{path} holds no ranges for its bytes; services/weights/nsfwjs/recipe.py makes the file anew")
        return {name: file.get_tensor(name).double() * ranges[name][1] + ranges[name][0] for name in file.keys()}  # noqa: SIM118


def _folded(t: Mapping[str, Tensor], conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """A convolution with its batch norm folded in."""
    depthwise = f"{conv}/depthwise_kernel" in t
    kernel = t[f"{conv}/depthwise_kernel"].permute(2, 3, 0, 1) if depthwise else t[f"{conv}/kernel"].permute(3, 2, 0, 1)
    gain = t[f"{norm}/gamma"] / (t[f"{norm}/moving_variance"] + 1e-3).sqrt()
    out, per_group, side, _ = kernel.shape
    layer = nn.Conv2d(
        out if depthwise else per_group, out, side, stride, side // 2 if stride == 1 else 0, groups=out if depthwise else 1
    )
    layer.weight.data = (kernel * gain.view(-1, 1, 1, 1)).float().contiguous()
    layer.bias.data = (t[f"{norm}/beta"] - t[f"{norm}/moving_mean"] * gain).float()  # type: ignore[union-attr]
    return layer


def _dense(t: Mapping[str, Tensor], name: str) -> nn.Linear:
    kernel = t[f"{name}/kernel"].T.float().contiguous()
    layer = nn.Linear(kernel.shape[1], kernel.shape[0])
    layer.weight.data, layer.bias.data = kernel, t[f"{name}/bias"].float()
    return layer


class _Block(nn.Module):
    """Expand, depthwise, project; with the input added where the shapes agree."""

    def __init__(self, t: Mapping[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if f"{name}_expand/kernel" in t:
            layers += [_folded(t, f"{name}_expand", f"{name}_expand_BN"), nn.ReLU6()]
        if stride == 2:
            layers += [nn.ZeroPad2d((0, 1, 0, 1))]
        layers += [_folded(t, f"{name}_depthwise", f"{name}_depthwise_BN", stride), nn.ReLU6()]
        layers += [_folded(t, f"{name}_project", f"{name}_project_BN")]
        self.body = nn.Sequential(*layers)
        first, last = (m for m in (layers[0], layers[-1]) if isinstance(m, nn.Conv2d))
        self.adds = stride == 1 and first.in_channels == last.out_channels and name != "expanded_conv"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """Pictures (B, 3, 224, 224) in [0, 1] to logits (B, 5) of CLASSES."""

    def __init__(self, t: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),
            _folded(t, "Conv1", "bn_Conv1", 2),
            nn.ReLU6(),
            _Block(t, "expanded_conv", 1),
            *(_Block(t, f"block_{i}", 2 if i in _STRIDED else 1) for i in range(1, 17)),
            _folded(t, "Conv_1", "Conv_1_bn"),
            nn.ReLU6(),
        )
        self.head = nn.Sequential(_dense(t, "dense_1"), nn.ReLU(), _dense(t, "dense_2"), nn.ReLU(), _dense(t, "dense_3"))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pixels).mean((2, 3)))
        return logits


def resize(pixels: Tensor) -> Tensor:
    """0..255 pixels of any size to [0, 1] at 224, bilinear with aligned corners and no antialiasing: what nsfwjs feeds its model."""
    pixels = pixels / 255
    if pixels.shape[-2:] != (SIDE, SIDE):
        pixels = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=True)
    return pixels
