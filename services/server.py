"""uvicorn with a guarded door: silent and slow connections are closed, and there are never more than so many."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.config import ServiceConfig

LOCK_S = 5e-4  # how long a busy event loop may keep Python's lock from a forward pass, which asks for it after each operation
READ_AT_ONCE = 1 << 20  # bytes taken from a socket in one go, and held before it is paused


def guarded(max_connections: int, header_timeout_s: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which closes a connection that has not sent whole headers in time, and one too many."""

    class Guarded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= max_connections:
                transport.write(
                    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
                transport.close()
            super().connection_made(transport)
            with contextlib.suppress(AttributeError):
                transport.max_size = READ_AT_ONCE
            self._arm()

        def _arm(self) -> None:
            self._disarm()
            self._timer = self.loop.call_later(header_timeout_s, self.transport.close)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def on_message_begin(self) -> None:
            self._arm()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._disarm()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

    return Guarded


class Server(uvicorn.Server):
    """Signals are handled once for all servers of the process, by `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(app: FastAPI, config: ServiceConfig, admin: FastAPI | None = None) -> int:
    """Until SIGTERM or SIGINT: readiness off, accepted work answered, exit 0. 1 when a device was lost, for a supervisor to restart."""
    common: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": int(config.drain_s) + 1}
    door = guarded(config.max_connections, config.header_timeout_s)
    servers = [Server(uvicorn.Config(app, config.host, config.port, http=door, timeout_keep_alive=75, **common))]
    if admin is not None and config.admin is not None:
        servers.append(Server(uvicorn.Config(admin, config.admin.host, config.admin.port, http=door, **common)))
    state = app.state.verism
    sys.setswitchinterval(LOCK_S)

    async def run() -> int:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            state.draining = True
            for server in servers:
                server.force_exit = server.should_exit
                server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        tasks = [asyncio.create_task(server.serve()) for server in servers]
        lost = False
        while not all(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=1.0)
            if any(lane.lost for lane in state.all_lanes) and not lost:
                lost = True
                stop()
        for task in tasks:
            task.result()
        return 1 if lost else 0

    return asyncio.run(run())
