"""A weighted sum of criteria, each P(yes) at a vision-language model's first word: after AutoRubric-T2I, R = sum of w_r s_r.

`python -m services.rubrics` finds criteria and weights from preference pairs.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import yaml
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from services.engines import Chat
from services.reward import Item
from services.rewards.judge_kit import FirstToken, JudgeOptions, Read
from shared.schema import Score


class Rubric(BaseModel):
    """One criterion: a sentence about a picture that is true or false."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str = Field(min_length=1, max_length=500)
    weight: float = Field(allow_inf_nan=False)


Rubrics = Annotated[tuple[Rubric, ...], Field(min_length=1, max_length=64)]


class AutoRubricOptions(JudgeOptions):
    """The criteria."""

    rubrics: Rubrics | Path = Field(description="a YAML file, or the list that it would hold: [{text: ..., weight: ...}]")


class AutoRubric(FirstToken):
    """Between the sums of negative and of positive weights; `parts.rubric_1` and so on are the criteria's P(yes) in their order."""

    template, labels, fields, needs = "auto_rubric", ("yes", "no"), ("prompt", "rubric"), ("prompt",)
    description = "weighted sum of the criteria that a vision-language model finds met"
    options_class = AutoRubricOptions

    def __init__(self, name: str, options: AutoRubricOptions, device: str) -> None:
        self.rubrics = load_rubrics(options.rubrics) if isinstance(options.rubrics, Path) else options.rubrics
        super().__init__(name, options, device)
        for rubric in self.rubrics:
            if found := self.engine.reserved.search(rubric.text):
                raise ValueError(f"the criterion {rubric.text!r} holds the model's reserved token {found[0]}; leave it away")
        low = math.fsum(min(0.0, rubric.weight) for rubric in self.rubrics)
        high = math.fsum(max(0.0, rubric.weight) for rubric in self.rubrics)
        digest = blake3("\n".join(rubric.model_dump_json() for rubric in self.rubrics).encode()).hexdigest()[:8]
        self.info = self.info.model_copy(update={"range": (low, high), "preprocessing": f"{self.info.preprocessing}-{digest}"})

    def chat(self, item: Item) -> Chat:
        return self.question.chat([item.image], {"prompt": item.prompt or "", "rubric": str(item.meta["rubric"])})

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        return read.p["yes"], {}

    def _scores(self, items: list[Item]) -> list[Score]:
        asked = [Item(item.image, item.prompt, meta={"rubric": rubric.text}) for item in items for rubric in self.rubrics]
        scores, count = super()._scores(asked), len(self.rubrics)
        return [self._sum(scores[i : i + count]) for i in range(0, len(scores), count)]

    def _sum(self, scores: Sequence[Score]) -> Score:
        """An item of which one criterion could not be judged is an error."""
        odd = next((score for score in scores if score.value is None), None)
        if odd is not None:
            return odd
        met = [score.value for score in scores if score.value is not None]
        value = math.fsum(rubric.weight * one for rubric, one in zip(self.rubrics, met, strict=True))
        low, high = self.info.range or (value, value)
        parts = {f"rubric_{i}": one for i, one in enumerate(met, 1)} | {"label_mass": min(s.parts["label_mass"] for s in scores)}
        return Score.ok(min(max(value, low), high), parts=parts)


def load_rubrics(path: Path) -> tuple[Rubric, ...]:
    """FileNotFoundError; ValueError with what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"no criteria at {path}; `python -m services.rubrics` finds some from preference pairs")
    try:
        return TypeAdapter(Rubrics).validate_python(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is no list of criteria, each {{text: ..., weight: ...}}: {error}") from error
