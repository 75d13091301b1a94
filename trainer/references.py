"""Real pictures that detectors are refitted on, and which of them stand against a step's pictures.

- JSONL: lines {"image": "path, relative to the file", "prompt": "...", "class": 3}; prompt and class may be missing, a prompt may come often
- a folder: `NAME.png|jpg|webp|qoi`, with its prompt in `NAME.txt` or without one
- `world/photographs`: the 8,000 photographs of the small world that monitors never see, by class

Another generator's pictures are a source like any other (Adv-GRPO, 2511.20256, takes Qwen-Image's), and fewer classes another style.

A generated picture comes in the run's own size and is sent as it is. A reference of another shape is cropped around its middle to the run's
shape and resized to its size by Lanczos' filter with antialiasing: `fitted` is the one path for both, and does nothing to a picture that has
the size already. What the filter leaves behind can be told from what a decoder does; so references in the run's own size are best, and
`note` says how many were not, and how many JPEG had been through. Files that are no pictures are named and skipped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from shared.errors import BadImage
from shared.image import check_size, decode, from_file, header_size, sniff
from trainer.config import ConfigError, ReferencesConfig, Stopped
from trainer.sampling.rollout import noise_seed
from trainer.types import Prompt

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".qoi")
WORLD = "t10k-images-idx3-ubyte.gz"  # a folder with this file is the small world's
NAMED = 3  # of the files that were skipped
HEADER = 1 << 16


@dataclass(frozen=True)
class Examples:
    """Pictures of one side, each with a caption where there is one, and a group that it shares with the other side's of the same caption."""

    images: list[NDArray[np.uint8]]
    prompts: list[str | None]
    groups: list[str | None]


@dataclass(frozen=True)
class _Reference:
    source: Path | int  # a file, or a place in `_pixels`
    prompt: str | None
    kind: str | None  # its class
    resized: bool = False
    jpeg: bool = False


