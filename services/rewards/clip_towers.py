"""CLIP's two towers: pictures and texts to embeddings of unit length. Checkpoints of transformers, OpenAI, open_clip and LongCLIP.

OpenAI, open_clip (HPSv2 among them) and LongCLIP name and pack their tensors in one way of their own: `from_open_clip` renames them.
LongCLIP (2403.15378) has two tables of 248 positions: the first 20 of `positional_embedding`, all others of the `_res` one.
"""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from services.rewards.clip_kit import ModelOptions, Picture, Pixels, Texts, Tokens, build, digest, read_states

_KEPT_POSITIONS = 20
_PLAIN = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_ASIDE = {"input_resolution", "context_length", "vocab_size", "attn_mask", "positional_embedding_res"}


def is_open_clip(state: Mapping[str, Tensor]) -> bool:
    return "visual.conv1.weight" in state


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of transformers' CLIPModel. ValueError when this is no CLIP with a plain ViT."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if name in _PLAIN:
            out[_PLAIN[name]] = tensor
        elif name in ("visual.proj", "text_projection"):
            out["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = tensor.T.contiguous()
        elif block is not None and (block[3] in _PARTS or block[3] == "attn.in_proj"):
            layer = f"{'vision_model' if block[1] else 'text_model'}.encoder.layers.{block[2]}"
            if block[3] in _PARTS:
                out[f"{layer}.{_PARTS[block[3]]}.{block[4]}"] = tensor
            else:  # query, key and value in one, (3 D, D) or (3 D,)
                parts = zip("qkv", tensor.chunk(3), strict=True)
                out |= {f"{layer}.self_attn.{x}_proj.{block[4]}": rows.contiguous() for x, rows in parts}
        elif name not in _ASIDE:
            raise ValueError(f"{name} is no tensor of a CLIP with a plain ViT, so the checkpoint is not read")
    res = state.get("positional_embedding_res")
    if res is not None:
        table = torch.cat([state["positional_embedding"][:_KEPT_POSITIONS], res[_KEPT_POSITIONS:]])
        out["text_model.embeddings.position_embedding.weight"] = table
    return out


class ClipTowers:
    """Pictures and texts to (B, D) float32 of unit length. `scale` is what CLIP multiplies cosines by, 100 in the published ones."""

    def __init__(self, options: ModelOptions, device: str, *, processor: Path | None = None, pad: bool = False) -> None:
        self.device, place = torch.device(device), options.place()
        files = options.files(place)
        state = read_states(files)
        state = from_open_clip(state) if is_open_clip(state) else state
        config = CLIPConfig.from_pretrained(place)
        table = state.get("text_model.embeddings.position_embedding.weight")
        if table is not None and options.weights is not None:
            config.text_config.max_position_embeddings = len(table)
        self.model = build(CLIPModel, config, state, options.dtype, self.device, files[0].name)
        self.sha256 = digest(files)
        self.context = int(config.text_config.max_position_embeddings)
        self.scale = float(self.model.logit_scale.float().exp())
        small = processor or place
        self.tokens = Tokens(AutoTokenizer.from_pretrained(small))
        self.pixels = Pixels.of(CLIPImageProcessor.from_pretrained(small), self.device, fit="pad" if pad else None)
        self.texts = Texts(self._encode)

    def _encode(self, texts: list[str]) -> Tensor:
        tokens = self.tokens(texts, truncation=True, max_length=self.context, padding=True).to(self.device)
        hidden = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return normalize(self.model.text_projection(hidden).float(), dim=-1)

    def seeing(self, model: CLIPModel) -> Self:
        """The same texts, cached ones too, with the pictures seen by another model of the same shapes."""
        other = copy(self)
        other.model = model
        return other

    def inputs(self, images: Sequence[Picture]) -> Tensor:
        return self.pixels(images).to(self.model.dtype)

    def pictures(self, inputs: Tensor) -> Tensor:
        hidden = self.model.vision_model(pixel_values=inputs).pooler_output
        return normalize(self.model.visual_projection(hidden).float(), dim=-1)
