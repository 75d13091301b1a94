"""Is this a photograph? OmniAID (2511.08423), the feature-level detector of RealGen (2512.00473), CLIP and DINOv3 forms.

    omniaid: {use: omniaid, hub: Yunncheng/OmniAID, file: checkpoint_mirage.pth, revision: COMMIT}

The architecture is read from the checkpoint. RealGen's first checkpoint routes by patches, later ones by a frozen twin that lies in
the checkpoint: `routing: auto` looks. Index 0 of the head is real. Run here at tiny random sizes only, never on the authors' weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from services.reward import Item
from services.rewards._detector_kit import CLIP, IMAGENET, WeightsOptions, batched, normaliser, read_state, sha256
from services.rewards._omniaid import build
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
        odds = (logits[:, 0] - logits[:, 1]).double()
        rows = torch.cat([odds.sigmoid()[:, None], odds[:, None], gates.double()], 1).cpu().tolist()
        return [Score.ok(p, parts={"logit": z, **{f"gate_{i}": g for i, g in enumerate(rest)}}) for p, z, *rest in rows]

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))
