"""LAION's aesthetic predictor, second version: five linear layers on the normalised picture embedding of CLIP ViT-L/14.

The head is `sac+logos+ava1-l14-linearMSE.pth` of github christophschuhmann/improved-aesthetic-predictor; between its layers there is
dropout and nothing else, so together they are one linear map. The tower is `openai/clip-vit-large-patch14`, or any CLIPModel of
the head's width. Needs no prompt.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionModelWithProjection

from services.reward import Item
from services.rewards.clip_kit import Batched, ModelOptions, Pixels, build, check_state, digest, fetched, read_state, read_states
from services.rewards.clip_towers import from_open_clip, is_open_clip
from shared.schema import RewardInfo, Score

_WIDTHS = (1024, 128, 64, 16, 1)


class AestheticOptions(ModelOptions):
    """`head` is the predictor; ModelOptions describes the CLIP model."""

    head: str = Field(description="the head's weights: a path, or hub id@commit:file; safetensors, .pt, .pth")


def load_head(state: Mapping[str, Tensor], width: int, source: str) -> nn.Module:
    """The layers `layers.0, 2, 4, 6, 7` (768 to 1024 to 128 to 64 to 16 to 1). ValueError names what does not fit."""
    layers: list[nn.Module] = []
    for wide, narrow, drop in zip((width, *_WIDTHS), _WIDTHS, (0.2, 0.2, 0.1, None, None), strict=False):
        layers += [nn.Linear(wide, narrow), *([nn.Dropout(drop)] if drop is not None else [])]
    head = nn.Sequential(*layers)
    own = {k.removeprefix("layers."): v.float() for k, v in state.items()}
    check_state(head.state_dict(), own, source)
    head.load_state_dict(own)
    return head.eval().requires_grad_(False)


class Aesthetic(Batched):
    """Unbounded; the head was trained on people's ratings from 1 to 10."""

    def __init__(self, name: str, options: AestheticOptions, device: str) -> None:
        self.device, place = torch.device(device), options.place()
        files, head_file = options.files(place), fetched(options.head)
        state = read_states(files)
        state = from_open_clip(state) if is_open_clip(state) else state
        state = {k: v for k, v in state.items() if k.startswith(("vision_model.", "visual_projection."))}
        both = CLIPConfig.from_pretrained(place)
        config = both.vision_config
        config.projection_dim = both.projection_dim
        self.model = build(CLIPVisionModelWithProjection, config, state, options.dtype, self.device, files[0].name)
        self.head = load_head(read_state(head_file), int(config.projection_dim), head_file.name).to(self.device)
        self.pixels = Pixels.of(CLIPImageProcessor.from_pretrained(place), self.device, rounded_centre=True)
        self.info = RewardInfo(
            name=name,
            version=options.version,
            weights_sha256=digest([*files, head_file]),
            preprocessing=self.pixels.version,
            licence=options.licence,
            description="LAION aesthetic predictor on CLIP ViT-L/14",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoints do not fit."""
        return cls(name, AestheticOptions.model_validate(dict(options)), device)

    def _inputs(self, items: list[Item]) -> Tensor:
        return self.pixels([item.image for item in items]).to(self.model.dtype)

    def _scores(self, items: list[Item], inputs: Tensor) -> list[Score]:
        embedding_BD = normalize(self.model(pixel_values=inputs).image_embeds.float(), dim=-1)
        return [Score.ok(value) for value in self.head(embedding_BD)[:, 0].double().cpu().tolist()]
