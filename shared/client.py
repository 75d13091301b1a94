"""Ask reward services for scores, and say honestly what could not be scored.

>>> client = RewardClientSync({"detector": "http://localhost:8001"})
>>> table = client.score(images, prompts=["a photo of a bag"] * len(images))
>>> table.values_RB, table.mask_RB

Pictures go as raw pixels in msgpack. A failed item is NaN in `values_RB` and False in `mask_RB`; no number is ever invented.
Only answers that say `retryable` are tried again, with full jitter and Retry-After honoured, under one deadline over all tries.
Several URLs for a reward are replicas: the one with the fewest pictures in flight is asked, and one that fails is left alone for
some seconds.
"""

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from shared import wire
from shared.errors import ServiceUnreachable, VerismError
from shared.image import encode
from shared.schema import MAX_ITEMS, Encoding, Problem, RewardInfo, Score, ScoreAnswer, ScoreItem, ScoreRequest

T = TypeVar("T")
CHUNK_BYTES = 48 * 1024 * 1024
CHUNK_PIXELS = 60_000_000
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


@dataclass
class _Replica:
    url: str
    in_flight: int = 0
    ejected_until: float = 0.0


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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not services:
            raise ValueError("name at least one reward and its URL, e.g. {'detector': 'http://localhost:8001'}")
        self._replicas = {
            name: [_Replica(u.rstrip("/")) for u in ([urls] if isinstance(urls, str) else urls)] for name, urls in services.items()
        }
        self.timeout_s, self.encoding, self.priority = timeout_s, encoding, priority
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=32)
        self._http = httpx.AsyncClient(transport=transport, limits=limits, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def info(self) -> dict[str, RewardInfo]:
        """What each service says of its reward; ServiceUnreachable names the URL that did not answer."""
        out = {}
        for name, replicas in self._replicas.items():
            url = replicas[0].url
            try:
                answer = await self._http.get(f"{url}/v1/rewards", timeout=min(10.0, self.timeout_s))
                answer.raise_for_status()
                known = {info["name"]: info for info in answer.json()["rewards"]}
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                raise ServiceUnreachable(
                    f"no reward service answers at {url} (for {name!r}): start it with `verism-serve CONFIG.yaml`, or mend the URL"
                ) from error
            if name not in known:
                raise RequestFailed(
                    Problem(type="urn:verism:unknown-reward", title=f"{url} does not serve {name!r}; it serves: {', '.join(known)}")
                )
            out[name] = RewardInfo.model_validate(known[name])
        return out

    async def score(
        self,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str | None] | None = None,
        groups: Sequence[str] | None = None,
        rewards: Sequence[str] | None = None,
    ) -> ScoreTable:
        """Scores of B pictures (uint8, (H, W, 3)) by each reward. Never raises for a service's failure: the mask tells."""
        names = tuple(rewards if rewards is not None else self._replicas)
        unknown = [name for name in names if name not in self._replicas]
        if unknown:
            raise ValueError(f"no URL for reward {unknown[0]!r}; known: {', '.join(self._replicas)}")
        prompts = prompts if prompts is not None else [None] * len(images)
        groups = groups if groups is not None else [""] * len(images)
        items = [
            ScoreItem(id=str(i), group=group or None, prompt=prompt, image=encode(image, self.encoding))
            for i, (image, prompt, group) in enumerate(zip(images, prompts, groups, strict=True))
        ]
        chunks = _chunks(items)
        rows = await asyncio.gather(*(self._row(name, chunks) for name in names))
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

    async def _row(self, name: str, chunks: list[list[ScoreItem]]) -> tuple[list[Score], int | None]:
        """All items by one reward; every chunk by one version of its weights."""
        deadline = time.monotonic() + self.timeout_s
        answers = await asyncio.gather(*(self._chunk(name, chunk, deadline) for chunk in chunks))
        scores = [score for row, _ in answers for score in row]
        versions = {version for _, version in answers if version is not None}
        if len(versions) > 1:
            mixed = Score.failed("version-changed", f"{name} changed its weights while scoring; score again", retryable=True)
            return [mixed] * len(scores), None
        return scores, versions.pop() if versions else None

    async def _chunk(self, name: str, items: list[ScoreItem], deadline: float) -> tuple[list[Score], int | None]:
        problem = Problem(type="urn:verism:deadline-exceeded", title=f"{name} did not answer within {self.timeout_s:g} s")
        request_id = uuid.uuid4().hex
        for attempt in range(100):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            replica = self._pick(name)
            request = ScoreRequest.model_construct(
                request_id=request_id,
                rewards=[name],
                priority=self.priority,
                deadline_ms=max(1, int(left * 1000)),
                require_version=None,
                items=items,
            )
            replica.in_flight += len(items)
            try:
                answer = await asyncio.wait_for(self._post(replica, request), left)
                scores = [item.scores[name] for item in answer.items]
                if [item.id for item in answer.items] != [item.id for item in items]:
                    raise ValueError("the answer has other items than the request")
                return scores, answer.rewards[name].version
            except TimeoutError:
                break
            except RequestFailed as error:
                problem = error.problem()
                if not problem.retryable:
                    break
                wait = (problem.retry_after_ms or 0) / 1000
                if problem.status != 429:
                    replica.ejected_until = time.monotonic() + EJECT_SECONDS
            except httpx.HTTPError as error:
                problem = Problem(
                    type="urn:verism:unreachable",
                    title=f"{replica.url} does not answer ({type(error).__name__}): is `verism-serve` running there?",
                    retryable=True,
                )
                wait = 0.0
                replica.ejected_until = time.monotonic() + EJECT_SECONDS
            except (ValueError, KeyError, msgspec.DecodeError) as error:
                problem = Problem(type="urn:verism:bad-answer", title=f"{replica.url} answered something else than scores: {error}")
                break
            finally:
                replica.in_flight -= len(items)
            pause = max(wait, random.uniform(0, min(4.0, 0.1 * 2**attempt)))
            await asyncio.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        status = "timeout" if problem.type.endswith("deadline-exceeded") else "error"
        return [Score(status=status, error=problem)] * len(items), None  # type: ignore[arg-type]

    def _pick(self, name: str) -> _Replica:
        now = time.monotonic()
        return min(self._replicas[name], key=lambda r: (r.ejected_until > now, r.in_flight, random.random()))

    async def _post(self, replica: _Replica, request: ScoreRequest) -> ScoreAnswer:
        answer = await self._http.post(
            f"{replica.url}/score",
            content=wire.pack_request(request),
            headers={"content-type": wire.MSGPACK, "accept": wire.MSGPACK},
            timeout=httpx.Timeout(self.timeout_s, connect=min(5.0, self.timeout_s)),
        )
        if answer.status_code == 200:
            return wire.parse_answer(answer.content, wire.MSGPACK)
        try:
            problem = Problem.model_validate(msgspec.json.decode(answer.content))
        except (ValueError, msgspec.DecodeError):
            retryable = answer.status_code >= 500
            problem = Problem(type="urn:verism:bad-answer", title=f"{replica.url}: HTTP {answer.status_code}", retryable=retryable)
        raise RequestFailed(problem.model_copy(update={"status": answer.status_code}))


