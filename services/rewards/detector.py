"""Is this a photograph? Features of a pretrained timm backbone, and a linear head that was fitted on samples of a generator.

Serve it with `detector: {use: detector, folder: world/detector}`. The folder holds `config.json` (below) and
`model.safetensors`: head.weight (D,), head.bias (), domain.mean (D,), domain.axes (K, D), domain.scale (K,). A
picture whose features lie nearer to or farther from the fitted ones' mean than `domain_range` gets `in_domain: false`: its
score is an extrapolation.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import Tensor

from services.fitting.heads import HeadOptions, Kept, balanced, checked, digest, head_logits, hidden_layer, leaf
from services.fitting.lora import adapted, adapters, merged
from services.reward import Item
from services.rewards._detector_kit import batched, folded, in_one_call, load_in_order, normaliser, package_weights
from services.rewards._resize import resized
from shared.schema import RewardInfo, Score


class DetectorOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path = Field(description="folder with config.json and model.safetensors")


class DetectorConfig(BaseModel):
    """`config.json` of a detector's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    backbone: str = Field(description="timm architecture, e.g. tf_efficientnet_lite0")
    backbone_weights: str = Field(
        description="`package:NAME` (weights inside a Python package), `timm` (timm's own pretrained tag), or a .safetensors path"
    )
    size: int = Field(ge=16, le=1024, description="side in pixels of the square that the backbone sees")
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    domain_range: tuple[float, float] = Field(description="smallest and largest distance of in-domain features")
    version: int = 1
    preprocessing: str = "bicubic-antialias-1"
    licence: str
    description: str


class Backbone:
    """Pictures (uint8 HxWx3, any size) to features (B, D): the one path for fitting and for scoring.

    Each picture is resized to a square with antialiased bicubic interpolation, whatever its aspect ratio. `fold` computes the same
    in less time (features to 1e-5 of the largest); fitting goes without, so that weights come out the same, byte for byte.
    """

    def __init__(self, config: DetectorConfig, device: str, fold: bool = False) -> None:
        weights = config.backbone_weights
        self.config, self.device = config, torch.device(device)
        self.model = timm.create_model(config.backbone, pretrained=weights == "timm")
        if weights.startswith("package:"):
            file = package_weights(weights.removeprefix("package:"))
            state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            load_in_order(self.model, state, weights)
        elif weights != "timm":
            self.model.load_state_dict(load_file(weights))
        self.model.reset_classifier(0)
        self.model.eval().requires_grad_(False).to(self.device)
        if fold:
            self.model = folded(self.model, self._trial())
        self._run: Callable[[Tensor], Tensor] = self.model
        if self.device.type == "cpu":
            self.model.to(memory_format=torch.channels_last)
            if fold:
                self._run = in_one_call(self.model, self._trial())
        self._normalise = normaliser(config.mean, config.std, self.device)

    def _trial(self) -> Tensor:
        """Two pictures of noise, preprocessed."""
        trial = torch.randn(2, 3, self.config.size, self.config.size, generator=torch.Generator().manual_seed(0)).to(self.device)
        return trial.contiguous(memory_format=torch.channels_last) if self.device.type == "cpu" else trial

    def running(self, model: torch.nn.Module) -> Self:
        """The same path around another network of the same shapes, made as quick as this one."""
        other = copy(self)
        other.model = model
        other._run = in_one_call(model, self._trial()) if self.device.type == "cpu" else model
        return other

    def preprocess(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, size, size) float32, normalised."""
        side = self.config.size
        pixels = batched(images, self.device, side, lambda several: resized(several, (side, side), "bicubic", self.device))
        return self._normalise(pixels.clamp_(0, 255)).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def features(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, D) float32."""
        return self.embed(self.preprocess(images))

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 of preprocessed pictures."""
        features = self._run(pixels)
        return features.float()

    @torch.inference_mode()
    def grid(self, images: Sequence[NDArray[np.uint8]]) -> Tensor | None:
        """(B, D, h, w) float32 whose mean over h and w is `features`, or None where the architecture pools otherwise."""
        pixels = self.preprocess(images)
        cells = self.model.forward_features(pixels).float()
        if cells.ndim != 4 or cells.shape[-1] * cells.shape[-2] < 2:
            return None
        features = self.embed(pixels)
        same = cells.shape[1] == features.shape[1] and torch.allclose(cells.mean((2, 3)), features, rtol=1e-3, atol=1e-4)
        return cells if same else None


def domain_distance(features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Mahalanobis distance of features (B, D) from those of the fit, over root K: (B,) >= 0, about 1 inside.

    The axes of small variance count most: that is where pictures of another kind stand out (Lee, 1807.03888).
    """
    along = (features - tensors["domain.mean"]) @ tensors["domain.axes"].float().T
    return (along / tensors["domain.scale"]).square().mean(1).sqrt()


