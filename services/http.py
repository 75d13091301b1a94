"""Between bytes and the app: bodies within limits, problems instead of tracebacks, one log line and one count for each request."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import logs
from services.auth import Keys, scope_of
from services.metrics import Metrics
from shared import wire
from shared.errors import BadRequest, TooLarge, VerismError
from shared.schema import MAX_ITEMS, Problem

T = TypeVar("T")
log = logging.getLogger("verism.service")
PROBLEM = "application/problem+json"
REQUEST_BODY: dict[str, Any] = {  # OpenAPI of what `parse` reads
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
        wire.JSON: {"schema": {"$ref": "#/components/schemas/ScoreRequest"}},
    },
}
CLOSED = 499  # what the log and the metrics say of a caller who left


class CallerLeft(Exception):
    """Nobody waits for the answer any more."""


class Buffers:
    """Memory for bodies, used again: the first touch of a fresh page costs more than all that is done with what is read into it.

    Nobody gives a buffer back: as long as somebody holds a memoryview of it, or an array over one, it is not lent again.
    """

    def __init__(self, most: int) -> None:
        """At most `most` bytes are kept."""
        self.most = most
        self._kept: list[bytearray] = []

    def find(self, size: int) -> memoryview | None:
        """At least `size` bytes that nobody holds, and not many times as many; None when there are none."""
        for buffer in self._kept:
            if size <= len(buffer) <= 4 * size and _unheld(buffer):
                return memoryview(buffer)
        return None

    def make(self, size: int) -> memoryview:
        """Fresh ones, kept for later; older ones that nobody holds make room for them."""
        buffer = bytearray(size)
        for old in self._kept[:]:
            if sum(map(len, self._kept)) + size > self.most and _unheld(old):
                self._kept.remove(old)
        if sum(map(len, self._kept)) + size <= self.most:
            self._kept.append(buffer)
        return memoryview(buffer)


def _unheld(buffer: bytearray) -> bool:
    """A bytearray that is seen through a memoryview refuses to change its length; losing a byte and having it back moves nothing."""
    try:
        buffer.append(buffer.pop())
    except BufferError:
        return False
    return True


async def read_body(
    request: Request, limit: int, timeout_s: float, buffers: Buffers | None = None, advice: str = "send fewer or smaller pictures"
) -> memoryview:
    """The body, never more than `limit` bytes in memory, never later than `timeout_s`."""
    too_large = f"the body is larger than {limit / 2**20:.0f} MiB: {advice}"
    declared = int(text) if (text := request.headers.get("content-length", "")).isdecimal() else 0
    if declared > limit:
        raise TooLarge(too_large, limit=limit, observed=declared)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("compressed bodies are not read: pictures are compressed already")
    body, size = memoryview(bytearray()), 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise CallerLeft
                part = message.get("body", b"")
                end = size + len(part)
                if end > limit:
                    raise TooLarge(too_large, limit=limit, observed=end)
                if size == 0 and not message.get("more_body", False):
                    return memoryview(part)
                if end > len(body):
                    body = _longer(body[:size], end, declared, buffers)
                body[size:end] = part
                size = end
                if not message.get("more_body", False):
                    return body[:size]
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {timeout_s:g} s") from None


def _longer(begun: memoryview, least: int, declared: int, buffers: Buffers | None) -> memoryview:
    """Room for `least` bytes that opens with what came so far. A declared length gets its memory as the bytes come, not before."""
    ready = buffers.find(declared) if buffers is not None and declared >= least else None
    if ready is None:
        size = min(4 * least, declared) if declared >= least else 2 * least
        ready = buffers.make(size) if buffers is not None and size == declared else memoryview(bytearray(size))
    ready[: len(begun)] = begun
    return ready


async def parse(headers: Headers, body: wire.Body) -> tuple[wire.Parsed, str]:
    """The request and the media type that it came in."""
    kind = wire.media_type(headers.get("content-type"))
    if kind == wire.JSON:
        return wire.parse_json(bytes(body)), kind
    if kind == wire.MSGPACK:
        return wire.parse_msgpack(body), kind

    async def once() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

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


async def while_asked(request: Request, work: "asyncio.Future[T]") -> T:
    """The result of `work`; CallerLeft as soon as the caller leaves. `work` itself is left alone."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone = asyncio.ensure_future(leave())
    both: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise CallerLeft
    finally:
        gone.cancel()
        del work, both  # an error's traceback holds this frame: holding the task that holds the error, it would never be free


def problem_response(error: VerismError, reference: str | None = None) -> Response:
    """application/problem+json, with Retry-After where there is one."""
    problem = error.problem()
    if reference:
        problem = problem.model_copy(update={"detail": f"reference {reference} in the service's log"})
    headers = {}
    if problem.retry_after_ms is not None:
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after_ms / 1000)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(exclude_none=True), error.status, headers, media_type=PROBLEM)


async def not_a_page(request: Request, error: Exception) -> Response:
    """For FastAPI's own errors: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    known = "no such page; POST /score, GET /v1/rewards, /livez, /readyz, /metrics, /docs"
    title = {404: known}.get(error.status_code, str(error.detail))
    problem = Problem(type=f"urn:verism:http-{error.status_code}", title=title, status=error.status_code)
    return JSONResponse(problem.model_dump(exclude_none=True), error.status_code, error.headers, media_type=PROBLEM)


class Door:
    """ASGI middleware: keys, problems, a reference for each request, its log line and its counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Keys, scope: Literal["admin"] | None = None) -> None:
        self.app, self.metrics, self.keys, self.scope = app, metrics, keys, scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, started = Request(scope, receive), time.perf_counter()
        reference, code = secrets.token_hex(6), 0

        async def answer(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                MutableHeaders(scope=message)["x-request-reference"] = reference
            await send(message)

        try:
            if self.keys and (wanted := self.scope or scope_of(request.method, scope["path"])) is not None:
                logs.note(request, key=self.keys.check(request.headers, wanted))
            await self.app(scope, receive, answer)
        except CallerLeft:
            code = CLOSED
        except VerismError as error:
            self.metrics.rejected.labels(error.kind).inc()
            await problem_response(error)(scope, receive, answer)
        except Exception:
            log.exception("request %s failed", reference)
            if code == 0:
                await problem_response(VerismError("something went wrong inside the service"), reference)(scope, receive, answer)
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - started
        self.metrics.requests.labels(route, code).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        logs.request(log, request, reference=reference, route=route, code=code, seconds=seconds)
