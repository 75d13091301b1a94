"""A vLLM server as a child on loopback: started, watched, and started again when it dies."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

log = logging.getLogger("verism.vllm")
_LOOK_S, _TELL_S, _STOP_S, _PAUSE_S = 0.5, 15.0, 10.0, 30.0
# Run first in the child: when the thread that started it goes, so does the server. Linux only; elsewhere `close` alone ends it.
_GUARD = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Server:
    """`arguments` are what the interpreter `python` runs; `url` answers /health when it can work."""

    def __init__(
        self,
        python: Path,
        arguments: Sequence[str],
        url: str,
        environment: Mapping[str, str],
        log_file: Path | None,
        start_s: float,
    ) -> None:
        guard = ["-c", _GUARD] if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "prctl") else []
        self.url, self._command = url, [str(python), *guard, *arguments]
        self._environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment}
        if log_file is None:
            handle, name = tempfile.mkstemp(prefix="verism-vllm-", suffix=".log")
            os.close(handle)
            log_file = Path(name)
        self.log_file, self._start_s = log_file, start_s
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._ready, self._closing, self._told = threading.Event(), threading.Event(), threading.Event()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._watch, name="vllm-server", daemon=True)

    @property
    def ready(self) -> bool:
        """The process lives and its /health answered."""
        return self._ready.is_set() and self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Returns when the server is ready; ValueError with the end of its log when it did not come up."""
        self._thread.start()
        self._told.wait()
        if self._error is not None:
            raise ValueError(self._error)

    def close(self) -> None:
        """Ends the server and the thread that watches it."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S + 5)

    def last_lines(self, count: int = 12) -> str:
        """The end of the log."""
        with self.log_file.open("rb") as file:
            file.seek(max(0, self.log_file.stat().st_size - 16_384))
            lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(line[:300] for line in lines[-count:])

    def _watch(self) -> None:
        tries = 0
        while not self._closing.is_set():
            came_up, why = False, ""
            try:
                why = self._come_up()
                came_up = not why
            except OSError as error:
                why = f"cannot run {self._command[0]}: {error}; make vllm builds it, or set python to one that has vLLM"
            if came_up:
                tries = 0
                self._ready.set()
                self._told.set()
                why = self._stay()
            self._ready.clear()
            self._end()
            if self._closing.is_set():
                break
            if not self._told.is_set():  # the first start: whoever waits for it is told, and nothing is tried again
                self._error = why
                break
            tries += 1
            pause = min(_PAUSE_S, 0.5 * 2 ** (tries - 1))
            log.error("%s; starting it again in %.1f s. The end of %s:\n%s", why, pause, self.log_file, self.last_lines())
            self._closing.wait(pause)
        self._told.set()

    def _come_up(self) -> str:
        """Starts the process and waits for /health; what went wrong, or nothing."""
        self.starts += 1
        with self.log_file.open("ab") as file:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=tempfile.gettempdir(),
                start_new_session=True,
            )
        log.info("starting a vLLM server at %s; its log: %s", self.url, self.log_file)
        began = told = time.monotonic()
        while not self._closing.wait(_LOOK_S):
            now = time.monotonic()
            if self.process.poll() is not None:
                return (
                    f"the vLLM server ended with {self.process.returncode} while starting. The end of its log:\n{self.last_lines()}"
                )
            if self._healthy() == 200:
                log.info("the vLLM server at %s is ready after %.0f s", self.url, now - began)
                return ""
            if now - began > self._start_s:
                return f"the vLLM server did not start within {self._start_s:.0f} s (start_s). The end of its log:\n{self.last_lines()}"
            if now - told > _TELL_S:
                told = now
                log.info("the vLLM server starts, %.0f s so far: %s", now - began, self.last_lines(1))
        return "closed while starting"

    def _stay(self) -> str:
        """Until the process ends, says that its engine is dead, or is no longer wanted; why."""
        assert self.process is not None
        looked = time.monotonic()
        while not self._closing.wait(_LOOK_S):
            if self.process.poll() is not None:
                return f"the vLLM server ended with {self.process.returncode}"
            if time.monotonic() - looked > 10 * _LOOK_S:
                looked = time.monotonic()
                if self._healthy() >= 500:
                    return "the vLLM server says that its engine is dead"
        return "closed"

    def _healthy(self) -> int:
        try:
            return httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code
        except httpx.HTTPError:
            return 0

    def _end(self) -> None:
        """The process and all that it started."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """A port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
