"""Does the picture carry the text that the prompt puts in quotes? Read by RapidOCR (Apache-2.0, weights in its package).

Value: 1 - edit distance / length of the longer text, over letters and digits, case folded: 1 is a perfect rendering.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from services.reward import Item
from shared.schema import RewardInfo, Score

QUOTED = re.compile(r"[\"“”]([^\"“”]+)[\"“”]|(?<!\w)'([^']+)'(?!\w)")


def quoted_text(prompt: str) -> str:
    """All quoted stretches of a prompt, joined by spaces; empty when there are none."""
    return " ".join(a or b for a, b in QUOTED.findall(prompt))


def normalise(text: str) -> str:
    """Letters and digits only, case folded."""
    return "".join(c for c in text.casefold() if c.isalnum())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


class OcrOptions(BaseModel):
    """No options yet."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ocr:
    """In [0, 1]; `text` is what was read."""

    def __init__(self, name: str) -> None:
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.WARNING)
        self._reader = RapidOCR(params={"Global.log_level": "warning"})
        self.info = RewardInfo(
            name=name,
            range=(0.0, 1.0),
            needs=["prompt"],
            preprocessing="rapidocr",
            description="1 - normalised edit distance between the text read and the text quoted in the prompt",
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del device
        OcrOptions.model_validate(options)
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return [self._one(item) for item in batch]

    def _one(self, item: Item) -> Score:
        wanted = normalise(quoted_text(item.prompt or ""))
        if not wanted:
            return Score.failed("prompt-missing", 'ocr needs a prompt with the wished text in quotes, e.g. a sign that says "OPEN"')
        found = self._reader(np.ascontiguousarray(item.image[:, :, ::-1])).txts or ()
        read = normalise("".join(found))
        distance = edit_distance(wanted, read)
        return Score.ok(1 - distance / max(len(wanted), len(read)), text=" ".join(found))
