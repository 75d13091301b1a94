"""Human Preference Score v3 (2508.03789): a Qwen2-VL that reads picture and prompt, and a head on the state of one reserved token.

`folder` or `model` is `Qwen/Qwen2-VL-7B-Instruct` (config.json, tokenizer, preprocessor_config.json), `weights` the published
HPSv3.safetensors; or the folder holds it all. The head gives a mean and the logarithm of a deviation: the score and its `sigma`.

The question around the prompt belongs to the checkpoint and is not repeated here. `template` is a text file with it, `{text_prompt}`
where the prompt goes and <|Reward|> where the score is read; or hpsv3/dataset/data_collator_qwen.py of github MizzenAI/HPSv3 (MIT),
whose strings INSTRUCTION and prompt_with_special_token are read, never run.
"""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel

from services.reward import Item
from services.rewards._resize import upload
from services.rewards.clip_kit import (
    Batched,
    ModelOptions,
    Tokens,
    build,
    check_state,
    digest,
    read_states,
    resized,
    same_size,
)
from shared.schema import RewardInfo, Score

REWARD = "<|Reward|>"
_IMAGE = "<|image_pad|>"
_SLOT = "{text_prompt}"
_HEAD = (1024, 16, 2)


class HpsV3Options(ModelOptions):
    """ModelOptions describes the others."""

    template: Path = Field(description="the question: a text file, or HPSv3's data_collator_qwen.py")
    pixels: int = Field(default=256 * 28 * 28, ge=28 * 28, description="area that pictures are scaled to")
    licence: str = "MIT (code); weights: see the model card"


