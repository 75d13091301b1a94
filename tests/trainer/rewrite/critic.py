"""A reward service that a test plays, with real HTTP and the real wire format: `brightness`, `alignment` (how near the mean grey is to what
the prompt's length asks for) and `critic`, whose `text` is what the test wants it to say."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shared import wire
from tests.answering import Answering, serving


@dataclass
class Critic:
    """`says` are taken in turn, one for each picture of a request; `prompts` are those that it was asked with."""

    url: str = ""
    says: list[str | None] = field(default_factory=list)
    prompts: set[str | None] = field(default_factory=set)
    pictures: int = 0
    broken: set[str] = field(default_factory=set)

    def score(self, item: dict[str, Any], name: str) -> dict[str, Any]:
        if name in self.broken:
            return {"status": "error", "error": {"type": "urn:verism:broken", "title": "broken for the test"}}
        grey = sum(item["image"]["data"]) / len(item["image"]["data"]) / 255
        if name == "alignment":
            return {"status": "ok", "value": 1 - abs(grey - len(item["prompt"]) % 7 / 7)}
        return {"status": "ok", "value": grey, "text": self.says.pop(0) if name == "critic" and self.says else None}


@contextmanager
def serve() -> Iterator[Critic]:
    """On a free port while inside."""
    critic = Critic()

    class Handler(Answering):
        def do_GET(self) -> None:
            needs: dict[str, list[str]] = {"brightness": [], "alignment": ["prompt"], "critic": ["prompt"]}
            self._reply(200, {"rewards": [{"name": name, "range": [0, 1], "needs": asks} for name, asks in needs.items()]})

        def do_POST(self) -> None:
            asked = msgspec.msgpack.decode(self.rfile.read(int(self.headers["content-length"])))
            critic.pictures += len(asked["items"])
            critic.prompts |= {item.get("prompt") for item in asked["items"]}
            names = asked["rewards"]
            items = [{"id": one["id"], "scores": {name: critic.score(one, name) for name in names}} for one in asked["items"]]
            rewards = {name: {"version": 1, "preprocessing": "none"} for name in names}
            body = msgspec.msgpack.encode({"request_id": asked["request_id"], "rewards": rewards, "items": items})
            self._send(200, body, wire.MSGPACK)

    with serving(Handler) as critic.url:
        yield critic
