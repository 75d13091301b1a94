"""Human Preference Score v2 and v2.1 (2306.09341): the cosine of a CLIP-H tuned on people's choices, without CLIP's logit scale.

The checkpoints are torch files in open_clip's layout (`xswu/HPSv2`: HPS_v2_compressed.pt, HPS_v2.1_compressed.pt); config.json,
tokenizer and processor are those of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`. Pictures are fitted whole into the square, black
around, as the authors' code does. Their code runs in mixed precision, this one in `dtype`.
"""

from collections.abc import Mapping
from typing import Any, Self

from services.rewards.clip_kit import Cosine, PromptOptions
from services.rewards.clip_towers import ClipTowers
from shared.schema import RewardInfo


class HpsV2Options(PromptOptions):
    """`weights` is the checkpoint, `folder` or `model` the CLIP-H that it was tuned from; ModelOptions describes them."""

    licence: str = "Apache-2.0 (code); weights: see the model card"


class HpsV2(Cosine):
    """In [-1, 1]; the figures in papers are this times 100."""

    def __init__(self, name: str, options: HpsV2Options, device: str) -> None:
        towers = ClipTowers(options, device, pad=True)
        info = RewardInfo(
            name=name,
            range=(-1.0, 1.0),
            needs=["prompt"],
            version=options.version,
            weights_sha256=towers.sha256,
            preprocessing=towers.pixels.version,
            licence=options.licence,
            description="Human Preference Score v2: cosine of picture and prompt",
        )
        super().__init__(towers, options, info)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoint do not fit."""
        return cls(name, HpsV2Options.model_validate(dict(options)), device)
