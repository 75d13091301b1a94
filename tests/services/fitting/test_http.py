"""What arrives at the admin routes of refits: hostile bodies, wrong rewards, too much at once; always a problem, never a 500."""

import base64
import random
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from pydantic import ValidationError

from shared import wire
from shared.errors import BadRequest, Invalid, UnsupportedMedia
from shared.fit_wire import FitPicture, FitPictures, Hold, LeaseBody, pack, parse
from shared.image import encode
from shared.schema import ImageData
from tests.services.fitting.linear import pictures
from tests.services.fitting.test_room import Service, in_service, problem
from tests.services.test_fuzz import files

PICTURE = encode(pictures(1, 120, 0)[0])
ROUTES = [("POST", one) for one in ("lease", "pictures", "fit", "publish", "snapshot", "rollback")] + [("DELETE", "lease")]


def sound(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text and ".py" not in answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["title"]


async def send(
    service: Service, method: str, path: str, body: bytes, kind: str = wire.MSGPACK, reward: str = "linear"
) -> httpx.Response:
    url = f"/admin/rewards/{reward}/{path}"
    return await service.admin.request(method, url, content=body, headers={"content-type": kind})


def body_of(lease: str, images: list[Any], side: str = "real") -> bytes:
    return msgspec.msgpack.encode({"lease": lease, "side": side, "items": [{"image": image} for image in images]})


def test_every_route_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    bodies = [b"", b"\xc1", b"\x91" * 50_000, b"\x80\x04\x95", msgspec.msgpack.encode([1]), msgspec.msgpack.encode({"lease": 5})]
    kinds = [wire.MSGPACK, wire.JSON, "text/plain", "multipart/form-data; boundary=x", "application/octet-stream"]

    async def run(service: Service) -> None:
        await service.take()
        for method, path in ROUTES:
            for kind in kinds:
                for body in bodies:
                    answer = await send(service, method, path, body, kind)
                    sound(answer)
                    assert answer.status_code in (400, 415, 422), (path, kind, body[:9], answer.text)
            large = await send(service, method, path, bytes(65 * 2**20 if path == "pictures" else 70_000))
            assert problem(large, 413)["limit"] > 0
            unnamed = await send(service, method, path, b"{}", wire.JSON, "nobody")
            assert "here are refitted: linear" in problem(unnamed, 404)["title"]
            frozen = await send(service, method, path, b"{}", wire.JSON, "size")
            assert "size is not refitted here" in problem(frozen, 422)["title"]
        for path in ("fit", "versions"):
            sound(await service.admin.get(f"/admin/rewards/nobody/{path}"))
            assert problem(await service.admin.get(f"/admin/rewards/size/{path}"), 422)
        sound(await service.admin.get("/admin/rewards/linear/nothing"))
        async with httpx.AsyncClient(transport=service.admin._transport, base_url="http://s") as stranger:
            for method, path in [*ROUTES, ("GET", "fit"), ("GET", "versions")]:
                problem(await stranger.request(method, f"/admin/rewards/linear/{path}"), 401)

    in_service(run, tmp_path)


def test_pictures_that_are_none_add_nothing(tmp_path: Path) -> None:
    good = {"encoding": "rgb8", "height": 28, "width": 28, "data": PICTURE.data}

    async def run(service: Service) -> None:
        lease = await service.take()
        for name, data in files().items():
            for encoding in ("png", "jpeg", "qoi"):
                bad = {"encoding": encoding, "height": 32, "width": 32, "data": data}
                answer = await send(service, "POST", "pictures", body_of(lease, [good, bad]))
                sound(answer)
                if answer.status_code != 200:
                    assert answer.json()["title"].startswith("items[1].image: "), (name, answer.text)
                    assert "nothing was added" in answer.json()["title"]
        waits = service.state.rewards["linear"].room._waiting["real"]
        assert all(one.item.image.shape in ((28, 28, 3), (32, 32, 3)) for one in waits.values())
        wrong = [
            {"lease": lease, "side": "both", "items": [{"image": good}]},
            {"lease": lease, "side": "real", "items": []},
            {"lease": lease, "side": "real", "items": [{"image": good}] * 257},
            {"lease": lease, "side": "real", "items": [{"image": {**good, "height": 0}}]},
            {"lease": lease, "side": "real", "items": [{"image": good, "prompt": "x" * 9000}]},
            {"lease": lease, "side": "real", "items": [{"image": good, "url": "http://127.0.0.1/x.png"}]},
            {"lease": lease, "side": "real", "items": [{"image": good, "group": "g" * 300}]},
        ]
        for body in wrong:
            said = problem(await send(service, "POST", "pictures", msgspec.msgpack.encode(body)), 422)
            assert said["title"].split(":")[0] in ("side", "items") or said["title"].startswith("items[0]")
        huge = {"encoding": "png", "height": 5000, "width": 5000, "data": b"\x89PNG\r\n\x1a\n"}
        said = problem(await send(service, "POST", "pictures", body_of(lease, [huge])), 422)
        assert said["type"] == "urn:verism:image-too-large"

    in_service(run, tmp_path)


def test_too_many_pictures_that_wait_are_refused(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        large = pictures(3, 120, 0, side=400)  # 480,000 bytes each
        assert (await service.add("real", large[:2])).json()["real"] == 2
        said = problem(await service.add("generated", large), 413)
        assert said["limit"] == 2**20 and said["observed"] > 2**20
        assert "fit.waiting_bytes" in said["title"] and "adversary.linear.pictures" in said["title"]
        assert (await service.add("real", large[:2])).json()["real"] == 2, "what is there already takes no more room"
        shrunk = {"encoding": "png", "height": 3000, "width": 3000, "data": encode(large[0], "png").data}
        sound(await send(service, "POST", "pictures", body_of(service.lease, [shrunk])))

    in_service(run, tmp_path, waiting_bytes=2**20)


def test_damaged_bodies(tmp_path: Path) -> None:
    """Bytes changed, cut or added anywhere in what a trainer sends."""

    async def run(service: Service) -> None:
        lease, chance = await service.take(), random.Random(0)
        plain = {
            "pictures": pack(FitPictures(lease=lease, side="real", items=[FitPicture(image=PICTURE, prompt="a bag")])),
            "lease": msgspec.msgpack.encode(Hold(holder="me", lease=lease).model_dump()),
            "rollback": msgspec.msgpack.encode({"lease": lease, "version": 1}),
            "fit": msgspec.msgpack.encode({"lease": lease, "rounds": 2, "publish": True}),
        }
        for _ in range(150):
            path = chance.choice(list(plain))
            body = bytearray(plain[path])
            for _ in range(chance.randrange(1, 5)):
                spot = chance.randrange(min(len(body), 200))
                match chance.randrange(3):
                    case 0:
                        body[spot] ^= 1 << chance.randrange(8)
                    case 1:
                        del body[spot : spot + chance.randrange(1, 9)]
                    case 2:
                        body[spot:spot] = chance.randbytes(chance.randrange(1, 9))
                if not body:
                    break
            sound(await send(service, "POST", path, bytes(body)))

    in_service(run, tmp_path)


def test_json_from_curl(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        lease = await service.take()
        image = {"encoding": "rgb8", "height": 28, "width": 28, "data": base64.b64encode(PICTURE.data).decode()}
        body = {"lease": lease, "side": "real", "items": [{"image": image, "prompt": "a bag"}]}
        assert (await service.post("pictures", body)).json() == {"real": 1, "generated": 0, "warnings": []}
        body["items"][0]["image"]["data"] = "not base64!"  # type: ignore[index]
        assert problem(await service.post("pictures", body), 422)["title"] == "items[0].image.data: not base64"

    in_service(run, tmp_path)


def test_a_service_that_drains_begins_nothing(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        lease = await service.take()
        assert (await service.admin.post("/admin/drain")).status_code == 200
        answer = await service.post("fit", {"lease": lease})
        assert problem(answer, 503)["retryable"] is True

    in_service(run, tmp_path)


def test_bodies_are_read_as_they_are_packed() -> None:
    images = [encode(np.full((20, 16, 3), n, np.uint8), "png") for n in range(3)]
    asked = FitPictures(lease="x", side="generated", items=[FitPicture(image=one, prompt=None, group="g") for one in images])
    assert parse(FitPictures, "application/msgpack", pack(asked)) == asked
    assert parse(FitPictures, "application/json", asked.model_dump_json().encode()) == asked
    with pytest.raises(UnsupportedMedia, match="pickle"):
        parse(LeaseBody, "application/msgpack", b"\x80\x04abc")
    with pytest.raises(BadRequest, match="not json"):
        parse(LeaseBody, "application/json", b"{")
    with pytest.raises(Invalid, match="^lease: "):
        parse(LeaseBody, "application/json", b"{}")
    with pytest.raises(Invalid, match="^body: "):
        parse(LeaseBody, "application/json", b"3")
    with pytest.raises(ValidationError):
        FitPicture(image=ImageData(encoding="png", height=1, width=1, data=b""), prompt="é" * 5000)
