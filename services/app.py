"""The same app for every reward: bytes in, scores or clear errors out.

A request goes down and back once: wire -> admission -> decode pool -> cache -> lanes -> answers in order -> wire. Rewards never see
HTTP; this file never sees torch.
"""

import asyncio
import contextlib
import functools
import importlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services import compare_http, logs, page, telemetry
from services import rewriter as rewriting
from services.auth import Keys, scope_of
from services.cache import Cache, key_of, pixels_digest
from services.config import RewardConfig, ServiceConfig
from services.http import PROBLEM, REQUEST_BODY, Buffers, Door, not_a_page, parse, read_body, while_asked
from services.metrics import Metrics
from services.registry import resolve
from services.reward import Item, require_version
from services.scheduler import Admission, Answered, Lane
from services.worker import best_threads, pick_device, warm_up
from shared import compare_wire, wire
from shared.errors import BadImage, DeadlineExceeded, NotReady, UnknownReward, VerismError
from shared.image import decode
from shared.schema import (
    MAX_ITEMS,
    MAX_PAIRS,
    CompareAnswer,
    CompareRequest,
    ItemAnswer,
    Problem,
    RewardInfo,
    RewardUsed,
    Score,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
)

log = logging.getLogger("verism.service")
READY_SECONDS = 5.0
HASH_AT_ONCE = 1 << 20  # bytes that are hashed in less time than a thread takes to be asked


@dataclass
class Served:
    """One reward: what it was configured as, and its lane (a composition has none)."""

    options: RewardConfig
    composition: Any = None
    lane: Lane[Item, Score] | None = None
    cache: Cache | None = None
    room: Any = None  # services.fitting.room.Room, of one that is refitted while it serves

    @property
    def reward(self) -> Any:
        return self.composition if self.lane is None else self.lane.work.reward  # type: ignore[attr-defined]

    @property
    def info(self) -> RewardInfo:
        info: RewardInfo = self.composition.info if self.lane is None else self.lane.work.info  # type: ignore[attr-defined]
        return info

    @property
    def parts(self) -> tuple[str, ...]:
        return () if self.composition is None else tuple(self.composition.parts)


@dataclass(eq=False)
class _Flight:
    """A request that is being answered, and how many wait for it. `key` is its kind and id."""

    key: tuple[str, str]
    body: memoryview
    task: "asyncio.Task[bytes]"
    waiters: int = 0


@dataclass
class State:
    """What the routes share."""

    config: ServiceConfig
    metrics: Metrics
    device: str
    rewards: dict[str, Served] = field(default_factory=dict)
    rewriter: rewriting.Rewriter | None = None
    draining: bool = False
    ready_at: float = float("-inf")
    ready_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    flights: dict[tuple[str, str], list[_Flight]] = field(default_factory=dict)

    @property
    def lanes(self) -> list[Lane[Item, Score]]:
        return [one.lane for one in self.rewards.values() if one.lane is not None]

    @property
    def all_lanes(self) -> list[Lane[Any, Any]]:
        """Those of rewards, and the rewriter's."""
        return [*self.lanes, *([] if self.rewriter is None else [self.rewriter.lane])]

    async def drain(self) -> None:
        """Readiness off, accepted work finishes."""
        self.draining = True
        await asyncio.gather(*(one.room.close() for one in self.rewards.values() if one.room is not None))
        await asyncio.gather(*(lane.drain(self.config.drain_s) for lane in self.all_lanes))


def load_reward(name: str, options: Mapping[str, Any], use: str, device: str) -> Any:
    """ValueError says which reward cannot be loaded, and why."""
    try:
        return resolve(use).load(name, options, device)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error


def load_fitted(name: str, options: RewardConfig, metrics: Metrics, device: str) -> tuple[Any, Any]:
    """A reward, and, where it is refitted, its room: the reward then is the version that was served last."""
    if options.fit is None:
        return load_reward(name, options.options(), options.use, device), None
    rooms = importlib.import_module("services.fitting.room")  # and with it torch, which other rewards may do without
    rooms.check(name, options.use, resolve(options.use), options.fit)
    reward = load_reward(name, options.options(), options.use, device)
    room = rooms.Room(name, reward, options.use, options.fit, device, metrics)
    return room.reward, room


