"""Versions of a refitted reward on disk, and the pictures that their replay buffers name.

    FOLDER/lock
    FOLDER/versions/00000003/{weights.safetensors, state.safetensors, meta.json}
    FOLDER/pictures/ab/ab12...-28x28.qoi

A version is written beside the others and renamed into its place, so it is there whole or not at all. `weights` are what scores (the
average of the trained values), `state` the trained values themselves and the optimiser's. Whatever cannot be read as it was
written is set aside in FOLDER/damaged, and said.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from services.fitting.replay import PastPair, Replay
from shared.errors import BadImage
from shared.image import decode, encode
from shared.schema import ImageData

log = logging.getLogger("verism.fitting")
CACHE_BYTES = 256 * 2**20
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}-[0-9]{1,5}x[0-9]{1,5}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Damaged(ValueError):
    """What lies on disk is not what was written; it has been set aside."""


@dataclass(frozen=True)
class State:
    """All that a refit goes on from: `weights` score, `raw` are trained, `optim` is the optimiser's by `NAME/what`. On the CPU, float32."""

    version: int
    weights: dict[str, Tensor]
    raw: dict[str, Tensor]
    replay: Replay
    optim: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    accuracy: float | None = None


class Meta(BaseModel):
    """meta.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = Field(ge=1)
    weights_sha256: str | None = Field(description="as the reward that serves this version says it")
    accuracy: float | None = None
    steps: int = Field(default=0, ge=0)
    seed: int = Field(default=0, description="with the version, all that the refit drew at random")
    digest: Digest = Field(description="of what these weights belong to: the reward, its own weights, `head`")
    optim: str = Field(default="", description="whose state it is")
    files: dict[str, Digest] = Field(description="sha256 of the files beside this one")
    replay: list[tuple[Key, str | None, Key, str | None]] = []
    published: bool = False
    snapshot: bool = False


def key_of(pixels: NDArray[np.uint8]) -> str:
    """sha256 of (H, W, 3) uint8 and its size."""
    height, width, _ = pixels.shape
    return f"{hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()}-{height}x{width}"


class Store:
    """One reward's folder; one process at a time. `said` collects what a person should know. ValueError says why it cannot be used."""

    def __init__(
        self,
        folder: Path,
        digest: str,
        like: Mapping[str, Tensor],
        *,
        keep: int = 4,
        snapshots: int = 64,
        seed: int = 0,
        optim: str = "",
    ) -> None:
        """`like` has the names and shapes of the weights."""
        self.folder, self.digest, self.keep, self.snapshots, self.seed, self.optim = folder, digest, keep, snapshots, seed, optim
        self._shapes = {name: tuple(value.shape) for name, value in like.items()}
        self.said: list[str] = []
        self.metas: dict[int, Meta] = {}
        self._cache: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._cached = 0
        self._mutex = threading.RLock()
        try:
            for part in ("versions", "pictures", "damaged"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ValueError(f"fit.folder: {folder} cannot be written ({error.strerror}); name another one") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"fit.folder: {folder} is in use by another service; give each service that refits a folder of its own"
            ) from error
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the folder back."""
        self._lock.close()

    def published(self) -> list[int]:
        """Oldest first."""
        return sorted(version for version, meta in list(self.metas.items()) if meta.published)  # others write meanwhile

    def candidate(self) -> int | None:
        """The version that was fitted and waits for its publication."""
        return max((version for version, meta in list(self.metas.items()) if not meta.published), default=None)

    def write(
        self, state: State, weights_sha256: str | None, *, published: bool, pictures: Mapping[str, NDArray[np.uint8]]
    ) -> None:
        """`pictures` holds at least those that `state.replay` names and no earlier version did. OSError leaves everything as it was."""
        with self._mutex:
            files = {
                "weights.safetensors": save({name: _plain(value) for name, value in state.weights.items()}),
                "state.safetensors": save(
                    {f"raw/{name}": _plain(value) for name, value in state.raw.items()}
                    | {f"optim/{name}": _plain(value) for name, value in state.optim.items()}
                ),
            }
            meta = Meta(
                version=state.version,
                weights_sha256=weights_sha256,
                accuracy=state.accuracy,
                steps=state.steps,
                seed=self.seed,
                digest=self.digest,
                optim=self.optim,
                files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
                replay=[(p.real, p.real_prompt, p.generated, p.generated_prompt) for p in state.replay.pairs],
                published=published,
            )
            place = self._place(state.version)
            beside = place.with_name(f".{place.name}.new")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                for key in dict.fromkeys(key for pair in state.replay.pairs for key in (pair.real, pair.generated)):
                    if key in pictures:
                        self._keep_picture(key, pictures[key])
                beside.mkdir()
                for name, data in {**files, "meta.json": meta.model_dump_json(indent=1).encode()}.items():
                    _write(beside / name, data)
                _sync(beside)
                self._remove(state.version)
                beside.rename(place)
                _sync(place.parent)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                with contextlib.suppress(OSError):
                    self.tidy()  # pictures that no version names
                raise
            self.metas[state.version] = meta

    def read(self, version: int, size: int) -> State:
        """`size` is the replay buffer's. KeyError for one that is not here; Damaged, after setting it aside, for one that has changed."""
        with self._mutex:
            meta = self.metas[version]
            try:
                weights, rest = self._tensors(version, meta, "weights"), self._tensors(version, meta, "state")
            except (OSError, ValueError, SafetensorError) as error:
                raise Damaged(self._aside(version, str(error))) from error
            raw = {name.removeprefix("raw/"): value for name, value in rest.items() if name.startswith("raw/")}
            optim = {name.removeprefix("optim/"): value for name, value in rest.items() if name.startswith("optim/")}
            for what, found in (("weights.safetensors", weights), ("state.safetensors", raw)):
                shapes = {name: tuple(value.shape) for name, value in found.items()}
                if shapes != self._shapes or not all(bool(torch.isfinite(value).all()) for value in found.values()):
                    raise Damaged(self._aside(version, f"{what} does not hold this reward's weights"))
            if meta.optim != self.optim:
                optim = {}
                self._say(f"version {version} was fitted with another optimiser ({meta.optim}): its state is begun anew")
            replay = Replay(size, [PastPair(*pair) for pair in meta.replay])
            return State(version, weights, raw, replay, optim, meta.steps, meta.accuracy)

    def publish(self, version: int) -> None:
        """The candidate is what is served from now on, and after a restart."""
        self._mark(version, published=True)

    def snapshot(self, version: int) -> None:
        self._mark(version, snapshot=True)

    def forget_after(self, version: int) -> None:
        """Every later version, candidates too."""
        with self._mutex:
            for later in [one for one in self.metas if one > version]:
                self._remove(later)

    def tidy(self) -> None:
        """Versions beyond `keep`, snapshots beyond `snapshots`, and pictures that nothing names any more, leave."""
        with self._mutex:
            published = self.published()
            marked = [version for version in published if self.metas[version].snapshot]
            kept = {*published[-self.keep :], *marked[-self.snapshots :]}
            for version in published:
                if version not in kept:
                    self._remove(version)
            named = {key for meta in self.metas.values() for real, _, made, _ in meta.replay for key in (real, made)}
            for file in (self.folder / "pictures").glob("*/*"):
                if file.suffix != ".qoi" or file.stem not in named:
                    file.unlink(missing_ok=True)
                    self._forget(file.stem)

    def picture(self, key: str) -> NDArray[np.uint8]:
        """(H, W, 3) uint8; Damaged when it is gone, or is another."""
        with self._mutex:
            if (held := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                return held
            file = self._file(key)
            height, width = map(int, key[65:].split("x"))
            try:
                pixels = decode(ImageData(encoding="qoi", height=height, width=width, data=file.read_bytes())).pixels
                if key_of(pixels) != key:
                    raise ValueError("its pixels have changed")
            except (OSError, ValueError, BadImage) as error:
                with contextlib.suppress(OSError):
                    file.replace(self.folder / "damaged" / file.name)
                raise Damaged(self._say(f"a replayed picture cannot be read ({error}): it is left out ({file.name})")) from error
            self._remember(key, pixels)
            return pixels

    def _scan(self) -> None:
        versions = self.folder / "versions"
        for beside in versions.glob(".*"):  # what a process that was killed had begun to write, or to remove
            shutil.rmtree(beside, ignore_errors=True)
        for place in sorted(versions.iterdir()):
            try:
                version = int(place.name)
                meta = Meta.model_validate(json.loads((place / "meta.json").read_bytes()))
                if meta.version != version or place.name != f"{version:08d}":
                    raise ValueError(f"it says that it is version {meta.version}")
            except (OSError, ValueError, ValidationError, RecursionError) as error:
                self._set_aside(place, f"{place.name} is no version of a reward ({str(error).splitlines()[0]})")
                continue
            if meta.digest != self.digest:
                raise ValueError(
                    f"fit.folder: {self.folder} holds versions of another reward, other weights or another `head`; move it away, or name "
                    "another folder"
                )
            self.metas[version] = meta

    def _place(self, version: int) -> Path:
        return self.folder / "versions" / f"{version:08d}"

    def _tensors(self, version: int, meta: Meta, what: str) -> dict[str, Tensor]:
        name = f"{what}.safetensors"
        data = (self._place(version) / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != meta.files.get(name):
            raise ValueError(f"{name} has changed since it was written")
        found: dict[str, Tensor] = load(data)
        return found

    def _mark(self, version: int, **changes: bool) -> None:
        with self._mutex:
            meta = self.metas[version].model_copy(update=changes)
            file = self._place(version) / "meta.json"
            beside = file.with_name("meta.json.new")
            _write(beside, meta.model_dump_json(indent=1).encode())
            beside.replace(file)
            _sync(file.parent)
            self.metas[version] = meta

    def _remove(self, version: int) -> None:
        """Out of its place at once; what is in the way then is deleted at leisure, or at the next start."""
        place = self._place(version)
        trash = place.with_name(f".{place.name}.old")
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            place.rename(trash)
        self.metas.pop(version, None)
        shutil.rmtree(trash, ignore_errors=True)

    def _aside(self, version: int, why: str) -> str:
        self.metas.pop(version, None)
        return self._set_aside(self._place(version), f"version {version} cannot be read ({why})")

    def _set_aside(self, place: Path, what: str) -> str:
        number = sum(1 for _ in (self.folder / "damaged").iterdir())
        target = self.folder / "damaged" / f"{place.name}.{number}"
        with contextlib.suppress(OSError):
            place.rename(target)
        return self._say(f"{what}; it was set aside as {target}")

    def _say(self, what: str) -> str:
        log.warning("%s: %s", self.folder, what)
        self.said.append(what)
        return what

    def _file(self, key: str) -> Path:
        return self.folder / "pictures" / key[:2] / f"{key}.qoi"

    def _keep_picture(self, key: str, pixels: NDArray[np.uint8]) -> None:
        file = self._file(key)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            beside = file.with_suffix(".new")
            _write(beside, encode(pixels, "qoi").data)
            beside.replace(file)
        self._remember(key, pixels)

    def _remember(self, key: str, pixels: NDArray[np.uint8]) -> None:
        self._forget(key)
        self._cache[key] = pixels
        self._cached += pixels.nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            self._forget(next(iter(self._cache)))

    def _forget(self, key: str) -> None:
        if (old := self._cache.pop(key, None)) is not None:
            self._cached -= old.nbytes


def digest_of(*parts: object) -> str:
    """sha256 of what can be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def shapes_of(weights: Mapping[str, Tensor]) -> Sequence[tuple[str, tuple[int, ...]]]:
    return sorted((name, tuple(value.shape)) for name, value in weights.items())


def _plain(value: Tensor) -> Tensor:
    """safetensors refuses tensors that share memory."""
    return value.detach().to("cpu").contiguous().clone()


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    """Renames inside it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
