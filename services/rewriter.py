"""`POST /rewrite`: a language model says a user's prompt so that its picture looks real. The same door, keys and errors as `/score`.

    rewriter: {folder: models/smollm2}

Rewrites of all callers that wait share forward passes: they are questions on a lane, as pictures are. What the model says is cleaned
(`shared/rewriting.py`); where nothing usable is left the answer is the user's own prompt, and says why.
"""

import asyncio
import functools
import importlib
import logging
import math
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response
from prometheus_client import Counter

from services import logs, telemetry
from services.config import RewriterConfig
from services.http import PROBLEM, read_body, while_asked
from services.metrics import Metrics
from services.scheduler import Admission, Lane, OutOfMemory
from services.worker import device_error
from shared import rewrite_wire, wire
from shared.errors import DeadlineExceeded, Invalid, NotReady
from shared.rewrite_wire import Rewrite, RewriteAnswer, RewriteRequest, RewriterInfo, Rewrites
from shared.rewriting import clean, fault, row_seed
from shared.schema import PROMPT_BYTES, Problem

if TYPE_CHECKING:
    from services.app import State
    from services.engines.language import Drawn, LanguageModel, Question

log = logging.getLogger("verism.rewriter")
MAX_BODY_BYTES = 1 << 20


class RewriteWork:
    """`services.scheduler.Work` over a language model."""

    join = None

    def __init__(self, model: "LanguageModel") -> None:
        self.model = model

    def collate(self, questions: "Sequence[Question]") -> "Sequence[Question]":
        return questions

    def run(self, collated: "Sequence[Question]") -> "Sequence[Drawn | Problem]":
        try:
            return self.model.draw(collated)
        except Exception as error:
            kind = device_error(error)
            if kind is None:
                raise
            raise kind(str(error)) from error

    def failed(self, question: "Question", error: Exception) -> Problem:
        log.error("a rewrite failed", exc_info=error)
        if isinstance(error, OutOfMemory):
            title = "the rewriter has not enough memory for this prompt; shorten it, or lower max_new_tokens"
            return Problem(type="urn:verism:out-of-memory", title=title)
        return Problem(type="urn:verism:rewriting-failed", title="the rewriter failed on this prompt; the service's log says why")

    def recover(self) -> None:
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Rewriter:
    """The model, its lane, and what is counted."""

    def __init__(self, options: RewriterConfig, metrics: Metrics, device: str) -> None:
        """ValueError says what cannot be loaded, and why."""
        try:
            place = options.place()
            instruction = options.told(place)
            load = importlib.import_module("services.engines.language").LanguageModel
            limits = {"max_new_tokens": options.max_new_tokens, "max_prompt_tokens": options.max_prompt_tokens}
            more = {"instruction": instruction, "dtype": options.dtype, "device": device, **limits}
            self.model: LanguageModel = load(place, options.adapter, **more)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"rewriter: {error}") from error
        self.info = RewriterInfo(
            name=options.name or options.model or place.resolve().name,
            weights_sha256=self.model.weights_sha256,
            instruction=instruction,
            max_new_tokens=options.max_new_tokens,
            max_prompt_tokens=self.model.max_prompt_tokens,
            licence=options.licence,
        )
        observe = functools.partial(metrics.ran, "rewriter")
        self.lane: Lane[Question, Drawn | Problem] = Lane(
            "rewriter", RewriteWork(self.model), cap=options.batch, bucket=lambda _: None, observe=observe
        )
        metrics.watch(cast(Any, self.lane))
        self.admission = Admission(
            options.max_waiting, 1 << 30, lambda n: self.lane.time.seconds(n, self.lane.cap), what="rewrites"
        )
        registry = metrics.registry
        self.counted = Counter(
            "verism_rewrites", "rewrites by outcome: used, the fault's name, or error", ["outcome"], registry=registry
        )
        self.tokens = Counter("verism_rewrite_tokens", "tokens drawn, those that end a turn included", registry=registry)

    async def probe(self) -> None:
        """NotReady unless one token is drawn within a minute."""
        question = importlib.import_module("services.engines.language").Question(self.model.ids("a"), 0, 0.0, 1)
        try:
            said = (await self.lane.ask([question], "interactive", time.monotonic() + 60)).answers[0]
        except DeadlineExceeded:
            raise NotReady("the rewriter did not draw a token within 60 s") from None
        if isinstance(said, Problem):
            raise NotReady(f"the rewriter cannot write: {said.title}")

    async def answer(self, asked: RewriteRequest, size: int, started: float) -> RewriteAnswer:
        """All of it, or the error of the whole request."""
        deadline = time.monotonic() + asked.deadline_ms / 1000 if asked.deadline_ms is not None else None
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        with self.admission.hold(asked.n * len(asked.prompts), size):
            questions = await asyncio.to_thread(self._questions, asked, seed)
            read = time.perf_counter()
            told = await self.lane.ask(questions, "interactive", deadline)
        telemetry.record("queue", told.asked, told.begun, reward="rewriter")
        telemetry.record("forward", told.begun, told.done, reward="rewriter", items=len(questions))
        rows = iter(told.answers)
        items = [
            Rewrites(prompt=prompt, rewrites=[self._rewrite(prompt, next(rows)) for _ in range(asked.n)])
            for prompt in asked.prompts
        ]
        stages = {
            "read": read - started,
            "queue": told.begun - told.asked,
            "forward": told.done - told.begun,
            "total": time.perf_counter() - started,
        }
        return RewriteAnswer(
            request_id=asked.request_id,
            model=self.info.name,
            weights_sha256=self.info.weights_sha256,
            seed=seed,
            temperature=asked.temperature,
            items=items,
            timing_ms={stage: round(1000 * seconds, 3) for stage, seconds in stages.items()},
        )

    def _questions(self, asked: RewriteRequest, seed: int) -> "list[Question]":
        question = importlib.import_module("services.engines.language").Question
        out = []
        for index, prompt in enumerate(asked.prompts):
            try:
                ids = self.model.ids(prompt)
            except Invalid as error:
                if isinstance(asked.prompt, str):
                    raise
                raise type(error)(f"prompt[{index}]: {error.message}", limit=error.limit, observed=error.observed) from error
            out += [question(ids, row_seed(seed, prompt, j), asked.temperature, self.info.max_new_tokens) for j in range(asked.n)]
        return out

    def _rewrite(self, prompt: str, drawn: "Drawn | Problem") -> Rewrite:
        """Cleaned and judged by its words; the user's own prompt where it is of no use."""
        if isinstance(drawn, Problem):
            self.counted.labels("error").inc()
            return Rewrite(text=prompt, error=drawn)
        self.tokens.inc(len(drawn.logps))
        text = clean(drawn.text).text
        found = fault(prompt, text, self.info.instruction)
        self.counted.labels(found or "used").inc()
        logps = [round(logp, 6) for logp in drawn.logps]
        return Rewrite(
            text=prompt if found else text, fault=found, said=drawn.text, logp=math.fsum(logps), logps=logps, ended=drawn.ended
        )


