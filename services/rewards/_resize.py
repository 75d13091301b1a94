"""Antialiased resizing in float32, equal to `torch.nn.functional.interpolate(antialias=True)` and some times quicker on a CPU.

A row of the result is a weighted sum of few rows of the picture, and so are the columns: two products with banded matrices, cut into
blocks, which matrix multiplication does at the rate of the core. `python -m bench.forward` has both.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mode = Literal["bilinear", "bicubic"]
BLOCK = 12  # rows of the result that one product makes


def _filter(x: NDArray[np.float64], mode: Mode) -> NDArray[np.float64]:
    """The triangle, or Keys' cubic with a = -0.5."""
    x = np.abs(x)
    if mode == "bilinear":
        return np.maximum(1 - x, 0)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))


@lru_cache(maxsize=64)
def blocks(size: int, target: int, mode: Mode) -> tuple[tuple[slice, slice, Tensor], ...]:
    """(places in the result, places in the picture, weights) of one side; the weights of a place add up to 1."""
    scale = size / target
    reach = (2 if mode == "bicubic" else 1) * max(scale, 1)
    centres = scale * (np.arange(target) + 0.5)
    low = np.maximum((centres - reach + 0.5).astype(int), 0)
    high = np.minimum((centres + reach + 0.5).astype(int), size)
    out = []
    for start in range(0, target, BLOCK):
        to, of = slice(start, min(start + BLOCK, target)), slice(int(low[start]), int(high[min(start + BLOCK, target) - 1]))
        places = np.arange(of.start, of.stop)[None]
        inside = (places >= low[to, None]) & (places < high[to, None])
        weights = inside * _filter((places - centres[to, None] + 0.5) / max(scale, 1), mode)
        out.append((to, of, torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()))
    return tuple(out)


def upload(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Pictures of one size as (B, 3, H, W) uint8 on the device, in one copy."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2)


def resized(images: Sequence[NDArray[np.uint8]], sides: tuple[int, int], mode: Mode, device: torch.device) -> Tensor:
    """Pictures of one size, (H, W, 3), as (B, 3, *sides) float32 in 0..255; bicubic may go a little beyond."""
    height, width, _ = images[0].shape
    if device.type != "cpu" or height < 2 * sides[0] or width < 2 * sides[1]:
        return torch.nn.functional.interpolate(upload(images, device).float(), sides, mode=mode, antialias=True)
    out = torch.empty(len(images), sides[0], 3, sides[1])
    pixels, flat = torch.empty(height, width * 3), torch.empty(sides[0], width * 3)
    levels = pixels.numpy().reshape(height, width, 3)
    for image, result in zip(images, out, strict=True):
        np.copyto(levels, image)
        for to, of, weights in blocks(height, sides[0], mode):
            torch.mm(weights, pixels[of], out=flat[to])
        columns = flat.view(sides[0], width, 3).transpose(1, 2).reshape(sides[0] * 3, width)
        wide = result.view(sides[0] * 3, sides[1])
        for to, of, weights in blocks(width, sides[1], mode):
            wide[:, to] = columns[:, of] @ weights.T
    return out.transpose(1, 2)