def fitted(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: the middle in that shape, resized; a picture of that size comes back as it is."""
    if pixels.shape[:2] == (height, width):
        return pixels
    scale = min(pixels.shape[0] / height, pixels.shape[1] / width)
    top, left = max(0.0, (pixels.shape[0] - scale * height) / 2), max(0.0, (pixels.shape[1] - scale * width) / 2)
    box = (left, top, pixels.shape[1] - left, pixels.shape[0] - top)  # inside, however the scale was rounded
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box=box))


class References:
    """All that a recipe names. ConfigError when they cannot be read or too few can; files are decoded when they are drawn."""

    def __init__(self, config: ReferencesConfig, height: int, width: int, seed: int) -> None:
        self.config, self.size, self.seed = config, (height, width), seed
        self.skipped: list[str] = []
        self.warn: Callable[[str], None] = lambda text: None
        self._pixels: NDArray[np.uint8] | None = None
        self._bad: set[int] = set()
        self._all = self._chosen(self._read(config.path))
        self._enough()
        self._by_prompt: dict[str, list[int]] = {}
        self._by_class: dict[str, list[int]] = {}
        for n, one in enumerate(self._all):
            if one.prompt is not None:
                self._by_prompt.setdefault(one.prompt, []).append(n)
            if one.kind is not None:
                self._by_class.setdefault(one.kind, []).append(n)

    def __len__(self) -> int:
        return len(self._all) - len(self._bad)

    @property
    def note(self) -> str:
        """What a person should know of them, or nothing."""
        out = []
        if self.skipped:
            more = f" and {len(self.skipped) - NAMED} more" if len(self.skipped) > NAMED else ""
            out.append(f"{len(self.skipped)} references were skipped: {'; '.join(self.skipped[:NAMED])}{more}")
        if resized := sum(one.resized for one in self._all):
            high, wide = self.size
            out.append(
                f"{resized} of {len(self._all)} references are not {wide}x{high} and are resized: a detector may learn the filter, so "
                "resize them beforehand as your pictures were made, or set the service's fit.augment.resize"
            )
        if jpeg := sum(one.jpeg for one in self._all):
            out.append(
                f"{jpeg} of {len(self._all)} references are JPEG, and generated pictures never were: a detector may learn the compression, so "
                "take lossless ones, or set the service's fit.augment.jpeg"
            )
        return "; ".join(out)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """ConfigError when none of the prompts has a reference, where only those count."""
        if self.config.match == "only" and not any(self._like(prompt) for prompt in prompts):
            raise ConfigError(
                f"references.match=only, and no caption or class in {self.config.path} is one of the training prompts: pair them with the "
                "prompts that you train on, or set references.match=prefer"
            )

    def drawn(self, prompts: Sequence[Prompt], step: int) -> tuple[Examples, list[str | None]]:
        """At most one for each of the prompts, none twice, a function of (seed, step, prompts); and each prompt's group, where it has one.

        A reference of the same caption stands for its prompt, then one of the same class, then (match=prefer, none) any.
        """
        rng = torch.Generator().manual_seed(noise_seed(self.seed, step, -3, -3))
        taken: set[int] = set()
        names = {text: f"{step}/{n}" for n, text in enumerate(dict.fromkeys(prompt.text for prompt in prompts))}
        orders: dict[str, list[int]] = {}
        out, tied, rest = Examples([], [], []), set[str](), 0
        for prompt in prompts:
            if prompt.text not in orders:
                like = [] if self.config.match == "none" else self._like(prompt)
                orders[prompt.text] = [like[i] for i in torch.randperm(len(like), generator=rng).tolist()]
            if self._take(out, orders[prompt.text], taken, prompt.text, names[prompt.text]):
                tied.add(prompt.text)
            else:
                rest += 1
        if self.config.match != "only" and rest:
            order = torch.randperm(len(self._all), generator=rng).tolist()
            while rest and self._take(out, order, taken):
                rest -= 1
        return out, [names[prompt.text] if prompt.text in tied else None for prompt in prompts]

    def some(self, count: int) -> Examples:
        """The same `count` of them each time, or all that there are: what evaluations score."""
        order = torch.randperm(len(self._all), generator=torch.Generator().manual_seed(noise_seed(self.seed, -1, -3, -3))).tolist()
        out, taken = Examples([], [], []), set[int]()
        while len(out.images) < count and self._take(out, order, taken):
            pass
        return out

    def _take(self, out: Examples, order: list[int], taken: set[int], text: str | None = None, group: str | None = None) -> bool:
        """The next of `order` (which loses it) that is readable and not taken; whether there was one."""
        while order:
            n = order.pop()
            if n in taken or n in self._bad or (pixels := self._decoded(n)) is None:
                continue
            taken.add(n)
            out.images.append(pixels)
            out.prompts.append(text if text is not None else self._all[n].prompt)
            out.groups.append(group)
            return True
        return False

    def _like(self, prompt: Prompt) -> list[int]:
        same = self._by_prompt.get(prompt.text, [])
        return same or self._by_class.get(str(prompt.meta.get("class")), [])

    def _decoded(self, n: int) -> NDArray[np.uint8] | None:
        """None, and named, for a file that is damaged behind its header. Stopped when too few are left."""
        source = self._all[n].source
        if isinstance(source, int):
            assert self._pixels is not None
            return fitted(self._pixels[source], *self.size)
        try:
            return fitted(decode(from_file(source.read_bytes())).pixels, *self.size)
        except (BadImage, OSError) as error:
            self._bad.add(n)
            self._skip(source, error)
            self.warn(f"a reference was skipped: {self.skipped[-1]}; {len(self)} are left")
            if len(self) < self.config.least:
                raise Stopped(f"{self._few()} Mend them, and go on with --resume.") from error
            return None

    def _skip(self, path: Path, error: Exception) -> None:
        self.skipped.append(f"{path.name}: {error.strerror if isinstance(error, OSError) and error.strerror else error}")

    def _enough(self) -> None:
        if len(self) < self.config.least:
            raise ConfigError(f"{self._few()} Add some, mend those that were skipped, or lower references.least.")

    def _few(self) -> str:
        of = "" if self.config.classes is None else f" of classes {', '.join(map(str, self.config.classes))}"
        why = f" ({len(self.skipped)} were skipped: {'; '.join(self.skipped[:NAMED])})" if self.skipped else ""
        return (
            f"references.path={self.config.path} has {len(self)} readable pictures{of}{why}, and {self.config.least} are the least."
        )

    def _chosen(self, every: list[_Reference]) -> list[_Reference]:
        """Those of the classes asked for."""
        if self.config.classes is None:
            return every
        wanted = {self._number(name) for name in self.config.classes}
        known = sorted({one.kind for one in every if one.kind is not None})
        if missing := sorted(wanted - set(known)):
            has = f"it has {', '.join(known)}" if known else "its pictures have no class (a key of the JSONL)"
            raise ConfigError(f"references.classes names {missing[0]!r}, and {self.config.path} has none such: {has}")
        return [one for one in every if one.kind in wanted]

    def _number(self, name: int | str) -> str:
        """A class as the pictures have it: the small world's go by number, and by name too."""
        if self._pixels is not None:
            from world.photographs import CLASS_NAMES

            return str(CLASS_NAMES.index(name)) if name in CLASS_NAMES else str(name)
        return str(name)

    def _read(self, path: Path) -> list[_Reference]:
        if (path / WORLD).is_file():
            return self._world()
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS)
            return [one for file in files if (one := self._reference(file, _caption(file.with_suffix(".txt")), None)) is not None]
        if path.suffix == ".jsonl" and path.is_file():
            return self._jsonl(path)
        raise ConfigError(
            f"references.path={path}: give a JSONL file of image and prompt, a folder of pictures, or world/photographs"
        )

    def _world(self) -> list[_Reference]:
        from world.captions import TEMPLATES, WORDINGS, caption
        from world.photographs import load

        self._pixels, classes = load("train")
        resized = self._pixels.shape[1:3] != self.size
        return [_Reference(n, caption(WORDINGS[c][0], TEMPLATES[1]), str(c), resized) for n, c in enumerate(classes.tolist())]

    def _jsonl(self, path: Path) -> list[_Reference]:
        root, out = path.parent.resolve(), []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                raw = json.loads(line)
                file, prompt, kind = root / raw["image"], raw.get("prompt"), raw.get("class")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f'{path}, line {number}: write {{"image": "a.png", "prompt": "..."}}') from error
            if not isinstance(prompt, str | None):
                raise ConfigError(f'{path}, line {number}: the prompt is a text, {{"image": "a.png", "prompt": "..."}}')
            if not file.resolve().is_relative_to(root):
                raise ConfigError(f"{path}, line {number}: {raw['image']} is not below {root}; keep pictures beside the file")
            if (one := self._reference(file, prompt, None if kind is None else str(kind))) is not None:
                out.append(one)
        return out

    def _reference(self, file: Path, prompt: str | None, kind: str | None) -> _Reference | None:
        """What its header says; None, and named, for a file that is no picture."""
        try:
            with file.open("rb") as opened:
                data = opened.read(HEADER)
                try:
                    size = header_size(data, sniff(data))
                except BadImage:
                    data += opened.read()  # a header behind long metadata
                    size = header_size(data, sniff(data))
            check_size(*size)
        except (BadImage, OSError) as error:
            self._skip(file, error)
            return None
        return _Reference(file, prompt, kind, size != self.size, sniff(data) == "jpeg")


def _caption(file: Path) -> str | None:
    return file.read_text(errors="replace").strip() or None if file.is_file() else None
