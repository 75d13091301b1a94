"""Which of two pictures is better? After UnifiedReward's pairwise question (2503.05236), by first token or by written verdict.

One order is one question, and its answer leans to a place; `score` asks in both and averages: (p(a, b) + 1 - p(b, a)) / 2. `compare` asks
in the order given, for a caller that does so itself. The question by first token (one digit), and that no tie is told by it, are ours.
"""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from services.engines import Failure, Generated, Sampling
from services.prompts.answers import tagged
from services.reward import Item, Pair
from services.rewards.judge_kit import FirstToken, Judge, JudgeOptions, Read, failed, unparsable
from shared.schema import Score

_VERDICTS = {
    r"image 1 is (?:the )?better(?: one)?": 1.0,
    r"image 2 is (?:the )?better(?: one)?": 0.0,
    r"both images are equally good": 0.5,
}
_WANTED = "`Image 1 is better`, `Image 2 is better` or `Both images are equally good` at its end"
_LEAD = r"[\s*_#\"'`]*(?:(?:final |overall )?(?:verdict|answer|conclusion)\W{0,4}:[\s*_\"'`]*)?"
_LONGEST = 100_000


def verdict(text: str) -> float | None:
    """1, 0 or 0.5 from the only <answer>, or from the last line where there is no such tag, if that says nothing else; None otherwise."""
    if len(text) > _LONGEST:
        return None
    said = tagged(text, "answer") if re.search(r"</?answer>", text, re.I) else (text.strip().splitlines() or [""])[-1]
    if said is None:
        return None
    return next((v for one, v in _VERDICTS.items() if re.fullmatch(_LEAD + one + r"[\s.!*_\"'`]*", said, re.I)), None)


class _Pairwise(Judge):
    """What both ways of asking share: two pictures, a prompt where the question has one, and both orders."""

    fields, images, needs = ("prompt",), 2, ("references",)

    def __init__(self, name: str, options: JudgeOptions, device: str) -> None:
        super().__init__(name, options, device)
        wants = ["prompt", "references"] if "prompt" in self.question.fields else ["references"]
        self.info = self.info.model_copy(update={"mode": "pairwise", "needs": wants})

    def _refusal(self, item: Item) -> Score | None:
        if "prompt" in self.info.needs and not (item.prompt or "").strip():
            return Score.failed("prompt-missing", f"{self.info.name} needs a `prompt`: what should the pictures show?")
        return super()._refusal(item)

    def compare(self, pairs: Sequence[Pair]) -> list[Score]:
        """P(the picture that is shown first is better), asked in this order only."""
        return super().score(pairs)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        """P(the picture is better than its first reference), both orders averaged; `parts.forward` and `parts.backward` are each."""
        out = {i: score for i, item in enumerate(batch) if (score := self._refusal(item)) is not None}
        rest = [i for i in range(len(batch)) if i not in out]
        pairs = [Pair(item.image, item.prompt, item.references[:1]) for item in (batch[i] for i in rest)]
        there = self.compare([*pairs, *(pair.swapped for pair in pairs)])
        for i, forward, backward in zip(rest, there[: len(rest)], there[len(rest) :], strict=True):
            if forward.value is None or backward.value is None:
                out[i] = forward if forward.value is None else backward
            else:
                one, other = forward.value, 1 - backward.value
                out[i] = Score.ok((one + other) / 2, parts={"forward": one, "backward": other})
        return [out[i] for i in range(len(batch))]


class UnifiedCompare(_Pairwise, FirstToken):
    """By the probabilities of `1` and `2` at the first token: P(1) / (P(1) + P(2))."""

    template, labels = "unified_compare", ("first", "second")
    description = "P(better than another picture) at the first token of a vision-language model, both orders averaged"

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        return read.p["first"], {"margin": read.margin("first", "second")}


class VerdictOptions(JudgeOptions):
    max_tokens: int = Field(default=512, ge=8, le=8192, description="longest judgement; one that is cut off is no verdict")


class UnifiedVerdict(_Pairwise):
    """By what the judge writes, read strictly: better 1, worse 0, equally good 0.5."""

    template, options_class = "unified_verdict", VerdictOptions
    description = "better than another picture, by the written verdict of a vision-language model, both orders averaged"

    def _scores(self, items: list[Item]) -> list[Score]:
        assert isinstance(self.options, VerdictOptions)
        answers: list[Any] = self.engine.generate([self.chat(item) for item in items], Sampling(max_tokens=self.options.max_tokens))
        return [failed(one) if isinstance(one, Failure) else _read(one[0]) for one in answers]


def _read(answer: Generated) -> Score:
    value = verdict(answer.text) if answer.finished else None
    return unparsable(answer.text, _WANTED) if value is None else Score.ok(value, text=answer.text)
