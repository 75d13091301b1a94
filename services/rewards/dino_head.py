"""Real or generated, after Adv-GRPO (2511.20256): a small head on the CLS token and the patches of a frozen DINO backbone.

    dino_head: {use: dino_head, head: {path: head.safetensors}, backbone: {timm: vit_base_patch14_dinov2, weights: {path: FILE}}}

h is Linear(D, 512), GELU, Linear(512, 1); the value is 0.7 h(CLS) + 0.3 mean h(patch), about +1 for real and -1 for generated.
Features have norm 1, in fitting and in scoring alike: the authors' code fits on raw ones and scores normalised ones. The authors draw 64
patches a picture at random; here all count unless `patches` says how many, drawn by a hash of the picture, so that a score repeats.
Run here at tiny random sizes only, never on the authors' weights.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import AutoModel

from services.reward import Item
from services.rewards._detector_kit import COMMIT, IMAGENET, WeightsOptions, batched, fill, normaliser, read_state, sha256
from services.rewards._resize import resized
from shared.schema import RewardInfo, Score


class BackboneOptions(BaseModel):
    """One of: a timm architecture with `weights`; a local `folder` or hub `model` of transformers (DINOv2, DINOv3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    timm: str | None = Field(default=None, description="timm architecture, e.g. vit_base_patch14_dinov2")
    weights: WeightsOptions | None = Field(default=None, description="its weight file")
    arguments: dict[str, int | float | bool] = Field(
        default={}, description="more of timm.create_model, for other sizes than the named"
    )
    folder: Path | None = Field(default=None, description="folder of a transformers model")
    model: str | None = Field(default=None, description="hub id of a transformers model; needs `revision`")
    revision: str | None = Field(default=None, pattern=COMMIT, description="commit of the hub model")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(x is not None for x in (self.timm, self.folder, self.model)) != 1:
            raise ValueError("give one of `timm` (architecture), `folder` (local) or `model` (hub id)")
        if (self.timm is None) != (self.weights is None):
            raise ValueError("`timm` and `weights` go together: the architecture, and the file with its weights")
        if self.model is not None and self.revision is None:
            raise ValueError("a hub `model` needs its `revision` (a commit), or scores change when the hub does")
        return self


class DinoHeadOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    backbone: BackboneOptions
    head: WeightsOptions
    size: int = Field(default=518, ge=16, le=1024, description="side in pixels of the square that the backbone sees")
    cls_weight: float = Field(default=0.7, ge=0, le=1)
    patches: int | None = Field(default=None, ge=1, description="patches drawn of each picture; default: all")
    dtype: Literal["float32", "bfloat16"] = "float32"
    version: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Features:
    """Of norm 1, float32; N patches row by row."""

    cls_BD: Tensor
    patches_BND: Tensor


class Backbone:
    """Pictures (uint8 HxWx3, any size) to Features: the one path for fitting and for scoring. `identity` names the weights."""

    def __init__(self, options: BackboneOptions, size: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        self._timm = options.timm is not None
        if options.timm is not None and options.weights is not None:
            if options.timm not in timm.list_models():
                raise ValueError(f"timm knows no {options.timm!r}; timm.list_models('*dino*') lists what there is")
            model = timm.create_model(options.timm, pretrained=False, num_classes=0, **options.arguments)
            file = options.weights.locate()
            fill(model, read_state(file), file.name, ("mask_token",))
            self.identity = sha256(file)
            if size != model.patch_embed.img_size[0]:
                model.set_input_size(img_size=size)
            self.prefix, patch = model.num_prefix_tokens, model.patch_embed.patch_size[0]
        else:
            source, pin = (str(options.folder), {}) if options.folder else (str(options.model), {"revision": options.revision})
            if options.folder and not (options.folder / "config.json").is_file():
                raise FileNotFoundError(f"{options.folder} holds no transformers model (config.json is missing)")
            model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **pin)
            self.prefix, patch = 1 + getattr(model.config, "num_register_tokens", 0), model.config.patch_size
            files = sorted(options.folder.glob("*.safetensors")) if options.folder else []
            self.identity = options.revision or " ".join(sha256(f) for f in files)
        if size % patch:
            raise ValueError(
                f"`size` {size} is not a multiple of the backbone's patch, {patch}: try {size // patch * patch or patch}"
            )
        self.grid = size // patch
        self.model = model.eval().requires_grad_(False).to(self.device, dtype)
        self._normalise = normaliser(*IMAGENET, self.device)

    def _resize(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        return resized(images, (self.size, self.size), "bicubic", self.device).clamp(0, 255)

    @torch.no_grad()  # not inference_mode: a head is fitted on these
    def pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, size, size), normalised."""
        return self._normalise(batched(images, self.device, self.size, self._resize)).to(self.dtype)

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        """cls_BD and patches_BND after the backbone's last norm, each divided by its length."""
        return self.embed(self.pixels(images))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Features:
        """Features of preprocessed pictures."""
        tokens = self.model.forward_features(pixels) if self._timm else self.model(pixel_values=pixels).last_hidden_state
        tokens = F.normalize(tokens.float(), dim=-1)
        return Features(tokens[:, 0], tokens[:, self.prefix :])


def head(width: int, hidden: int = 512) -> nn.Sequential:
    """h: (..., D) to (..., 1)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))


def hinge_loss(head: nn.Module, real: Features, generated: Features, patch_weight: float = 0.3) -> Tensor:
    """What h is fitted by: half of relu(1 - h(real)) + relu(1 + h(generated)), on CLS tokens plus `patch_weight` on patches."""

    def on(real: Tensor, generated: Tensor) -> Tensor:
        return 0.5 * (F.relu(1 - head(real)).mean() + F.relu(1 + head(generated)).mean())

    return on(real.cls_BD, generated.cls_BD) + patch_weight * on(real.patches_BND, generated.patches_BND)


def _named(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A head's tensors as 0.weight, 0.bias, 2.weight, 2.bias, whatever module they lay in."""
    weights = sorted(k for k in state if k.endswith("weight"))
    if len(weights) != 2 or len(state) != 4 or any(state[k].ndim != 2 for k in weights):
        raise ValueError(f"{source} is not a head of two linear layers; it holds {', '.join(sorted(state)[:5])}")
    first, last = weights
    pairs = {
        "0.weight": first,
        "0.bias": first[: -len("weight")] + "bias",
        "2.weight": last,
        "2.bias": last[: -len("weight")] + "bias",
    }
    return {ours: state[theirs] for ours, theirs in pairs.items() if theirs in state}


class DinoHead:
    """Unbounded, higher is more real; parts: `cls` and `patch`, the two means that are weighed."""

    def __init__(self, name: str, options: DinoHeadOptions, device: str) -> None:
        dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
        self.backbone, self.options = Backbone(options.backbone, options.size, device, dtype), options
        file = options.head.locate()
        state = _named(read_state(file), file.name)
        self.head = head(self.backbone.features([np.zeros((16, 16, 3), np.uint8)]).cls_BD.shape[1], len(state["0.weight"]))
        fill(self.head, state, file.name)
        self.head.eval().requires_grad_(False).to(self.backbone.device)
        self.info = RewardInfo(
            name=name,
            range=None,
            version=options.version,
            weights_sha256=hashlib.sha256(f"{sha256(file)} {self.backbone.identity}".encode()).hexdigest(),
            preprocessing=f"bicubic-antialias-{options.size}-1",
            licence=options.head.licence,
            description=f"{options.cls_weight:g} h(CLS) + {1 - options.cls_weight:g} mean h(patch) on normalised DINO features",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when a file is not there; ValueError names what of a checkpoint differs."""
        return cls(name, DinoHeadOptions.model_validate(options), device)

    def _drawn(self, image: NDArray[np.uint8]) -> Tensor:
        """Which patches count, as often as drawn: `patches` numbers out of a generator that the picture's hash seeds."""
        seed = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7).digest())
        count = self.options.patches or 0
        return torch.randint(self.backbone.grid**2, (count,), generator=torch.Generator().manual_seed(seed))

    def prepare(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """What `forward` takes: pixels, and the patches drawn (B, n), or None for all of them."""
        pixels = self.backbone.pixels([item.image for item in batch])
        if self.options.patches is None:
            return pixels, None
        return pixels, torch.stack([self._drawn(item.image) for item in batch]).to(self.backbone.device)

    def join(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        drawn = [one for _, one in pieces if one is not None]
        return torch.cat([pixels for pixels, _ in pieces]), torch.cat(drawn) if drawn else None

    @torch.no_grad()
    def forward(self, prepared: tuple[Tensor, Tensor | None]) -> list[Score]:
        pixels, drawn = prepared
        features = self.backbone.embed(pixels)
        cls, patches = self.head(features.cls_BD)[:, 0].double(), self.head(features.patches_BND)[..., 0].double()
        patch = (patches if drawn is None else patches.gather(1, drawn)).mean(1)
        value = self.options.cls_weight * cls + (1 - self.options.cls_weight) * patch
        rows = torch.stack([value, cls, patch], 1).cpu().tolist()
        return [Score.ok(v, parts={"cls": c, "patch": p}) for v, c, p in rows]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))

    @torch.no_grad()
    def patch_map(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How generated each patch looks, (grid, grid) in [0, 1]: the sigmoid of -h."""
        scores = self.head(self.backbone.features([image]).patches_BND)[0, :, 0]
        found: NDArray[np.float32] = torch.sigmoid(-scores).view(self.backbone.grid, self.backbone.grid).cpu().numpy()
        return found
