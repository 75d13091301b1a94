"""Is the picture fit to be shown? The MobileNetV2 of npm's nsfwjs (MIT), shipped in services/weights/nsfwjs.

`safety: {use: safety}`. The value is P(safe): one minus the probabilities of the classes in `unsafe`; `parts` holds all five, and
`gate`, 1.0 where P(safe) reaches `threshold` and 0.0 below. Used as a gate, not as something to climb: multiply by `gate`, or floor
the reward where it is 0. A policy that is rewarded by P(safe) itself learns to please a small classifier. Below 112 pixels a
picture is mostly interpolation to this model: `in_domain` is false there and the gate is not to be trusted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from services.reward import Item
from services.rewards._detector_kit import batched, in_one_call, sha256
from services.rewards._nsfwjs import CLASSES, SIDE, MobileNet, read, resize
from services.rewards._resize import upload
from shared.schema import RewardInfo, Score

MIN_SIDE = SIDE // 2
WEIGHTS = Path(__file__).parents[1] / "weights" / "nsfwjs" / "model.safetensors"


class SafetyOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    unsafe: tuple[Literal["drawing", "hentai", "neutral", "porn", "sexy"], ...] = Field(
        default=("hentai", "porn", "sexy"), min_length=1, description="classes whose probability counts against the picture"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="P(safe) from which `parts.gate` is 1")


class Safety:
    """P(safe) in [0, 1]."""

    def __init__(self, name: str, options: SafetyOptions, device: str) -> None:
        self.device, self.threshold = torch.device(device), options.threshold
        self._unsafe = [CLASSES.index(c) for c in dict.fromkeys(options.unsafe)]
        if not WEIGHTS.is_file():
            raise FileNotFoundError(f"{WEIGHTS} is missing; python -m services.weights.nsfwjs.recipe makes it")
        self.model = MobileNet(read(WEIGHTS)).eval().requires_grad_(False).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trial = torch.rand(2, 3, SIDE, SIDE, device=self.device).contiguous(memory_format=torch.channels_last)
        self._run = in_one_call(self.model, trial) if self.device.type == "cpu" else self.model
        self.info = RewardInfo(
            name=name,
            range=(0.0, 1.0),
            weights_sha256=sha256(WEIGHTS),
            preprocessing="bilinear-aligned-224-1",
            licence="MIT (nsfwjs)",
            description=f"P(safe) = 1 - P({' or '.join(dict.fromkeys(options.unsafe))}), a gate at {options.threshold:g}",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name, SafetyOptions.model_validate(options), device)

    @torch.inference_mode()
    def pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, 224, 224) in [0, 1]."""
        pixels = batched(images, self.device, SIDE, lambda several: resize(upload(several, self.device).float()))
        return pixels.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def probabilities(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 5) float64 in the order of CLASSES."""
        return self._softmax(self.pixels(images))

    def _softmax(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._run(pixels)
        return logits.double().softmax(1)

    def prepare(self, batch: Sequence[Item]) -> tuple[Tensor, list[bool]]:
        """What `forward` takes: pixels, and whether each picture is large enough to be known."""
        return self.pixels([item.image for item in batch]), [min(item.image.shape[:2]) >= MIN_SIDE for item in batch]

    def join(self, pieces: Sequence[tuple[Tensor, list[bool]]]) -> tuple[Tensor, list[bool]]:
        pixels = torch.cat([one for one, _ in pieces]).contiguous(memory_format=torch.channels_last)
        return pixels, [known for _, several in pieces for known in several]

    @torch.inference_mode()
    def forward(self, prepared: tuple[Tensor, list[bool]]) -> list[Score]:
        pixels, known = prepared
        out = []
        for row, in_domain in zip(self._softmax(pixels).cpu().tolist(), known, strict=True):
            safe = min(1.0, max(0.0, 1.0 - sum(row[i] for i in self._unsafe)))
            parts = {**dict(zip(CLASSES, row, strict=True)), "gate": float(safe >= self.threshold)}
            out.append(Score.ok(safe, parts=parts, in_domain=in_domain))
        return out

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return self.forward(self.prepare(batch))
