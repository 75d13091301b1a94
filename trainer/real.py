"""Real pictures with prompts, to learn from beside one's own: a folder, a JSONL file or an npz.

- folder: `NAME.png|jpg|webp|qoi` with its prompt in `NAME.txt`
- JSONL: lines {"image": "path, relative to the file", "prompt": "..."}
- npz: `images` (N, H, W, 3) uint8 and `prompts` (N,) strings, no pickles

They are cropped to the shape of training from their middle and resized.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import BadImage
from shared.image import decode, from_file
from trainer.config import ConfigError
from trainer.references import fitted

FORMS = 'a folder of NAME.png with NAME.txt, a JSONL of {"image": ..., "prompt": ...}, or an npz of images and prompts'
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".qoi")


class RealPictures:
    """`len` of them; `of` indices gives pictures (B, height, width, 3) and prompts. ConfigError for what cannot be read."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path, self.size = path, (height, width)
        self.images: NDArray[np.uint8] | list[Path] = []
        if path.is_dir():
            self.images, self.prompts = _folder(path)
        elif path.suffix == ".npz" and path.is_file():
            self.images, self.prompts = _npz(path)
        elif path.suffix == ".jsonl" and path.is_file():
            self.images, self.prompts = _jsonl(path)
        else:
            raise ConfigError(f"loss.real={path}: give {FORMS}")
        if not self.prompts:
            raise ConfigError(f"loss.real={path} holds no pictures: give {FORMS}")

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, indices: list[int]) -> tuple[NDArray[np.uint8], list[str]]:
        """Pictures (B, H, W, 3) uint8 and their prompts."""
        return np.stack([self._fitted(i) for i in indices]), [self.prompts[i] for i in indices]

    def _fitted(self, index: int) -> NDArray[np.uint8]:
        source = self.images[index]
        if isinstance(source, Path):
            try:
                pixels = decode(from_file(source.read_bytes())).pixels
            except (BadImage, OSError) as error:
                raise ConfigError(f"loss.real: {source}: {error}") from error
        else:
            pixels = source
        return fitted(pixels, *self.size)


def _folder(path: Path) -> tuple[list[Path], list[str]]:
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
    for image in images:
        if not image.with_suffix(".txt").is_file():
            raise ConfigError(f"loss.real: {image} has no prompt: write it into {image.with_suffix('.txt').name}")
    return images, [image.with_suffix(".txt").read_text().strip() for image in images]


def _jsonl(path: Path) -> tuple[list[Path], list[str]]:
    images, prompts, root = [], [], path.parent.resolve()
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            raw = json.loads(line)
            image, prompt = root / raw["image"], raw["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'{path}, line {number}: write {{"image": "a.png", "prompt": "..."}}') from error
        if not isinstance(prompt, str) or not image.resolve().is_relative_to(root) or not image.is_file():
            raise ConfigError(f"{path}, line {number}: no picture {raw['image']} in {root}, or no prompt for it")
        images.append(image)
        prompts.append(prompt)
    return images, prompts


def _npz(path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images, prompts = file["images"], file["prompts"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"loss.real={path}: {error}; it should hold `images` (N, H, W, 3) uint8 and `prompts` (N,)") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or prompts.shape != images.shape[:1]:
        raise ConfigError(
            f"loss.real={path}: images {images.dtype} {images.shape}, prompts {prompts.shape}: they should be uint8 (N, H, W, 3) and (N,)"
        )
    return images, [str(prompt) for prompt in prompts]
