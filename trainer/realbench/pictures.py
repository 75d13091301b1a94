"""Pictures in folders, and what they are of. A file is read when it is needed, checked, and known by the sha256 of its bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.arena import ENDINGS
from shared.errors import VerismError
from shared.image import decode, from_file
from shared.schema import Problem
from trainer.config import ConfigError
from trainer.realbench.prompts import BenchPrompt

LARGEST = 64 * 2**20  # bytes of a file
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """`key` is what it shares with the others' pictures of the same prompt; pictures of no prompt share theirs with none."""

    key: str
    path: Path
    prompt: BenchPrompt | None = None


@dataclass(frozen=True)
class Entry:
    """A contestant's pictures in order; `missing` prompts have none. `notes` go into the report."""

    name: str
    pictures: tuple[Picture, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def prompted(self) -> bool:
        return any(one.prompt is not None for one in self.pictures)


def entry(name: str, folder: Path, prompts: Sequence[BenchPrompt], most: int | None = None, extra: bool = False) -> Entry:
    """Of a folder: by prompt where file names are ids of prompts, else every picture by itself.

    Where some are and others are not, the others are left out, or kept as `extra` ones. ConfigError when there is nothing.
    """
    if not folder.is_dir():
        raise ConfigError(f"{name}: {folder} is no folder; give one that holds pictures")
    files: dict[str, Path] = {}
    twice = 0
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS and path.is_file():
            twice += path.stem in files
            files.setdefault(path.stem, path)
    if not files:
        raise ConfigError(f"{name}: {folder} holds no pictures ({', '.join(ENDINGS)})")
    notes = [f"{twice} files have the name of another picture, but for the ending, and are left out"] if twice else []
    known = {prompt.id: prompt for prompt in prompts[:most]}
    if not known.keys() & files.keys():
        if prompts:
            notes.append(
                "no file is named by a prompt: every picture stands for itself, and rewards that need a prompt are not asked"
            )
        return Entry(name, tuple(_own(name, path) for path in [*files.values()][:most]), notes=tuple(notes))
    pictures = [Picture(id_, files[id_], prompt) for id_, prompt in known.items() if id_ in files]
    missing = tuple(id_ for id_ in known if id_ not in files)
    others = [path for stem, path in files.items() if stem not in {prompt.id for prompt in prompts}]
    if others and extra:
        pictures += [_own(name, path) for path in others[: None if most is None else max(0, most - len(pictures))]]
    elif others:
        notes.append(f"{len(others)} files are of no prompt, and are left out")
    return Entry(name, tuple(pictures), missing, tuple(notes))


def _own(name: str, path: Path) -> Picture:
    return Picture(f"{name}/{path.name}", path)


@dataclass(frozen=True)
class Looked:
    """Of a file: sha256 of its bytes (empty where there are none), height and width of its pixels, or what is wrong with it."""

    sha: str
    size: tuple[int, int] | None
    problem: Problem | None = None


def look(path: Path) -> Looked:
    """Its pixels are decoded: a header says nothing of a file that ends half-way."""
    data = _bytes(path)
    if isinstance(data, Problem):
        return Looked("", None, data)
    sha, image = hashlib.sha256(data).hexdigest(), _decoded(data)
    if isinstance(image, Problem):
        return Looked(sha, None, image)
    return Looked(sha, (image.shape[0], image.shape[1]))


def pixels(path: Path) -> Pixels | Problem:
    """(H, W, 3) uint8, or why there are none."""
    data = _bytes(path)
    return data if isinstance(data, Problem) else _decoded(data)


def seen(picture: Picture) -> Pixels:
    """Of a picture without a problem when it was looked at. FileNotFoundError when its file has become another since."""
    image = pixels(picture.path)
    if isinstance(image, Problem):
        raise FileNotFoundError(f"{image.title}; it could be read a moment ago")
    return image


def _decoded(data: bytes) -> Pixels | Problem:
    try:
        return decode(from_file(data)).pixels
    except VerismError as error:
        return error.problem()


def _bytes(path: Path) -> bytes | Problem:
    try:
        if path.stat().st_size > LARGEST:
            return Problem(type="urn:verism:image-too-large", title=f"{path} has more than {LARGEST >> 20} MiB: make it smaller")
        return path.read_bytes()
    except OSError as error:
        return Problem(type="urn:verism:file-unreadable", title=f"{path} cannot be read: {error}")
