"""Services as processes of their own, for benchmarks and tests: a port, the start, and the wait until they are ready."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import httpx

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    config: str | Path, port: int, stderr: int | IO[str] = subprocess.PIPE, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`verism-serve CONFIG --port PORT` with one thread a forward pass, and with `variables` beside those of this process."""
    command = [sys.executable, "-m", "services", str(config), "--port", str(port)]
    environment = {**os.environ, **ENVIRONMENT, **(variables or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


def wait(url: str, process: subprocess.Popen[bytes] | None = None, limit_s: float = 90.0) -> None:
    """Until /readyz says so; RuntimeError after `limit_s`, or when `process` has ended, with what it said where that was kept."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and (process is None or process.poll() is None):
        try:
            if httpx.get(f"{url}/readyz", timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    if process is not None and process.poll() is not None and process.stderr is not None:
        raise RuntimeError("the service ended: " + process.stderr.read().decode(errors="replace"))
    raise RuntimeError("the service did not start; try `verism-serve examples/serve/detector.yaml` to see why")
