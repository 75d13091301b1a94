"""The same app for every reward: bytes in, scores or clear errors out.

A request goes down and back once: wire -> admission -> decode pool -> lanes -> answers in order -> wire. Rewards never see HTTP;
this file never sees torch.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from services import logs, page, telemetry
from services.config import ServiceConfig
from services.registry import resolve
from services.reward import Item, Reward
from services.scheduler import Admission, Batch, Lane
from services.worker import pick_device, score_batch
from shared import wire
from shared.errors import (
    BadImage,
    BadRequest,
    DeadlineExceeded,
    NotReady,
    TooLarge,
    UnknownReward,
    VerismError,
    WrongVersion,
)
from shared.image import decode
from shared.schema import MAX_ITEMS, ItemAnswer, Problem, RewardInfo, RewardUsed, Score, ScoreAnswer, ScoreItem, ScoreRequest

log = logging.getLogger("verism.service")
PROBLEM = "application/problem+json"
READY_SECONDS = 5.0


class Metrics:
    """What /metrics shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        p, r = "verism_", self.registry
        buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.requests = Counter(p + "requests", "requests by route and status", ["route", "code"], registry=r)
        self.request_seconds = Histogram(p + "request_seconds", "whole requests", ["route"], buckets=buckets, registry=r)
        self.stage_seconds = Histogram(p + "stage_seconds", "stages of a request", ["stage"], buckets=buckets, registry=r)
        self.items = Counter(p + "items", "items by reward and outcome", ["reward", "outcome"], registry=r)
        self.rejected = Counter(p + "rejected", "requests refused, by reason", ["reason"], registry=r)
        self.queue = Gauge(p + "queue_images", "pictures waiting", ["reward"], registry=r)
        self.inflight = Gauge(p + "inflight_images", "pictures admitted and not answered", registry=r)
        self.batch_images = Histogram(p + "batch_images", "pictures per forward pass", ["reward"], buckets=sizes, registry=r)
        self.batch_seconds = Histogram(p + "batch_seconds", "forward passes", ["reward"], buckets=buckets, registry=r)
        self.bytes_in = Counter(p + "bytes_in", "bytes of request bodies", registry=r)
        self.bisected = Counter(p + "bisect", "batches split to find a failing item", ["reward"], registry=r)
        self.version = Gauge(p + "weights_version", "version of the weights", ["reward"], registry=r)
        self.score = Histogram(p + "score", "scores, for drift", ["reward"], buckets=[i / 20 for i in range(-20, 21)], registry=r)


@dataclass
class Served:
    """One reward: its object, and its lane (a composition has none)."""

    reward: Any
    lane: Lane[Item, Score] | None
    parts: tuple[str, ...] = ()

    @property
    def info(self) -> RewardInfo:
        info: RewardInfo = self.reward.info
        return info


@dataclass
class State:
    """What the routes share."""

    config: ServiceConfig
    metrics: Metrics
    rewards: dict[str, Served] = field(default_factory=dict)
    draining: bool = False
    ready_at: float = float("-inf")
    ready_lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def load_rewards(config: ServiceConfig, metrics: Metrics, device: str) -> dict[str, Served]:
    """Build every reward; ValueError or FileNotFoundError says which one failed and why."""
    served: dict[str, Served] = {}
    for name, options in config.rewards.items():
        try:
            reward = resolve(options.use).load(name, options.options(), device)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        if hasattr(reward, "compose"):
            served[name] = Served(reward, None, tuple(reward.parts))
        else:
            served[name] = Served(reward, _lane(name, reward, options.batch_cap, metrics))
        metrics.version.labels(name).set(reward.info.version)
    for name, one in served.items():
        missing = [p for p in one.parts if p not in served or served[p].lane is None]
        if missing:
            raise ValueError(f"reward {name!r} is made of {missing[0]!r}, which is not a plain reward of this service")
    return served


