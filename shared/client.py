"""Ask reward services for scores, and say honestly what could not be scored.

>>> client = RewardClientSync({"detector": "http://localhost:8001"})
>>> table = client.score(images, prompts=["a photo of a bag"] * len(images))
>>> table.values_RB, table.mask_RB

Pictures go as raw pixels in msgpack. A failed item is NaN in `values_RB` and False in `mask_RB`; no number is ever invented.
Only answers that say `retryable` are tried again, with full jitter and Retry-After honoured, under one deadline over all tries: of whole
requests, and of single items (an engine that is being started again) without the others.
Several URLs for a reward are replicas: the one with the fewest seconds of work outstanding is asked, and one that fails is left alone
for some seconds. Rewards that live at the same URLs share a request.
"""

import asyncio
import importlib.util
import itertools
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from shared import compare_wire, wire
from shared.errors import ServiceUnreachable, VerismError
from shared.image import MAX_SIDE, encode
from shared.schema import (
    MAX_ITEMS,
    MAX_PAIRS,
    CompareAnswer,
    CompareGroup,
    CompareRequest,
    Encoding,
    GroupAnswer,
    ImageData,
    Plan,
    Problem,
    RewardInfo,
    Score,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
    pairs_of,
)

if importlib.util.find_spec("sniffio") is None:  # httpcore looks for it four times a request; where it is not, that is said at once
    sys.modules.setdefault("sniffio", None)  # type: ignore[arg-type]

T = TypeVar("T")
LIMITS = (MAX_ITEMS, 48 * 2**20, 60_000_000)  # items, bytes and pixels of one request: below what services take
EJECT_SECONDS = 5.0


@dataclass(frozen=True)
class ScoreTable:
    """rewards[r] is row r of values_RB (float64, NaN where missing), mask_RB and scores; `failures` counts by urn."""

    rewards: tuple[str, ...]
    values_RB: NDArray[np.float64]
    mask_RB: NDArray[np.bool_]
    scores: tuple[tuple[Score, ...], ...]
    versions: dict[str, int]
    failures: dict[str, int] = field(default_factory=dict)

    def part(self, reward: str, part: str) -> NDArray[np.float64]:
        """One named part of a reward, (B,), NaN where missing; KeyError names the parts there are."""
        row = self.scores[self.rewards.index(reward)]
        known = {name for score in row for name in score.parts}
        if known and part not in known:
            raise KeyError(f"{reward} has no part {part!r}; known: {', '.join(sorted(known))}")
        return np.array([score.parts.get(part, float("nan")) for score in row], dtype=np.float64)


@dataclass(frozen=True)
class CompareTable:
    """Win rates_B of B pictures and their standard errors_B (float64, NaN where missing), mask_B, and each group as the service said it,
    with places that are positions in B; a group that got no answer is not in `groups`. `failures` counts missing pairs by urn."""

    reward: str
    rates_B: NDArray[np.float64]
    errors_B: NDArray[np.float64]
    mask_B: NDArray[np.bool_]
    groups: dict[str, GroupAnswer]
    version: int | None
    failures: dict[str, int] = field(default_factory=dict)


@dataclass
class _Replica:
    url: str
    endpoints: dict[str, httpx.URL] = field(default_factory=dict)  # by path, of its first request on
    in_flight: int = 0
    seconds: float | None = None  # of one picture, exponentially forgetting
    rest_until: float = 0.0
    bursts: int = 0  # failures since the last answer

    def served(self, count: int, seconds: float) -> None:
        self.seconds = seconds / count if self.seconds is None else 0.8 * self.seconds + 0.2 * seconds / count
        self.bursts = 0

    def failed(self, rest_s: float = 0.0) -> None:
        """Left alone for as long as it asked, or for EJECT_SECONDS, doubled with each further failure."""
        self.rest_until = time.monotonic() + (rest_s or EJECT_SECONDS * 2 ** min(self.bursts, 4))
        self.bursts += 1


