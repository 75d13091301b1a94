"""What the rewards on CLIP-like models share: options, hostile weight files, pictures to pixels, the cache of texts.

Every model is loaded one way: a state of named tensors is read (safetensors, or a torch file of tensors only), compared with the
architecture by name and shape, and only then put in. A key too few or too many is an error, never a random layer.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from services.reward import Item
from services.rewards._resize import upload
from shared.schema import RewardInfo, Score

Picture = NDArray[np.uint8]

COMMIT = re.compile(r"[0-9a-f]{40}")
_PINNED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?::(?P<file>[\w./-]+))?")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
_TEXTS = 4096
_AT_ONCE = 1 << 25  # pixels that are resized in one call
_SLIMMEST = 32  # a longer side of more than this many times the shorter one would blow up where the shorter is enlarged
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelOptions(BaseModel):
    """Options that every reward of this family takes; each adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path | None = Field(default=None, description="local folder with config.json, tokenizer, preprocessor_config.json")
    model: str | None = Field(default=None, description="hub id instead of a folder; needs `revision`")
    revision: str | None = Field(default=None, description="commit of the hub model, 40 hex digits: scores stay comparable")
    weights: str | None = Field(
        default=None, description="weight file where it is not in the folder: a path, or hub id@commit:file; safetensors, .pt, .pth"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    version: int = Field(default=1, ge=1)
    licence: str = "see the model card"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.model is None):
            raise ValueError("give either `folder` (local) or `model` (hub id)")
        if self.model is not None and (self.revision is None or not COMMIT.fullmatch(self.revision)):
            raise ValueError("a hub `model` needs its `revision`: a commit of 40 hex digits, or scores change when the hub does")
        return self

    def place(self) -> Path:
        """The folder, fetched from the hub when `model` names one. FileNotFoundError when it is not there."""
        if self.folder is not None:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.folder} is no folder; give the one that holds config.json")
            return self.folder
        wanted = _SMALL if self.weights else [*_SMALL, "*.safetensors"]
        return _from_hub(lambda: snapshot_download(str(self.model), revision=self.revision, allow_patterns=wanted), str(self.model))

    def files(self, place: Path) -> list[Path]:
        """The weight files: `weights`, or the folder's safetensors. FileNotFoundError says what is missing."""
        if self.weights is not None:
            return [fetched(self.weights)]
        single = place / "model.safetensors"
        found = [single] if single.is_file() else sorted(place.glob("model-*-of-*.safetensors"))
        if not found:
            raise FileNotFoundError(f"{place} holds no weights (model.safetensors is missing); `weights` may name another file")
        return found


class PromptOptions(ModelOptions):
    """Of rewards that read a prompt."""

    long_prompts: Literal["truncate", "refuse"] = Field(
        default="truncate", description="a prompt beyond the model's context: cut, and said as parts.truncated, or refused"
    )


def _from_hub(fetch: Callable[[], str], what: str) -> Path:
    try:
        return Path(fetch())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be had from the hub ({type(error).__name__}); download it, and give the local path"
        ) from error


def fetched(source: str) -> Path:
    """A local path, or `id@commit:file` of the hub. FileNotFoundError names what is not there."""
    pinned = _PINNED.fullmatch(source)
    if pinned is None:
        if not Path(source).is_file():
            raise FileNotFoundError(f"no file {source}; give a path, or hub id@commit:file with a commit of 40 hex digits")
        return Path(source)
    repo, commit, name = pinned["repo"], pinned["commit"], pinned["file"]
    if name is None:
        raise ValueError(f"{source} names no file; write {source}:model.safetensors")
    return _from_hub(lambda: str(hf_hub_download(repo, name, revision=commit)), source)


