"""Refit a reward of a service, over its admin listener.

>>> with FitClient("http://localhost:8900", key, reward="detector", holder="my run") as fits:
...     fits.lease()
...     fits.add("real", photographs, prompts); fits.add("generated", samples, prompts)
...     fits.fit(); state = fits.wait()

Errors are those of shared.client: RequestFailed with what the service said (409 while another holder has the lease), ServiceUnreachable.
"""

import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.client import RequestFailed, _check_url, _fits, _problem
from shared.errors import ServiceUnreachable
from shared.fit_wire import (
    MOST_PICTURES,
    FitPicture,
    FitPictures,
    FitRequest,
    FitState,
    Hold,
    Lease,
    LeaseBody,
    RollbackBody,
    Side,
    Versions,
    Waiting,
    pack,
)
from shared.image import encode
from shared.schema import Encoding, Frozen, Problem
from shared.wire import MSGPACK

M = TypeVar("M", bound=Frozen)


class FitClient:
    """One reward. The lease is taken once, is renewed by every call that shows it and by `wait`, and given back by `close`."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        reward: str,
        holder: str = "a client",
        seconds: float = 60.0,
        timeout_s: float = 60.0,
        encoding: Encoding = "rgb8",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`url` is the admin listener's; `key` (default: the variable VERISM_ADMIN_KEY) its key; a lease lasts `seconds`."""
        self.url, self.reward, self.holder, self.seconds, self.encoding = url.rstrip("/"), reward, holder, seconds, encoding
        _check_url(reward, self.url)
        given = key or os.environ.get("VERISM_ADMIN_KEY")
        headers = {"authorization": f"Bearer {given}"} if given else {}
        timeout = httpx.Timeout(timeout_s, connect=min(5.0, timeout_s))
        self._http = httpx.Client(headers=headers, timeout=timeout, transport=transport, trust_env=False)
        self._lease: Lease | None = None
        self._renewed = 0.0

    def lease(self) -> Lease:
        """Take it, or renew what is held. One that ran out meanwhile is taken anew, unless somebody else has it."""
        held = None if self._lease is None else self._lease.lease
        try:
            self._lease = self._hold(held)
        except RequestFailed as error:
            if held is None or not error.problem().type.endswith(":no-lease"):
                raise
            self._lease = self._hold(None)
        self._renewed = time.monotonic()
        return self._lease

    def _hold(self, held: str | None) -> Lease:
        return self._ask(Lease, "POST", "lease", Hold(holder=self.holder, seconds=self.seconds, lease=held))

    def release(self) -> None:
        """Give it back; nothing when none is held."""
        if self._lease is not None:
            held, self._lease = self._lease, None
            self._send("DELETE", "lease", LeaseBody(lease=held.lease))

    def add(
        self,
        side: Side,
        images: Sequence[NDArray[np.uint8]],
        prompts: Sequence[str | None] | None = None,
        groups: Sequence[str | None] | None = None,
    ) -> Waiting | None:
        """Examples for the next refit: pictures (H, W, 3) uint8. Sent in pieces below what a service takes; None when there are none."""
        prompts = prompts if prompts is not None else [None] * len(images)
        groups = groups if groups is not None else [None] * len(images)
        told: Waiting | None = None
        items: list[FitPicture] = []
        load = 0, 0, 0

        def send() -> Waiting:
            body = pack(FitPictures.model_construct(lease=self._shown(), side=side, items=items))
            return self._ask(Waiting, "POST", "pictures", body)

        for image, prompt, group in zip(images, prompts, groups, strict=True):
            data = encode(image, self.encoding)
            cost = 1, len(data.data), data.height * data.width
            if items and (len(items) == MOST_PICTURES or not _fits(load, [cost])):
                told, items, load = send(), [], (0, 0, 0)
            items.append(FitPicture.model_construct(image=data, prompt=prompt, group=group))
            load = load[0] + cost[0], load[1] + cost[1], load[2] + cost[2]
        return send() if items else told

    def fit(self, *, publish: bool = True, until_accuracy: float | None = None, rounds: int | None = None) -> FitState:
        """Begin a refit with what was added; it goes on in the service's background."""
        asked = FitRequest(lease=self._shown(), publish=publish, until_accuracy=until_accuracy, rounds=rounds)
        return self._ask(FitState, "POST", "fit", asked)

    def state(self) -> FitState:
        """How the last refit goes, or went."""
        return self._ask(FitState, "GET", "fit")

    def wait(self, timeout_s: float = 600.0, progress: Callable[[FitState], None] | None = None, every_s: float = 0.2) -> FitState:
        """Until the refit is over, however it went. TimeoutError when it is not by then; RequestFailed `fit-lost` when the service ended
        meanwhile: started again it serves the last version, and the pictures have to be sent again."""
        end, away = time.monotonic() + timeout_s, None
        while True:
            try:
                state: FitState | None = self.state()
                self._renew_in_time()
            except ServiceUnreachable as error:
                state, away = None, error
            if state is not None:
                if progress is not None:
                    progress(state)
                if state.outcome == "idle":
                    title = f"{self.reward}: the refit is gone, for its service ends or was started again; add the pictures and fit again"
                    raise RequestFailed(Problem(type="urn:verism:fit-lost", title=title, retryable=True))
                if state.outcome != "running":
                    return state
            if time.monotonic() > end:
                if state is None and away is not None:
                    raise away
                raise TimeoutError(
                    f"{self.reward} at {self.url} is not refitted after {timeout_s:g} s; wait longer, or lower `rounds`"
                )
            time.sleep(every_s)

    def _renew_in_time(self) -> None:
        if self._lease is not None and time.monotonic() - self._renewed > self._lease.seconds / 3:
            self.lease()

    def publish(self) -> FitState:
        """Serve what was fitted with publish=False."""
        return self._ask(FitState, "POST", "publish", LeaseBody(lease=self._shown()))

    def snapshot(self) -> Versions:
        """Keep the version that is served, with its average, optimiser and replay buffer, until it is rolled back over."""
        return self._ask(Versions, "POST", "snapshot", LeaseBody(lease=self._shown()))

    def rollback(self, version: int) -> Versions:
        """Serve a kept version again, and go on from it; a running refit is ended, later versions are forgotten."""
        return self._ask(Versions, "POST", "rollback", RollbackBody(lease=self._shown(), version=version))

    def versions(self) -> Versions:
        return self._ask(Versions, "GET", "versions")

    def close(self) -> None:
        """Give the lease back, where the service still answers, and end the connections."""
        try:
            self.release()
        except (RequestFailed, ServiceUnreachable):
            pass
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _shown(self) -> str:
        if self._lease is None:
            self.lease()
        assert self._lease is not None
        self._renewed = time.monotonic()
        return self._lease.lease

    def _ask(self, model: type[M], method: str, path: str, body: Frozen | bytes | None = None) -> M:
        answer = self._send(method, path, body)
        try:
            return model.model_validate(msgspec.json.decode(answer.content))
        except (ValidationError, msgspec.DecodeError) as error:
            title = f"{self.url} answered something else than {model.__name__}: is this the admin listener?"
            raise RequestFailed(Problem(type="urn:verism:bad-answer", title=title)) from error

    def _send(self, method: str, path: str, body: Frozen | bytes | None) -> httpx.Response:
        content = msgspec.msgpack.encode(body.model_dump(mode="python")) if isinstance(body, Frozen) else body
        headers = {} if content is None else {"content-type": MSGPACK}
        try:
            answer = self._http.request(method, f"{self.url}/admin/rewards/{self.reward}/{path}", content=content, headers=headers)
        except httpx.HTTPError as error:
            kind = type(error).__name__
            raise ServiceUnreachable(
                f"{self.url} does not answer ({kind}): is the admin listener of `verism-serve` there?"
            ) from error
        if answer.status_code not in (200, 202):
            raise RequestFailed(_problem(self.url, answer))
        return answer
