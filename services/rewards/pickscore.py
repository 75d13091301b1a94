"""PickScore (2305.01569): which picture people would pick for a prompt. A CLIP-H tuned on Pick-a-Pic; exp(logit scale) * cosine.

Published as `yuvalkirstain/PickScore_v1`, a CLIPModel; its tokenizer and processor are those of
`laion/CLIP-ViT-H-14-laion2B-s32B-b79K`: name their folder as `processor` where the model's folder has none.
Differences between pictures for one prompt mean something, not the value itself. Flow-GRPO divides it by 26.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from services.rewards.clip_kit import Cosine, PromptOptions
from services.rewards.clip_towers import ClipTowers
from shared.schema import RewardInfo


class PickScoreOptions(PromptOptions):
    """ModelOptions describes the others."""

    processor: Path | None = Field(
        default=None, description="folder of tokenizer and preprocessor_config.json; default: the model's"
    )
    divide_by: float = Field(default=1.0, gt=0, description="26 gives the scale that Flow-GRPO trains with")


class PickScore(Cosine):
    """In [-s, s] with s = exp(logit scale) / divide_by, s = 100 in the published weights; `parts.cosine` is the cosine."""

    def __init__(self, name: str, options: PickScoreOptions, device: str) -> None:
        towers = ClipTowers(options, device, processor=options.processor)
        self._scale = towers.scale / options.divide_by
        info = RewardInfo(
            name=name,
            range=(-self._scale, self._scale),
            needs=["prompt"],
            version=options.version,
            weights_sha256=towers.sha256,
            preprocessing=towers.pixels.version,
            licence=options.licence,
            description="PickScore: exp(logit scale) times the cosine of picture and prompt",
        )
        super().__init__(towers, options, info)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoint do not fit."""
        return cls(name, PickScoreOptions.model_validate(dict(options)), device)

    def _value(self, cosine: float) -> tuple[float, dict[str, float]]:
        return self._scale * cosine, {"cosine": cosine}
