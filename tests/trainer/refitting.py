"""A service whose `brightness` can be refitted, with faults that a test chooses: real HTTP and the real wire, and a detector of one feature.

It scores `slope * brightness`; a refit moves the slope a tenth of the way from the mean brightness of the generated to that of the real
pictures, each counted with all that went before. `darkness` beside it is never refitted. Its twin is services/fitting, see
tests/e2e/test_adversary.py.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shared import wire
from shared.fit_wire import FitState
from tests.answering import Answering, serving


@dataclass(frozen=True)
class Kept:
    """All that a version is."""

    slope: float = 1.0
    real: tuple[float, ...] = ()
    generated: tuple[float, ...] = ()  # the replay buffer

    @property
    def sum(self) -> str:
        return str(hash((self.slope, self.real, self.generated)))


@dataclass
class Refitting:
    """`fault`: "keep_out", "fail", "slow" (a refit that never ends), "lose" (the next refit: as if restarted in its middle), "refuse" (fit)."""

    url: str = ""
    fault: str = ""
    version: int = 1
    versions: dict[int, Kept] = field(default_factory=lambda: {1: Kept()})
    snapshots: set[int] = field(default_factory=set)
    candidate: Kept | None = None
    state: FitState = FitState(outcome="idle", version=1)
    holder: str = ""
    lease: str = ""
    lease_until: float = 0.0
    sent: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"real": [], "generated": []})
    fits: list[dict[str, Any]] = field(default_factory=list)
    asked: list[tuple[list[str], dict[str, int] | None, int]] = field(
        default_factory=list
    )  # rewards, pins, pictures of each request
    before_score: Any = None  # called before a request to /score
    away: int = 0  # so many requests to the admin listener are answered as by a service that shuts down

    def restart(self) -> None:
        """As a process that is started again from its folder: no lease, nothing waiting, no refit."""
        self.lease, self.lease_until, self.candidate = "", 0.0, None
        self.sent = {"real": [], "generated": []}
        self.state = FitState(outcome="idle", version=self.version)

    def fit(self, asked: dict[str, Any]) -> FitState:
        live, n = self.versions[self.version], self.version
        bright = {side: tuple(_brightness(item["image"]["data"]) for item in items) for side, items in self.sent.items()}
        self.fits.append({**asked, **{side: len(items) for side, items in bright.items()}, "items": self.sent, "version": n})
        self.sent = {"real": [], "generated": []}
        if self.fault == "lose":
            self.fault = ""
            self.restart()
            return self.state
        real, generated = live.real + bright["real"], live.generated + bright["generated"]
        slope = live.slope + 0.1 * (sum(real) / len(real) - sum(generated) / len(generated))
        self.candidate = Kept(slope, real, generated)
        self.state = FitState(
            outcome="running" if self.fault == "slow" else "ready",
            version=n, candidate=n + 1, real=len(bright["real"]), generated=len(bright["generated"]), replayed=len(live.generated),
            losses={"total": 1 / abs(slope)}, accuracy=0.9, accuracy_before=0.6,
        )  # fmt: skip
        if self.fault in ("keep_out", "fail"):
            outcome: Any = "kept_out" if self.fault == "keep_out" else "failed"
            self.candidate, self.state = None, self.state.model_copy(update={"outcome": outcome, "reason": "for the test"})
        return self.state

    def versions_now(self) -> dict[str, Any]:
        kept = [{"version": n, "weights_sha256": one.sum, "replay": len(one.generated)} for n, one in self.versions.items()]
        return {"reward": "brightness", "version": self.version, "kept": kept}

    def admin(self, method: str, what: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        now = time.monotonic()
        if self.away:
            self.away -= 1
            return 503, {"type": "urn:verism:not-ready", "title": "this service is shutting down", "retryable": True}
        if what == "lease" and method == "POST":
            if body.get("lease") not in (None, self.lease):
                return 409, {"type": "urn:verism:no-lease", "title": "take it again", "retryable": False}
            if self.lease and now < self.lease_until and body.get("lease") != self.lease:
                return 409, {
                    "type": "urn:verism:leased",
                    "title": f"{self.holder} has it",
                    "retryable": True,
                    "retry_after_ms": 100,
                }
            if body.get("lease") is None:
                self.lease, self.holder = f"lease {now}", body["holder"]
            self.lease_until = now + body["seconds"]
            told = {"reward": "brightness", "lease": self.lease, "seconds": body["seconds"], "version": self.version}
            return 200, told
        if method == "GET":
            return 200, json.loads(self.state.model_dump_json()) if what == "fit" else self.versions_now()
        if not self.lease or body.get("lease") != self.lease or now > self.lease_until:
            return 409, {"type": "urn:verism:no-lease", "title": "take it again", "retryable": False}
        if what == "lease":
            self.lease = ""
        elif what == "pictures":
            self.sent[body["side"]] += body["items"]
            return 200, {"real": len(self.sent["real"]), "generated": len(self.sent["generated"])}
        elif what == "fit" and self.fault == "refuse":
            return 422, {"type": "urn:verism:invalid", "title": "too few real pictures: send 8", "retryable": False}
        elif what == "fit":
            return 202, json.loads(self.fit(body).model_dump_json())
        elif what == "publish":
            assert self.candidate is not None
            self.version += 1
            self.versions[self.version], self.candidate = self.candidate, None
            self.state = self.state.model_copy(update={"outcome": "published", "version": self.version})
            return 200, json.loads(self.state.model_dump_json())
        elif what == "snapshot":
            self.snapshots.add(self.version)
        elif what == "rollback":
            if body["version"] not in self.versions:
                return 404, {
                    "type": "urn:verism:unknown-version",
                    "title": f"version {body['version']} is not kept",
                    "retryable": False,
                }
            self.version, self.candidate = body["version"], None
            self.versions = {n: one for n, one in self.versions.items() if n <= self.version}
            self.sent = {"real": [], "generated": []}
            self.state = FitState(outcome="idle", version=self.version)
        return 200, self.versions_now()


def _brightness(data: bytes) -> float:
    return sum(data) / len(data) / 255


@contextmanager
def serve() -> Iterator[Refitting]:
    """Scores and admin routes on one free port while inside."""
    service = Refitting()

    class Handler(Answering):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = msgspec.msgpack.decode(data) if data else {}
            if self.path == "/v1/rewards":
                known = [("brightness", service.version), ("darkness", 1)]
                told: dict[str, Any] = {"rewards": [{"name": name, "range": [0, 1], "version": n} for name, n in known]}
                return self._send(200, json.dumps(told).encode(), "application/json")
            if self.path == "/score":
                return self._send(*self._scores(body))
            if self.headers.get("authorization") != "Bearer secret":
                refused = {"type": "urn:verism:unauthorised", "title": "no such key", "retryable": False}
                return self._send(401, json.dumps(refused).encode(), "application/problem+json")
            if "/brightness/" not in self.path:
                status, told = 404, {"type": "urn:verism:unknown-reward", "title": "darkness has no `fit:`", "retryable": False}
            else:
                status, told = service.admin(self.command, self.path.rpartition("/")[2], body)
            return self._send(status, json.dumps(told).encode(), "application/json")

        do_GET = do_POST = do_DELETE = _any

        def _scores(self, request: dict[str, Any]) -> tuple[int, bytes, str]:
            if service.before_score is not None:
                service.before_score(service)
            service.asked.append((request["rewards"], request["require_version"], len(request["items"])))
            pinned = (request["require_version"] or {}).get("brightness", service.version)
            if pinned != service.version:
                problem = {"type": "urn:verism:wrong-version", "title": f"serves {service.version}", "retryable": False}
                return 409, json.dumps(problem).encode(), "application/problem+json"
            slope, items = service.versions[service.version].slope, []
            for item in request["items"]:
                bright = _brightness(item["image"]["data"])
                values = {"brightness": slope * bright, "darkness": 1 - bright}
                items.append(
                    {"id": item["id"], "scores": {name: {"status": "ok", "value": values[name]} for name in request["rewards"]}}
                )
            known = {"brightness": service.version, "darkness": 1}
            rewards = {name: {"version": known[name], "preprocessing": "none"} for name in request["rewards"]}
            answer = {"request_id": request["request_id"], "rewards": rewards, "items": items}
            return 200, msgspec.msgpack.encode(answer), wire.MSGPACK

    with serving(Handler) as service.url:
        yield service