class RequestFailed(VerismError):
    """A service refused the whole request; `problem()` is what it said."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.title)
        self._problem = problem

    def problem(self) -> Problem:
        return self._problem


class RewardClient:
    """Async. `services` maps reward names to one URL or a list of replicas."""

    def __init__(
        self,
        services: Mapping[str, str | Sequence[str]],
        *,
        timeout_s: float = 60.0,
        encoding: Encoding = "rgb8",
        priority: str = "train",
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`api_key` (default: the variable VERISM_API_KEY) goes to every URL."""
        if not services:
            raise ValueError("name at least one reward and its URL, e.g. {'detector': 'http://localhost:8001'}")
        pool: dict[str, _Replica] = {}
        self._replicas = {
            name: [
                pool.setdefault(u, _Replica(u)) for u in (url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls))
            ]
            for name, urls in services.items()
        }
        for name, replicas in self._replicas.items():
            if not replicas:
                raise ValueError(f"reward {name!r} has no URL, e.g. 'http://localhost:8001'")
        self.timeout_s, self.encoding, self.priority = timeout_s, encoding, priority
        key = api_key or os.environ.get("VERISM_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._transport = transport or Connections(64)
        self._http = httpx.AsyncClient(transport=self._transport, headers=headers, trust_env=False)
        self._headers = {**headers, "content-type": wire.MSGPACK, "accept": wire.MSGPACK}
        self._timeout = httpx.Timeout(timeout_s, connect=min(5.0, timeout_s)).as_dict()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def info(self) -> dict[str, RewardInfo]:
        """What a service says of each reward; ServiceUnreachable names the URLs when no replica answers."""
        return {name: await self._info(name, [replica.url for replica in replicas]) for name, replicas in self._replicas.items()}

    async def _info(self, name: str, urls: Sequence[str]) -> RewardInfo:
        for url in urls:
            _check_url(name, url)
            try:
                answer = await self._http.get(f"{url}/v1/rewards", timeout=min(10.0, self.timeout_s))
                answer.raise_for_status()
                known = {info["name"]: info for info in answer.json()["rewards"]}
                if name in known:
                    return RewardInfo.model_validate(known[name])
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                continue
            title = f"{url} does not serve {name!r}; it serves: {', '.join(known)}"
            raise RequestFailed(Problem(type="urn:verism:unknown-reward", title=title))
        where = " or ".join(urls)
        raise ServiceUnreachable(
            f"no reward service answers at {where} (for {name!r}): start it with `verism-serve CONFIG.yaml`, or mend the URL"
        )

    async def score(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str | None] | None = None,
        groups: Sequence[str] | None = None,
        rewards: Sequence[str] | None = None,
        require_version: Mapping[str, int] | None = None,
    ) -> ScoreTable:
        """Scores of B pictures (uint8, (H, W, 3)) by each reward. Never raises for a service's failure: the mask tells.

        A reward in `require_version` answers by that version of its weights; where its service has another, nothing that was asked together
        with it has a score, and the failure is `wrong-version`.
        Raw pixels are sent from the arrays themselves, which must not change until the answer is there.
        """
        names = tuple(rewards if rewards is not None else self._replicas)
        unknown = [name for name in names if name not in self._replicas]
        if unknown:
            raise ValueError(f"no URL for reward {unknown[0]!r}; known: {', '.join(self._replicas)}")
        prompts = prompts if prompts is not None else [None] * len(images)
        groups = groups if groups is not None else [""] * len(images)
        items = [
            ScoreItem(id=str(i), group=group or None, prompt=prompt, image=_encoded(image, self.encoding))
            for i, (image, prompt, group) in enumerate(zip(images, prompts, groups, strict=True))
        ]
        chunks = _chunks(items)
        together: dict[tuple[str, ...], list[str]] = {}  # rewards of one service share a request, and its decoding
        for name in names:
            together.setdefault(tuple(replica.url for replica in self._replicas[name]), []).append(name)
        pinned = require_version or {}
        answers = await asyncio.gather(*(self._rows(group, items, chunks, pinned) for group in together.values()))
        by_name = {name: row for rows in answers for name, row in rows.items()}
        rows = [by_name[name] for name in names]
        scores = tuple(tuple(row) for row, _ in rows)
        values = np.array([[np.nan if s.value is None else s.value for s in row] for row in scores], dtype=np.float64)
        failures: dict[str, int] = {}
        for row in scores:
            for score in row:
                if score.error is not None:
                    failures[score.error.type] = failures.get(score.error.type, 0) + 1
        versions = {name: version for name, (_, version) in zip(names, rows, strict=True) if version is not None}
        values = values.reshape(len(names), len(images))
        return ScoreTable(names, values, np.isfinite(values), scores, versions, failures)

    async def compare(
        self,
        images: Sequence[NDArray[np.uint8]],
        groups: Sequence[str],
        prompts: Sequence[str | None] | None = None,
        *,
        reward: str | None = None,
        plan: Plan = "all",
        anchors: Sequence[int] = (),
        rounds: int | None = None,
        hard: bool = False,
    ) -> CompareTable:
        """Win rates of B pictures (uint8, (H, W, 3)) within their groups, each pair asked in both orders. Never raises for a service's
        failure: the mask tells.

        A group has one prompt. `anchors` are positions in `images`, of plan anchor. A group of one picture has no pair, and no win rate.
        Raw pixels are sent from the arrays themselves, each once.
        """
        name = reward if reward is not None else next(iter(self._replicas))
        if name not in self._replicas:
            raise ValueError(f"no URL for reward {name!r}; known: {', '.join(self._replicas)}")
        prompts = prompts if prompts is not None else [None] * len(images)
        members: dict[str, list[int]] = {}
        for i, (_, group, prompt) in enumerate(zip(images, groups, prompts, strict=True)):
            members.setdefault(group, []).append(i)
            if prompts[members[group][0]] != prompt:
                raise ValueError(f"group {group!r} has two prompts: compare pictures of one prompt")
        wanted = {group: rows for group, rows in members.items() if len(rows) > 1}
        costs = {
            group: (
                len(rows),
                sum(images[i].nbytes for i in rows),
                sum(images[i].shape[0] * images[i].shape[1] for i in rows),
                pairs_of(len(rows), plan, len(set(rows) & set(anchors)), rounds),
            )
            for group, rows in wanted.items()
        }
        chunks: list[list[str]] = []
        load: tuple[int, ...] = (*LIMITS, MAX_PAIRS)
        for group, cost in costs.items():
            load = tuple(a + b for a, b in zip(load, cost, strict=True))
            if any(a > b for a, b in zip(load, (*LIMITS, MAX_PAIRS), strict=True)):
                chunks.append([])
                load = cost
            chunks[-1].append(group)
        deadline = time.monotonic() + self.timeout_s
        told = await asyncio.gather(
            *(
                self._tournaments(
                    name, images, {g: (wanted[g], prompts[wanted[g][0]]) for g in chunk}, plan, anchors, rounds, hard, deadline
                )
                for chunk in chunks
            )
        )
        failures: dict[str, int] = {}
        answered: dict[str, GroupAnswer] = {}
        versions = {one.rewards[name].version for one in told if isinstance(one, CompareAnswer)}
        for chunk, one in zip(chunks, told, strict=True):
            if isinstance(one, CompareAnswer) and len(versions) == 1:
                answered |= {group.id: group for group in one.groups}
                problems = [pair.error.type for group in one.groups for pair in group.pairs if pair.error is not None]
            else:
                kind = one.type if isinstance(one, Problem) else "urn:verism:version-changed"
                problems = [kind] * sum(costs[group][3] for group in chunk)
            for kind in problems:
                failures[kind] = failures.get(kind, 0) + 1
        rates, errors = np.full((2, len(images)), np.nan)
        for said in answered.values():
            for row in said.items:
                if row.win_rate is not None and row.standard_error is not None:
                    rates[row.image], errors[row.image] = row.win_rate, row.standard_error
        version = versions.pop() if len(versions) == 1 else None
        return CompareTable(name, rates, errors, np.isfinite(rates), answered, version, failures)

    async def _tournaments(
        self,
        name: str,
        images: Sequence[NDArray[np.uint8]],
        groups: Mapping[str, tuple[Sequence[int], str | None]],
        plan: Plan,
        anchors: Sequence[int],
        rounds: int | None,
        hard: bool,
        deadline: float,
    ) -> CompareAnswer | Problem:
        """One request: some groups, their places those of `images` again when it comes back."""
        rows = [i for members, _ in groups.values() for i in members]
        place = {i: k for k, i in enumerate(rows)}
        asked = CompareRequest.model_construct(
            request_id=uuid.uuid4().hex,
            reward=name,
            priority=self.priority,
            require_version=None,
            plan=plan,
            rounds=rounds,
            hard=hard,
            images=[_encoded(images[i], self.encoding) for i in rows],
            groups=[
                CompareGroup.model_construct(
                    id=group, prompt=prompt, images=[place[i] for i in members], anchors=[place[i] for i in anchors if i in members]
                )
                for group, (members, prompt) in groups.items()
            ],
        )

        async def ask(replica: _Replica, deadline_ms: int) -> CompareAnswer:
            body = compare_wire.pack(asked.model_copy(update={"deadline_ms": deadline_ms}))
            answer = compare_wire.parse_answer(await self._post(replica, "/v1/compare", [body]))
            if [group.id for group in answer.groups] != list(groups):
                raise ValueError("the answer has other groups than the request")
            said = {
                i for g in answer.groups for i in (*(r.image for r in g.items), *(k for p in g.pairs for k in (p.first, p.second)))
            }
            if name not in answer.rewards or not said <= set(range(len(rows))):
                raise ValueError("the answer has other pictures than the request")
            return answer.model_copy(update={"groups": [_placed(group, rows) for group in answer.groups]})

        return await self._tried(self._replicas[name], name, len(rows), deadline, ask)

    async def _rows(
        self, names: list[str], items: list[ScoreItem], chunks: list[list[int]], pinned: Mapping[str, int]
    ) -> dict[str, tuple[list[Score], int | None]]:
        """All items by some rewards of one service; all chunks of a reward by one version of its weights."""
        deadline = time.monotonic() + self.timeout_s
        answers = await asyncio.gather(*(self._chunk(names, [items[i] for i in chunk], deadline, pinned) for chunk in chunks))
        out: dict[str, tuple[list[Score], int | None]] = {}
        for name in names:
            by_position = {
                i: s for chunk, got in zip(chunks, answers, strict=True) for i, s in zip(chunk, got[name][0], strict=True)
            }
            scores = [by_position[i] for i in range(len(items))]
            versions = {got[name][1] for got in answers} - {None}
            if len(versions) > 1:
                mixed = Score.failed("version-changed", f"{name} changed its weights while scoring; score again", retryable=True)
                out[name] = [mixed] * len(scores), None
            else:
                out[name] = scores, versions.pop() if versions else None
        return out

    async def _chunk(
        self, names: list[str], items: list[ScoreItem], deadline: float, pinned: Mapping[str, int]
    ) -> dict[str, tuple[list[Score], int | None]]:
        """One request; items that come back with a retryable error are asked again until the deadline, by the same version of the weights."""
        told = await self._asked(names, items, deadline, pinned)
        if isinstance(told, Problem):
            status = "timeout" if told.type.endswith("deadline-exceeded") else "error"
            return {name: ([Score(status=status, error=told)] * len(items), None) for name in names}  # type: ignore[arg-type]
        open_ = {name: rows for name in names if (rows := [i for i, score in enumerate(told[name][0]) if _again(score)])}
        for attempt in itertools.count():
            pause = random.uniform(0.5, 1.0) * min(4.0, 0.1 * 2 ** min(attempt, 10))
            if not open_ or time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
            rows = sorted({i for several in open_.values() for i in several})
            more = await self._asked(list(open_), [items[i] for i in rows], deadline, pinned)
            if isinstance(more, Problem):
                break
            left: dict[str, list[int]] = {}
            for name, wanted in open_.items():
                scores, version = more[name]
                if version != told[name][1]:  # other weights: what has no score stays without one
                    continue
                for i, score in zip(rows, scores, strict=True):
                    if i in wanted:
                        told[name][0][i] = score
                if still := [i for i in wanted if _again(told[name][0][i])]:
                    left[name] = still
            open_ = left
        return told

    async def _asked(
        self, names: list[str], items: list[ScoreItem], deadline: float, pinned: Mapping[str, int]
    ) -> dict[str, tuple[list[Score], int | None]] | Problem:
        request_id = uuid.uuid4().hex

        async def ask(replica: _Replica, deadline_ms: int) -> dict[str, tuple[list[Score], int | None]]:
            request = ScoreRequest.model_construct(
                request_id=request_id,
                rewards=names,
                priority=self.priority,
                deadline_ms=deadline_ms,
                require_version={name: pinned[name] for name in names if name in pinned} or None,
                items=items,
            )
            answer: ScoreAnswer = wire.parse_answer(await self._post(replica, "/score", wire.pack_chunks(request)), wire.MSGPACK)
            if [item.id for item in answer.items] != [item.id for item in items]:
                raise ValueError("the answer has other items than the request")
            return {name: ([item.scores[name] for item in answer.items], answer.rewards[name].version) for name in names}

        return await self._tried(self._replicas[names[0]], ", ".join(names), len(items), deadline, ask)

    async def _tried(
        self,
        replicas: Sequence[_Replica],
        what: str,
        count: int,
        deadline: float,
        ask: Callable[[_Replica, int], Awaitable[T]],
    ) -> T | Problem:
        """What `ask` (a replica, milliseconds left) of `count` pictures gives, tried again as long as that may help; or the last problem."""
        where = " or ".join(replica.url for replica in replicas)
        late = Problem(
            type="urn:verism:deadline-exceeded",
            title=f"{what} at {where} did not answer within {self.timeout_s:g} s: raise timeout_s, or send less at once",
        )
        problem = late
        for attempt in itertools.count():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            replica, began = self._pick(replicas), time.monotonic()
            replica.in_flight += count
            try:
                _check_url(what, replica.url)
                answer = await asyncio.wait_for(ask(replica, max(1, int(left * 1000))), left)
                replica.served(count, time.monotonic() - began)
                return answer
            except TimeoutError:
                problem = late
                break
            except ServiceUnreachable as error:
                problem = error.problem().model_copy(update={"retryable": False})
                break
            except RequestFailed as error:
                problem = error.problem()
                if not problem.retryable:
                    break
                wait = (problem.retry_after_ms or 0) / 1000
                replica.failed(wait)
            except httpx.HTTPError as error:
                problem = Problem(
                    type="urn:verism:unreachable",
                    title=f"{replica.url} does not answer ({type(error).__name__}): is `verism-serve` running there?",
                    retryable=True,
                )
                wait = 0.0
                replica.failed()
            except (ValueError, KeyError, msgspec.DecodeError) as error:
                problem = Problem(type="urn:verism:bad-answer", title=f"{replica.url} answered something else than scores: {error}")
                break
            finally:
                replica.in_flight -= count
            now = time.monotonic()
            rested = any(other.rest_until <= now for other in replicas)
            pause = random.uniform(0, min(4.0, 0.1 * 2 ** min(attempt, 10))) + (0.0 if rested else wait)
            if now + pause >= deadline:
                break
            await asyncio.sleep(pause)
        return problem

    def _pick(self, replicas: Sequence["_Replica"]) -> "_Replica":
        """The one with the fewest seconds of work outstanding, resting ones last."""
        now = time.monotonic()
        known = [r.seconds for r in replicas if r.seconds is not None]
        usual = sum(known) / len(known) if known else 1.0
        return min(replicas, key=lambda r: (r.rest_until > now, r.in_flight * (r.seconds or usual), random.random()))

    async def _post(self, replica: _Replica, path: str, chunks: Sequence[bytes | memoryview]) -> bytes:
        """Past httpx's client, whose redirects, cookies and merging of headers cost more than a picture, to its transport."""
        body = _Body(chunks)
        url = replica.endpoints.get(path) or replica.endpoints.setdefault(path, httpx.URL(f"{replica.url}{path}"))
        headers = {"host": url.netloc.decode(), **self._headers, "content-length": str(body.size), **_trace()}
        asked = httpx.Request("POST", url, headers=headers, stream=body, extensions={"timeout": self._timeout})
        answer = await self._transport.handle_async_request(asked)
        content = await answer.aread()
        if answer.status_code == 200:
            return content
        raise RequestFailed(_problem(replica.url, answer))


