"""Does the picture show what the prompt says? Cosine similarity of the two embeddings of a CLIP-like model.

Any folder or hub id of transformers' CLIPModel, SiglipModel or Siglip2Model; with `weights`, a CLIP or LongCLIP checkpoint in the
layout of OpenAI or open_clip over a folder's config.json and tokenizer. LongCLIP reads 248 tokens, CLIP 77, SigLIP 64. The embedded
model is a tiny CLIPModel trained on this repository's photographs: `alignment: {use: alignment, folder: world/alignment}`.
Embeddings are normalised, else the norm of a picture's embedding becomes something to exploit.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Self

from services.rewards.clip_kit import Cosine, PromptOptions
from services.rewards.clip_towers import ClipTowers
from services.rewards.siglip import SiglipTowers
from shared.schema import RewardInfo


class AlignmentOptions(PromptOptions):
    """Options in the service's configuration; ModelOptions describes them."""


class Alignment(Cosine):
    """`parts.match` is SigLIP's probability that the two belong together; `parts.truncated` says that the prompt was cut."""

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoint do not fit."""
        chosen = AlignmentOptions.model_validate(dict(options))
        config = chosen.place() / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{config.parent} holds no model (config.json is missing)")
        kind = json.loads(config.read_text()).get("model_type")
        if kind not in ("clip", "siglip", "siglip2"):
            raise ValueError(f"{config} is of a {kind!r} model; alignment reads clip, siglip and siglip2")
        towers = ClipTowers(chosen, device) if kind == "clip" else SiglipTowers(chosen, device)
        info = RewardInfo(
            name=name,
            range=(-1.0, 1.0),
            needs=["prompt"],
            version=chosen.version,
            weights_sha256=towers.sha256,
            preprocessing=towers.pixels.version,
            licence=chosen.licence,
            description=f"cosine of the {kind} embeddings of picture and prompt",
        )
        return cls(towers, chosen, info)

    def _value(self, cosine: float) -> tuple[float, dict[str, float]]:
        if isinstance(self.towers, SiglipTowers):
            return cosine, {"match": (1 + math.tanh((self.towers.scale * cosine + self.towers.bias) / 2)) / 2}
        return cosine, {}
