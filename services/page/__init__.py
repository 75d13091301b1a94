"""The page at `/`, the map of a picture at `/v1/map`, and `/docs` without the internet.

Files lie beside this one and are served as they are; Swagger's come from the package fastapi-offline. Nothing is loaded from
elsewhere: the policy in the headers forbids it, and forbids inline scripts and styles.
"""

import asyncio
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

from services import logs, telemetry
from services.http import REQUEST_BODY, parse, read_body
from shared import wire
from shared.errors import BadImage, Busy, Invalid, NotReady, UnknownReward, VerismError
from shared.image import decode

if TYPE_CHECKING:
    from services.app import State

HERE = Path(__file__).parent
SWAGGER = Path(str(files("fastapi_offline") / "static"))
ASSETS = {name: HERE / name for name in ("page.css", "page.js", "docs.css", "docs.js")} | {
    name: SWAGGER / name for name in ("swagger-ui.css", "swagger-ui-bundle.js")
}
SAME = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; script-src 'self'"
HEADERS = {
    "content-security-policy": f"{SAME}; style-src 'self'; img-src 'self' blob: data:; require-trusted-types-for 'script'",
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "vary": "accept",
    "x-content-type-options": "nosniff",
}
DOCS_POLICY = f"{SAME}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"  # Swagger writes styles into its elements
MAPS_AT_ONCE = 8


class NoMap(VerismError):
    """The reward cannot say which patches made its score."""

    kind, status = "no-map", 404


def router(state: "State") -> APIRouter:
    """`/`, `/docs`, `/page/...` and `/v1/map` of one service."""
    routes = APIRouter()
    drawing = 0

    def with_map() -> list[str]:
        return [name for name, one in state.rewards.items() if one.lane is not None and hasattr(one.reward, "patch_map")]

    @routes.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(HERE / "index.html", headers=HEADERS)
        base = str(request.base_url).rstrip("/")
        said = {
            "service": "verism",
            "rewards": list(state.rewards),
            "try": f"curl -F image=@photo.jpg {base}/score",
            "see": [f"{base}{path}" for path in ("/v1/rewards", "/docs", "/metrics", "/readyz")],
        }
        return JSONResponse(said, headers={"vary": "accept"})

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(HERE / "docs.html", headers={**HEADERS, "content-security-policy": DOCS_POLICY})

    @routes.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404)
        return FileResponse(ASSETS[name], headers={**HEADERS, "cache-control": "max-age=300"})

    @routes.get("/v1/map", summary="Which rewards can draw a map")
    async def maps() -> dict[str, Any]:
        return {"rewards": with_map()}

    @routes.post("/v1/map", summary="Which patches of a picture look generated", openapi_extra=_MAP)
    async def draw(request: Request) -> dict[str, Any]:
        nonlocal drawing
        known = with_map()
        name = request.query_params.get("reward", known[0] if known else "")
        if name not in state.rewards:
            raise UnknownReward(f"unknown reward {name!r}; with a map: {', '.join(known) or 'none of this service'}")
        if name not in known:
            raise NoMap(f"{name} has no map; with a map: {', '.join(known) or 'none of this service'}")
        if state.draining:
            raise NotReady("this service is shutting down; ask another replica")
        if drawing >= MAPS_AT_ONCE:
            raise Busy(f"{drawing} maps are being drawn; come back in 1 s", retry_after_ms=1000, limit=MAPS_AT_ONCE)
        drawing += 1
        try:
            body = await read_body(request, state.config.max_body_bytes, state.config.body_timeout_s)
            parsed, _ = await parse(request.headers, body)
            logs.note(request, request_id=parsed.request.request_id, items=len(parsed.request.items), rewards=[name])
            with telemetry.span("map", reward=name):
                return await _map(state, name, parsed)
        finally:
            drawing -= 1

    return routes


async def _map(state: "State", name: str, parsed: wire.Parsed) -> dict[str, Any]:
    """One picture decoded off the event loop, its map computed on the thread that owns the reward's device."""
    if len(parsed.request.items) != 1:
        raise Invalid(f"image: a map is drawn of one picture, not of {len(parsed.request.items)}: ask once for each")
    if parsed.broken:
        problem = parsed.broken[0]
        raise BadImage(problem.title, problem.type.rpartition(":")[2], limit=problem.limit, observed=problem.observed)
    image = parsed.request.items[0].image
    if image.height * image.width > state.config.max_pixels:
        raise BadImage("the picture is larger than this service allows", "image-too-large", limit=state.config.max_pixels)
    served = state.rewards[name]
    assert served.lane is not None
    decoded = await asyncio.to_thread(decode, image)
    map_hw = np.asarray(await served.lane.borrow(served.reward.patch_map, decoded.pixels), np.float64)
    if map_hw.ndim != 2 or not map_hw.size or not np.isfinite(map_hw).all():
        raise VerismError(f"{name} gave no finite map of this picture")
    height, width = map_hw.shape
    rows = map_hw.round(5).tolist()
    return {"reward": name, "version": served.info.version, "height": height, "width": width, "rows": rows}


_MAP: dict[str, Any] = {
    "parameters": [
        {"name": "reward", "in": "query", "schema": {"type": "string"}, "description": "default: the first that has a map"}
    ],
    "requestBody": {"description": "one picture", **REQUEST_BODY},
}
