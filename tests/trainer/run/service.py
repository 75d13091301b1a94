"""A reward service whose faults a test chooses: real HTTP and the real wire format. `brightness` is the pixels' mean, `darkness` the rest."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from shared import wire


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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            info = {"rewards": [{"name": name, "range": [0, 1]} for name in ("brightness", "darkness")]}
            self._answer(200, "application/json", json.dumps(info).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            request = msgspec.msgpack.decode(body)
            service.requests.append(len(request["items"]))
            if service.fault == "down":
                problem = {"type": "urn:verism:broken", "title": "down for the test", "retryable": False}
                return self._answer(503, "application/problem+json", json.dumps(problem).encode())
            if service.fault == "slow":
                time.sleep(1.5)
            service.pictures += len(request["items"])
            answer = {
                "request_id": request["request_id"],
                "rewards": {name: {"version": 1, "preprocessing": "none"} for name in request["rewards"]},
                "items": _scores(request["items"], request["rewards"], service.fault),
            }
            self._answer(200, wire.MSGPACK, msgspec.msgpack.encode(answer))
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
