"""What the rewards that ask a vision-language model share: options, engines, questions, label probabilities, and what can go wrong.

A reward of one first token is a subclass with a value of the labels' probabilities:

    class Artifacts(FirstToken):
        template, labels = "artifacts", ("yes", "no")

        def _value(self, read: Read) -> tuple[float, dict[str, float]]:
            return read.p["no"], {}

One that asks otherwise subclasses `Judge` and gives `_scores`. An item that the engine cannot answer gets an error, never a number.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from services.engines import Chat, Engine, EngineOptions, Failure, First, Sampling, open_engine
from services.prompts import read
from services.prompts.answers import is_refusal
from services.reward import Item
from services.rewards.presets import expand
from shared.schema import RewardInfo, Score

log = logging.getLogger("verism.judge")
SLIMMEST = 32  # longer to shorter side; processors of the Qwen family end at 200, and enlarge the short side before that
SLACK = 0.01  # how wrong a probability may be because an engine returned only its likeliest tokens
_QUOTED_TOKENS, _QUOTED_LETTERS = 12, 60


class JudgeOptions(EngineOptions):
    """EngineOptions says which model and how it runs."""

    template: Path | None = Field(
        default=None, description="the question: a YAML file; default: the reward's own in services/prompts"
    )
    floor: float = Field(
        default=0.1, ge=0, le=1, description="least probability of all labels together; below it the item is an error"
    )
    version: int = Field(default=1, ge=1)
    licence: str = "see the model card"

    def for_engine(self) -> EngineOptions:
        return EngineOptions.model_construct(**{name: getattr(self, name) for name in EngineOptions.model_fields})


@dataclass(frozen=True)
class Read:
    """What the first token said. `logits` are of unnormalised log-probability by label; `p` sum to 1 over the labels."""

    p: Mapping[str, float]
    logits: Mapping[str, float]
    mass: float

    def margin(self, label: str, other: str) -> float:
        """Log-odds of two labels."""
        return self.logits[label] - self.logits[other]


def spellings(word: str) -> tuple[str, ...]:
    """A word plain, capitalised and in capitals, with and without a space before it."""
    cases = dict.fromkeys((word, word.capitalize(), word.upper()))
    return tuple(spelling for case in cases for spelling in (case, f" {case}"))


class Labels:
    """The first tokens that stand for each label of a question.

    `rule` is how the spellings of a label add up: `sum` of their probabilities, or `mean` of their logits, as Forensic-Chat's code does.
    """

    def __init__(
        self, engine: Engine, words: Mapping[str, str | Sequence[str]], rule: Literal["sum", "mean"] = "sum", floor: float = 0.1
    ) -> None:
        self.rule, self.floor = rule, floor
        wished = {label: spellings(word) if isinstance(word, str) else tuple(word) for label, word in words.items()}
        self.spelled = _tokens(engine, wished)
        self.all = tuple(spelling for several in self.spelled.values() for spelling in several)

    def read(self, first: First) -> Read | Failure:
        """`label-mass` when the answer begins otherwise, `label-missing` when the engine did not return what is needed."""
        known = first.logprobs
        mass = math.fsum(math.exp(known[s]) for s in self.all if s in known)
        missing = [s for s in self.all if s not in known]
        unseen = len(missing) * math.exp(first.ceiling)
        if mass + unseen < self.floor or mass == 0.0:
            return Failure("label-mass", f"the judge's answer begins with {self._wished} at probability {mass:.2g} only")
        if missing and (self.rule == "mean" or unseen > SLACK * mass):
            title = f"the engine returned no probability of {missing[0]!r}, only its likeliest tokens; serve the judge by vLLM"
            return Failure("label-missing", title)
        logits = {label: self._added([known[s] for s in several if s in known]) for label, several in self.spelled.items()}
        top = max(logits.values())
        weights = {label: math.exp(logit - top) for label, logit in logits.items()}
        total = math.fsum(weights.values())
        lowest = math.log(unseen or mass * 1e-12)  # a label of which nothing was seen: finite, and within SLACK
        return Read(
            {label: weight / total for label, weight in weights.items()},
            {label: max(logit, lowest) if missing else logit for label, logit in logits.items()},
            min(mass, 1.0),
        )

    def _added(self, logprobs: Sequence[float]) -> float:
        if not logprobs:
            return -math.inf
        if self.rule == "mean":
            return math.fsum(logprobs) / len(logprobs)
        top = max(logprobs)
        return top + math.log(math.fsum(math.exp(one - top) for one in logprobs)) if top > -math.inf else top

    @property
    def _wished(self) -> str:
        return " or ".join(self.spelled)


def _tokens(engine: Engine, wished: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Of each label the spellings that are one token, one for each token. ValueError says which label has none, or shares one."""
    ids = engine.tokens([s for several in wished.values() for s in several])
    if ids is None:  # taken by their text
        return {label: tuple(dict.fromkeys(several)) for label, several in wished.items()}
    left, owner, out = iter(ids), dict[int, str](), dict[str, tuple[str, ...]]()
    for label, several in wished.items():
        found: dict[int, str] = {}
        cut = ""
        for spelling in several:
            row = next(left)
            if len(row) == 1:
                found.setdefault(row[0], spelling)
            else:
                cut = cut or f"{spelling!r} is {len(row)} tokens"
        if not found:
            raise ValueError(
                f"label {label!r} is no single token of {engine.name} ({cut}); choose other words under `labels` of the template, "
                "for instance A and B, and ask for them in its text"
            )
        for token, spelling in found.items():
            if token in owner:
                raise ValueError(
                    f"labels {owner[token]!r} and {label!r} begin with the same token of {engine.name} ({spelling!r}); "
                    "choose other words under `labels` of the template"
                )
            owner[token] = label
        out[label] = tuple(found.values())
    return out


