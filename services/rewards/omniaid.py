"""Is this a photograph? OmniAID (2511.08423), the feature-level detector of RealGen (2512.00473), CLIP and DINOv3 forms.

    omniaid: {use: omniaid, hub: Yunncheng/OmniAID, file: checkpoint_mirage.pth, revision: COMMIT}

The architecture is read from the checkpoint. RealGen's first checkpoint routes by patches, later ones by a frozen twin that lies in
the checkpoint: `routing: auto` looks. Index 0 of the head is real. Run here at tiny random sizes only, never on the authors' weights.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from services.fitting.heads import LossOptions, balanced, checked, digest
from services.fitting.lora import shared_copy, with_values
from services.reward import Item
from services.rewards._detector_kit import CLIP, IMAGENET, WeightsOptions, batched, normaliser, read_state, sha256
from services.rewards._omniaid import ExpertLinear, OmniAid, build
from services.rewards._resize import resized
from shared.schema import RewardInfo, Score


class OmniAidOptions(WeightsOptions):
    """Options in the service's configuration."""

    routing: Literal["auto", "pooler", "patches"] = "auto"
    top_k: int = Field(default=2, ge=1, description="experts that the router chooses")
    heads: int | None = Field(default=None, ge=1, description="attention heads; default: one per 64 channels, as in ViT-L")
    size: int | None = Field(default=None, ge=16, le=1024, description="side in pixels; CLIP: in the checkpoint, DINOv3: 448")
    first_size: int = Field(default=512, ge=0, le=2048, description="every picture is brought to this side first; 0: not")
    dtype: Literal["float32", "bfloat16"] = "float32"
    version: int = Field(default=1, ge=1)


class OmniAID:
    """P(photograph) in [0, 1]; parts: `logit`, the log-odds, and `gate_N`, how much expert N (last: artifacts) was asked."""

    def __init__(self, name: str, options: OmniAidOptions, device: str) -> None:
        weights = options.locate()
        self.device, self._first = torch.device(device), options.first_size
        self.dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
        self.model = build(read_state(weights), weights.name, options.routing, options.top_k, options.heads, options.size)
        self.model.eval().requires_grad_(False).to(self.device, self.dtype)
        self.shape = self.model.shape
        self._fitted: tuple[OmniAID, OmniAidFitOptions, dict[str, Tensor]] | None = None
        self._normalise = normaliser(*(CLIP if self.shape.form == "clip" else IMAGENET), self.device)
        self.info = RewardInfo(
            name=name,
            range=(0.0, 1.0),
            version=options.version,
            weights_sha256=sha256(weights),
            preprocessing=f"bilinear-{options.first_size}-{self.shape.size}-1",
            licence=options.licence,
            description=f"P(photograph) by OmniAID ({self.shape.form}, {self.shape.experts} experts of rank {self.shape.rank}, "
            f"routed by {self.model.routing})",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when the file is not there; ValueError names what of the checkpoint differs."""
        return cls(name, OmniAidOptions.model_validate(options), device)

    def fitter(self, options: Mapping[str, Any]) -> "OmniAidFitter":
        """`fit.head`: OmniAidFitOptions. A refitted version goes on where it is, with the `router` that it was fitted with."""
        wanted = OmniAidFitOptions.model_validate(dict(options))
        if self._fitted is None:
            return OmniAidFitter(self, wanted)
        origin, was, weights = self._fitted
        if wanted.router != was.router:
            raise ValueError(f"version {self.info.version} of {self.info.name} was fitted with `router: {was.router}`: keep that")
        return OmniAidFitter(origin, wanted, weights)

    def refitted(self, options: "OmniAidFitOptions", weights: Mapping[str, Tensor], version: int) -> Self:
        """With other experts and another head; what is frozen is the very same."""
        other = copy(self)
        model = with_values(self.model, weights)
        assert isinstance(model, OmniAid)
        other.model = model
        other._fitted = (self, options, dict(weights))
        other.info = self.info.model_copy(
            update={"version": version, "weights_sha256": digest(str(self.info.weights_sha256), weights)}
        )
        return other

    def _resize(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """To `first_size`, then to the model's side, antialiased bilinear, rounded to whole levels after each like a picture."""
        first, last = (self._first or self.shape.size,) * 2, (self.shape.size,) * 2
        pixels = resized(images, first, "bilinear", self.device).round().clamp(0, 255)
        if first != last:
            pixels = torch.nn.functional.interpolate(pixels, last, mode="bilinear", antialias=True).round().clamp(0, 255)
        return pixels

    def preprocess(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, size, size) float32, normalised."""
        return self._normalise(batched(images, self.device, self.shape.size, self._resize))

    @torch.inference_mode()
    def prepare(self, batch: Sequence[Item]) -> Tensor:
        """What `forward` takes: (B, 3, size, size) in the model's type."""
        return self.preprocess([item.image for item in batch]).to(self.dtype)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(pieces))

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> list[Score]:
        logits, gates = self.model.logits(pixels)
        odds = (logits[:, 0].float() - logits[:, 1].float()).double()
        rows = torch.cat([odds.sigmoid()[:, None], odds[:, None], gates.double()], 1).cpu().tolist()
        return [Score.ok(p, parts={"logit": z, **{f"gate_{i}": g for i, g in enumerate(rest)}}) for p, z, *rest in rows]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))


