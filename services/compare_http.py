"""Between `POST /v1/compare` and a lane: pictures by their places, rounds of questions, verdicts, win rates.

A pair is two questions on the reward's own lane, one for each order; those of a round, of all groups, are asked at once.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from services import telemetry
from services.compare import Tournament, both_orders, win_rates
from services.metrics import Metrics
from services.reward import Comparer, Item, Pair, require_version
from services.scheduler import Lane
from services.worker import RewardWork
from shared import wire
from shared.errors import Invalid, UnknownReward
from shared.schema import (
    CompareAnswer,
    CompareGroup,
    CompareRequest,
    GroupAnswer,
    ImageData,
    Problem,
    RewardInfo,
    RewardUsed,
    Score,
    ScoreItem,
    Verdict,
    WinRate,
)

Picture = tuple[Item, bytes, bool] | Score  # as the app decodes: with whether it was lossy, or its error
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {wire.JSON: {"schema": {"$ref": "#/components/schemas/CompareRequest"}}},
}


class PairWork(RewardWork):
    """A comparer's work: batches of pairs by `compare`, all others as usual. A lane's bucket keeps them apart."""

    def __init__(self, reward: Comparer) -> None:
        super().__init__(reward)
        self._pairs = RewardWork(_Compares(reward))  # type: ignore[arg-type]  # it is loaded already

    def collate(self, questions: Sequence[Item]) -> tuple[int, Any]:
        if isinstance(questions[0], Pair):
            return len(questions), _Pairs(questions)
        return super().collate(questions)

    def run(self, collated: tuple[int, Any]) -> list[Score]:
        return self._pairs.run(collated) if isinstance(collated[1], _Pairs) else super().run(collated)


class _Pairs(list[Item]):
    """The questions of a batch of pairs."""


class _Compares:
    """A comparer whose `score` is its `compare`."""

    def __init__(self, reward: Comparer) -> None:
        self.info, self.score = reward.info, reward.compare


def work_of(reward: Any) -> RewardWork:
    """What a lane drives of a reward."""
    return PairWork(reward) if isinstance(reward, Comparer) else RewardWork(reward)


def lane_of(asked: CompareRequest, rewards: Mapping[str, Any]) -> Lane[Item, Score]:
    """Where to ask. UnknownReward, Invalid for a reward that cannot compare, WrongVersion. `rewards` are the app's, by name."""
    served = rewards.get(asked.reward)
    if served is None:
        raise UnknownReward(f"unknown reward {asked.reward!r}; this service has: {', '.join(rewards)}")
    if not isinstance(served.reward, Comparer):
        able = ", ".join(name for name, one in rewards.items() if isinstance(one.reward, Comparer))
        raise Invalid(f"reward: {asked.reward!r} scores single pictures and cannot compare; here can: {able or 'none'}")
    require_version(asked.require_version, served.info)
    lane: Lane[Item, Score] = served.lane
    return lane


def uploads(asked: CompareRequest) -> list[ScoreItem]:
    """Its pictures as the app's decoder takes them, each once."""
    return [ScoreItem.model_construct(id="", group=None, prompt=None, image=one, references=[], meta={}) for one in asked.images]


def places(asked: CompareRequest) -> list[tuple[list[int], list[int]]]:
    """Of each group the positions of its pictures, and which of them are anchors. Invalid for a place that is not there, or named twice."""
    named = any(isinstance(place, str) for group in asked.groups for place in (*group.images, *group.anchors))
    known = _digests(asked.images) if named else {}
    out = []
    for number, group in enumerate(asked.groups):
        images = _found(group.images, known, len(asked.images), f"groups[{number}].images")
        anchors = _found(group.anchors, known, len(asked.images), f"groups[{number}].anchors")
        if strange := set(anchors) - set(images):
            raise Invalid(f"groups[{number}].anchors: picture {min(strange)} is not among the images of the group")
        out.append((images, [images.index(one) for one in anchors]))
    return out


def _digests(images: Sequence[ImageData]) -> dict[str, int]:
    """Position by sha256 of `data`; of equal ones the first."""
    out: dict[str, int] = {}
    for index, image in enumerate(images):
        out.setdefault(hashlib.sha256(image.data).hexdigest(), index)
    return out


def _found(wanted: Sequence[int | str], known: Mapping[str, int], count: int, path: str) -> list[int]:
    out: list[int] = []
    for index, place in enumerate(wanted):
        position = known.get(place) if isinstance(place, str) else place if place < count else None
        if position is None:
            said = "no picture of this sha256 came with the request" if isinstance(place, str) else f"there are {count} pictures"
            raise Invalid(f"{path}[{index}]: {said}")
        if position in out:
            raise Invalid(f"{path}[{index}]: picture {position} is named twice")
        out.append(position)
    return out


