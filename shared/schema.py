"""What travels between trainer and services: frozen, versioned, checked at the door.

Everything here is plain data. A number exists only where a model gave one: a failed item carries a `Problem`, never a value.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION = 1

Status = Literal["ok", "parse_error", "refused", "timeout", "error"]
Priority = Literal["interactive", "train", "bulk"]
Encoding = Literal["rgb8", "qoi", "png", "webp", "jpeg"]
Plan = Literal["all", "anchor", "swiss"]

PROMPT_BYTES = 8 * 1024
MAX_ITEMS = 256
MAX_PAIRS = 4096


class Frozen(BaseModel):
    """Base of every message: unknown fields are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class Problem(Frozen):
    """What went wrong, after RFC 9457; `type` is `urn:verism:...`, `retryable` says whether the same call may work later."""

    type: str
    title: str
    status: int | None = None
    detail: str | None = None
    retryable: bool = False
    retry_after_ms: int | None = None
    limit: float | None = None
    observed: float | None = None


class RewardInfo(Frozen):
    """What `GET /v1/rewards` says about one reward."""

    name: str
    mode: Literal["pointwise", "pairwise"] = Field(default="pointwise", description="pairwise: POST /v1/compare takes it too")
    range: tuple[float, float] | None = Field(default=None, description="smallest and largest value, null when unbounded")
    higher_is_better: bool = True
    needs: list[Literal["prompt", "references"]] = []
    version: int = 1
    weights_sha256: str | None = None
    preprocessing: str = "none"
    licence: str = "Apache-2.0"
    description: str = ""
    min_side: int = Field(default=16, description="smallest side in pixels")
    max_side: int | None = None


class Score(Frozen):
    """One reward's answer for one item. `value` exists only when `status` is ok, and is finite."""

    status: Status
    value: float | None = None
    parts: dict[str, float] = {}
    sigma: float | None = None
    in_domain: bool | None = None
    distribution: list[float] | None = None
    text: str | None = None
    cached: bool = False
    error: Problem | None = None

    @model_validator(mode="after")
    def _value_iff_ok(self) -> Self:
        ok = self.status == "ok"
        if ok != (self.value is not None) or ok == (self.error is not None):
            raise ValueError("a score has a value exactly when its status is ok, and an error otherwise")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError("a score is finite; use Score.ok, which makes an error of NaN and infinity")
        return self

    @classmethod
    def ok(
        cls,
        value: float,
        *,
        parts: dict[str, float] | None = None,
        sigma: float | None = None,
        in_domain: bool | None = None,
        text: str | None = None,
    ) -> "Score":
        """A scored item; a NaN or infinite value (or part) becomes an error of this item instead."""
        numbers = [value, *(parts or {}).values(), *([] if sigma is None else [sigma])]
        if not all(math.isfinite(number) for number in numbers):
            return cls.failed("non-finite-score", "the model's answer is not a finite number for this item")
        return cls(status="ok", value=float(value), parts=parts or {}, sigma=sigma, in_domain=in_domain, text=text)

    @classmethod
    def failed(
        cls,
        type: str,
        title: str,
        *,
        retryable: bool = False,
        status: Literal["parse_error", "refused", "timeout", "error"] = "error",
    ) -> "Score":
        """An item without a score; `type` is the last part of the urn, `title` says what to do."""
        return cls(status=status, error=Problem(type=f"urn:verism:{type}", title=title, retryable=retryable))


Side = Annotated[int, Field(ge=1, le=65_535)]


class ImageData(Frozen):
    """An encoded picture. `rgb8` is height x width x 3 bytes, row by row; the others carry their own header too."""

    encoding: Encoding
    height: Side
    width: Side
    data: bytes


def _check_prompt(prompt: str | None) -> None:
    if prompt is not None and len(prompt.encode()) > PROMPT_BYTES:
        raise ValueError(f"the prompt is longer than {PROMPT_BYTES} bytes; shorten it")


def _check_ids(what: str, ids: Sequence[str]) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError(f"{what} ids repeat; give each {what} its own id")


class ScoreItem(Frozen):
    """One picture to score."""

    id: Annotated[str, Field(max_length=256)]
    group: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    image: ImageData
    references: list[ImageData] = []
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _short_prompt(self) -> Self:
        _check_prompt(self.prompt)
        return self


class ScoreRequest(Frozen):
    """Body of `POST /score`; `rewards: null` means the service's default."""

    request_id: Annotated[str, Field(max_length=256)]
    rewards: list[str] | None = None
    priority: Priority = "interactive"
    deadline_ms: Annotated[int, Field(gt=0)] | None = None
    require_version: dict[str, int] | None = None
    items: Annotated[list[ScoreItem], Field(min_length=1, max_length=MAX_ITEMS)]

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        _check_ids("item", [item.id for item in self.items])
        return self