def read_template(path: Path) -> str:
    """The question with its slot and its reward token. ValueError says what it lacks."""
    if not path.is_file():
        raise FileNotFoundError(f"no template {path}; take hpsv3/dataset/data_collator_qwen.py of github MizzenAI/HPSv3")
    text = path.read_text()
    if path.suffix == ".py":
        wanted = ("INSTRUCTION", "prompt_with_special_token")
        found = {
            target.id: node.value.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(
                f"{path} sets no string {missing[0]}; take hpsv3/dataset/data_collator_qwen.py of github MizzenAI/HPSv3"
            )
        text = "".join(found[name] for name in wanted)
    if text.count(_SLOT) != 1 or text.count(REWARD) != 1:
        raise ValueError(f"{path} must hold {_SLOT} once (there goes the prompt) and {REWARD} once (there the score is read)")
    return text


def scaled_sides(height: int, width: int, factor: int, area: int) -> tuple[int, int]:
    """Sides in pixels, multiples of `factor`, near `area` and the shape of the picture: as Qwen2-VL with min = max = `area`."""
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if sides[0] * sides[1] > area:
        shrink = math.sqrt(height * width / area)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < area:
        grow = math.sqrt(area / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def renamed(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Backbone and head, under the names of Qwen2VLModel, from any of the names that transformers gave them since."""
    backbone: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(("rm_head.", "lm_head.")):
            short = name.removeprefix("model.")
            backbone[short if short.startswith(("visual.", "language_model.")) else f"language_model.{short}"] = tensor
    return backbone, {k.removeprefix("rm_head."): v.float() for k, v in state.items() if k.startswith("rm_head.")}


class HpsV3(Batched):
    """Unbounded mean of the preference; `sigma` is the deviation that the model itself gives."""

    def __init__(self, name: str, options: HpsV3Options, device: str) -> None:
        self.device, self.template, place = torch.device(device), read_template(options.template), options.place()
        files = options.files(place)
        state, head = renamed(read_states(files))
        config = Qwen2VLConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="right")
        if tokenizer.chat_template is None:
            raise ValueError(f"{place} holds no chat template (tokenizer_config.json); take the files of Qwen/Qwen2-VL-7B-Instruct")
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]}, replace_extra_special_tokens=False)
        self._reward = int(tokenizer.convert_tokens_to_ids(REWARD))
        self._reserved = re.compile("|".join(re.escape(token) for token in tokenizer.get_added_vocab()))
        self.tokens = Tokens(tokenizer)
        table = state.get("language_model.embed_tokens.weight")
        if table is None or len(table) <= self._reward:
            raise ValueError(
                f"{files[0].name} has no embedding for {REWARD}; is it HPSv3's checkpoint, and the tokenizer Qwen2-VL's?"
            )
        config.text_config.vocab_size = len(table)
        self.model = build(Qwen2VLModel, config, state, options.dtype, self.device, files[0].name)
        widths = (config.text_config.hidden_size, *_HEAD)
        first, second, last = (nn.Linear(a, b) for a, b in zip(widths, _HEAD, strict=False))
        self.head = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.05), second, nn.ReLU(), last)
        check_state(self.head.state_dict(), head, f"{files[0].name} (rm_head)")
        self.head.load_state_dict(head)
        self.head.eval().requires_grad_(False).to(self.device)
        self.processor = Qwen2VLImageProcessor.from_pretrained(place, do_resize=False)
        self.area, self.context = options.pixels, int(config.text_config.max_position_embeddings)
        self.info = RewardInfo(
            name=name,
            needs=["prompt"],
            version=options.version,
            weights_sha256=digest(files),
            preprocessing=f"area-{options.pixels}-bicubic-u8-1",
            licence=options.licence,
            description="Human Preference Score v3: mean preference of a Qwen2-VL, with its deviation",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options, template or checkpoint do not fit."""
        return cls(name, HpsV3Options.model_validate(dict(options)), device)

    def patches(self, items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor]]:
        """For each picture its patches (N, D) and its grid (3,): time, rows, columns. Pictures of one size in one call."""
        images = [item.image for item in items]
        values: dict[int, Tensor] = {}
        grids: dict[int, Tensor] = {}
        factor = self.processor.patch_size * self.processor.merge_size
        for indices in same_size(images):
            height, width = images[indices[0]].shape[:2]
            sides = scaled_sides(height, width, factor, self.area)
            pixels = resized(upload([images[i] for i in indices], self.device), sides, "bicubic")
            made = self.processor(images=list(pixels), return_tensors="pt", device=self.device)
            rows = made.pixel_values.reshape(len(indices), -1, made.pixel_values.shape[-1])
            values |= dict(zip(indices, rows, strict=True))
            grids |= dict(zip(indices, made.image_grid_thw, strict=True))
        order = range(len(images))
        return [values[i] for i in order], [grids[i] for i in order]

    def question(self, prompt: str, grid: Tensor) -> str:
        """The whole text with as many picture tokens as the picture has merged patches."""
        content = [{"type": "image"}, {"type": "text", "text": self.template.replace(_SLOT, prompt)}]
        text: str = self.tokens.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text.replace(_IMAGE, _IMAGE * int(grid.prod() // self.processor.merge_size**2))

    def _refusal(self, item: Item) -> Score | None:
        refused, found = super()._refusal(item), self._reserved.search(item.prompt or "")
        if refused is None and found is not None:  # it would stand for a picture, or be scored in place of the question
            return Score.failed("prompt-reserved", f"the prompt holds the model's reserved token {found[0]}; leave it away")
        return refused

    def _inputs(self, items: list[Item]) -> tuple[dict[int, Score], dict[str, Tensor]]:
        """What is too long by position, and the model's inputs for the others."""
        values, grids = self.patches(items)
        texts = [self.question(item.prompt or "", grid) for item, grid in zip(items, grids, strict=True)]
        tokens = self.tokens(texts, padding=True)
        lengths = tokens.attention_mask.sum(1).tolist()
        title = "question and prompt are {} tokens, the model reads {}; shorten the prompt"
        refused = {
            i: Score.failed("prompt-too-long", title.format(length, self.context), status="refused")
            for i, length in enumerate(lengths)
            if length > self.context
        }
        kept = [i for i in range(len(items)) if i not in refused]
        if not kept:
            return refused, {}
        longest = max(lengths[i] for i in kept)
        ids, mask = (table[kept, :longest].to(self.device) for table in (tokens.input_ids, tokens.attention_mask))
        return refused, {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": torch.cat([values[i] for i in kept]).to(self.model.dtype),
            "image_grid_thw": torch.stack([grids[i] for i in kept]).to(self.device),
        }

    def _scores(self, items: list[Item], inputs: tuple[dict[int, Score], dict[str, Tensor]]) -> list[Score]:
        refused, tensors = inputs
        rows: list[list[float]] = []
        if tensors:
            hidden_BTD = self.model(**tensors, use_cache=False).last_hidden_state
            out_B2 = self.head(hidden_BTD[tensors["input_ids"] == self._reward].float()).double()
            rows = torch.stack([out_B2[:, 0], out_B2[:, 1].exp()], 1).cpu().tolist()
        scored = iter(rows)
        return [refused[i] if i in refused else _answer(next(scored)) for i in range(len(items))]


def _answer(row: list[float]) -> Score:
    return Score.ok(row[0], sigma=row[1])
