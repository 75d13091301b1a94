"""The page over HTTP, by the standard library: only GET, only from what was named at the start; looks at the folders when somebody asks."""

import gzip
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from trainer.watch.files import names, stamp
from trainer.watch.record import Record, trouble

PORT, PORTS = 8790, 20  # the first one asked for, and how many above it are tried
RUNS = 32  # at most; of more the newest
EVERY_S, BUDGET_S = 1.0, 0.25  # the folders are looked at so often at most, and for so long at a time, however many watch
CONNECTIONS = 64
HERE = Path(__file__).parent
PAGES = {"/": ("watch.html", "text/html"), "/watch.css": ("watch.css", "text/css"), "/watch.js": ("watch.js", "text/javascript")}
HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
HERE_ONLY = ("127.0.0.1", "localhost", "::1")


class Watch:
    """The runs of some paths: each a run folder, one that is not there yet, or a folder of runs."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.boot = list(dict.fromkeys(paths)), secrets.token_hex(4)
        self.records: dict[Path, Record] = {}
        self._lock, self._looked, self._next = threading.Lock(), 0.0, 0
        self.more, self.left_out = False, 0  # whether something is left to read; runs beyond RUNS

    def look(self) -> None:
        """Bring all up to date, unless that was just done."""
        if not self.more and time.monotonic() - self._looked < EVERY_S:
            return
        with self._lock:
            now = time.monotonic()
            if not self.more and now - self._looked < EVERY_S:
                return
            self._find()
            self.more, records = False, list(self.records.values())
            for n in range(len(records)):  # a long one must not keep the others waiting for ever
                record = records[(self._next + n) % len(records)]
                try:
                    self.more |= record.look(now + BUDGET_S)
                except Exception as error:  # nor a bad one take them down
                    record.stumbled(error)
            self._next += 1
            self._looked = time.monotonic()

    def brief(self) -> dict[str, Any]:
        with self._lock:
            runs = [_shown(record, Record.brief) for record in self.records.values()]
            return {"boot": self.boot, "more": self.more, "left_out": self.left_out, "runs": runs}

    def whole(self, wanted: str, steps: str, evals: str) -> dict[str, Any] | None:
        with self._lock:
            record = self._of(wanted)
            return _shown(record, lambda one: one.whole(steps, evals)) if record is not None else None

    def grid(self, wanted: str, step: int) -> bytes | None:
        with self._lock:
            record = self._of(wanted)
            known = record is not None and step in record.grids
        return record.grid(step) if known and record is not None else None

    def _of(self, wanted: str) -> Record | None:
        return next((record for record in self.records.values() if record.id == wanted), None)

    def _find(self) -> None:
        found: list[Path] = []
        for path in self.paths:
            inner = [] if _is_run(path) else sorted(child for name in names(path, 2000) if _is_run(child := path / name))
            found += inner or [path]
        known = [path for path, record in self.records.items() if record.seen]  # one that was there stays, and is said to be gone
        kept = list(dict.fromkeys([*found, *known]))
        self.left_out = max(0, len(kept) - RUNS)
        if self.left_out:
            kept = sorted(kept, key=_written, reverse=True)[:RUNS]
        self.records = {path: self.records.get(path) or Record(path, self.boot) for path in kept}


def _is_run(path: Path) -> bool:
    try:
        return (path / "metrics.jsonl").is_file() or (path / "config.yaml").is_file()
    except (OSError, ValueError):
        return False


def _written(path: Path) -> int:
    """When something was last written into a run, in ns."""
    at = stamp(path, "metrics.jsonl") or stamp(path, "config.yaml")
    return at[3] if at is not None else 0


def _shown(record: Record, tell: Callable[[Record], dict[str, Any]]) -> dict[str, Any]:
    """What a run tells, or that it cannot be shown: one that nobody thought of must not take the others down."""
    try:
        told = tell(record)
        json.dumps(told, allow_nan=False)
        return told
    except Exception as error:
        why = f"cannot be shown ({trouble(error)})"
        warning = {"kind": "problem", "step": None, "until": None, "text": f"this run {why}", "level": "bad"}
        wrong = {"revision": record.revision, "state": "unreadable", "reason": why, "warnings": [warning]}
        return tell(Record(record.folder, "")) | wrong


class Server(ThreadingHTTPServer):
    """Threads end with the process; more than CONNECTIONS at once are turned away."""

    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True

    def __init__(self, watch: Watch, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.watch, self.host, self.token = watch, host, token
        self.pages = {path: (_page(name), kind) for path, (name, kind) in PAGES.items()}
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        shown = "localhost" if self.host in HERE_ONLY else socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        shown = f"[{shown}]" if ":" in shown else shown
        return f"http://{shown}:{self.server_address[1]}/" + (f"?token={self.token}" if self.token else "")

    def server_bind(self) -> None:
        """Without the look-up of the host's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.host), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that goes away in mid-answer is no news."""


