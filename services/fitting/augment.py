"""Pictures changed at random before a refit sees them: real and generated ones the same way, so that no change tells the sides apart.

    augment: {flip: 0.5, blur: 0.5, jitter: 0.5, jpeg: 0.2, resize: 0.2}

The numbers are probabilities a picture. Defaults are RealGen V2's (2512.00473, its code), which changes pictures after they were brought to the
detector's size; here they are changed as they came, of whatever size, and then take the one path that scoring takes.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.reward import Item

Picture = NDArray[np.uint8]
Share = Annotated[float, Field(ge=0, le=1)]
_SIDE = 16  # no picture is made smaller than this


class AugmentOptions(BaseModel):
    """`augment:` under a reward's `fit:`; everything 0 leaves pictures as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    flip: Share = Field(default=0.5, description="left becomes right")
    blur: Share = Field(default=0.5, description="Gaussian, of `blur_kernels` pixels, with a sigma of `blur_sigma`")
    blur_kernels: tuple[Annotated[int, Field(ge=3, le=31)], ...] = Field(default=(3, 5), min_length=1)
    blur_sigma: tuple[Annotated[float, Field(gt=0)], float] = (0.1, 2.0)
    jitter: Share = Field(default=0.5, description="brightness, contrast and saturation, each times 1 +- `jitter_strength`")
    jitter_strength: float = Field(default=0.1, ge=0, lt=1)
    jitter_hue: float = Field(default=0.05, ge=0, le=0.5, description="of the circle of colours; grey stays grey")
    jpeg: Share = Field(default=0.0, description="through JPEG of a quality within `jpeg_quality`")
    jpeg_quality: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (60, 95)
    resize: Share = Field(default=0.0, description="to a share of its sides within `resize_scale`, and back")
    resize_scale: tuple[Annotated[float, Field(ge=0.1)], Annotated[float, Field(le=4)]] = (0.5, 1.0)

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentOptions":
        for name in ("blur_sigma", "jpeg_quality", "resize_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"`{name}` is [{low}, {high}]; give the smaller number first")
        if any(k % 2 == 0 for k in self.blur_kernels):
            raise ValueError(f"`blur_kernels` are {list(self.blur_kernels)}; a kernel has an odd number of pixels")
        return self


class _Dice:
    """Numbers out of a torch generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))


def blurred(image: Picture, kernel: int, sigma: float) -> Picture:
    """Gaussian of `kernel` taps along rows and columns, the picture mirrored at its edges."""
    reach = kernel // 2
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    pixels = np.pad(image.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    for axis in (0, 1):
        count = image.shape[axis]
        pixels = sum(np.take(pixels, range(i, i + count), axis) * tap for i, tap in enumerate(taps / taps.sum()))
    return _levels(pixels)


def jittered(image: Picture, brightness: float, contrast: float, saturation: float, hue: float = 0.0) -> Picture:
    """Factors, 1 changes nothing: towards black, the mean grey, each pixel's own grey. `hue` turns the colours by a share of their circle."""
    luma = np.array([0.299, 0.587, 0.114])
    pixels = image.astype(np.float64) * brightness
    mean = float((pixels @ luma).mean())
    pixels = mean + (pixels - mean) * contrast
    grey = (pixels @ luma)[..., None]
    pixels = grey + (pixels - grey) * saturation
    if not hue:
        return _levels(pixels)
    turned = np.array(Image.fromarray(_levels(pixels)).convert("HSV"))
    turned[..., 0] = (turned[..., 0].astype(np.int16) + round(hue * 256)) % 256
    return np.asarray(Image.fromarray(turned, "HSV").convert("RGB"))


def through_jpeg(image: Picture, quality: int) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized_and_back(image: Picture, scale: float) -> Picture:
    """Bicubic both ways, antialiased; no side under 16 pixels."""
    height, width = image.shape[:2]
    small = (max(_SIDE, round(width * scale)), max(_SIDE, round(height * scale)))
    return np.asarray(
        Image.fromarray(image).resize(small, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
    )


def _levels(pixels: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _changed(image: Picture, options: AugmentOptions, dice: _Dice) -> Picture:
    steps: list[tuple[float, Callable[[Picture], Picture]]] = [
        (options.resize, lambda x: resized_and_back(x, dice.between(*options.resize_scale))),
        (options.flip, lambda x: x[:, ::-1]),
        (
            options.blur,
            lambda x: blurred(x, options.blur_kernels[dice.below(len(options.blur_kernels))], dice.between(*options.blur_sigma)),
        ),
        (options.jitter, lambda x: jittered(x, *_factors(options, dice))),
        (
            options.jpeg,
            lambda x: through_jpeg(x, options.jpeg_quality[0] + dice.below(options.jpeg_quality[1] - options.jpeg_quality[0] + 1)),
        ),
    ]
    for probability, step in steps:
        if probability and dice.between(0, 1) < probability:
            image = step(image)
    return np.ascontiguousarray(image)


def _factors(options: AugmentOptions, dice: _Dice) -> tuple[float, float, float, float]:
    low, high = 1 - options.jitter_strength, 1 + options.jitter_strength
    return (
        dice.between(low, high),
        dice.between(low, high),
        dice.between(low, high),
        dice.between(-options.jitter_hue, options.jitter_hue),
    )


def augment(items: Sequence[Item], options: AugmentOptions, generator: torch.Generator) -> list[Item]:
    """The items with other pictures of the same sizes, uint8; prompts and the rest stay. One generator's state, one outcome."""
    dice = _Dice(generator)
    return [replace(item, image=_changed(item.image, options, dice)) for item in items]
