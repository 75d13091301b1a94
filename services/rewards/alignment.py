"""Does the picture show what the prompt says? Cosine similarity of a CLIP model's two embeddings.

Any folder or hub id of transformers' CLIPModel class works (CLIP, LongCLIP conversions, PickScore's backbone); the embedded
one is a tiny CLIPModel trained on this repository's photographs: `alignment: {use: alignment, model: world/alignment}`.
Embeddings are normalised, else the norm of a picture's embedding becomes something to exploit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from services.reward import Item
from shared.schema import RewardInfo, Score

_CACHE = 4096


class AlignmentOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path | None = Field(default=None, description="local folder of a CLIPModel")
    model: str | None = Field(default=None, description="hub id of a CLIPModel; needs `revision`")
    revision: str | None = Field(default=None, description="commit of the hub model; pinned, so that scores stay comparable")
    licence: str = "see the model card"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.model is None):
            raise ValueError("give either `folder` (local) or `model` (hub id)")
        if self.model is not None and self.revision is None:
            raise ValueError("a hub `model` needs its `revision` (a commit), or scores change when the hub does")
        return self


class Alignment:
    """Cosine in [-1, 1] of picture and prompt; an item without a prompt is an error of that item."""

    def __init__(self, name: str, source: str, revision: str | None, licence: str, sha256: str | None, device: str) -> None:
        common = {"revision": revision} if revision else {}
        self.device = torch.device(device)
        self.model = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **common)
        self.model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(source, **common)
        processor = CLIPImageProcessor.from_pretrained(source, **common)
        self.size = int(self.model.config.vision_config.image_size)
        self._mean = torch.tensor(processor.image_mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(processor.image_std, device=self.device).view(1, 3, 1, 1)
        self._text: dict[str, Tensor] = {}
        self.info = RewardInfo(
            name=name,
            range=(-1.0, 1.0),
            needs=["prompt"],
            version=1,
            weights_sha256=sha256,
            preprocessing="short-side-bicubic-centre-crop-1",
            licence=licence,
            description="cosine of CLIP embeddings of picture and prompt",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when the folder is missing; ValueError when the options contradict each other."""
        chosen = AlignmentOptions.model_validate(options)
        if chosen.folder is None:
            return cls(name, str(chosen.model), chosen.revision, chosen.licence, None, device)
        weights = chosen.folder / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{chosen.folder} holds no CLIPModel (model.safetensors is missing)")
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
        return cls(name, str(chosen.folder), None, chosen.licence, sha256, device)

    def preprocess(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, size, size): short side to `size` with antialiased bicubic, centre crop, CLIP's mean and deviation."""
        crops = []
        for image in images:
            pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1)[None].float() / 255
            height, width = pixels.shape[-2:]
            if (height, width) != (self.size, self.size):
                scale = self.size / min(height, width)
                sides = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
                pixels = torch.nn.functional.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 1)
                top, left = (sides[0] - self.size) // 2, (sides[1] - self.size) // 2
                pixels = pixels[..., top : top + self.size, left : left + self.size]
            crops.append(pixels)
        return (torch.cat(crops) - self._mean) / self._std

    def text(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) normalised embeddings; each distinct prompt is encoded once and kept, up to 4,096 of them."""
        if len(self._text) > _CACHE:
            self._text.clear()
        for prompt in dict.fromkeys(p for p in prompts if p not in self._text):
            tokens = self.tokenizer([prompt], truncation=True, return_tensors="pt").to(self.device)
            hidden = self.model.text_model(**tokens).pooler_output
            self._text[prompt] = torch.nn.functional.normalize(self.model.text_projection(hidden), dim=-1)[0]
        return torch.stack([self._text[p] for p in prompts])

    def pictures(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, D) normalised embeddings."""
        hidden = self.model.vision_model(pixel_values=self.preprocess(images)).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(hidden), dim=-1)

    @torch.inference_mode()
    def score(self, batch: Sequence[Item]) -> list[Score]:
        asked = [item for item in batch if item.prompt]
        cosines: list[float] = []
        if asked:
            text = self.text([item.prompt or "" for item in asked])
            cosines = (self.pictures([item.image for item in asked]) * text).sum(-1).double().cpu().tolist()
        values = iter(cosines)
        return [
            Score.ok(max(-1.0, min(1.0, next(values))))
            if item.prompt
            else Score.failed("prompt-missing", f"{self.info.name} needs the item's `prompt`: what should the picture show?")
            for item in batch
        ]