def _lane(name: str, reward: Reward, cap: int, metrics: Metrics) -> Lane[Item, Score]:
    def work(items: list[Item]) -> list[Score]:
        splits: list[int] = []
        scores = score_batch(reward, items, splits)
        metrics.bisected.labels(name).inc(len(splits))
        return scores

    def observe(batch: Batch) -> None:
        metrics.batch_images.labels(name).observe(batch.size)
        metrics.batch_seconds.labels(name).observe(batch.seconds)

    lane = Lane(name, work, cap=cap, observe=observe)
    metrics.queue.labels(name).set_function(lambda: lane.waiting)
    return lane


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body, never more than `limit` bytes in memory, never later than `timeout_s`."""
    too_large = f"the body is larger than {limit / 2**20:.0f} MiB: send fewer or smaller pictures"
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(too_large, limit=limit, observed=int(declared))
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("compressed bodies are not read: pictures are compressed already")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise TooLarge(too_large, limit=limit, observed=size)
                chunks.append(chunk)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(chunks)


async def parse(headers: Headers, body: bytes) -> tuple[wire.Parsed, str]:
    """The request and the media type that it came in."""
    kind = wire.media_type(headers.get("content-type"))
    if kind == wire.JSON:
        return wire.parse_json(body), kind
    if kind == wire.MSGPACK:
        return wire.parse_msgpack(body), kind

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = MultiPartParser(headers, once(), max_files=MAX_ITEMS, max_fields=MAX_ITEMS + 16, max_part_size=64 * 1024)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise BadRequest("the form cannot be read; send it as `curl -F image=@picture.png URL/score` does") from error
    parts = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(form.close)
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                parts.append(wire.Part(name, value.filename, await value.read()))
            else:
                parts.append(wire.Part(name, None, value.encode()))
    return wire.parse_form(parts), kind


def create_app(config: ServiceConfig) -> FastAPI:
    """Load the rewards and build the app; raises ValueError when a reward cannot be loaded."""
    telemetry.configure()
    state = State(config, Metrics())
    state.rewards = load_rewards(config, state.metrics, pick_device(config.device))
    pool = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
    lanes = [served.lane for served in state.rewards.values() if served.lane is not None]
    admission = Admission(
        config.max_waiting_items, config.max_waiting_bytes, lambda n: max((lane.time.seconds(n) for lane in lanes), default=0.1)
    )
    state.metrics.inflight.set_function(lambda: admission.items)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.draining = True
        await asyncio.gather(*(lane.drain(config.drain_s) for lane in lanes))
        await asyncio.to_thread(telemetry.flush)
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Verism reward service",
        version="0.1.0",
        description="Realism and other rewards for pictures. `curl -F image=@photo.jpg http://localhost:8000/score`",
        lifespan=lifespan,
        docs_url=None,  # services.page serves /docs, without the internet
        redoc_url=None,
    )
    app.state.verism = state

    def problem_response(error: VerismError, reference: str | None = None) -> Response:
        problem = error.problem()
        if reference:
            problem = problem.model_copy(update={"detail": f"reference {reference} in the service's log"})
        headers = {}
        if problem.retry_after_ms is not None:
            headers["retry-after"] = str(max(1, round(problem.retry_after_ms / 1000)))
        return JSONResponse(problem.model_dump(exclude_none=True), error.status, headers, media_type=PROBLEM)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        title = {404: "no such page; POST /score, GET /v1/rewards, /livez, /readyz, /metrics, /docs"}.get(
            error.status_code, str(error.detail)
        )
        problem = Problem(type=f"urn:verism:http-{error.status_code}", title=title, status=error.status_code)
        return JSONResponse(problem.model_dump(exclude_none=True), error.status_code, error.headers, media_type=PROBLEM)

    @app.middleware("http")
    async def watch(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        started, reference = time.perf_counter(), secrets.token_hex(6)
        request.state.reference = reference
        try:
            response = await call(request)
        except VerismError as error:
            state.metrics.rejected.labels(error.kind).inc()
            response = problem_response(error)
        except Exception:
            log.exception("request %s failed", reference)
            response = problem_response(VerismError("something went wrong inside the service"), reference)
        route = getattr(request.scope.get("route"), "path", "other")
        seconds = time.perf_counter() - started
        state.metrics.requests.labels(route, response.status_code).inc()
        state.metrics.request_seconds.labels(route).observe(seconds)
        response.headers["x-request-reference"] = reference
        logs.request(log, request, reference=reference, route=route, code=response.status_code, seconds=seconds)
        return response

    def wanted(request: ScoreRequest) -> list[str]:
        names = request.rewards or config.default or _first_composition(state.rewards)
        for name in names:
            if name not in state.rewards:
                raise UnknownReward(f"unknown reward {name!r}; this service has: {', '.join(state.rewards)}")
        for name, version in (request.require_version or {}).items():
            if name not in state.rewards:
                raise UnknownReward(f"unknown reward {name!r} in require_version; this service has: {', '.join(state.rewards)}")
            has = state.rewards[name].info.version
            if has != version:
                raise WrongVersion(f"{name} is at version {has}, not {version}", observed=has, limit=version)
        return list(dict.fromkeys(names))

    def decode_items(items: Sequence[ScoreItem], broken: Mapping[int, Problem]) -> list[Item | Score]:
        """Every item decoded, or its error; the request's pixel budget is checked before anything is decoded."""
        out: list[Item | Score] = []
        budget = config.max_request_pixels
        for index, item in enumerate(items):
            if index in broken:
                out.append(Score(status="error", error=broken[index]))
                continue
            budget -= sum(i.height * i.width for i in (item.image, *item.references))
            try:
                if budget < 0:
                    raise BadImage(
                        f"the request's pictures add up to more than {config.max_request_pixels / 1e6:.0f} megapixels: split it",
                        "image-too-large",
                        limit=config.max_request_pixels,
                    )
                if item.image.height * item.image.width > config.max_pixels:
                    raise BadImage("the picture is larger than this service allows", "image-too-large", limit=config.max_pixels)
                image = decode(item.image)
                references = tuple(decode(reference).pixels for reference in item.references)
                out.append(Item(image.pixels, item.prompt, references, {**item.meta, "_lossy": image.lossy}))
            except VerismError as error:
                out.append(Score(status="error", error=error.problem()))
        return out

    async def score_one(name: str, items: Sequence[Item | Score], priority: str, deadline: float | None) -> list[Score]:
        lane = state.rewards[name].lane
        assert lane is not None
        good = [item for item in items if isinstance(item, Item)]
        scores = iter(await lane.ask(good, priority, deadline))
        return [next(scores) if isinstance(item, Item) else item for item in items]

    @app.post(
        "/score",
        response_model=ScoreAnswer,
        openapi_extra=_REQUEST_BODY,
        responses={
            c: {"content": {PROBLEM: {"schema": Problem.model_json_schema()}}, "description": d} for c, d in _PROBLEMS.items()
        },
        summary="Score pictures",
    )
    @app.post("/v1/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        started = time.perf_counter()
        if state.draining:
            raise NotReady("this service is shutting down; ask another replica")
        body = await read_body(request, config.max_body_bytes, config.body_timeout_s)
        state.metrics.bytes_in.inc(len(body))
        parsed, kind = await parse(request.headers, body)
        asked = parsed.request
        names = wanted(asked)
        logs.note(request, request_id=asked.request_id, items=len(asked.items), rewards=names)
        read = time.perf_counter()
        deadline = time.monotonic() + asked.deadline_ms / 1000 if asked.deadline_ms is not None else None
        with admission.hold(len(asked.items), len(body)):
            loop = asyncio.get_running_loop()
            with telemetry.span("decode", items=len(asked.items)):
                items = await loop.run_in_executor(pool, decode_items, asked.items, parsed.broken)
            decoded = time.perf_counter()
            plain = list(dict.fromkeys(p for n in names for p in (state.rewards[n].parts or (n,))))
            rows = await asyncio.gather(*(score_one(name, items, asked.priority, deadline) for name in plain))
        by_name = dict(zip(plain, rows, strict=True))
        for name in names:
            if state.rewards[name].parts:
                by_name[name] = [
                    item
                    if isinstance(item, Score)
                    else state.rewards[name].reward.compose({p: by_name[p][i] for p in plain if p in by_name})
                    for i, item in enumerate(items)
                ]
        done = time.perf_counter()
        for name in names:
            _count(state.metrics, name, by_name[name])
        answer = ScoreAnswer.model_construct(
            request_id=asked.request_id,
            rewards={n: _used(state.rewards[n].info) for n in names},
            items=[
                ItemAnswer.model_construct(
                    id=item.id,
                    scores={n: by_name[n][i] for n in names},
                    lossy=bool(got.meta["_lossy"]) if isinstance(got := items[i], Item) else False,
                )
                for i, item in enumerate(asked.items)
            ],
            timing_ms={
                "read": round((read - started) * 1000, 3),
                "decode": round((decoded - read) * 1000, 3),
                "score": round((done - decoded) * 1000, 3),
                "total": round((done - started) * 1000, 3),
            },
        )
        for stage, seconds in (("read", read - started), ("decode", decoded - read), ("score", done - decoded)):
            state.metrics.stage_seconds.labels(stage).observe(seconds)
        return Response(wire.render_answer(answer, kind), media_type=wire.MSGPACK if kind == wire.MSGPACK else wire.JSON)

    @app.get("/v1/rewards", summary="What is served")
    async def rewards() -> dict[str, Any]:
        return {
            "rewards": [served.info.model_dump(mode="json") for served in state.rewards.values()],
            "default": config.default or _first_composition(state.rewards),
            "limits": {
                "body_bytes": config.max_body_bytes,
                "items": MAX_ITEMS,
                "pixels": config.max_pixels,
                "request_pixels": config.max_request_pixels,
            },
        }

    @app.get("/livez", summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Every reward has just scored a picture")
    async def readyz() -> dict[str, str]:
        if state.draining:
            raise NotReady("this service is shutting down")
        async with state.ready_lock:
            if time.monotonic() - state.ready_at > READY_SECONDS:
                probe = Item(np.full((64, 64, 3), 127, np.uint8), 'a photo of a sign that says "a"')
                for name, served in state.rewards.items():
                    if served.lane is None:
                        continue
                    try:
                        result = (await served.lane.ask([probe], "interactive", time.monotonic() + 60))[0]
                    except DeadlineExceeded:
                        raise NotReady(f"{name} did not score a picture within 60 s") from None
                    if result.error is not None and result.error.type.endswith("scoring-failed"):
                        raise NotReady(f"{name} cannot score: {result.error.title}")
                state.ready_at = time.monotonic()
        return {"status": "ready"}

    @app.get("/metrics", summary="Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(page.router(state))
    return app


def _first_composition(rewards: Mapping[str, Served]) -> list[str]:
    """Everything, compositions such as realism first."""
    return sorted(rewards, key=lambda name: not rewards[name].parts)


def _used(info: RewardInfo) -> RewardUsed:
    return RewardUsed(version=info.version, weights_sha256=info.weights_sha256, preprocessing=info.preprocessing)


def _count(metrics: Metrics, name: str, scores: Sequence[Score]) -> None:
    outcomes: dict[str, int] = {}
    histogram = metrics.score.labels(name)
    for score in scores:
        outcomes[score.status] = outcomes.get(score.status, 0) + 1
        if score.value is not None:
            histogram.observe(score.value)
    for outcome, count in outcomes.items():
        metrics.items.labels(name, outcome).inc(count)


_PROBLEMS: dict[int | str, str] = {
    400: "The body cannot be read",
    404: "Unknown reward",
    409: "Another version of the weights",
    413: "Body too large",
    415: "Not JSON, multipart or msgpack",
    422: "Not what the schema asks for",
    429: "Queue full; see Retry-After",
    503: "Starting or shutting down",
    504: "Deadline exceeded",
}

_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            wire.MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
                        "prompt": {"type": "string", "description": "what the picture should show"},
                        "rewards": {"type": "string", "description": "names, separated by commas"},
                    },
                }
            },
            wire.JSON: {
                "schema": {
                    "type": "object",
                    "required": ["items"],
                    "properties": {
                        "request_id": {"type": "string"},
                        "rewards": {"type": "array", "items": {"type": "string"}},
                        "items": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_ITEMS,
                            "items": {
                                "type": "object",
                                "required": ["image"],
                                "properties": {
                                    "id": {"type": "string"},
                                    "prompt": {"type": "string"},
                                    "image": {
                                        "type": "object",
                                        "required": ["encoding", "height", "width", "data"],
                                        "properties": {
                                            "encoding": {"enum": ["rgb8", "qoi", "png", "webp", "jpeg"]},
                                            "height": {"type": "integer"},
                                            "width": {"type": "integer"},
                                            "data": {"type": "string", "format": "byte", "description": "base64"},
                                        },
                                    },
                                },
                            },
                        },
                    },
                }
            },
        },
    }
}
