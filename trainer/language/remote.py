"""A vLLM server over HTTP: asked, and while it is gone waited for. Every wait has an end."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from shared.vllm_server import Server

A = TypeVar("A")
log = logging.getLogger("verism.vllm")
HELP = "python -m trainer.language.serving starts a server as it has to be"


class VllmError(RuntimeError):
    """What a vLLM server refuses, in its own words."""


class ServerGone(VllmError):
    """No server for longer than `outage_s`."""


class Away(Exception):
    """No answer, or none that counts: worth asking again once the server is there."""


class Remote:
    """The server at `url`; `server` where it is a child of this process. `name` is its base model's, `context` the tokens that fit in it."""

    def __init__(self, url: str, key: str, server: Server | None, *, concurrent: int, timeout_s: float, outage_s: float) -> None:
        self.server, self.outage_s, self.timeout_s = server, outage_s, timeout_s
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=concurrent, max_keepalive_connections=concurrent)
        # trust_env would send loopback traffic through a proxy that the environment names
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, limits=limits, trust_env=False)
        self.name, self.context = "", 0

    def start(self) -> None:
        """ValueError where no server comes up, or one that is none of vLLM's."""
        if self.server is not None:
            self.server.start()
        try:
            self._meet()
        except (Away, VllmError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self._http.base_url} does not answer as a vLLM server does ({error}); {HELP}") from error

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self._http.close()

    def models(self) -> dict[str, Mapping[str, Any]]:
        """What it serves, adapters too, by name."""
        return {str(one["id"]): one for one in self._ask("GET", "/v1/models")["data"]}

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        return self._ask("POST", route, json=body)

    def workers(self, method: str, *arguments: Any) -> list[Any]:
        """What each of its workers says to a method of inside_vllm/verism_weights.py."""
        told: list[Any] = self.post("/collective_rpc", {"method": method, "args": arguments, "timeout": self.timeout_s})["results"]
        return told

    def patiently(self, ask: Callable[[], A], back: Callable[[], object] = lambda: None) -> A:
        """What `ask` says; while it says Away, again once the server is there and `back` was called. ServerGone `outage_s` after the first."""
        until = None
        while True:
            try:
                return ask()
            except Away as why:
                until = until or time.monotonic() + self.outage_s
                log.warning("vLLM is away (%s); it is waited for, up to %.0f s more", why, until - time.monotonic())
                self._wait(until, why)
            with suppress(Away):
                back()

    def _wait(self, until: float, why: Away) -> None:
        pause = 0.2
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(2.0, 1.5 * pause)
            if self.server is None or self.server.ready:
                with suppress(Away):
                    if self._healthy():
                        self._meet()
                        return
        said = f". The end of its log:\n{self.server.last_lines()}" if self.server is not None else ""
        raise ServerGone(
            f"vLLM at {self._http.base_url} was away for {self.outage_s:.0f} s ({why}): start it again and resume the run, or raise "
            f"outage_s{said}"
        )

    def _meet(self) -> None:
        own = next(one for one in self.models().values() if one.get("parent") is None)
        self.name, self.context = str(own["id"]), int(own["max_model_len"])

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def _ask(self, method: str, route: str, **rest: Any) -> Any:
        """Away, or VllmError with the server's words."""
        if self.server is not None and not self.server.ready:
            raise Away("its process has ended")
        try:
            answer = self._http.request(method, route, **rest)
        except httpx.TransportError as error:
            raise Away(f"{route}: {type(error).__name__} {error}") from error
        if answer.status_code == 200:
            with suppress(json.JSONDecodeError):
                return answer.json()
            return answer.text
        said = f"{route} says {answer.status_code}: {answer.text[:500]}"
        if answer.status_code in (408, 429, 502, 503, 504) or (answer.status_code == 500 and not self._healthy()):
            raise Away(said)
        if answer.status_code == 404 and "NotFoundError" in answer.text:  # a model that it does not have, or not any more
            raise NotThere(said)
        raise VllmError(f"{said}; {HELP}")


class NotThere(VllmError):
    """A model that the server does not have."""