class RewardUsed(Frozen):
    """Which weights gave the scores of one answer."""

    version: int
    weights_sha256: str | None = None
    preprocessing: str

    @classmethod
    def of(cls, info: RewardInfo) -> Self:
        return cls(version=info.version, weights_sha256=info.weights_sha256, preprocessing=info.preprocessing)


class ItemAnswer(Frozen):
    """Scores of one item by reward name."""

    id: str
    scores: dict[str, Score]
    lossy: bool = False


class ScoreAnswer(Frozen):
    """Answer of `POST /score`: one entry per item, in the request's order."""

    request_id: str
    rewards: dict[str, RewardUsed]
    items: list[ItemAnswer]
    timing_ms: dict[str, float] = {}


Place = Annotated[int, Field(ge=0, lt=MAX_ITEMS)] | Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CompareGroup(Frozen):
    """Pictures that are compared with one another. Each is a position in the request's `images`, or the sha256 of its `data` in hex."""

    id: Annotated[str, Field(max_length=256)]
    prompt: str | None = None
    images: Annotated[list[Place], Field(min_length=2, max_length=MAX_ITEMS)]
    anchors: Annotated[list[Place], Field(max_length=MAX_ITEMS)] = []

    @model_validator(mode="after")
    def _short_prompt(self) -> Self:
        _check_prompt(self.prompt)
        return self


class CompareRequest(Frozen):
    """Body of `POST /v1/compare`. Every pair is asked in both orders."""

    request_id: Annotated[str, Field(max_length=256)]
    reward: str
    priority: Priority = "interactive"
    deadline_ms: Annotated[int, Field(gt=0)] | None = None
    require_version: int | None = None
    plan: Plan = "all"
    rounds: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = Field(
        default=None, description="of plan swiss; default log2 of the group"
    )
    hard: bool = Field(default=False, description="count each verdict as a win, a tie or a loss, not as a probability")
    images: Annotated[list[ImageData], Field(min_length=2, max_length=MAX_ITEMS)]
    groups: Annotated[list[CompareGroup], Field(min_length=1, max_length=MAX_ITEMS)]

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        _check_ids("group", [group.id for group in self.groups])
        if self.rounds is not None and self.plan != "swiss":
            raise ValueError("`rounds` belongs to plan swiss; leave it away")
        if self.plan != "anchor" and any(group.anchors for group in self.groups):
            raise ValueError("`anchors` belong to plan anchor; leave them away")
        return self

    @property
    def pairs(self) -> int:
        """How many pairs it asks for."""
        return sum(pairs_of(len(group.images), self.plan, len(group.anchors), self.rounds) for group in self.groups)


def swiss_rounds(n: int, rounds: int | None = None) -> int:
    """Of n pictures: `rounds`, or log2 n rounded up; at most n / 2 rounded up, so that everyone has a new opponent in each."""
    return min(rounds or (n - 1).bit_length(), (n + 1) // 2)


def pairs_of(n: int, plan: Plan, anchors: int = 0, rounds: int | None = None) -> int:
    """Pairs of a group of n. No anchors named: one."""
    if plan == "swiss":
        return swiss_rounds(n, rounds) * (n // 2)
    others = n - (max(anchors, 1) if plan == "anchor" else n)
    return (n * (n - 1) - others * (others - 1)) // 2


class Verdict(Frozen):
    """Of one pair (positions in `images`): P(first wins), the mean over both orders; without one, `error` says why.

    `orders` are P(first wins) when the first was shown first, and when it was shown second."""

    first: int
    second: int
    value: float | None = None
    orders: tuple[float | None, float | None] = (None, None)
    error: Problem | None = None

    @model_validator(mode="after")
    def _value_or_error(self) -> Self:
        if (self.value is None) == (self.error is None):
            raise ValueError("a verdict has a value, or an error")
        return self


class WinRate(Frozen):
    """Of one picture (position in `images`): the mean of its verdicts and its standard error, null when it has no verdict."""

    image: int
    win_rate: float | None = None
    standard_error: float | None = None
    pairs: int = 0
    missing: int = 0
    lossy: bool = False
    error: Problem | None = Field(default=None, description="why the picture itself could not be read")


class GroupAnswer(Frozen):
    """Win rates in the order of the group's images; `shown_first` is how often what is shown first wins (0.5 is unbiased)."""

    id: str
    items: list[WinRate]
    pairs: list[Verdict]
    shown_first: float | None = None


class CompareAnswer(Frozen):
    """Answer of `POST /v1/compare`: one entry per group, in the request's order."""

    request_id: str
    rewards: dict[str, RewardUsed]
    groups: list[GroupAnswer]
    timing_ms: dict[str, float] = {}
