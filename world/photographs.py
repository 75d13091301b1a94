"""The photographs that are shipped: 8,000 to learn from, 2,000 held out, with captions.

>>> from world.photographs import load
>>> images, classes = load("train")
"""

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "photographs"
TRAIN = 8_000

CLASS_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def _read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """One IDX file (Fashion-MNIST's container) as an array; ValueError when the header is not what it should be."""
    with gzip.open(path, "rb") as file:
        found, *_ = header = struct.unpack(">" + "I" * (1 + magic % 256), file.read(4 * (1 + magic % 256)))
        if found != magic:
            raise ValueError(f"{path} is not an IDX file with magic {magic}; restore it from the repository")
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(header[1:])


def load(split: Literal["train", "test", "all"] = "train") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Photographs (N, 28, 28, 3) uint8, 0 is the dark background, and their classes (N,) in 0..9.

    `train` is the first 8,000 of the shipped 10,000, `test` the last 2,000; nothing is ever fitted on `test`.
    """
    grey = _read_idx(FOLDER / "t10k-images-idx3-ubyte.gz", 2051)
    classes = _read_idx(FOLDER / "t10k-labels-idx1-ubyte.gz", 2049).astype(np.int64)
    chosen = {"train": slice(None, TRAIN), "test": slice(TRAIN, None), "all": slice(None)}[split]
    return np.repeat(grey[chosen, :, :, None], 3, axis=3), classes[chosen]
