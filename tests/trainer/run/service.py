"""A reward service whose faults a test chooses: real HTTP and the real wire format. `brightness` is the pixels' mean, `darkness` the rest."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from shared import wire
from tests.answering import Answering, serving


@dataclass
class Service:
    """`fault` is "", "down", "slow", "nan" or "some" (half of the items fail); `pictures` counts what was scored."""

    fault: str = ""
    url: str = ""
    pictures: int = 0
    requests: list[int] = field(default_factory=list)


def _scores(items: list[dict[str, object]], names: list[str], fault: str) -> list[dict[str, object]]:
    out = []
    for n, item in enumerate(items):
        data = item["image"]["data"]  # type: ignore[index]
        brightness = sum(data) / len(data) / 255
        scores: dict[str, dict[str, object]] = {
            name: {"status": "ok", "value": brightness if name == "brightness" else 1 - brightness} for name in names
        }
        for score in scores.values():
            if fault == "nan":
                score["value"] = float("nan")
            if fault == "some" and n % 2:
                score.clear()
                score.update({"status": "error", "error": {"type": "urn:verism:broken", "title": "broken for the test"}})
        out.append({"id": item["id"], "scores": scores})
    return out


@contextmanager
def serve(fault: str = "") -> Iterator[Service]:
    """A service on a free port while inside."""
    service = Service(fault)

    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(200, {"rewards": [{"name": name, "range": [0, 1]} for name in ("brightness", "darkness")]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = msgspec.msgpack.decode(body)
            service.requests.append(len(request["items"]))
            if service.fault == "down":
                problem = {"type": "urn:verism:broken", "title": "down for the test", "retryable": False}
                return self._send(503, json.dumps(problem).encode(), "application/problem+json")
            if service.fault == "slow":
                time.sleep(1.5)
            service.pictures += len(request["items"])
            answer = {
                "request_id": request["request_id"],
                "rewards": {name: {"version": 1, "preprocessing": "none"} for name in request["rewards"]},
                "items": _scores(request["items"], request["rewards"], service.fault),
            }
            self._send(200, msgspec.msgpack.encode(answer), wire.MSGPACK)
            return None

    with serving(Handler) as service.url:
        yield service


def recipe(url: str, **changes: object) -> dict[str, object]:
    """The smallest run: 4 steps of 2 groups of 4 pictures, against `url`."""
    return {
        "name": "tiny",
        "policy": {"use": "sd3", "path": "world/policy", "max_sequence_length": 1, "lora": {"rank": 4, "alpha": 8}},
        "prompts": {"train": "world/prompts/train.jsonl", "eval": "world/prompts/eval.jsonl"},
        "sampling": {
            "steps": 4, "window": 2, "window_first": 0, "window_last": 3, "height": 28, "width": 28, "micro_batch": 8
        },
        "group": {"prompts": 2, "size": 4},
        "rewards": {"brightness": {"url": url}},
        "kl": {"use": "v_kl", "weight": 0.1},
        "optim": {"lr": 1e-3},
        "eval": {"every": 2, "samples": 4, "steps": 4, "grid": 4},
        "alarm": {"action": "off"},
        "checkpoint_every": 2,
        "reward_outage_s": 0,
        "device": "cpu",
        "steps": 4,
        **changes,
    }  # fmt: skip
