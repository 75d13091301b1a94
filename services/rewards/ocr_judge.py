"""Does the picture carry the text that the prompt puts in quotes? Read by a vision-language model, matched as `ocr` matches.

The model is not told the wished text, so that it does not read what it expects.
"""

from services.prompts.answers import tagged
from services.reward import Item
from services.rewards.judge_kit import unparsable
from services.rewards.ocr import edit_distance, normalise, quoted_text
from services.rewards.written_kit import Written
from shared.schema import Score


class OcrJudge(Written):
    """1 - edit distance / length of the longer text, in [0, 1]; `text` is what was read."""

    template, needs = "ocr_judge", ("prompt",)
    description = "1 - normalised edit distance between the text a vision-language model reads and the text quoted in the prompt"

    def _refusal(self, item: Item) -> Score | None:
        if not normalise(quoted_text(item.prompt or "")):
            title = f'{self.info.name} needs a prompt with the wished text in quotes, e.g. a sign that says "OPEN"'
            return Score.failed("prompt-missing", title)
        return super()._refusal(item)

    def _read(self, text: str, item: Item) -> Score:
        found = tagged(text, "text")
        if found is None:
            return unparsable(text, "<text>...</text>")
        wanted, seen = normalise(quoted_text(item.prompt or "")), normalise(found)
        return Score.ok(1 - edit_distance(wanted, seen) / max(len(wanted), len(seen)), text=found)
