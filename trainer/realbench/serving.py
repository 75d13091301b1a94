"""The services of a bench, as a process of their own for as long as it lasts."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from trainer.config import ConfigError

_START_S = 900.0  # a service that ended is noticed at once; one that is slow may be so


@contextlib.contextmanager
def started(config: dict[str, Any] | None, out: Path, wanted: bool) -> Iterator[str]:
    """Its URL, once it is ready; ConfigError with the end of its log when it does not start. Nothing where it is not wanted."""
    if config is None or not wanted:
        yield ""
        return
    out.mkdir(parents=True, exist_ok=True)
    told, log, port = out / "services.yaml", out / "services.log", _free_port()
    told.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "services", str(told), "--port", str(port)]
    with log.open("wb") as file:  # Ctrl-C is for the bench: it ends the services when its own work is put away
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=60, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    last = log.read_text(errors="replace")[-1500:].strip()
    raise ConfigError(f"the services of `serve` did not start; the end of {log}:\n{last}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