class OmniAidFitOptions(LossOptions):
    """`fit.head` of an OmniAID detector."""

    orthogonality: float = Field(default=0.001, ge=0, description="weight of the overlap of the experts' spaces in the loss")
    router: bool = Field(default=False, description="fit the router too; RealGen V2 does not")


class OmniAidFitter:
    """The low-rank experts and the head, after RealGen V2 (2512.00473). See services/fitting/types.py.

    Everything else is shared with what is served. RealGen's code drops a tenth of the experts' inputs while it fits; here nothing is
    dropped, so that what is fitted is what is scored.
    """

    def __init__(self, live: OmniAID, options: OmniAidFitOptions, weights: Mapping[str, Tensor] | None = None) -> None:
        self._live, self._options = live, options
        own = [n for n, _ in live.model.named_parameters() if _is_fitted(n, options.router)]
        model = shared_copy(live.model, own)
        assert isinstance(model, OmniAid)
        self._model, self._own = model, {name: model.get_parameter(name) for name in own}
        if weights is not None:
            with torch.no_grad():
                for name, value in checked(weights, self._own, live.info.name).items():
                    self._own[name].copy_(value)
        layers = [m for m in model.modules() if isinstance(m, ExpertLinear)] if options.orthogonality else []
        self._frozen = [(layer, layer.complements()) for layer in layers]

    def trainable(self) -> dict[str, Tensor]:
        return dict(self._own)

    def _odds(self, items: Sequence[Item]) -> Tensor:
        pixels = self._live.preprocess([item.image for item in items]).to(self._live.dtype)
        logits = self._model.logits(pixels)[0].float()
        return logits[:, 0] - logits[:, 1]

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        odds = self._odds([*real, *generated])
        sides = odds[: len(real)], odds[len(real) :]
        total = apart = self._options(*sides)
        parts = {self._options.loss: apart, "accuracy": torch.tensor(balanced(*sides, 0.0))}
        if self._frozen:
            parts["orthogonality"] = torch.stack([layer.overlap(frozen) for layer, frozen in self._frozen]).mean()
            total = apart + self._options.orthogonality * parts["orthogonality"]
        return {"total": total, **parts}

    @torch.no_grad()
    def scores(self, items: Sequence[Item]) -> Tensor:
        return self._odds(items).double().sigmoid().float()

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        """Balanced over both sides, at P(photograph) = 0.5."""
        return balanced(real, generated, 0.5)

    def reward(self, weights: Mapping[str, Tensor], version: int) -> OmniAID:
        return self._live.refitted(self._options, checked(weights, self._own, self._live.info.name), version)


def _is_fitted(name: str, router: bool) -> bool:
    return "_experts." in name or name.startswith("head.") or (router and name.startswith("gating_network."))
