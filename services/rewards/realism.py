"""How real is this picture? A weighted mean of other rewards' values, answered with its parts.

It is computed from scores that were asked for anyway; no model runs twice. A part that failed makes realism fail: nothing is
imputed. A part marked `optional` (an alignment without a prompt, say) is left out when it failed, and `parts` shows what counted.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from shared.schema import RewardInfo, Score


class PartOptions(BaseModel):
    """One part: `detector: {weight: 1}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: float = Field(default=1.0, gt=0)
    optional: bool = False


class RealismOptions(BaseModel):
    """Options in the service's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: dict[str, PartOptions] = Field(min_length=1, description="names of rewards of the same service")


class Realism:
    """In [0, 1] when its parts are."""

    def __init__(self, name: str, parts: Mapping[str, PartOptions]) -> None:
        self.parts = dict(parts)
        self.info = RewardInfo(
            name=name,
            range=(0.0, 1.0),
            description="weighted mean of " + ", ".join(f"{k} ({p.weight:g})" for k, p in parts.items()),
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del device
        return cls(name, RealismOptions.model_validate(options).parts)

    def compose(self, scores: Mapping[str, Score]) -> Score:
        """The composition of one item's scores by reward name."""
        values: dict[str, float] = {}
        in_domain: bool | None = None
        for name, part in self.parts.items():
            score = scores[name]
            if score.value is None:
                if part.optional:
                    continue
                why = score.error.title if score.error else "no value"
                return Score.failed("part-missing", f"{self.info.name} needs {name}, which failed: {why}")
            values[name] = score.value
            if score.in_domain is not None:
                in_domain = score.in_domain if in_domain is None else in_domain and score.in_domain
        if not values:
            return Score.failed("part-missing", f"{self.info.name}: none of {', '.join(self.parts)} could score this item")
        total = sum(self.parts[name].weight for name in values)
        mean = sum(self.parts[name].weight * value for name, value in values.items()) / total
        return Score.ok(mean, parts=values, in_domain=in_domain)
