"""EditScore: n sampled judgements of an edit, each sqrt(SC PQ), and their mean; the self-ensemble of its code.

SC = min(success, over-editing) from before and after, PQ = min(naturalness, artefacts) from the picture after, each 0 to 25 read as 0 to
10. Before is the item's first reference, the prompt is the instruction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from services.engines import Failure, Generated
from services.prompts import read
from services.prompts.answers import json_scores
from services.reward import Item
from services.rewards.judge_kit import failed, unparsable
from services.rewards.written_kit import Written, WrittenOptions, cut
from shared.schema import Score

_MOST, _TEN = 25.0, 10.0


class EditScoreOptions(WrittenOptions):
    """The code's temperature, its seed, and how many judgements."""

    temperature: float = Field(default=0.7, gt=0, le=2)
    n: int = Field(default=4, ge=1, le=64, description="judgements of each item")
    least: int | None = Field(default=None, ge=1, description="of them at least so many must be readable; default: half")
    quality_template: Path | None = Field(
        default=None, description="the question for PQ; default: edit_score_quality of services/prompts"
    )


class EditScore(Written):
    """In [0, 10]; `parts`: mean `semantic` and `quality`, `passes` that were read, `spread` (their standard deviation, of two or more)."""

    template, fields, images, needs, limits = "edit_score", ("prompt",), 2, ("prompt", "references"), (0.0, _TEN)
    description = "an edit of the item's first reference: mean of sampled judgements of success and quality"
    options: EditScoreOptions
    options_class = EditScoreOptions

    def __init__(self, name: str, options: EditScoreOptions, device: str) -> None:
        self.quality = read(options.quality_template or "edit_score_quality")
        self.least = options.least or (options.n + 1) // 2
        if self.least > options.n:
            raise ValueError(f"`least` is {self.least} of `n` = {options.n} judgements; make it {options.n} or less")
        super().__init__(name, options, device)
        how = f"{self.info.preprocessing}-n{options.n}-{self.least}-{self.quality.id}"
        self.info = self.info.model_copy(update={"preprocessing": how})

    def _pictures(self, item: Item) -> Sequence[Any]:
        return [item.references[0], item.image]

    def _scores(self, items: list[Item]) -> list[Score]:
        sampling = self.options.sampling(self.options.n)
        semantic = self.engine.generate([self.chat(item) for item in items], sampling)
        quality = self.engine.generate([self.quality.chat([item.image]) for item in items], sampling)
        return [self._ensemble(one, other) for one, other in zip(semantic, quality, strict=True)]

    def _ensemble(self, semantic: Sequence[Generated] | Failure, quality: Sequence[Generated] | Failure) -> Score:
        if isinstance(semantic, Failure) or isinstance(quality, Failure):
            return failed(semantic if isinstance(semantic, Failure) else quality)  # type: ignore[arg-type]
        passes: list[tuple[float, float]] = []
        error: Score | None = None
        for both in zip(semantic, quality, strict=True):
            a, b = (lowest(answer) for answer in both)
            if a is None or b is None:
                odd = both[0] if a is None else both[1]
                error = error or (
                    unparsable(odd.text, "two scores from 0 to 25") if odd.finished else cut(odd.text, self.options.max_tokens)
                )
            else:
                passes.append((a, b))
        if error is not None and len(passes) < self.least:
            return error
        values = [math.sqrt(a * b) for a, b in passes]
        mean = math.fsum(values) / len(values)
        parts = {name: math.fsum(one[i] for one in passes) / len(values) for i, name in enumerate(("semantic", "quality"))}
        if len(values) > 1:
            parts["spread"] = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return Score.ok(mean, parts={**parts, "passes": float(len(values))})


def lowest(answer: Generated) -> float | None:
    """The lower of the two scores, 0 to 10."""
    scores = json_scores(answer.text, 2, 0, _MOST, "score") if answer.finished else None
    return None if scores is None else min(scores) * _TEN / _MOST
