"""What happens to pictures on their way, at rising strength: JPEG, resizing there and back, blur, noise. The size stays."""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]


def jpeg(image: Pixels, quality: float, seed: int) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(quality))
    return np.asarray(Image.open(buffer).convert("RGB"))


def resize(image: Pixels, factor: float, seed: int) -> Pixels:
    """Smaller by `factor`, and back, both bicubic."""
    height, width = image.shape[:2]
    small = (max(4, round(width * factor)), max(4, round(height * factor)))
    picture = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def blur(image: Pixels, sigma: float, seed: int) -> Pixels:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def noise(image: Pixels, sigma: float, seed: int) -> Pixels:
    """Gaussian, of `sigma` levels of 255."""
    drawn = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + drawn), 0, 255).astype(np.uint8)


WAYS: dict[str, tuple[Callable[[Pixels, float, int], Pixels], tuple[float, ...], str]] = {
    "jpeg": (jpeg, (90, 70, 50, 30, 10), "quality"),
    "resize": (resize, (0.9, 0.75, 0.5, 0.35, 0.25), "factor"),
    "blur": (blur, (0.5, 1, 1.5, 2, 3), "sigma in pixels"),
    "noise": (noise, (2, 5, 10, 20, 40), "sigma of 255"),
}


def altered(image: Pixels, way: str, strength: float, sha: str) -> Pixels:
    """The same file alters the same way every time."""
    return WAYS[way][0](image, strength, int(sha[:12], 16))
