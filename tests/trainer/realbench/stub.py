"""Services whose answers a test chooses, over real HTTP: a reward service (scores and pairs), and an OpenAI-compatible judge.

`real` is the mean brightness of a picture; of two pictures the brighter wins. Both count what they were asked, and can go away.
"""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from shared import wire
from shared.schema import Problem
from tests.answering import Answering, serving

GONE = Problem(type="urn:verism:busy", title="gone for the test", retryable=True, status=503)


@dataclass
class Stub:
    """`most`: how many pictures (pairs, questions) are answered before it goes away; None is for ever."""

    url: str = ""
    most: int | None = None
    asked: list[Any] = field(default_factory=list)
    version: int = 1
    refit: int | None = None  # after so many answers its weights are others
    first: bool = False  # a judge that always prefers what is shown first
    say: Callable[[list[np.ndarray]], str] = lambda images: "Real or Fake: real"
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, what: list[Any]) -> bool:
        with self.lock:
            if self.most is not None and len(self.asked) + len(what) > self.most:
                return False
            self.asked += what
            if self.refit is not None and len(self.asked) >= self.refit:
                self.version, self.refit = self.version + 1, None
            return True


def brightness(image: dict[str, Any]) -> float:
    data = np.frombuffer(image["data"], np.uint8)
    return float(data.mean() / 255)


def scores(stub: Stub, request: dict[str, Any]) -> dict[str, Any] | None:
    if not stub.take([(name, item["image"]["data"]) for item in request["items"] for name in request["rewards"]]):
        return None
    items = []
    for item in request["items"]:
        value = brightness(item["image"])
        given = {"real": value, "fake": 1 - value, "level": 10 * value, "fit": len(item.get("prompt") or "") / 100}
        said = {name: {"status": "ok", "value": given[name], "in_domain": value < 0.9} for name in request["rewards"]}
        items.append({"id": item["id"], "scores": said})
    used = {name: {"version": stub.version, "preprocessing": "none"} for name in request["rewards"]}
    return {"request_id": request["request_id"], "rewards": used, "items": items}


def pairs(stub: Stub, request: dict[str, Any]) -> dict[str, Any] | None:
    images = request["images"]
    if not stub.take([tuple(images[i]["data"] for i in group["images"]) for group in request["groups"]]):
        return None
    groups = []
    for group in request["groups"]:
        i, j = group["images"]
        wins = float(brightness(images[i]) > brightness(images[j])) * 0.8 + 0.1
        orders = [0.9, 0.1] if stub.first else [wins, wins]
        items = [
            {"image": i, "win_rate": wins, "standard_error": 0.1, "pairs": 1},
            {"image": j, "win_rate": 1 - wins, "standard_error": 0.1, "pairs": 1},
        ]
        groups.append({"id": group["id"], "items": items, "pairs": [{"first": i, "second": j, "value": wins, "orders": orders}]})
    used = {request["reward"]: {"version": stub.version, "preprocessing": "none"}}
    return {"request_id": request["request_id"], "rewards": used, "groups": groups}


def chat(stub: Stub, request: dict[str, Any]) -> dict[str, Any] | None:
    content = request["messages"][0]["content"]
    shown = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in content if part["type"] == "image_url"]
    if not stub.take([tuple(shown)]):
        return None
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in shown]
    return {"choices": [{"message": {"content": stub.say(images)}}]}


@contextmanager
def serve(**options: Any) -> Iterator[Stub]:
    stub = Stub(**options)

    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            infos = [
                {"name": "real", "range": [0, 1], "version": stub.version, "preprocessing": "none"},
                {"name": "fake", "range": [0, 1], "higher_is_better": False, "version": stub.version, "preprocessing": "none"},
                {"name": "level", "version": stub.version, "preprocessing": "none"},
                {"name": "fit", "needs": ["prompt"], "version": stub.version, "preprocessing": "none"},
                {"name": "pairs", "mode": "pairwise", "needs": ["references"], "version": stub.version, "preprocessing": "none"},
            ]
            self._send(200, json.dumps({"rewards": infos}).encode(), "application/json")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            talk = self.path.endswith("/chat/completions")
            request = json.loads(body) if talk else msgspec.msgpack.decode(body)
            answer = (chat if talk else pairs if self.path == "/v1/compare" else scores)(stub, request)
            if answer is None:
                return self._send(503, GONE.model_dump_json().encode(), "application/problem+json")
            if talk:
                return self._send(200, json.dumps(answer).encode(), "application/json")
            return self._send(200, msgspec.msgpack.encode(answer), wire.MSGPACK)

    with serving(Handler) as stub.url:
        yield stub
