"""PickScore (2305.01569): which picture people would pick for a prompt. A CLIP-H tuned on Pick-a-Pic; exp(logit scale) * cosine.

Published as `yuvalkirstain/PickScore_v1`, a CLIPModel; its tokenizer and processor are those of
`laion/CLIP-ViT-H-14-laion2B-s32B-b79K`: name their folder as `processor` where the model's folder has none.
Differences between pictures for one prompt mean something, not the value itself. Flow-GRPO divides it by 26.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from services.fitting.heads import checked, digest, leaf
from services.fitting.lora import shared_copy, with_values
from services.fitting.losses import preference
from services.reward import Item
from services.rewards.clip_kit import Cosine, PromptOptions
from services.rewards.clip_towers import ClipTowers
from shared.schema import RewardInfo


class PickScoreOptions(PromptOptions):
    """ModelOptions describes the others."""

    processor: Path | None = Field(
        default=None, description="folder of tokenizer and preprocessor_config.json; default: the model's"
    )
    divide_by: float = Field(default=1.0, gt=0, description="26 gives the scale that Flow-GRPO trains with")


class PickScore(Cosine):
    """In [-s, s] with s = exp(logit scale) / divide_by, s = 100 in the published weights; `parts.cosine` is the cosine."""

    def __init__(self, name: str, options: PickScoreOptions, device: str) -> None:
        towers = ClipTowers(options, device, processor=options.processor)
        self._scale = towers.scale / options.divide_by
        self._fitted: tuple[PickScore, PickScoreFitOptions, dict[str, Tensor]] | None = None
        info = RewardInfo(
            name=name,
            range=(-self._scale, self._scale),
            needs=["prompt"],
            version=options.version,
            weights_sha256=towers.sha256,
            preprocessing=towers.pixels.version,
            licence=options.licence,
            description="PickScore: exp(logit scale) times the cosine of picture and prompt",
        )
        self._own_towers = towers
        super().__init__(towers, options, info)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options or checkpoint do not fit."""
        return cls(name, PickScoreOptions.model_validate(dict(options)), device)

    def fitter(self, options: Mapping[str, Any]) -> "PickScoreFitter":
        """`fit.head`: PickScoreFitOptions. A refitted version goes on where it is, with the `layers` that it was fitted with."""
        wanted = PickScoreFitOptions.model_validate(dict(options))
        if self._fitted is None:
            return PickScoreFitter(self, wanted)
        origin, was, weights = self._fitted
        if wanted.layers != was.layers:
            raise ValueError(f"version {self.info.version} of {self.info.name} was fitted with `layers: {was.layers}`: keep that")
        return PickScoreFitter(origin, wanted, weights)

    def refitted(self, options: "PickScoreFitOptions", weights: Mapping[str, Tensor], version: int) -> Self:
        """With other last layers of the vision tower; everything else, the texts that are kept too, is this one's."""
        other = copy(self)
        other.towers = other._own_towers = self._own_towers.seeing(with_values(self._own_towers.model, weights))
        other._fitted = (self, options, dict(weights))
        other.info = self.info.model_copy(
            update={"version": version, "weights_sha256": digest(str(self.info.weights_sha256), weights)}
        )
        return other

    def _value(self, cosine: float) -> tuple[float, dict[str, float]]:
        return self._scale * cosine, {"cosine": cosine}


class PickScoreFitOptions(BaseModel):
    """`fit.head` of a PickScore."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: int = Field(default=1, ge=1, description="last layers of the vision tower that are fitted")


class PickScoreFitter:
    """The last layer of the vision tower, by which picture is preferred: real over generated, after Adv-GRPO (2511.20256).

    Pictures at one place are a pair. The loss is that of exp(logit scale) * cosine, whatever `divide_by` makes of it. See
    services/fitting/types.py.
    """

    def __init__(self, live: PickScore, options: PickScoreFitOptions, weights: Mapping[str, Tensor] | None = None) -> None:
        self._live, self._options = live, options
        towers = live._own_towers
        count = len(towers.model.vision_model.encoder.layers)
        if options.layers > count:
            raise ValueError(f"`layers` is {options.layers}, and the vision tower of {live.info.name} has {count}")
        last = tuple(f"vision_model.encoder.layers.{i}." for i in range(count - options.layers, count))
        own = [name for name, _ in towers.model.named_parameters() if name.startswith(last)]
        self._towers = towers.seeing(shared_copy(towers.model))
        self._own = {name: leaf(towers.model.get_parameter(name)) for name in own}
        if weights is not None:
            with torch.no_grad():
                for name, value in checked(weights, self._own, live.info.name).items():
                    self._own[name].copy_(value)

    def trainable(self) -> dict[str, Tensor]:
        return dict(self._own)

    def _place(self) -> None:
        """The leaves into the layers of the fitter's own copy, in the type that it computes in."""
        for name, value in self._own.items():
            path, _, last = name.rpartition(".")
            layer = self._towers.model.get_submodule(path)
            layer._parameters.pop(last, None)
            setattr(layer, last, value.to(self._towers.model.dtype))

    def _cosines(self, items: Sequence[Item]) -> Tensor:
        for item in items:
            if (refused := self._live._refusal(item)) is not None and refused.error is not None:
                raise ValueError(f"a picture cannot be fitted on: {refused.error.title}")
        self._place()
        with torch.no_grad():
            texts_BD = self._towers.texts([item.prompt or "" for item in items]).clone()
        pictures_BD = self._towers.pictures(self._towers.inputs([item.image for item in items]))
        return (pictures_BD * texts_BD).sum(-1).double().clamp(-1, 1)

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, Tensor]:
        score = self._towers.scale * self._cosines([*real, *generated])
        better, worse = score[: len(real)], score[len(real) :]
        return {
            "total": preference(better, worse).float(),
            "accuracy": torch.tensor(self.accuracy(better.detach(), worse.detach())),
        }

    @torch.no_grad()
    def scores(self, items: Sequence[Item]) -> Tensor:
        return (self._live._scale * self._cosines(items)).float()

    def accuracy(self, real: Tensor, generated: Tensor) -> float:
        """Share of pairs with the real one above, equal ones half."""
        apart = real - generated
        return float(((apart > 0).double() + 0.5 * (apart == 0).double()).mean())

    def reward(self, weights: Mapping[str, Tensor], version: int) -> PickScore:
        return self._live.refitted(self._options, checked(weights, self._own, self._live.info.name), version)
