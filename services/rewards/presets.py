"""Published checkpoints by name: `{use: artifact_reward, preset: qwen2.5-vl-7b}` stands for the options of presets.yaml.

What is given beside `preset` wins over it. With a `folder` or a `url` the preset still brings its question, its settings and its licence: any
vision-language model can be asked so. None of these checkpoints has been loaded here.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from services.prompts import HERE

FILE = Path(__file__).with_suffix(".yaml")


class Preset(BaseModel):
    """`by_hand`: why it cannot be loaded by its id, and what to do instead. A `template` of `options` is one of services/prompts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    licence: str = Field(min_length=1)
    source: str = Field(min_length=1)
    by_hand: str | None = None
    options: dict[str, Any] = {}


@cache
def presets(question: str) -> dict[str, Preset]:
    """Of the reward whose own question has this name; the untuned models are everyone's."""
    told = yaml.safe_load(FILE.read_text())
    return {name: Preset.model_validate(one) for name, one in {**told.get(question, {}), **told["any"]}.items()}


def expand(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `preset` stands for; as they are without one. ValueError says what to add."""
    given = dict(options)
    name = given.pop("preset", None)
    if name is None:
        return given
    known = presets(question)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}this reward has: {', '.join(known)}")
    preset = known[name]
    out = {"licence": f"{preset.licence} ({preset.model})", **preset.options}
    if "template" in out:
        out["template"] = HERE / f"{out['template']}.yaml"
    if given.get("url") is not None:
        out["model"] = preset.model  # as `vllm serve` names it, unless told otherwise
    elif given.get("folder") is None:
        out |= _source(str(name), preset, given)
    return {**out, **given}


def _source(name: str, preset: Preset, given: Mapping[str, Any]) -> dict[str, Any]:
    """Hub id and commit."""
    if given.get("model") is not None:
        raise ValueError(f"preset {name!r} names its model, {preset.model}; leave `model` away, or the preset")
    if preset.by_hand is not None:
        raise ValueError(f"preset {name!r} ({preset.model}) cannot be loaded by its id: {preset.by_hand}")
    revision = given.get("revision") or preset.revision
    if revision is None:
        raise ValueError(
            f"preset {name!r} needs a `revision`, a commit of 40 hex digits: https://huggingface.co/{preset.model}/commits/main "
            "lists them; or download the model, and give its `folder`"
        )
    return {"model": preset.model, "revision": revision}