def read_state(path: Path) -> dict[str, Tensor]:
    """Named tensors of one file. Torch files are read with weights_only: ValueError when there is anything but tensors in them."""
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file raises differs by version
        raise ValueError(
            f"{path} is damaged or holds more than tensors, so it is not read; ask for its safetensors, or write the tensors anew"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no named tensors; give the state dict of the model")
    return {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}


def read_states(files: Iterable[Path]) -> dict[str, Tensor]:
    """The shards of one model together."""
    return {k: v for file in files for k, v in read_state(file).items()}


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of one file as sha256sum prints it; of several, of their digests' lines in order."""
    sums = []
    for file in files:
        with file.open("rb") as stream:
            sums.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def check_state(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """ValueError names what differs between an architecture and a checkpoint."""
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [k for k in sorted(wanted.keys() & state.keys()) if wanted[k].shape != state[k].shape]
    said = [f"{len(keys)} {what}, e.g. {keys[0]}" for what, keys in (("missing", missing), ("too many", extra)) if keys]
    said += [f"{k} is {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}" for k in shapes[:1]]
    if said:
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(said)}; is it a checkpoint of this model?")


def build(cls: Any, config: Any, state: Mapping[str, Tensor], dtype: str, device: torch.device, source: str) -> Any:
    """A frozen transformers model holding exactly `state`. Buffers of older versions (position_ids) are left aside."""
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    with torch.device("meta"):
        skeleton = cls(config)
    wanted = skeleton.state_dict()
    check_state(wanted, state, source)
    model = cls.from_pretrained(None, config=config, state_dict=state, dtype=DTYPES[dtype])
    return model.eval().requires_grad_(False).to(device)


def same_size(images: Sequence[Picture]) -> Iterator[list[int]]:
    """Positions of pictures of one size, at most _AT_ONCE pixels together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape[0], image.shape[1]), []).append(index)
    for (height, width), indices in groups.items():
        count = max(1, _AT_ONCE // (height * width))
        yield from (indices[start : start + count] for start in range(0, len(indices), count))


def resized(pixels: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, *sides) uint8, antialiased; of noise two grey levels from PIL at most.

    As PIL: rows first, rounded to whole grey levels, then columns. (Pillow 13 takes the columns of some tall pictures first, and
    then differs by more from this and from its own older versions, where a picture is all noise.)
    """
    if tuple(pixels.shape[-2:]) == sides:
        return pixels
    if pixels.device.type == "cpu":
        return torch.nn.functional.interpolate(pixels, sides, mode=mode, antialias=True)
    return _pass(_pass(pixels, (pixels.shape[-2], sides[1]), mode), sides, mode)


def _pass(pixels: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """One direction, in float, where the device has no integer interpolation."""
    if tuple(pixels.shape[-2:]) == sides:
        return pixels
    return torch.nn.functional.interpolate(pixels.float(), sides, mode=mode, antialias=True).round().clamp(0, 255).to(torch.uint8)


class Pixels:
    """Pictures of any size to (B, 3, height, width) float32 as the model's own processor makes them; one call for each size.

    `crop`: short side to the target, centre cut out. `squash`: both sides, whatever the shape. `pad`: long side, black around.
    `rounded_centre` is torchvision's centre of an odd margin (half to even); transformers cuts it down.
    """

    def __init__(
        self,
        fit: Literal["crop", "squash", "pad"],
        sides: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        mode: str = "bicubic",
        rounded_centre: bool = False,
    ) -> None:
        self.fit, self.sides, self.mode, self.rounded_centre, self.device = fit, sides, mode, rounded_centre, device
        self._mean = 255 * torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.version = f"{fit}-{sides[0]}x{sides[1]}-{mode}-u8-{'round-' if rounded_centre else ''}2"

    @classmethod
    def of(cls, processor: Any, device: torch.device, *, fit: Literal["pad"] | None = None, rounded_centre: bool = False) -> Self:
        """After a transformers image processor (CLIP, SigLIP); ValueError names a setting that is not known here."""
        size, crop = processor.size, getattr(processor, "crop_size", None)
        mode = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample))
        if mode is None:
            raise ValueError(f"preprocessor_config.json asks for resample {processor.resample}; 2 and 3 are known here")
        cuts = bool(getattr(processor, "do_center_crop", False))
        if size.get("shortest_edge") and cuts and crop and crop["height"] == crop["width"] == size["shortest_edge"]:
            sides = (int(crop["height"]), int(crop["width"]))
            return cls(
                fit or "crop", sides, processor.image_mean, processor.image_std, device, mode=mode, rounded_centre=rounded_centre
            )
        if size.get("height") and size.get("width") and not cuts:
            sides = (int(size["height"]), int(size["width"]))
            return cls(fit or "squash", sides, processor.image_mean, processor.image_std, device, mode=mode)
        raise ValueError(
            f"preprocessor_config.json sets size {dict(size)} and crop {crop}; a square cut or a plain size is known here"
        )

    def _fitted(self, pixels: Tensor) -> Tensor:
        height, width = self.sides
        h, w = pixels.shape[-2:]
        if self.fit == "squash":
            return resized(pixels, self.sides, self.mode)
        if self.fit == "pad":
            scale = height / max(h, w)
            pixels = resized(pixels, (max(1, round(h * scale)), max(1, round(w * scale))), self.mode)
            down, right = height - pixels.shape[-2], width - pixels.shape[-1]
            return torch.nn.functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
        sides = (int(height * h / w), width) if w <= h else (height, int(width * w / h))
        pixels = resized(pixels, sides, self.mode)
        margins = (sides[0] - height, sides[1] - width)
        top, left = (round(m / 2) for m in margins) if self.rounded_centre else (m // 2 for m in margins)
        return pixels[..., top : top + height, left : left + width]

    def __call__(self, images: Sequence[Picture]) -> Tensor:
        out = torch.empty(len(images), 3, *self.sides, device=self.device)
        for indices in same_size(images):
            out[indices] = self._fitted(upload([images[i] for i in indices], self.device)).float()
        return (out - self._mean) / self._std


class Tokens:
    """A tokenizer for several threads: preparing and running meet in it, and the library's own does not bear that."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._lock = tokenizer, Lock()
        self._count = lru_cache(_TEXTS)(self._counted)

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        with self._lock:
            return self.tokenizer(texts, return_tensors="pt", **settings)

    def count(self, text: str) -> int:
        """Tokens of the whole text, special ones included."""
        return self._count(text)

    def _counted(self, text: str) -> int:
        with self._lock:
            return len(self.tokenizer(text, truncation=False, verbose=False).input_ids)


class Texts:
    """Embeddings of texts: each text is encoded once, and the `limit` used last are kept.

    For several threads: the versions of a reward and its fitter share one, as texts mean the same to all of them.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], limit: int = _TEXTS) -> None:
        self._encode, self._limit, self._lock = encode, limit, Lock()
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, D), in order; what is new is encoded in one batch."""
        with self._lock:
            known = {t: self._kept[t] for t in texts if t in self._kept}
        new = list(dict.fromkeys(t for t in texts if t not in known))
        known |= {text: row.clone() for text, row in zip(new, self._encode(new), strict=True)} if new else {}
        with self._lock:
            for text in texts:
                self._kept[text] = known[text]
                self._kept.move_to_end(text)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return torch.stack([known[t] for t in texts])

    def __len__(self) -> int:
        return len(self._kept)


@dataclass(frozen=True)
class Ready:
    """A batch before its forward pass: `failed` by position, the other items, and what the model takes for them."""

    failed: Mapping[int, Score]
    items: list[Item]
    inputs: Any


class Batched:
    """A reward in two halves: `prepare` (pictures to pixels; runs beside another batch) and `forward` (the model).

    Items that cannot be scored get their error; the others go on together. A subclass gives `_inputs` and `_scores`.
    """

    info: RewardInfo

    def _refusal(self, item: Item) -> Score | None:
        """The error of an item that the model need not see."""
        height, width = item.image.shape[:2]
        if max(height, width) > _SLIMMEST * min(height, width):
            title = f"the picture is {width}x{height}; its longer side may be {_SLIMMEST} times the shorter one at most"
            return Score.failed("image-too-slim", title)
        if "prompt" in self.info.needs and not item.prompt:
            return Score.failed("prompt-missing", f"{self.info.name} needs the item's `prompt`: what should the picture show?")
        return None

    def _inputs(self, items: list[Item]) -> Any:
        raise NotImplementedError

    def _scores(self, items: list[Item], inputs: Any) -> list[Score]:
        raise NotImplementedError

    @torch.inference_mode()
    def prepare(self, batch: Sequence[Item]) -> Ready:
        failed = {i: score for i, item in enumerate(batch) if (score := self._refusal(item)) is not None}
        items = [item for i, item in enumerate(batch) if i not in failed]
        return Ready(failed, items, self._inputs(items) if items else None)

    @torch.inference_mode()
    def forward(self, ready: Ready) -> list[Score]:
        scored = iter(self._scores(ready.items, ready.inputs) if ready.items else [])
        places = range(len(ready.items) + len(ready.failed))
        return [ready.failed[i] if i in ready.failed else next(scored) for i in places]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))


class Prompted(Batched):
    """Of models that read `context` tokens: a longer prompt is cut, which the part `truncated` says, or refused."""

    def __init__(self, info: RewardInfo, tokens: Tokens, context: int, long_prompts: str) -> None:
        self.info, self.tokens, self.context, self._refuses = info, tokens, context, long_prompts == "refuse"

    def _refusal(self, item: Item) -> Score | None:
        refused = super()._refusal(item)
        if refused is None and self._refuses and (count := self.tokens.count(item.prompt or "")) > self.context:
            title = (
                f"the prompt has {count} tokens, {self.info.name} reads {self.context}; shorten it, or serve long_prompts: truncate"
            )
            return Score.failed("prompt-too-long", title, status="refused")
        return refused

    def _cut(self, items: Sequence[Item]) -> list[dict[str, float]]:
        return [{"truncated": 1.0} if self.tokens.count(item.prompt or "") > self.context else {} for item in items]


class Towers(Protocol):
    """Two encoders with one space, texts and pictures to (B, D) of unit length."""

    texts: Texts
    tokens: Tokens
    context: int
    scale: float

    def inputs(self, images: Sequence[Picture]) -> Any:
        """What `pictures` takes."""
        ...

    def pictures(self, inputs: Any) -> Tensor: ...


class Cosine(Prompted):
    """A function of the cosine of picture and prompt, in [-1, 1]."""

    def __init__(self, towers: Towers, options: PromptOptions, info: RewardInfo) -> None:
        super().__init__(info, towers.tokens, towers.context, options.long_prompts)
        self.towers = towers

    def _value(self, cosine: float) -> tuple[float, dict[str, float]]:
        """The score and its parts."""
        return cosine, {}

    def _more(self, cosine_B: Tensor, picture_BD: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
        """Parts that need more than the cosine."""
        return [{} for _ in prompts]

    def _inputs(self, items: list[Item]) -> Any:
        return self.towers.inputs([item.image for item in items])

    def _scores(self, items: list[Item], inputs: Any) -> list[Score]:
        prompts = [item.prompt or "" for item in items]
        text_BD, picture_BD = self.towers.texts(prompts), self.towers.pictures(inputs)
        cosine_B = (picture_BD * text_BD).sum(-1).double().clamp(-1, 1)
        valued = [self._value(cosine) for cosine in cosine_B.cpu().tolist()]
        more = self._more(cosine_B, picture_BD, prompts)
        return [
            Score.ok(value, parts=parts | other | cut)
            for (value, parts), other, cut in zip(valued, more, self._cut(items), strict=True)
        ]