def load_rewards(config: ServiceConfig, metrics: Metrics, device: str, tuned: bool) -> dict[str, Served]:
    """Build every reward; `tuned`: warm it up, and find its largest batch and its threads."""
    served: dict[str, Served] = {}
    for name, options in config.rewards.items():
        reward, room = load_fitted(name, options, metrics, device)
        if hasattr(reward, "compose"):
            served[name] = Served(options, composition=reward)
        else:
            served[name] = Served(
                options,
                lane=_lane(name, reward, options, metrics, device, tuned),
                cache=Cache(options.cache_items if getattr(reward, "repeatable", True) else 0),
                room=room,
            )
        metrics.version.labels(name).set(reward.info.version)
    if tuned and device == "cpu" and config.threads is None:
        lanes = [one.lane for one in served.values() if one.lane is not None]
        slowest = max(lanes, key=lambda lane: lane.time.seconds(8), default=None)
        if slowest is not None:
            log.info("%d threads for a forward pass", best_threads(slowest.work))  # type: ignore[arg-type]
    for name, one in served.items():
        missing = [p for p in one.parts if p not in served or served[p].lane is None]
        if missing:
            raise ValueError(f"reward {name!r} is made of {missing[0]!r}, which is not a plain reward of this service")
    return served


def _lane(name: str, reward: Any, options: RewardConfig, metrics: Metrics, device: str, tuned: bool) -> Lane[Item, Score]:
    work = compare_http.work_of(reward)
    cap, seen = options.batch_cap or options.batch_most, list[tuple[int, float]]()
    if tuned and options.batch_cap is None:
        cap, seen = warm_up(work, options.batch_most, device)
        log.info("%s: batches of up to %d (%s)", name, cap, ", ".join(f"{n}: {1000 * s:.0f} ms" for n, s in seen))
    lane: Lane[Item, Score] = Lane(
        name, work, cap=cap, bucket=lambda item: (type(item), item.image.shape), observe=functools.partial(metrics.ran, name)
    )
    for n, seconds in seen:
        lane.time.observe(n, seconds)
    metrics.watch(lane)
    return lane


def _keep_memory() -> None:
    """glibc gives every block of a megabyte back to the kernel, and takes fresh pages for the next, until one as large as this was
    freed once. Elsewhere it does nothing."""
    bytearray((32 << 20) - (1 << 16))


class _Swapped(Exception):
    """The weights changed while a request was on its way: ask once more, with one version."""


