"""Hostile callers: whatever arrives, the answer is a score, or a problem that says what to do; never a 500, never a traceback."""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Iterator

import httpx
import msgspec
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from starlette.testclient import TestClient

from services.app import create_app
from services.config import ServiceConfig
from shared import wire
from shared.image import encode
from tests.services.undying import undying

CONFIG = {"device": "cpu", "rewards": {"jpeg_size": {"use": "jpeg_size", "batch_cap": 16}}, "max_body_bytes": 300_000}
schema = schemathesis.openapi.from_asgi("/openapi.json", undying(create_app(ServiceConfig.model_validate(CONFIG))))
PIXELS = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)


def sound(answer: httpx.Response) -> None:
    """A score or a problem, and nothing of the service's inside."""
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text and ".py" not in answer.text
    if answer.status_code >= 400 and answer.content:
        assert answer.headers["content-type"] == "application/problem+json"
        said = answer.json()
        assert said["type"].startswith("urn:verism:") and said["title"] and "retryable" in said


@schema.parametrize()
@settings(max_examples=20, deadline=None)
def test_the_document_tells_the_truth(case: schemathesis.Case) -> None:
    answer = case.call()
    case.validate_response(answer, checks=[not_a_server_error, response_schema_conformance, content_type_conformance])


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG)), raise_server_exceptions=False) as test:
        yield test


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def files() -> dict[str, bytes]:
    """The corpus: every way in which a picture was ever known to hurt a decoder, as far as a few bytes can say it."""
    made = {name: io.BytesIO() for name in ("jpeg", "webp", "gif", "tiff", "bmp", "palette", "animated", "progressive")}
    picture = Image.fromarray(PIXELS)
    picture.save(made["jpeg"], "JPEG")
    picture.save(made["progressive"], "JPEG", progressive=True)
    picture.save(made["webp"], "WEBP")
    picture.save(made["gif"], "GIF")
    picture.save(made["tiff"], "TIFF")
    picture.save(made["bmp"], "BMP")
    picture.quantize(4).save(made["palette"], "PNG", transparency=1)
    picture.save(made["animated"], "WEBP", save_all=True, append_images=[picture] * 3)
    whole = {name: buffer.getvalue() for name, buffer in made.items()}
    good = encode(PIXELS, "png").data
    return {
        **whole,
        "empty": b"",
        "one byte": b"\x89",
        "text": b"this is no picture",
        "html": b"<script>alert(1)</script>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "url": b"http://127.0.0.1:1/secret.png",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00",
        "bomb by header": png(50_000, 50_000),
        "bomb by data": png(32, 32, bytes(1 << 24)),
        "zero width": png(0, 32),
        "negative height": png(32, 0x80000001),
        "one pixel": png(1, 1, b"\0\0\0\0"),
        "a line": png(60_000, 1, bytes(180_001)),
        "too little data": png(32, 32, b"\0"),
        "depth 3": png(32, 32, bytes(1000), depth=3),
        "colour 9": png(32, 32, bytes(1000), colour=9),
        "text bomb": png(32, 32, bytes(32 * 97), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
        "profile bomb": png(32, 32, bytes(32 * 97), extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
        "bad checksum": good[:-20] + bytes(4) + good[-16:],
        "half a PNG": good[: len(good) // 2],
        "half a JPEG": whole["jpeg"][: len(whole["jpeg"]) // 2],
        "half a WebP": whole["webp"][: len(whole["webp"]) // 2],
        "endless JPEG": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 4000,
        "exif loop": b"\xff\xd8\xff\xe1\x00\x16Exif\0\0II*\0\x08\0\0\0\x01\0" + bytes(6) + whole["jpeg"][2:],
        "qoi of runs": b"qoif" + struct.pack(">II", 65_000, 65_000) + b"\x03\x00" + b"\xfd" * 3000 + bytes(7) + b"\x01",
        "two pictures": good + good,
    }


@pytest.mark.parametrize("name", sorted(files()))
def test_a_file_from_the_corpus_as_a_form(client: TestClient, name: str) -> None:
    answer = client.post("/score", files=[("image", (name, files()[name])), ("image", ("good", encode(PIXELS, "png").data))])
    sound(answer)
    bad, good = (item["scores"]["jpeg_size"] for item in answer.json()["items"])
    assert good["status"] == "ok", "the picture beside it has its score"
    assert (bad["value"] is None) == (bad["error"] is not None)


@pytest.mark.parametrize("encoding", ["rgb8", "qoi", "png", "webp", "jpeg"])
@pytest.mark.parametrize("name", sorted(files()))
def test_a_file_from_the_corpus_under_every_name(client: TestClient, name: str, encoding: str) -> None:
    image = {"encoding": encoding, "height": 32, "width": 32, "data": base64.b64encode(files()[name]).decode()}
    sound(client.post("/score", json={"items": [{"image": image}]}))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_bodies(client: TestClient, data: st.DataObject) -> None:
    """Requests with bytes changed, cut or added anywhere."""
    kind = data.draw(st.sampled_from([wire.JSON, wire.MSGPACK]))
    image = {"encoding": "png", "height": 32, "width": 32, "data": encode(PIXELS, "png").data}
    plain = {"request_id": "r", "items": [{"id": "a", "image": image, "prompt": "a bag"}], "rewards": None, "priority": "bulk"}
    if kind == wire.JSON:
        image["data"] = base64.b64encode(image["data"]).decode()
        body = bytearray(json.dumps(plain).encode())
    else:
        body = bytearray(msgspec.msgpack.encode(plain))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 6))):
        spot = chance.randrange(len(body))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip":
                body[spot] ^= 1 << chance.randrange(8)
            case "cut":
                del body[spot : spot + chance.randrange(1, 40)]
            case "insert":
                body[spot:spot] = chance.randbytes(chance.randrange(1, 9))
            case "repeat":
                body[spot:spot] = body[spot : spot + 30]
        if not body:
            break
    sound(client.post("/score", content=bytes(body), headers={"content-type": kind}))


deep = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("request_id", "rewards", "priority", "deadline_ms", "require_version", "items", "x"), deep)
    )
)
def test_anything_in_any_field(client: TestClient, body: dict[str, object]) -> None:
    sound(client.post("/score", content=msgspec.msgpack.encode(body), headers={"content-type": wire.MSGPACK}))


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/msgpack; charset=\x01"},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary="},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-length": "99999999999"},
        {"content-type": "application/x-python-pickle"},
        {"content-type": "text/" + "a" * 5000},
        {},
    ],
)
def test_odd_headers(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/score", content=b"{}", headers=headers)
    sound(answer)
    assert answer.status_code in (400, 413, 415, 422)


def test_nesting_is_no_way_to_the_stack(client: TestClient) -> None:
    for body, kind in ((b"[" * 100_000, wire.JSON), (b"\x91" * 100_000, wire.MSGPACK)):
        answer = client.post("/score", content=body, headers={"content-type": kind})
        sound(answer)
        assert answer.status_code in (400, 422)


def test_keys_and_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_A_TRAINER", "the key of a trainer")
    keys = {"trainer": {"env": "KEY_OF_A_TRAINER", "scopes": ["score"]}, "grafana": {"sha256": "0" * 64, "scopes": ["read"]}}
    guarded = create_app(ServiceConfig.model_validate({**CONFIG, "keys": keys}))
    picture = {"image": ("a.png", encode(PIXELS, "png").data)}
    with TestClient(guarded) as one:
        assert one.get("/livez").status_code == one.get("/readyz").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}, {"x-api-key": b"\xff"}):
            answer = one.post("/score", files=picture, headers=headers)
            sound(answer)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": "Bearer the key of a trainer"}, {"x-api-key": "the key of a trainer"}):
            assert one.post("/score", files=picture, headers=headers).status_code == 200
            answer = one.get("/metrics", headers=headers)
            sound(answer)
            assert answer.status_code == 403 and "read" in answer.json()["title"]
    with pytest.raises(ValueError, match="KEY_OF_NOBODY"):
        create_app(ServiceConfig.model_validate({**CONFIG, "keys": {"a": {"env": "KEY_OF_NOBODY"}}}))
