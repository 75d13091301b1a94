"""What the rewards share that read a judgement which a vision-language model wrote out.

    class Stars(Written):
        template, limits = "stars", (1.0, 5.0)

        def _read(self, text: str, item: Item) -> Score:
            value = number(text, 1, 5, "Stars")
            return unparsable(text, "`Stars:` from 1 to 5") if value is None else Score.ok(value)

An answer that was cut at `max_tokens` is an error: its last number may be half a number.
"""

from collections.abc import Sequence

from pydantic import Field

from services.engines import Failure, Generated, Sampling
from services.reward import Item
from services.rewards.judge_kit import Judge, JudgeOptions, failed, unparsable
from shared.schema import Score


class WrittenOptions(JudgeOptions):
    """How to write. At temperature 0 the judge gives its likeliest answer, always the same."""

    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=512, ge=1, le=8192, description="longest judgement; one that is longer is an error of its item")
    seed: int = Field(default=42, ge=0, le=2**31)

    def sampling(self, n: int = 1) -> Sampling:
        return Sampling(n=n, temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed)


class Written(Judge):
    """One answer for each item, read by `_read`."""

    options: WrittenOptions
    options_class = WrittenOptions

    def __init__(self, name: str, options: WrittenOptions, device: str) -> None:
        super().__init__(name, options, device)
        how = f"{self.info.preprocessing}-t{options.temperature:g}-m{options.max_tokens}-s{options.seed}"
        self.info = self.info.model_copy(update={"preprocessing": how})

    @property
    def repeatable(self) -> bool:
        """Whether the same question has the same answer: sampled judgements are not cached."""
        return self.options.temperature == 0

    def _read(self, text: str, item: Item) -> Score:
        """The score that a whole answer holds, or its error."""
        raise NotImplementedError

    def _scores(self, items: list[Item]) -> list[Score]:
        answers = self.engine.generate([self.chat(item) for item in items], self.options.sampling())
        return [
            failed(answer) if isinstance(answer, Failure) else self._judged(answer, item)
            for answer, item in zip(answers, items, strict=True)
        ]

    def _judged(self, answer: Sequence[Generated], item: Item) -> Score:
        return self._read(answer[0].text, item) if answer[0].finished else cut(answer[0].text, self.options.max_tokens)


def cut(text: str, limit: int) -> Score:
    """The error of an item whose judgement did not end."""
    if (score := unparsable(text, "end")).status == "refused":
        return score
    title = f"the judge's answer was cut at {limit} tokens; raise `max_tokens`, or ask it for less (`template`)"
    return Score.failed("answer-cut", title, status="parse_error")