def _chunks(items: list[ScoreItem]) -> list[list[ScoreItem]]:
    """Cut a long list to the server's limits, between groups wherever a group fits into one request."""
    groups: list[list[ScoreItem]] = []
    for item in items:
        if groups and item.group is not None and groups[-1][0].group == item.group and len(groups[-1]) < MAX_ITEMS:
            groups[-1].append(item)
        else:
            groups.append([item])
    chunks: list[list[ScoreItem]] = []
    size = pixels = 0
    for group in groups:
        more = sum(len(item.image.data) for item in group)
        area = sum(item.image.height * item.image.width for item in group)
        fits = chunks and len(chunks[-1]) + len(group) <= MAX_ITEMS and size + more <= CHUNK_BYTES and pixels + area <= CHUNK_PIXELS
        if fits:
            chunks[-1] += group
            size, pixels = size + more, pixels + area
        else:
            chunks.append(list(group))
            size, pixels = more, area
    return chunks


class RewardClientSync:
    """The same, for callers without an event loop (or inside one): a loop of its own in a thread."""

    def __init__(self, services: Mapping[str, str | Sequence[str]], **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

        async def make() -> RewardClient:
            return RewardClient(services, **options)

        self._client = self._run(make())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(self, *args: Any, **kwargs: Any) -> "asyncio.Future[ScoreTable] | Any":
        """Start scoring and return at once: a concurrent.futures.Future of the ScoreTable."""
        return asyncio.run_coroutine_threadsafe(self._client.score(*args, **kwargs), self._loop)

    def score(self, *args: Any, **kwargs: Any) -> ScoreTable:
        """As RewardClient.score."""
        return self._run(self._client.score(*args, **kwargs))

    def info(self) -> dict[str, RewardInfo]:
        """As RewardClient.info."""
        return self._run(self._client.info())

    def close(self) -> None:
        self._run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
