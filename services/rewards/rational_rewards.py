"""RationalRewards: a vision-language model rates aspects from 1 to 4 or N/A, and writes a prompt that would mend the picture.

r = (mean over the aspects that apply, clipped to [1, 4], - 1) / 3. The refined prompt feeds the next round of a generate-critique loop.
A rating stands in the aspect's line (`Aspect: 3`), or, as the published checkpoint writes, after `Score:` in the section that it heads.
"""

import math
import re
from collections.abc import Sequence

from pydantic import Field

from services.prompts.answers import number
from services.reward import Item
from services.rewards.judge_kit import unparsable
from services.rewards.written_kit import Written, WrittenOptions
from shared.schema import Score

_REFINED = re.compile(r"^[ \t#*]*Refined Request[ \t*]*:[ \t*]*(\S[^\n]*(?:\n(?![ \t]*#)[^\n]+)*)", re.I | re.M)


class RationalOptions(WrittenOptions):
    """Which aspects the template asks for."""

    aspects: tuple[str, ...] = Field(
        default=("Text faithfulness", "Physical and visual quality", "Text rendering"),
        min_length=1,
        description="each a line `Aspect: 1-4` or `Aspect: N/A`, or a section with `Score: 1-4` or `Score: N/A`",
    )


class RationalRewards(Written):
    """In [0, 1]; `parts` are the ratings that apply, `text` is the refined prompt."""

    template, fields, needs = "rational_rewards", ("prompt",), ("prompt",)
    description = "mean of the aspects that a vision-language model rates, and as `text` the prompt that it would rather have"
    options: RationalOptions
    options_class = RationalOptions

    def _read(self, text: str, item: Item) -> Score:
        ratings: dict[str, float] = {}
        for aspect in self.options.aspects:
            where, label = rating(text, aspect, self.options.aspects)
            value, left_out = number(where, 1, 4, label), applies_not(where, label)
            if (value is None) != left_out:
                return unparsable(text, f"`{aspect}: ` and one number from 1 to 4 or N/A")
            if value is not None:
                ratings[aspect.lower().replace(" ", "_")] = value
        if not ratings:
            return unparsable(text, "rating: every aspect is N/A")
        mean = math.fsum(ratings.values()) / len(ratings)
        return Score.ok((min(max(mean, 1.0), 4.0) - 1) / 3, parts=ratings, text=refined(text))


def rating(text: str, aspect: str, aspects: Sequence[str]) -> tuple[str, str]:
    """Where the aspect's rating stands, and after which label: its section and `Score`; or, where no line is its heading, the whole text and
    the aspect. Two headings leave nothing to read."""
    heads = _heads(text, aspects)
    mine = [i for i, (name, _, _) in enumerate(heads) if name == aspect]
    if not mine:
        return text, aspect
    end = heads[mine[0] + 1][1] if mine[0] + 1 < len(heads) else len(text)
    return text[heads[mine[0]][2] : end] if len(mine) == 1 else "", "Score"


def _heads(text: str, aspects: Sequence[str]) -> list[tuple[str | None, int, int]]:
    """(aspect, start, end) of each line that is nothing but `1. Aspect:`, and (None, start, end) of each `# ...`."""
    known = {one.lower(): one for one in aspects}
    names = "|".join(map(re.escape, aspects))
    line = rf"^(?:[ \t#*]*(?:[0-9]{{1,3}}\.[ \t*]*)?({names})[ \t*]*:[ \t*]*$|#(?!#).*$)"
    return [(known.get((one[1] or "").lower()), one.start(), one.end()) for one in re.finditer(line, text, re.I | re.M)]


def applies_not(text: str, aspect: str) -> bool:
    """Whether the aspect's line says N/A."""
    return re.search(rf"(?<!\w){re.escape(aspect)}\W{{0,4}}?\s*[:=]\s*\**\s*N/A[ \t*.]*$", text, re.I | re.M) is not None


def refined(text: str) -> str | None:
    """What stands after `Refined Request:`, to the next heading or empty line; None when it is missing or there are two."""
    found = {one.strip(" \t\n*") for one in _REFINED.findall(text)} - {""}
    return found.pop() if len(found) == 1 else None