class Judge:
    """A reward that asks about a picture. Subclasses set the class variables and give `_scores`."""

    template: ClassVar[str]
    labels: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = ()  # what a template may hold of an item: prompt
    images: ClassVar[int] = 1
    needs: ClassVar[tuple[Literal["prompt", "references"], ...]] = ()
    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    description: ClassVar[str]
    options_class: ClassVar[type[JudgeOptions]] = JudgeOptions

    def __init__(self, name: str, options: JudgeOptions, device: str) -> None:
        source = options.template if options.template is not None else self.template
        self.options, self.question = options, read(source, self.fields, self.images, self.labels)
        self.engine = open_engine(options.for_engine(), device)
        self.info = RewardInfo(
            name=name,
            range=self.limits,
            needs=list(self.needs),
            version=options.version,
            weights_sha256=self.engine.weights_sha256,
            preprocessing=f"{self.question.id}-{options.engine}-{options.dtype}",
            licence=options.licence,
            description=self.description,
        )

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        """FileNotFoundError when something is missing; ValueError when options, template or model do not fit."""
        return cls(name, cls.options_class.model_validate(expand(cls.template, options)), device)

    @property
    def ready(self) -> bool:
        """Whether the engine would answer now."""
        return self.engine.ready

    def chat(self, item: Item) -> Chat:
        """The question about one item."""
        return self.question.chat(self._pictures(item), {"prompt": item.prompt or ""})

    def _pictures(self, item: Item) -> Sequence[Any]:
        return [item.image, *item.references[: self.images - 1]]

    def _scores(self, items: list[Item]) -> list[Score]:
        """One for each item; every one of them can be asked about."""
        raise NotImplementedError

    def _refusal(self, item: Item) -> Score | None:
        """The error of an item that the model need not see."""
        for height, width in (image.shape[:2] for image in (item.image, *item.references)):
            if max(height, width) > SLIMMEST * min(height, width):
                title = f"the picture is {width}x{height}; its longer side may be {SLIMMEST} times the shorter one at most"
                return Score.failed("image-too-slim", title)
        if "prompt" in self.needs and not (item.prompt or "").strip():
            return Score.failed("prompt-missing", f"{self.info.name} needs the item's `prompt`: what should the picture show?")
        if len(item.references) < self.images - 1:
            title = f"{self.info.name} compares with {self.images - 1} of the item's `references`, and {len(item.references)} came"
            return Score.failed("references-missing", title)
        found = self.engine.reserved.search(item.prompt or "") if self.fields or "prompt" in self.needs else None
        if found is not None:  # it would end the question, or stand for a picture
            return Score.failed("prompt-reserved", f"the prompt holds the model's reserved token {found[0]}; leave it away")
        return None

    def score(self, batch: Sequence[Item]) -> list[Score]:
        out = {i: score for i, item in enumerate(batch) if (score := self._refusal(item)) is not None}
        rest = [i for i in range(len(batch)) if i not in out]
        if rest:
            out |= dict(zip(rest, self._scores([batch[i] for i in rest]), strict=True))
        return [out[i] for i in range(len(batch))]


class FirstToken(Judge):
    """The probabilities of the labels at the first position of the answer."""

    rule: ClassVar[Literal["sum", "mean"]] = "sum"

    def __init__(self, name: str, options: JudgeOptions, device: str) -> None:
        super().__init__(name, options, device)
        self.tokens = Labels(self.engine, self.question.labels, self.rule, options.floor)

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        """The score and its parts; the label mass is added."""
        raise NotImplementedError

    def _scores(self, items: list[Item]) -> list[Score]:
        chats = [self.chat(item) for item in items]
        answers = self.engine.first(chats, self.tokens.all)
        reads = [one if isinstance(one, Failure) else self.tokens.read(one) for one in answers]
        odd = [i for i, one in enumerate(reads) if isinstance(one, Failure) and one.type == "label-mass"]
        said = dict(zip(odd, self._quotes([chats[i] for i in odd]), strict=True))
        return [said.get(i) or (failed(one) if isinstance(one, Failure) else self._scored(one)) for i, one in enumerate(reads)]

    def _scored(self, read: Read) -> Score:
        value, parts = self._value(read)
        return Score.ok(value, parts={"label_mass": read.mass, **parts})

    def _quotes(self, chats: list[Chat]) -> list[Score]:
        """Errors of items whose answer begins with no label: what it begins with instead."""
        if not chats:
            return []
        wished = " or ".join(self.labels)
        out = []
        for answer in self.engine.generate(chats, Sampling(max_tokens=_QUOTED_TOKENS)):
            if isinstance(answer, Failure):
                out.append(failed(answer))
                continue
            quoted = repr(answer[0].text.strip()[:_QUOTED_LETTERS])
            title = (
                f"the judge answers {quoted} and not {wished}; use the question that it was tuned on (`template`), or lower `floor`"
            )
            out.append(
                Score.failed("judge-refused", f"the judge refuses to answer: {quoted}", status="refused")
                if is_refusal(answer[0].text)
                else Score.failed("label-mass", title, status="parse_error")
            )
        return out


def failed(failure: Failure) -> Score:
    """An engine's failure as the item's error."""
    return Score.failed(failure.type, failure.title, retryable=failure.retryable, status=failure.status)


def unparsable(text: str, wanted: str) -> Score:
    """The error of an item whose judgement holds no `wanted`."""
    quoted = repr(text.strip()[:_QUOTED_LETTERS])
    if is_refusal(text):
        return Score.failed("judge-refused", f"the judge refuses to answer: {quoted}", status="refused")
    return Score.failed("answer-unparsable", f"the judge's answer holds no {wanted}: {quoted}", status="parse_error")
