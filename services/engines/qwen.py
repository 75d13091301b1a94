"""Qwen2-VL and Qwen2.5-VL: each picture prepared and seen once, and each text, for as long as they are kept.

A tournament shows a picture in many questions, and rewards that share an engine ask about the same ones; the questions of a group differ
in their pictures only. What the processor and the model would work out again is kept: token ids and positions by text and picture sizes,
the vision tower's output by picture.
"""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.engines.base import Chat, Picture, picture_id

KEPT_BYTES = 256 << 20
_FAMILY = ("qwen2_vl", "qwen2_5_vl")


@dataclass(eq=False)
class Seen:
    """A picture: its grid of patches, and those as numbers until the tower has made tokens_NC of them."""

    grid: tuple[int, int, int]
    pixels: Tensor | None
    tokens_NC: Tensor | None = None


def fits(model: Any) -> bool:
    """Whether the model is of this family, as transformers has it at this time."""
    core = getattr(model, "model", None)
    return (
        getattr(model.config, "model_type", None) in _FAMILY
        and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        and "mm_token_type_ids" in inspect.signature(getattr(core, "get_rope_index", _nothing)).parameters
    )


def _nothing() -> None: ...


class Reader:
    """Inputs of questions, in two steps: `inputs` beside the device's work (one thread at a time), `seen` on the device."""

    def __init__(self, processor: Any, model: Any, device: torch.device) -> None:
        self.processor, self.tokenizer, self.core, self.device = processor, processor.tokenizer, model.model, device
        config = model.config
        self._unit, self._token = int(config.vision_config.spatial_merge_size) ** 2, int(config.image_token_id)
        self._mark = str(processor.image_token)
        width = config.get_text_config().hidden_size * next(model.parameters()).element_size()
        self._most, self._used = KEPT_BYTES // width, 0  # tokens
        self._kept: OrderedDict[str, Seen] = OrderedDict()
        self._row = lru_cache(1024)(self._read)
        _evenly(self.core.visual)

    def inputs(self, chats: Sequence[Chat], texts: Sequence[str]) -> dict[str, Any]:
        """As the processor makes them, padded on the left, and `positions`; `pictures` in the order of the questions instead of pixels.

        ValueError (IndexError, TypeError) of the processor about a picture.
        """
        pictures = self._looked([list(chat.images) for chat in chats])
        rows = [self._row(text, tuple(one.grid for one in several)) for text, several in zip(texts, pictures, strict=True)]
        longest = max(len(ids_T) for ids_T, _ in rows)
        ids_BT = torch.full((len(rows), longest), int(self.tokenizer.pad_token_id))
        mask_BT, position_3BT = torch.zeros_like(ids_BT), ids_BT.new_zeros((3, len(rows), longest))
        for i, (ids_T, position_3T) in enumerate(rows):
            ids_BT[i, -len(ids_T) :], mask_BT[i, -len(ids_T) :], position_3BT[:, i, -len(ids_T) :] = ids_T, 1, position_3T
        made = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_3BT}
        return {**{k: v.to(self.device) for k, v in made.items()}, "pictures": [one for several in pictures for one in several]}

    def seen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the model: what is in `inputs`, with the tower's output for `pictures`."""
        made = {k: v for k, v in inputs.items() if k != "pictures"}
        pictures: list[Seen] = inputs["pictures"]
        new = {id(one): one for one in pictures if one.tokens_NC is None}
        if new:
            pixels = torch.cat([one.pixels for one in new.values() if one.pixels is not None]).to(self.device)
            grids = torch.tensor([one.grid for one in new.values()], device=self.device)
            told = self.core.get_image_features(pixels, grids, return_dict=True).pooler_output
            for one, tokens_NC in zip(new.values(), told, strict=True):
                one.tokens_NC = tokens_NC.clone()  # a part of the batch's tensor would keep all of it
            for one in new.values():
                one.pixels = None
        if pictures:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            tokens = tuple(one.tokens_NC for one in pictures)
            made["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
        return made

    def _looked(self, pictures: Sequence[Sequence[Picture]]) -> list[list[Seen]]:
        """Each picture once, and kept; the longest unused ones go when there are too many."""
        flat = {id(picture): picture for several in pictures for picture in several}
        names = {key: picture_id(picture) for key, picture in flat.items()}
        new = {names[key]: picture for key, picture in flat.items() if names[key] not in self._kept}
        here = {name: self._kept[name] for name in names.values() if name in self._kept}
        if new:
            images = [np.require(image, requirements="W") for image in new.values()]  # torch wants to own them
            made = self.processor.image_processor(images=images, return_tensors="pt")
            grids = [(int(t), int(h), int(w)) for t, h, w in made["image_grid_thw"].tolist()]
            parts = made["pixel_values"].split([t * h * w for t, h, w in grids])
            here |= {name: Seen(grid, part.clone()) for name, grid, part in zip(new, grids, parts, strict=True)}
        for name, one in here.items():
            if name not in self._kept:
                self._used += self._size(one)
            self._kept[name] = one
            self._kept.move_to_end(name)
        while self._used > self._most and self._kept:
            self._used -= self._size(self._kept.popitem(last=False)[1])
        return [[here[names[id(picture)]] for picture in several] for several in pictures]

    def _size(self, one: Seen) -> int:
        time, height, width = one.grid
        return time * height * width // self._unit

    def _read(self, text: str, grids: tuple[tuple[int, int, int], ...]) -> tuple[Tensor, Tensor]:
        """Token ids (T) of a text with pictures of these grids, and positions (3, T)."""
        parts = text.split(self._mark)
        if len(parts) != len(grids) + 1:
            raise ValueError(f"the chat template shows {len(parts) - 1} pictures instead of {len(grids)}")
        marks = [self._mark * (t * h * w // self._unit) for t, h, w in grids]
        whole = "".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True))
        ids_T = torch.tensor(self.tokenizer(whole).input_ids)
        grids_I3 = torch.tensor(grids) if grids else None
        types_T = (ids_T == self._token).int()
        position_31T, _ = self.core.get_rope_index(ids_T[None], mm_token_type_ids=types_T[None], image_grid_thw=grids_I3)
        return ids_T, position_31T[:, 0]


class _Even(nn.Module):
    """The vision tower's attention over windows of one size, all at once instead of one by one."""

    part: Any

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self._rotated = sys.modules[type(part).__module__].apply_rotary_pos_emb_vision

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        ends = cu_seqlens.tolist()
        count, size, own = len(ends) - 1, ends[1], self.part
        if own.config._attn_implementation != "sdpa" or ends != list(range(0, (count + 1) * size, size)):
            out: Tensor = own(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
            return out
        query, key, value = own.qkv(hidden_states).unflatten(-1, (3, own.num_heads, -1)).unbind(1)
        query, key = self._rotated(query, key, *position_embeddings)
        query, key, value = (one.unflatten(0, (count, size)).transpose(1, 2) for one in (query, key, value))
        y_WHSD = nn.functional.scaled_dot_product_attention(query, key, value, scale=own.scaling)
        out = own.proj(y_WHSD.transpose(1, 2).reshape(count * size, -1))
        return out


def _evenly(visual: nn.Module) -> None:
    for block in visual.blocks:  # type: ignore[union-attr]
        block.attn = _Even(block.attn)
