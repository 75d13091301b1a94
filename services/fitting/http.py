"""The admin routes of refits, as shared/fit_wire.py has them.

curl -H "authorization: Bearer $VERISM_ADMIN_KEY" localhost:8900/admin/rewards/detector/fit
"""

import asyncio
from collections.abc import Sequence
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from services.app import State
from services.fitting.refit import Example
from services.fitting.room import Room
from services.http import read_body
from services.reward import Item
from shared import fit_wire
from shared.errors import BadImage, Invalid, NotReady, UnknownReward
from shared.fit_wire import FitPicture, FitPictures, FitRequest, Hold, LeaseBody, RollbackBody
from shared.image import decode
from shared.schema import Frozen

M = TypeVar("M", bound=Frozen)
SMALL = 64 * 1024  # bytes of a body without pictures


def router(state: State) -> APIRouter:
    """Over a running service's rooms."""
    routes, config = APIRouter(), state.config
    base = "/admin/rewards/{name}/"
    decoding = asyncio.Semaphore(2)  # bodies at once, each in a thread

    def room_of(name: str) -> Room:
        served = state.rewards.get(name)
        if served is None or served.room is None:
            fitted = ", ".join(n for n, one in state.rewards.items() if one.room is not None)
            if served is None:
                raise UnknownReward(f"unknown reward {name!r}; here are refitted: {fitted}")
            raise Invalid(f"{name} is not refitted here: give it `fit` in the configuration; here are refitted: {fitted}")
        room: Room = served.room
        return room

    async def read(request: Request, model: type[M], limit: int = SMALL) -> M:
        if state.draining and request.method != "DELETE":
            raise NotReady("this service is shutting down; ask again when it is back")
        advice = "send fewer pictures at once" if limit > SMALL else "this route takes a few words only"
        body = await read_body(request, limit, config.body_timeout_s, advice=advice)
        return await asyncio.to_thread(fit_wire.parse, model, request.headers.get("content-type"), body)

    @routes.post(base + "lease")
    async def hold(name: str, request: Request) -> Response:
        room = room_of(name)
        return _json(room.hold(await read(request, Hold)))

    @routes.delete(base + "lease")
    async def release(name: str, request: Request) -> Response:
        room = room_of(name)
        room.release((await read(request, LeaseBody)).lease)
        return Response("{}", media_type="application/json")

    @routes.post(base + "pictures")
    async def pictures(name: str, request: Request) -> Response:
        room = room_of(name)
        async with decoding:
            asked = await read(request, FitPictures, config.max_body_bytes)
            room.holder.check(asked.lease)
            examples = await asyncio.to_thread(_examples, asked.items, config.max_pixels, config.max_request_pixels)
        room.holder.check(asked.lease)  # it may have run out meanwhile
        return _json(room.add(asked.side, examples))

    @routes.post(base + "fit")
    async def fit(name: str, request: Request) -> Response:
        room = room_of(name)
        asked = await read(request, FitRequest)
        room.holder.check(asked.lease)
        return _json(await room.fit(asked), 202)

    @routes.get(base + "fit")
    async def fitted(name: str) -> Response:
        return _json(room_of(name).state)

    @routes.post(base + "publish")
    async def publish(name: str, request: Request) -> Response:
        room = room_of(name)
        room.holder.check((await read(request, LeaseBody)).lease)
        return _json(await room.publish())

    @routes.post(base + "snapshot")
    async def snapshot(name: str, request: Request) -> Response:
        room = room_of(name)
        room.holder.check((await read(request, LeaseBody)).lease)
        return _json(await room.snapshot())

    @routes.post(base + "rollback")
    async def rollback(name: str, request: Request) -> Response:
        room = room_of(name)
        asked = await read(request, RollbackBody)
        room.holder.check(asked.lease)
        return _json(await room.rollback(asked.version))

    @routes.get(base + "versions")
    async def versions(name: str) -> Response:
        return _json(room_of(name).versions())

    return routes


def _json(answer: Frozen, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _examples(items: Sequence[FitPicture], max_pixels: int, budget: int) -> list[Example]:
    """All of them, or BadImage that names the first that cannot be: a refit from fewer pictures than were sent would be another one."""
    out = []
    for index, one in enumerate(items):
        pixels = one.image.height * one.image.width
        budget -= pixels
        try:
            if pixels > max_pixels or budget < 0:
                limit = max_pixels if pixels > max_pixels else None
                raise BadImage("larger than this service allows in one picture or one request", "image-too-large", limit=limit)
            picture = decode(one.image)
        except BadImage as error:
            raise BadImage(f"items[{index}].image: {error.message}; nothing was added", error.reason) from error
        out.append(Example.of(Item(picture.pixels, one.prompt), one.group, picture.lossy))
    return out
