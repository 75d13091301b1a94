"""ImageReward (2304.05977): a BLIP whose text encoder looks at the picture, and five linear layers on its first token.

The folder holds what `THUDM/ImageReward` publishes, ImageReward.pt and med_config.json, and the tokenizer of bert-base-uncased
(vocab.txt or tokenizer.json). The checkpoint is in BLIP's own layout; it is put into transformers' BlipVisionModel and
BlipTextModel, the vision tower's size read from the tensors. reward = (head - 0.16717362830052426) / 1.0333394966054072.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from services.reward import Item
from services.rewards.aesthetic import load_head
from services.rewards.clip_kit import Pixels, Prompted, PromptOptions, Tokens, build, digest, read_states
from shared.schema import RewardInfo, Score

MEAN, STD = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64  # of one attention head, in BLIP's base and large
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm1", r"encoder.layers.\1.layer_norm1"),
    (r"blocks\.(\d+)\.norm2", r"encoder.layers.\1.layer_norm2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)


class ImageRewardOptions(PromptOptions):
    """`weights` defaults to the folder's ImageReward.pt or model.safetensors, in BLIP's layout; ModelOptions describes the others."""

    tokenizer: Path | None = Field(default=None, description="folder of bert-base-uncased's tokenizer; default: the model's")
    licence: str = "Apache-2.0 (code); weights: see the model card"

    def files(self, place: Path) -> list[Path]:
        published = place / "ImageReward.pt"
        return [published] if self.weights is None and published.is_file() else super().files(place)


def vision_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`blip.visual_encoder.*` under the names of BlipVisionModel."""
    out = {}
    for name, tensor in state.items():
        if name.startswith("blip.visual_encoder."):
            short = name.removeprefix("blip.visual_encoder.")
            for pattern, renamed in _VISION:
                if re.match(pattern, short):
                    short = re.sub(f"^{pattern}", renamed, short)
                    break
            out[short] = tensor
    return out


def vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    """What the tensors say of their architecture; ValueError when there is no BLIP vision tower in them."""
    try:
        positions, width = state["embeddings.position_embedding"].shape[-2:]
        patch = state["embeddings.patch_embedding.weight"].shape[-1]
        inner = state["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"no BLIP checkpoint: {error} of the vision tower is missing; is it ImageReward.pt?") from error
    depth = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.layers\.(\d+)\.", k)))
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def text_config(med: Mapping[str, Any], encoder_width: int) -> BlipTextConfig:
    """med_config.json, a BertConfig of BLIP, as BlipTextConfig. ValueError names a key that is missing."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    missing = [key for key in same if key not in med]
    if missing:
        raise ValueError(f"med_config.json lacks {missing[0]!r}; take the one that THUDM/ImageReward publishes")
    kept = {key: med[key] for key in (*same, "hidden_act", "layer_norm_eps") if key in med}
    return BlipTextConfig(**kept, encoder_hidden_size=encoder_width, is_decoder=True)


class ImageReward(Prompted):
    """Unbounded, about standard normal over the authors' pictures; `parts.truncated` says that the prompt was cut at 35 tokens."""

    def __init__(self, name: str, options: ImageRewardOptions, device: str) -> None:
        self.device, place = torch.device(device), options.place()
        med = place / "med_config.json"
        if not med.is_file():
            raise FileNotFoundError(f"{place} holds no med_config.json; take the one that THUDM/ImageReward publishes")
        files = options.files(place)
        state = read_states(files)
        vision, source = vision_state(state), files[0].name
        config = vision_config(vision)
        texts = {k.removeprefix("blip.text_encoder."): v for k, v in state.items() if k.startswith("blip.text_encoder.")}
        text = text_config(json.loads(med.read_text()), config.hidden_size)
        self.vision = build(BlipVisionModel, config, vision, options.dtype, self.device, source)
        self.text = build(_TextEncoder, text, texts, options.dtype, self.device, source)
        mlp = {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")}
        self.head = load_head(mlp, text.hidden_size, source).to(self.device)
        self.pixels = Pixels("crop", (config.image_size,) * 2, _CLIP_MEAN, _CLIP_STD, self.device, rounded_centre=True)
        info = RewardInfo(
            name=name,
            needs=["prompt"],
            version=options.version,
            weights_sha256=digest(files),
            preprocessing=self.pixels.version,
            licence=options.licence,
            description="ImageReward: what people prefer for a prompt",
        )
        super().__init__(info, Tokens(AutoTokenizer.from_pretrained(options.tokenizer or place)), _TOKENS, options.long_prompts)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoint do not fit."""
        return cls(name, ImageRewardOptions.model_validate(dict(options)), device)

    def _inputs(self, items: list[Item]) -> tuple[Tensor, Any]:
        tokens = self.tokens([item.prompt or "" for item in items], padding=True, truncation=True, max_length=self.context)
        return self.pixels([item.image for item in items]).to(self.vision.dtype), tokens.to(self.device)

    def _scores(self, items: list[Item], inputs: tuple[Tensor, Any]) -> list[Score]:
        pixels, tokens = inputs
        patches_BND = self.vision(pixel_values=pixels).last_hidden_state
        seen_BTD = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=patches_BND
        ).last_hidden_state
        value_B = ((self.head(seen_BTD[:, 0].float())[:, 0].double() - MEAN) / STD).cpu().tolist()
        return [Score.ok(value, parts=cut) for value, cut in zip(value_B, self._cut(items), strict=True)]


class _TextEncoder(BlipTextModel):  # type: ignore[misc]
    """Without the pooler, which ImageReward has not."""

    def __init__(self, config: BlipTextConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