class Connections(httpx.AsyncBaseTransport):
    """At most so many connections at once, each a transport of its own, the last one used first; answers come whole.

    One transport for all would look at every connection for every request: with 32 callers that took longer than the requests. A connection
    whose request failed or was cancelled is closed, for httpcore may take it for busy ever after.
    """

    def __init__(self, most: int) -> None:
        self._free, self._tls = asyncio.Semaphore(most), httpx.create_ssl_context(trust_env=False)
        self._idle: dict[tuple[str, str, int | None], list[httpx.AsyncHTTPTransport]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with self._free:
            idle = self._idle.setdefault((request.url.scheme, request.url.host, request.url.port), [])
            if idle:
                connection = idle.pop()
            else:
                connection = httpx.AsyncHTTPTransport(verify=self._tls, limits=httpx.Limits(max_connections=1), trust_env=False)
            try:
                answer = await connection.handle_async_request(request)
                await answer.aread()
                await answer.aclose()
            except BaseException:
                await connection.aclose()
                raise
            idle.append(connection)
            return answer

    async def aclose(self) -> None:
        while self._idle:
            for connection in self._idle.popitem()[1]:
                await connection.aclose()


def _again(score: Score) -> bool:
    return score.error is not None and score.error.retryable


class _Body(httpx.AsyncByteStream):
    """Chunks as they are; a second reading, of a request that is sent again, begins anew."""

    def __init__(self, chunks: Sequence[bytes | memoryview]) -> None:
        self._chunks, self.size = chunks, sum(map(len, chunks))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk  # type: ignore[misc]  # a memoryview is written as it is


def _encoded(pixels: NDArray[np.uint8], encoding: Encoding) -> ImageData:
    """As shared.image.encode, but raw pixels are the array's own memory wherever it is contiguous."""
    usual = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and 0 not in pixels.shape
    if encoding != "rgb8" or not usual or max(pixels.shape) > MAX_SIDE:
        return encode(pixels, encoding)
    height, width, _ = pixels.shape
    data = np.ascontiguousarray(pixels).data.cast("B")
    return ImageData.model_construct(encoding=encoding, height=height, width=width, data=data)


def _placed(group: GroupAnswer, rows: Sequence[int]) -> GroupAnswer:
    """A group whose places are `rows` instead of positions in the request."""
    items = [item.model_copy(update={"image": rows[item.image]}) for item in group.items]
    pairs = [pair.model_copy(update={"first": rows[pair.first], "second": rows[pair.second]}) for pair in group.pairs]
    return group.model_copy(update={"items": items, "pairs": pairs})


def _trace() -> dict[str, str]:
    """W3C `traceparent` of the span that is current here; nothing unless this process has set OpenTelemetry up."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def _check_url(reward: str, url: str) -> None:
    """ServiceUnreachable for what can never be a service's address, before anything waits for it."""
    try:
        parsed = httpx.URL(url)
        sound = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx.InvalidURL:
        sound = False
    if not sound:
        raise ServiceUnreachable(f"{url!r}, the URL of reward {reward!r}, is not one; write it as http://HOST:PORT")


def _problem(url: str, answer: httpx.Response) -> Problem:
    """What a service, or a proxy before it, said was wrong; Retry-After counts where the body names no time."""
    seconds = answer.headers.get("retry-after", "")
    update: dict[str, Any] = {"status": answer.status_code}
    try:
        said = msgspec.json.decode(answer.content)
        problem = Problem.model_validate({key: said[key] for key in Problem.model_fields if key in said})
    except (ValueError, TypeError, msgspec.DecodeError):
        retryable = answer.status_code >= 500 or answer.status_code == 429
        problem = Problem(type="urn:verism:bad-answer", title=f"{url}: HTTP {answer.status_code}", retryable=retryable)
    if problem.retry_after_ms is None and seconds.isdecimal():
        update["retry_after_ms"] = 1000 * int(seconds)
    return problem.model_copy(update=update)


def _chunks(items: Sequence[ScoreItem]) -> list[list[int]]:
    """Positions of the items of each request: within LIMITS, and a group in one request wherever it fits into one."""
    groups: dict[int | str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(i if item.group is None else item.group, []).append(i)
    costs = [(1, len(item.image.data), item.image.height * item.image.width) for item in items]
    chunks: list[list[int]] = []
    load = LIMITS
    for group in groups.values():
        apart = not _fits(load, [costs[i] for i in group])
        for i in group:
            if apart or not _fits(load, [costs[i]]):
                chunks.append([])
                load, apart = (0, 0, 0), False
            chunks[-1].append(i)
            load = (load[0] + costs[i][0], load[1] + costs[i][1], load[2] + costs[i][2])
    return chunks


def _fits(load: tuple[int, int, int], more: Sequence[tuple[int, int, int]]) -> bool:
    return all(sum(values) <= limit for values, limit in zip(zip(load, *more, strict=True), LIMITS, strict=True))


class RewardClientSync:
    """The same, for callers without an event loop (or inside one): a loop of its own in a thread."""

    def __init__(self, services: Mapping[str, str | Sequence[str]], **options: Any) -> None:
        self._client = RewardClient(services, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(self, *args: Any, **kwargs: Any) -> Future[ScoreTable]:
        """Start scoring and return at once."""
        return asyncio.run_coroutine_threadsafe(self._client.score(*args, **kwargs), self._loop)

    def score(self, *args: Any, **kwargs: Any) -> ScoreTable:
        """As RewardClient.score."""
        return self._run(self._client.score(*args, **kwargs))

    def compare(self, *args: Any, **kwargs: Any) -> CompareTable:
        """As RewardClient.compare."""
        return self._run(self._client.compare(*args, **kwargs))

    def info(self) -> dict[str, RewardInfo]:
        """As RewardClient.info."""
        return self._run(self._client.info())

    def close(self) -> None:
        """End the connections and the thread; a second call does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
