"""What a configuration can serve: one line each, loaded when asked for."""

import difflib
import importlib
from typing import Any

REWARDS: dict[str, str] = {
    "realism": "services.rewards.realism:Realism",
    "detector": "services.rewards.detector:Detector",
    "alignment": "services.rewards.alignment:Alignment",
    "jpeg_size": "services.rewards.jpeg_size:JpegSize",
    "ocr": "services.rewards.ocr:Ocr",
    "safety": "services.rewards.safety:Safety",
    "omniaid": "services.rewards.omniaid:OmniAID",
    "dino_head": "services.rewards.dino_head:DinoHead",
    "pickscore": "services.rewards.pickscore:PickScore",
    "hpsv2": "services.rewards.hpsv2:HpsV2",
    "hpsv3": "services.rewards.hpsv3:HpsV3",
    "image_reward": "services.rewards.image_reward:ImageReward",
    "aesthetic": "services.rewards.aesthetic:Aesthetic",
    "forensic_chat": "services.rewards.forensic_chat:ForensicChat",
    "prompt_echo": "services.rewards.prompt_echo:PromptEcho",
    "artifact_reward": "services.rewards.artifact_reward:ArtifactReward",
    "reward_dance": "services.rewards.reward_dance:RewardDance",
    "z_reward": "services.rewards.z_reward:ZReward",
    "unified_reward": "services.rewards.unified_reward:UnifiedReward",
    "edit_score": "services.rewards.edit_score:EditScore",
    "rational_rewards": "services.rewards.rational_rewards:RationalRewards",
    "ocr_judge": "services.rewards.ocr_judge:OcrJudge",
    "auto_rubric": "services.rewards.auto_rubric:AutoRubric",
    "unified_compare": "services.rewards.unified_compare:UnifiedCompare",
}


def resolve(name: str) -> Any:
    """The class behind `use: NAME`, or behind `use: my.module:MyReward` for a reward of your own."""
    target = REWARDS.get(name, name if ":" in name else "")
    if not target:
        near = difflib.get_close_matches(name, REWARDS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown reward {name!r}; {hint}known: {', '.join(sorted(REWARDS))} (or module:Class)")
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load reward {target!r}: {error}") from error