def router(state: "State", rewriter: Rewriter) -> APIRouter:
    """`/rewrite` and `/v1/rewriter` of one service."""
    routes = APIRouter()
    config = state.config

    @routes.post(
        "/rewrite",
        response_model=RewriteAnswer,
        openapi_extra={"requestBody": _request_body()},
        responses=_PROBLEM_ANSWERS,
        summary="Rewrite prompts",
    )
    @routes.post("/v1/rewrite", include_in_schema=False)
    async def rewrite(request: Request) -> Response:
        started = time.perf_counter()
        if state.draining:
            raise NotReady("this service is shutting down; ask another replica")
        rewriter.admission.check(1, 0)
        limit = min(MAX_BODY_BYTES, config.max_body_bytes)
        body = await read_body(request, limit, config.body_timeout_s, advice="send fewer or shorter prompts")
        state.metrics.bytes_in.inc(len(body))
        asked = rewrite_wire.parse(request.headers.get("content-type"), bytes(body))
        logs.note(request, request_id=asked.request_id, items=asked.n * len(asked.prompts), rewards=["rewriter"])
        work = asyncio.ensure_future(rewriter.answer(asked, len(body), started))
        try:
            said = await while_asked(request, work)
        finally:
            work.cancel()
        return Response(wire.render_answer(said, wire.JSON), media_type=wire.JSON)

    @routes.get("/v1/rewriter", response_model=RewriterInfo, summary="Which model rewrites, and what it is told")
    async def info() -> RewriterInfo:
        return rewriter.info

    return routes


def _request_body() -> dict[str, Any]:
    schema = RewriteRequest.model_json_schema()
    schema["required"] = ["prompt"]  # the id is made up where it is missing
    text = {"type": "string", "minLength": 1, "maxLength": PROMPT_BYTES}
    schema["properties"]["prompt"]["anyOf"] = [
        text,
        {"type": "array", "items": text, "minItems": 1, "maxItems": rewrite_wire.MAX_PROMPTS},
    ]
    return {"required": True, "content": {wire.JSON: {"schema": schema}}}


_PROBLEMS: dict[int | str, str] = {
    400: "The body cannot be read",
    401: "No key, or an unknown one",
    403: "The key's scopes do not cover this",
    413: "Body too large",
    415: "Not JSON",
    422: "Not what the schema asks for, or a prompt that is too long for the rewriter",
    429: "Queue full; see Retry-After",
    503: "Starting or shutting down",
    504: "Deadline exceeded",
}
_PROBLEM_ANSWERS: dict[int | str, dict[str, Any]] = {
    code: {"content": {PROBLEM: {"schema": Problem.model_json_schema()}}, "description": what} for code, what in _PROBLEMS.items()
}