def open_server(watch: Watch, host: str, port: int | None, token: str | None) -> Server:
    """On `port`; without one on the first free one from PORT on. OSError when there is none."""
    for number in [port] if port is not None else range(PORT, PORT + PORTS):
        try:
            return Server(watch, host, number, token)
        except OSError as error:
            problem = error
    raise OSError(problem.errno, f"{problem.strerror}: {host}, port {port or f'{PORT} to {PORT + PORTS - 1}'}; give another --port")


class Handler(BaseHTTPRequestHandler):
    """GET / and its two files, /runs, /runs/ID, /runs/ID/grids/STEP.png."""

    server: Server
    protocol_version, server_version, sys_version = "HTTP/1.1", "verism-watch", ""
    timeout = 30  # of a connection on which nothing comes
    wbufsize = 1 << 16  # headers and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal belongs to the run."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            parts = urlsplit(self.path)
            asked = {key: values[-1] for key, values in parse_qs(parts.query, max_num_fields=8).items()}
        except ValueError:
            return self._problem(400, "the address cannot be read")
        if parts.path in PAGES and parts.path != "/":
            return self._file(parts.path)
        if not self._may(asked.get("token")):
            return None
        if parts.path == "/":
            return self._file("/")
        place = parts.path.strip("/").split("/")
        if place == ["runs"]:
            self.server.watch.look()
            return self._json(self.server.watch.brief())
        if len(place) == 2 and place[0] == "runs":
            told = self.server.watch.whole(place[1], asked.get("steps", ""), asked.get("evals", ""))
            return self._json(told) if told is not None else self._problem(404, "no such run is watched here")
        if len(place) == 4 and (place[0], place[2]) == ("runs", "grids"):
            step = place[3].removesuffix(".png")
            picture = (
                self.server.watch.grid(place[1], int(step)) if step.isdecimal() and step.isascii() and len(step) < 13 else None
            )
            if picture is None:
                return self._problem(404, "no such grid")
            return self._answer(200, picture, "image/png", {"cache-control": "private, max-age=3600"})
        return self._problem(404, "nothing lies here; / has the page")

    def _may(self, told: str | None) -> bool:
        """On this machine alone: whoever calls it by a name of this machine. Opened to others: who has the token, in the address or, from then
        on, in a cookie."""
        server = self.server
        if server.token is None:
            host = self.headers.get("host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if name.strip("[]") in HERE_ONLY:
                return True
            self._problem(403, f"this page answers to localhost alone, not to {host[:80]!r}: open it there, or start with --host")
            return False
        cookie = f"verism_watch_{server.server_port}"
        try:
            held = SimpleCookie(self.headers.get("cookie", "")).get(cookie)
        except CookieError:
            held = None
        bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
        tokens = (told or "", held.value if held is not None else "", bearer)
        if not any(hmac.compare_digest(token.encode(errors="replace"), server.token.encode()) for token in tokens):
            self._problem(401, "this page needs its token: open the address that verism-watch printed")
            return False
        if told:
            self._more = {"set-cookie": f"{cookie}={server.token}; Path=/; HttpOnly; SameSite=Strict"}
        return True

    _more: Mapping[str, str] = {}

    def _file(self, path: str) -> None:
        body, kind = self.server.pages[path]
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {"cache-control": "no-cache", "etag": tag}
        if self.headers.get("if-none-match") == tag:
            return self._answer(304, b"", None, headers)
        return self._answer(200, body, f"{kind}; charset=utf-8", headers)

    def _json(self, value: Any) -> None:
        body = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        self._answer(200, body, "application/json", {"cache-control": "no-store"})

    def _problem(self, status: int, title: str) -> None:
        body = json.dumps({"type": f"urn:verism:watch-{status}", "title": title, "status": status}).encode()
        self._answer(status, body, "application/problem+json", {"cache-control": "no-store"})

    def _answer(self, status: int, body: bytes, kind: str | None, headers: Mapping[str, str]) -> None:
        zipped = len(body) > 2048 and kind != "image/png" and "gzip" in self.headers.get("accept-encoding", "")
        if zipped:
            body = gzip.compress(body, 4, mtime=0)
        self.send_response(status)
        for name, value in {**HEADERS, **headers, **self._more, **({"content-encoding": "gzip"} if zipped else {})}.items():
            self.send_header(name, value)
        self._more = {}
        if kind is not None:
            self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _page(name: str) -> bytes:
    return (HERE / name).read_bytes()