def create_app(config: ServiceConfig, *, tuned: bool = True) -> FastAPI:
    """Load the rewards and build the app; raises ValueError when a reward cannot be loaded. Not `tuned` for a few pictures, scored once."""
    telemetry.configure()
    _keep_memory()
    keys, metrics, device = Keys(config.keys), Metrics(), pick_device(config.device)
    state = State(config, metrics, device, load_rewards(config, metrics, device, tuned))
    if config.rewriter is not None:
        state.rewriter = rewriting.Rewriter(config.rewriter, metrics, device)
    for one in state.rewards.values():
        if one.room is not None:
            one.room.attach(one.lane, lambda: state.all_lanes)
    pool = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
    buffers = Buffers(4 * config.max_body_bytes)
    admission = Admission(
        config.max_waiting_items,
        config.max_waiting_bytes,
        lambda n: max((lane.time.seconds(n, lane.cap) for lane in state.lanes), default=0.1),
    )
    metrics.inflight.set_function(lambda: admission.items)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await state.drain()
        await asyncio.to_thread(telemetry.flush)
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Verism reward service",
        version="0.1.0",
        description="Realism and other rewards for pictures. `curl -F image=@photo.jpg http://localhost:8000/score`",
        lifespan=lifespan,
        docs_url=None,  # services.page serves /docs, without the internet
        redoc_url=None,
        exception_handlers={HTTPException: not_a_page},
    )
    app.add_middleware(Door, metrics=metrics, keys=keys)
    app.state.verism = state

    def wanted(request: ScoreRequest) -> list[str]:
        names = request.rewards or config.default or _first_composition(state.rewards)
        if not names:
            raise UnknownReward("this service serves no rewards, only POST /rewrite; name `rewards` in its configuration")
        for name in names:
            if name not in state.rewards:
                raise UnknownReward(f"unknown reward {name!r}; this service has: {', '.join(state.rewards)}")
        for name, version in (request.require_version or {}).items():
            if name not in state.rewards:
                raise UnknownReward(f"unknown reward {name!r} in require_version; this service has: {', '.join(state.rewards)}")
            require_version(version, state.rewards[name].info)
        return list(dict.fromkeys(names))

    def decode_items(
        items: Sequence[ScoreItem], broken: Mapping[int, Problem], hashed: bool
    ) -> list[tuple[Item, bytes, bool] | Score]:
        """Every item decoded, with the hash of its pixels where it is asked for and whether it was lossy, or its error. The request's
        pixel budget is checked before anything is decoded."""
        out: list[tuple[Item, bytes, bool] | Score] = []
        budget = config.max_request_pixels
        for index, item in enumerate(items):
            if index in broken:
                out.append(Score(status="error", error=broken[index]))
                continue
            began, images = time.perf_counter(), (item.image, *item.references)
            try:
                if any(image.height * image.width > config.max_pixels for image in images):
                    raise BadImage("the picture is larger than this service allows", "image-too-large", limit=config.max_pixels)
                budget -= sum(image.height * image.width for image in images)
                if budget < 0:
                    raise BadImage(
                        f"the request's pictures add up to more than {config.max_request_pixels / 1e6:.0f} megapixels: split it",
                        "image-too-large",
                        limit=config.max_request_pixels,
                    )
                image = decode(item.image)
                references = tuple(decode(reference).pixels for reference in item.references)
                ready = Item(np.ascontiguousarray(image.pixels), item.prompt, references, item.meta)
                out.append((ready, pixels_digest(ready) if hashed else b"", image.lossy))
            except VerismError as error:
                out.append(Score(status="error", error=error.problem()))
            metrics.decode_seconds.labels(item.image.encoding).observe(time.perf_counter() - began)
        return out

    async def decoded_items(parsed: wire.Parsed) -> list[tuple[Item, bytes, bool] | Score]:
        """In a thread, but for raw pixels that need no hash: those are there as soon as the body is."""
        asked = parsed.request
        hashed, raw = config.caches and _repeats(asked), all(_is_raw(item) for item in asked.items)
        if raw and (not hashed or sum(len(item.image.data) for item in asked.items) <= HASH_AT_ONCE):
            return decode_items(asked.items, parsed.broken, hashed)
        return await asyncio.get_running_loop().run_in_executor(pool, decode_items, asked.items, parsed.broken, hashed)

    async def score_one(
        name: str, asked: ScoreRequest, items: Sequence[tuple[Item, bytes, bool] | Score], deadline: float | None
    ) -> tuple[list[Score], RewardInfo, Answered[Score] | None]:
        """One reward's scores in order, the version that made all of them, and the lane's answer where it was asked."""
        served = state.rewards[name]
        lane, cache = served.lane, served.cache
        assert lane is not None and cache is not None
        good = [one for one in items if not isinstance(one, Score)]
        told: Answered[Score] | None = None

        async def ask(indices: Sequence[int]) -> Sequence[Score]:
            nonlocal told
            told = await lane.ask([good[i][0] for i in indices], asked.priority, deadline)
            telemetry.record("queue", told.asked, told.begun, reward=name)
            telemetry.record("forward", told.begun, told.done, reward=name, items=len(indices))
            if (told.work.info.version, told.work.info.weights_sha256) != (info.version, info.weights_sha256):
                raise _Swapped  # after a rollback another version may have the same number
            return told.answers

        while True:
            info = served.info
            require_version((asked.require_version or {}).get(info.name), info)
            cached = cache.size and _repeats(asked) and all(not item.meta for item, _, _ in good)
            try:
                if cached:
                    scores = iter(await cache.through([key_of(info, item, pixels) for item, pixels, _ in good], ask))
                else:
                    scores = iter(await ask(range(len(good))))
                break
            except _Swapped:
                continue
        return [one if isinstance(one, Score) else next(scores) for one in items], info, told

    async def answer(parsed: wire.Parsed, names: list[str], kind: str, size: int, started: float) -> bytes:
        asked, read = parsed.request, time.perf_counter()
        deadline = time.monotonic() + asked.deadline_ms / 1000 if asked.deadline_ms is not None else None
        with admission.hold(len(asked.items), size):
            with telemetry.span("decode", items=len(asked.items)):
                items = await decoded_items(parsed)
            decoded = time.perf_counter()
            plain = list(dict.fromkeys(p for n in names for p in (state.rewards[n].parts or (n,))))
            rows = await _all([score_one(name, asked, items, deadline) for name in plain])
        by_name = {name: scores for name, (scores, _, _) in zip(plain, rows, strict=True)}
        used = {name: RewardUsed.of(info) for name, (_, info, _) in zip(plain, rows, strict=True)}
        for name in names:
            composition = state.rewards[name].composition
            if composition is not None:
                used[name] = RewardUsed.of(composition.info)
                by_name[name] = [composition.compose({p: by_name[p][i] for p in composition.parts}) for i in range(len(items))]
            metrics.scored(name, by_name[name])
        done = time.perf_counter()
        told = [told for _, _, told in rows if told is not None]
        stages = {
            "read": read - started,
            "decode": decoded - read,
            "queue": max((one.begun - one.asked for one in told), default=0.0),
            "forward": max((one.done - one.begun for one in told), default=0.0),
            "total": done - started,
        }
        for stage, seconds in stages.items():
            metrics.stage_seconds.labels(stage).observe(seconds)
        return wire.render_answer(
            ScoreAnswer.model_construct(
                request_id=asked.request_id,
                rewards={n: used[n] for n in dict.fromkeys([*names, *plain])},
                items=[
                    ItemAnswer.model_construct(
                        id=item.id,
                        scores={n: by_name[n][i] for n in names},
                        lossy=False if isinstance(one := items[i], Score) else one[2],
                    )
                    for i, item in enumerate(asked.items)
                ],
                timing_ms={stage: round(seconds * 1000, 3) for stage, seconds in stages.items()},
            ),
            kind,
        )

    def land(flight: _Flight) -> None:
        same_id = state.flights.get(flight.key, [])
        if flight in same_id:
            same_id.remove(flight)
        if not same_id:
            state.flights.pop(flight.key, None)
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # nobody may be left to hear of it

    def board(key: tuple[str, str], body: memoryview, work: Callable[[], Coroutine[Any, Any, bytes]]) -> _Flight:
        """What answers this request: `work`, or that of the same request (same id, same body) that is being answered."""
        same_id = state.flights.setdefault(key, [])
        for flight in same_id:
            if np.array_equal(flight.body, body):
                metrics.joined.inc()
                return flight
        flight = _Flight(key, body, asyncio.ensure_future(work()))
        same_id.append(flight)
        flight.task.add_done_callback(lambda _: land(flight))
        return flight

    async def ride(request: Request, flight: _Flight) -> bytes:
        """The answer. Whoever is the last to leave ends the work."""
        flight.waiters += 1
        try:
            return await while_asked(request, flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.task.done():
                land(flight)  # nobody may join what is being cancelled
                flight.task.cancel()
            del flight  # as in while_asked

    async def received(request: Request) -> memoryview:
        if state.draining:
            raise NotReady("this service is shutting down; ask another replica")
        admission.check(1, int(size) if (size := request.headers.get("content-length", "")).isdecimal() else 0)
        body = await read_body(request, config.max_body_bytes, config.body_timeout_s, buffers)
        metrics.bytes_in.inc(len(body))
        return body

    @app.post(
        "/score",
        response_model=ScoreAnswer,
        openapi_extra={"requestBody": REQUEST_BODY},
        responses=_PROBLEM_ANSWERS,
        summary="Score pictures",
    )
    @app.post("/v1/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        started = time.perf_counter()
        body = await received(request)
        parsed, kind = await parse(request.headers, body)
        names = wanted(parsed.request)
        logs.note(request, request_id=parsed.request.request_id, items=len(parsed.request.items), rewards=names)
        work = functools.partial(answer, parsed, names, kind, len(body), started)
        content = await ride(request, board((kind, parsed.request.request_id), body, work))
        return Response(content, media_type=wire.MSGPACK if kind == wire.MSGPACK else wire.JSON)

    @app.post(
        "/v1/compare",
        response_model=CompareAnswer,
        openapi_extra={"requestBody": compare_http.REQUEST_BODY},
        responses=_PROBLEM_ANSWERS,
        summary="Compare pictures in pairs",
    )
    async def compare(request: Request) -> Response:
        started = time.perf_counter()
        body = await received(request)
        asked, kind = compare_wire.parse(request.headers.get("content-type"), body)
        lane = compare_http.lane_of(asked, state.rewards)
        logs.note(request, request_id=asked.request_id, items=len(asked.images), rewards=[asked.reward])
        in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, pool)
        hold = functools.partial(admission.hold, 2 * asked.pairs, len(body))
        work = functools.partial(compare_http.answer, asked, kind, lane, hold, in_thread, decode_items)
        flight = board((f"compare {kind}", asked.request_id), body, functools.partial(work, metrics, started))
        return Response(await ride(request, flight), media_type=kind)

    @app.get("/v1/rewards", summary="What is served")
    async def rewards() -> dict[str, Any]:
        return {
            "rewards": [served.info.model_dump(mode="json") for served in state.rewards.values()],
            "default": config.default or _first_composition(state.rewards),
            "limits": {
                "body_bytes": config.max_body_bytes,
                "items": MAX_ITEMS,
                "pairs": MAX_PAIRS,
                "pixels": config.max_pixels,
                "request_pixels": config.max_request_pixels,
            },
        }

    @app.get("/livez", summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Every reward has just scored a picture, and the rewriter has drawn a token")
    async def readyz() -> dict[str, str]:
        if state.draining:
            raise NotReady("this service is shutting down")
        async with state.ready_lock:
            if time.monotonic() - state.ready_at > READY_SECONDS or any(
                lane.lost or not getattr(lane.work, "ready", True) for lane in state.all_lanes
            ):
                probe = Item(np.full((64, 64, 3), 127, np.uint8), 'a photo of a sign that says "a"')
                for lane in state.lanes:
                    if not getattr(lane.work, "ready", True):
                        raise NotReady(f"{lane.name} waits for its engine; ask again in a minute")
                    try:
                        result = (await lane.ask([probe], "interactive", time.monotonic() + 60)).answers[0]
                    except DeadlineExceeded:
                        raise NotReady(f"{lane.name} did not score a picture within 60 s") from None
                    if result.error is not None and result.error.type.endswith(("scoring-failed", "out-of-memory")):
                        raise NotReady(f"{lane.name} cannot score: {result.error.title}")
                if state.rewriter is not None:
                    await state.rewriter.probe()
                state.ready_at = time.monotonic()
        return {"status": "ready"}

    @app.get("/metrics", summary="Prometheus", response_class=Response)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if state.rewriter is not None:
        app.include_router(rewriting.router(state, state.rewriter))
    app.include_router(page.router(state))
    app.openapi = functools.partial(_openapi, app, bool(keys))  # type: ignore[method-assign]
    return app


async def _all(coroutines: Sequence[Any]) -> list[Any]:
    """gather, but nothing goes on behind the back of a request that failed."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _repeats(asked: ScoreRequest) -> bool:
    """Whether its pictures may come again. Those of a training step never do: to look for them in the cache is work for nothing."""
    return asked.priority != "train"


def _is_raw(item: ScoreItem) -> bool:
    return item.image.encoding == "rgb8" and not item.references


def _first_composition(rewards: Mapping[str, Served]) -> list[str]:
    """Everything, compositions such as realism first."""
    return sorted(rewards, key=lambda name: not rewards[name].parts)


KEY_SCHEMES = {  # services/auth.py takes either
    "bearer": {"type": "http", "scheme": "bearer", "description": "a key of this service"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "the same, for who cannot send the other"},
}

_PROBLEMS: dict[int | str, str] = {
    400: "The body cannot be read",
    401: "No key, or an unknown one",
    403: "The key's scopes do not cover this",
    404: "Unknown reward",
    409: "Another version of the weights",
    413: "Body too large",
    415: "Not JSON, multipart or msgpack",
    422: "Not what the schema asks for",
    429: "Queue full; see Retry-After",
    503: "Starting or shutting down",
    504: "Deadline exceeded",
}
_PROBLEM_ANSWERS: dict[int | str, dict[str, Any]] = {
    c: {"content": {PROBLEM: {"schema": Problem.model_json_schema()}}, "description": d} for c, d in _PROBLEMS.items()
}


def _openapi(app: FastAPI, guarded: bool) -> dict[str, Any]:
    """FastAPI's document with the request's own schema beside the answer's, and, where the service has keys, how to send one."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        request = ScoreRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = request.pop("$defs")
        request["required"], parts["ScoreItem"]["required"] = ["items"], ["image"]  # the ids are made up where they are missing
        compare = CompareRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= compare.pop("$defs")
        compare["required"].remove("request_id")
        parts["CompareGroup"]["required"].remove("id")
        document["components"]["schemas"].update({**parts, "ScoreRequest": request, "CompareRequest": compare})
        if guarded:
            document["components"]["securitySchemes"] = KEY_SCHEMES
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    if scope_of(method.upper(), path) is not None:
                        operation["security"] = [{name: []} for name in KEY_SCHEMES]
        app.openapi_schema = document
    return app.openapi_schema
