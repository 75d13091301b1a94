"""Does the picture show what the prompt says? Cosine similarity of the two embeddings of a CLIP-like model.

Any folder or hub id of transformers' CLIPModel, SiglipModel or Siglip2Model; with `weights`, a CLIP or LongCLIP checkpoint in the
layout of OpenAI or open_clip over a folder's config.json and tokenizer. LongCLIP reads 248 tokens, CLIP 77, SigLIP 64. The embedded
model is a tiny CLIPModel trained on this repository's photographs: `alignment: {use: alignment, folder: world/alignment}`.
Embeddings are normalised, else the norm of a picture's embedding becomes something to exploit.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from services.rewards.clip_kit import Cosine, PromptOptions
from services.rewards.clip_towers import ClipTowers
from services.rewards.siglip import SiglipTowers
from shared.schema import RewardInfo

_MOST_OTHERS = 1000


class AlignmentOptions(PromptOptions):
    """Options in the service's configuration; ModelOptions describes them."""

    against: Path | None = Field(default=None, description="text file of other prompts, one a line: gives `parts.margin`")
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="divides the logits of `parts.margin`: above 1, a clear case counts on"
    )


class Alignment(Cosine):
    """`parts.match` is SigLIP's probability that the two belong together; `parts.truncated` says that the prompt was cut.

    With `against`, `parts.margin` is the log-probability, at `temperature` times the model's own, that the picture shows its prompt rather than
    one of those: at most 0. What raises every cosine leaves it alone, so as a reward it is harder to please without showing the thing.
    """

    _others: tuple[str, ...] = ()
    _temperature = 1.0

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
        reward = cls(towers, chosen, info)
        reward._others, reward._temperature = _lines(chosen.against), chosen.temperature
        return reward

    def _more(self, cosine_B: Tensor, picture_BD: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
        if not self._others:
            return super()._more(cosine_B, picture_BD, prompts)
        cosine_BO = (picture_BD @ self.towers.texts(self._others).T).double()
        for row, prompt in enumerate(prompts):
            cosine_BO[row, [n for n, other in enumerate(self._others) if other == prompt]] = -torch.inf
        logits_BO = self.towers.scale / self._temperature * torch.cat([cosine_B[:, None], cosine_BO], dim=1)
        return [{"margin": margin} for margin in logits_BO.log_softmax(1)[:, 0].cpu().tolist()]

    def _value(self, cosine: float) -> tuple[float, dict[str, float]]:
        if isinstance(self.towers, SiglipTowers):
            return cosine, {"match": (1 + math.tanh((self.towers.scale * cosine + self.towers.bias) / 2)) / 2}
        return cosine, {}


def _lines(file: Path | None) -> tuple[str, ...]:
    """Prompts of a text file; ValueError when there are none, or more than are worth the time."""
    if file is None:
        return ()
    if not file.is_file():
        raise FileNotFoundError(f"against: no file {file}; write other prompts into it, one a line")
    lines = tuple(dict.fromkeys(line.strip() for line in file.read_text().splitlines() if line.strip()))
    if not 1 <= len(lines) <= _MOST_OTHERS:
        raise ValueError(f"against: {file} holds {len(lines)} prompts; 1 to {_MOST_OTHERS} are sensible")
    return lines
