"""A Qwen2.5-VL of random weights and a few million parameters with tokenizer, processor and chat template, as a folder.

Class, files, layout and words are those of the trained judge (`world/recipes/judge.py`), patches of 14 as published models have; the
weights mean nothing, and pictures keep their size. For tests of engines and formulas, which have to hold whatever a judge thinks.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from world.recipes import judge


def save(folder: Path, seed: int = 0) -> Path:
    """Everything that AutoProcessor, AutoModelForImageTextToText and vLLM read; pictures become 16 to 256 tokens of 28x28 pixels."""
    tokens = judge.tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(judge.config(tokens)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):  # transformers' own are so small that no picture matters
        if parameter.ndim >= 2:
            scale = 0.1 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    judge.processor(tokens, 14, {"min_pixels": 112 * 112, "max_pixels": 448 * 448}).save_pretrained(folder)
    return folder


@functools.cache
def made() -> Path:
    """The folder, made when first asked for and removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="verism-judge-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save(folder)


class Options(Mapping[str, Any]):
    """Options of a judge reward on `made`, without making anything before they are looked at."""

    def __getitem__(self, key: str) -> Any:
        return {"folder": made(), "floor": 0}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("folder", "floor"))

    def __len__(self) -> int:
        return 2