class _Group:
    """A group while it is compared."""

    def __init__(self, asked: CompareRequest, group: CompareGroup, images: list[int], anchors: list[int]) -> None:
        self.group, self.images, self.hard = group, images, asked.hard
        self.tournament = Tournament(len(images), asked.plan, anchors, asked.rounds)
        self.verdicts: dict[tuple[int, int], Verdict] = {}

    def question(self, pair: tuple[int, int], pictures: Sequence[Picture]) -> tuple[Pair, Pair] | Problem:
        """Both orders, or why there is nothing to ask."""
        one, other = (pictures[self.images[i]] for i in pair)
        if isinstance(one, Score) or isinstance(other, Score):
            bad, position = (one, pair[0]) if isinstance(one, Score) else (other, pair[1])
            assert isinstance(bad, Score) and bad.error is not None
            return bad.error.model_copy(update={"title": f"picture {self.images[position]}: {bad.error.title}"})
        asked = Pair(one[0].image, self.group.prompt, (other[0].image,))
        return asked, asked.swapped

    def record(self, pair: tuple[int, int], said: tuple[Score, Score] | Problem) -> None:
        """The answers in both orders, or the problem of the pair."""
        forward, backward = (None, None) if isinstance(said, Problem) else (said[0].value, said[1].value)
        error = said if isinstance(said, Problem) else said[0].error or said[1].error
        value = both_orders(forward, backward)
        self.tournament.record(pair, value)
        self.verdicts[pair] = Verdict(
            first=self.images[pair[0]],
            second=self.images[pair[1]],
            value=value,
            orders=(forward, None if backward is None else 1 - backward),
            error=error,
        )

    def answer(self, pictures: Sequence[Picture]) -> GroupAnswer:
        rates = win_rates(self.tournament.p_NN, self.hard)
        asked = Counter(i for pair in self.verdicts for i in pair)
        items = []
        for i, position in enumerate(self.images):
            picture, known = pictures[position], int(rates.known_N[i])
            items.append(
                WinRate(
                    image=position,
                    win_rate=float(rates.rate_N[i]) if known else None,
                    standard_error=float(rates.error_N[i]) if known else None,
                    pairs=known,
                    missing=asked[i] - known,
                    lossy=False if isinstance(picture, Score) else picture[2],
                    error=picture.error if isinstance(picture, Score) else None,
                )
            )
        shown = [(v.orders[0] + 1 - v.orders[1]) / 2 for v in self.verdicts.values() if None not in v.orders]  # type: ignore[operator]
        verdicts = list(self.verdicts.values())
        return GroupAnswer(id=self.group.id, items=items, pairs=verdicts, shown_first=sum(shown) / len(shown) if shown else None)


async def compared(
    asked: CompareRequest,
    places: Sequence[tuple[list[int], list[int]]],
    pictures: Sequence[Picture],
    lane: Lane[Item, Score],
    metrics: Metrics,
    deadline: float | None,
) -> tuple[list[GroupAnswer], RewardInfo]:
    """All groups, all by one version of the weights: when they change in between, what was said before is asked again."""
    while True:
        groups = [_Group(asked, group, *where) for group, where in zip(asked.groups, places, strict=True)]
        info: RewardInfo | None = None
        while waiting := [(group, pair) for group in groups for pair in group.tournament.next()]:
            questions = [group.question(pair, pictures) for group, pair in waiting]
            pairs = [one for both in questions if not isinstance(both, Problem) for one in both]
            told = await lane.ask(pairs, asked.priority, deadline)
            telemetry.record("queue", told.asked, told.begun, reward=asked.reward)
            telemetry.record("forward", told.begun, told.done, reward=asked.reward, items=len(pairs))
            if info is not None and told.work.info.version != info.version:
                break
            info = told.work.info
            metrics.scored(asked.reward, told.answers)
            said = iter(told.answers)
            for (group, pair), both in zip(waiting, questions, strict=True):
                group.record(pair, both if isinstance(both, Problem) else (next(said), next(said)))
        else:
            assert info is not None
            require_version(asked.require_version, info)
            return [group.answer(pictures) for group in groups], info


async def answer(
    asked: CompareRequest,
    kind: str,
    lane: Lane[Item, Score],
    hold: Callable[[], AbstractContextManager[None]],
    in_thread: Callable[..., Awaitable[Any]],
    decode: Callable[..., list[Picture]],
    metrics: Metrics,
    started: float,
) -> bytes:
    """The answer's body. `hold` admits the questions, `decode` is the app's, `in_thread` runs what would keep others waiting."""
    read = time.perf_counter()
    deadline = time.monotonic() + asked.deadline_ms / 1000 if asked.deadline_ms is not None else None
    with hold():
        where = await in_thread(places, asked)
        with telemetry.span("decode", items=len(asked.images)):
            pictures = await in_thread(decode, uploads(asked), {}, False)
        decoded = time.perf_counter()
        groups, info = await compared(asked, where, pictures, lane, metrics, deadline)
    done = time.perf_counter()
    stages = {"read": read - started, "decode": decoded - read, "compare": done - decoded, "total": done - started}
    for stage, seconds in stages.items():
        metrics.stage_seconds.labels(stage).observe(seconds)
    timing_ms = {stage: round(1000 * seconds, 3) for stage, seconds in stages.items()}
    made = CompareAnswer(
        request_id=asked.request_id, rewards={asked.reward: RewardUsed.of(info)}, groups=groups, timing_ms=timing_ms
    )
    return wire.render_answer(made, kind)