class Detector:
    """P(photograph) in [0, 1]; `parts.logit` is the log-odds, `parts.domain_distance` what `in_domain` was read from."""

    def __init__(self, name: str, config: DetectorConfig, tensors: Mapping[str, Tensor], sha256: str, device: str) -> None:
        self.backbone = self._familiar = Backbone(config, device, fold=True)
        self._t = {k: v.to(self.backbone.device) for k, v in tensors.items()}
        spread = (self._t["domain.axes"].float() * self._t["domain.scale"][:, None]).square().sum(0).sqrt()
        self._t["domain.std"] = spread.clamp_min(1e-3)
        self._fitted: tuple[Detector, HeadOptions, dict[str, Tensor]] | None = None
        self.info = RewardInfo(
            name=name,
            range=(0.0, 1.0),
            version=config.version,
            weights_sha256=sha256,
            preprocessing=config.preprocessing,
            licence=config.licence,
            description=config.description,
        )
        if self.backbone.grid([np.zeros((16, 16, 3), np.uint8)]) is not None:
            self.patch_map = self._patch_map

    def fitter(self, options: Mapping[str, Any]) -> "DetectorFitter":
        """`fit.head`: HeadOptions. A refitted version goes on where it is, with the options that it was fitted with."""
        head = HeadOptions.model_validate(dict(options))
        if self._fitted is None:
            return DetectorFitter(self, head)
        origin, was, weights = self._fitted
        if head != was:
            raise ValueError(
                f"version {self.info.version} of {self.info.name} was fitted with `fit.head` {was.model_dump(exclude_defaults=True)}: "
                "keep that, or go back to the version of the folder"
            )
        return DetectorFitter(origin, head, weights)

    def refitted(self, options: HeadOptions, weights: Mapping[str, Tensor], version: int) -> Self:
        """With other weights of the head, and of the backbone where LoRA changes it; all else is this one's."""
        other = copy(self)
        other._t = {**self._t, **{k: v for k, v in weights.items() if k.startswith("head.")}}
        if options.lora is not None:
            values = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
            other.backbone = self.backbone.running(merged(self.backbone.model, options.lora, values))
        other._fitted = (self, options, dict(weights))
        other.info = self.info.model_copy(
            update={"version": version, "weights_sha256": digest(str(self.info.weights_sha256), weights)}
        )
        if hasattr(self, "patch_map"):
            other.patch_map = other._patch_map
        return other

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """Read the folder; FileNotFoundError or ValueError says what is wrong with it."""
        folder = DetectorOptions.model_validate(options).folder
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no detector (config.json is missing); `make world` builds world/detector")
        config = DetectorConfig.model_validate(json.loads((folder / "config.json").read_text()))
        weights = folder / "model.safetensors"
        return cls(name, config, load_file(weights), hashlib.sha256(weights.read_bytes()).hexdigest(), device)

    @torch.inference_mode()
    def prepare(self, batch: Sequence[Item]) -> Tensor:
        """What `forward` takes: (B, 3, size, size)."""
        return self.backbone.preprocess([item.image for item in batch])

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces)).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> list[Score]:
        features = self.backbone.embed(pixels)
        logits = head_logits(features, self._t)
        known = features if self.backbone is self._familiar else self._familiar.embed(pixels)
        distance = domain_distance(known, self._t)
        low, high = self.backbone.config.domain_range
        rows = torch.stack([logits.double().sigmoid(), logits.double(), distance.double()], 1).cpu().tolist()
        return [Score.ok(p, parts={"logit": z, "domain_distance": d}, in_domain=low <= d <= high) for p, z, d in rows]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))

    @torch.inference_mode()
    def _patch_map(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """How generated each patch looks, (h, w) in [0, 1]: the head before pooling (class activation map, 1512.04150).

        Only there (as `patch_map`) where the backbone pools by the mean: the mean of the map's log-odds is then the picture's.
        """
        cells = self.backbone.grid([image])
        if cells is None:
            raise RuntimeError(f"{self.info.name} has no map of this picture: its backbone does not pool by the mean")
        logits = head_logits(cells[0].flatten(1).T, self._t).view(cells.shape[2:])
        found: NDArray[np.float32] = torch.sigmoid(-logits).cpu().numpy()
        return found


class DetectorFitter:
    """A linear head or one with a hidden layer, on the features that are served; with LoRA on the backbone too. See services/fitting/types.py.

    `trainable`: head.weight (D,), head.bias (); with a hidden layer head.hidden (H, D), head.shift (H,), head.out (H,); with LoRA
    backbone.LAYER.a and .b. Without LoRA a refit computes the features of a picture once, while they are among its last 256 MiB.
    """

    def __init__(self, live: Detector, options: HeadOptions, weights: Mapping[str, Tensor] | None = None) -> None:
        self._live, self._options = live, options
        generator = torch.Generator().manual_seed(options.seed)
        own = {k: live._t[k] for k in ("head.weight", "head.bias")}
        if options.kind == "mlp":
            own |= hidden_layer(len(own["head.weight"]), options.hidden or 256, generator)
        self._own = {k: leaf(v.to(live.backbone.device)) for k, v in own.items()}
        self._adapted: torch.nn.Module | None = None
        if options.lora is not None:
            self._adapted = adapted(live.backbone.model, options.lora, generator)
            self._own |= {f"backbone.{k}": v for k, v in adapters(self._adapted).items()}
        self._features = Kept(lambda items: (live.backbone.features([item.image for item in items]),))
        with torch.no_grad():
            for name, value in checked(weights, self._own, live.info.name).items() if weights is not None else ():
                self._own[name].copy_(value)

    def trainable(self) -> dict[str, Tensor]:
        """A refit asks for these first, so what was kept of the one before is dropped."""
        self._features.clear()
        return dict(self._own)

    def _logits(self, items: Sequence[Item]) -> Tensor:
        if self._adapted is None:
            (features,) = self._features(items)
        else:
            features = self._adapted(self._live.backbone.preprocess([item.image for item in items])).float()
        return head_logits(features, {**self._live._t, **self._own})

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        logits = self._logits([*real, *generated])
        sides = logits[: len(real)], logits[len(real) :]
        return {"total": self._options(*sides), "accuracy": torch.tensor(balanced(*sides, 0.0))}

    @torch.no_grad()
    def scores(self, items: Sequence[Item]) -> Tensor:
        return self._logits(items).double().sigmoid().float()

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        """Balanced over both sides, at P(photograph) = 0.5."""
        return balanced(real, generated, 0.5)

    def reward(self, weights: Mapping[str, Tensor], version: int) -> Detector:
        return self._live.refitted(self._options, checked(weights, self._own, self._live.info.name), version)
