"""UnifiedReward, pointwise: a vision-language model writes `Final Score: 1-5`, or several scores of that range, read as its code does.

The authors' trainers take 0 for an answer without a score; here it is an error of its item.
"""

import math

from pydantic import Field

from services.prompts.answers import number
from services.reward import Item
from services.rewards.judge_kit import unparsable
from services.rewards.written_kit import Written, WrittenOptions
from shared.schema import Score


class UnifiedRewardOptions(WrittenOptions):
    """One score, or the mean of several."""

    aspects: tuple[str, ...] = Field(
        default=(), description="`Alignment` reads the line `Alignment Score (1-5): x`; none: `Final Score: x`"
    )


class UnifiedReward(Written):
    """In [1, 5]; with `aspects` their mean, and each of them in `parts`. `text` is the judgement."""

    template, fields, needs, limits = "unified_reward", ("prompt",), ("prompt",), (1.0, 5.0)
    description = "score from 1 to 5 that a vision-language model writes after its judgement"
    options: UnifiedRewardOptions
    options_class = UnifiedRewardOptions

    def _read(self, text: str, item: Item) -> Score:
        labels = {aspect: f"{aspect} Score (1-5)" for aspect in self.options.aspects} or {"final": "Final Score"}
        parts: dict[str, float] = {}
        for name, label in labels.items():
            value = number(text, 1, 5, label)
            if value is None:
                return unparsable(text, f"`{label}: ` and one number from 1 to 5")
            parts[name] = value
        return Score.ok(math.fsum(parts.values()) / len(parts), parts=parts if self.options.aspects else {}, text=text)
