"""SigLIP's two towers (2303.15343, 2502.14786): SiglipModel (SigLIP, SigLIP 2 of one size) and Siglip2Model (any shape of picture).

Texts are padded to the whole context, as these models were trained; the last token's state is the text's embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers import AutoConfig, AutoTokenizer, Siglip2ImageProcessor, Siglip2Model, SiglipImageProcessor, SiglipModel
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from services.rewards._resize import upload
from services.rewards.clip_kit import (
    ModelOptions,
    Picture,
    Pixels,
    Texts,
    Tokens,
    build,
    digest,
    read_states,
    resized,
    same_size,
)

_CONTEXT = 64


class Patches:
    """Pictures of any size to patches (B, N, P*P*3), their mask (B, N) and grids (B, 2): the shape is kept, N patches at most."""

    def __init__(self, processor: Any, device: torch.device) -> None:
        mode = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample))
        if mode is None:
            raise ValueError(f"preprocessor_config.json asks for resample {processor.resample}; 2 and 3 are known here")
        self.mode, self.device, self.side, self.most = mode, device, int(processor.patch_size), int(processor.max_num_patches)
        self._mean = 255 * torch.tensor(processor.image_mean, device=device).view(1, 3, 1, 1)
        self._std = 255 * torch.tensor(processor.image_std, device=device).view(1, 3, 1, 1)
        self.version = f"patches-{self.most}x{self.side}-{mode}-u8-1"

    def __call__(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        values = torch.zeros(len(images), self.most, 3 * self.side**2, device=self.device)
        mask = torch.zeros(len(images), self.most, dtype=torch.int32, device=self.device)
        grids = torch.zeros(len(images), 2, dtype=torch.int64)
        for indices in same_size(images):
            height, width = images[indices[0]].shape[:2]
            sides = get_image_size_for_max_num_patches(height, width, self.side, self.most)
            pixels = resized(upload([images[i] for i in indices], self.device), sides, self.mode).float()
            pixels = (pixels - self._mean) / self._std
            rows, columns = sides[0] // self.side, sides[1] // self.side
            grid = pixels.reshape(len(indices), 3, rows, self.side, columns, self.side).permute(0, 2, 4, 3, 5, 1)
            values[indices] = pad(grid.reshape(len(indices), rows * columns, -1), (0, 0, 0, self.most - rows * columns))
            mask[indices, : rows * columns] = 1
            grids[indices] = torch.tensor([rows, columns])
        return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": grids.to(self.device)}


class SiglipTowers:
    """Pictures and texts to (B, D) float32 of unit length; sigmoid(scale * cosine + bias) is the probability that they match."""

    def __init__(self, options: ModelOptions, device: str) -> None:
        self.device, place = torch.device(device), options.place()
        config, files = AutoConfig.from_pretrained(place), options.files(place)
        self.any_shape = config.model_type == "siglip2"
        model = Siglip2Model if self.any_shape else SiglipModel
        self.model = build(model, config, read_states(files), options.dtype, self.device, files[0].name)
        self.sha256 = digest(files)
        self.context = min(_CONTEXT, int(config.text_config.max_position_embeddings))
        self.scale, self.bias = float(self.model.logit_scale.float().exp()), float(self.model.logit_bias.float())
        self.tokens = Tokens(AutoTokenizer.from_pretrained(place))
        self.pixels: Pixels | Patches
        if self.any_shape:
            self.pixels = Patches(Siglip2ImageProcessor.from_pretrained(place), self.device)
        else:
            self.pixels = Pixels.of(SiglipImageProcessor.from_pretrained(place), self.device)
        self.texts = Texts(self._encode)

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokens(texts, truncation=True, max_length=self.context, padding="max_length")
        pooled: Tensor = self.model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        return normalize(pooled.float(), dim=-1)

    def inputs(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        made = self.pixels(images)
        inputs = made if isinstance(made, dict) else {"pixel_values": made}
        return {**inputs, "pixel_values": inputs["pixel_values"].to(self.model.dtype)}

    def pictures(self, inputs: dict[str, Tensor]) -> Tensor:
        return normalize(self.model.vision_model(**inputs).pooler_output.float(), dim=-1)
