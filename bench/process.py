"""Services as processes of their own, for benchmarks and tests: a port, the start, the wait until they are ready, their CPU, their end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

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
    """`verism-serve CONFIG --port PORT` with one thread a forward pass, and with `variables` beside those of this process.

    In a session of its own: Ctrl-C is for whoever started it, and who asks it for scores goes on having them until that one ends it.
    """
    command = [sys.executable, "-m", "services", str(config), "--port", str(port)]
    environment = {**os.environ, **ENVIRONMENT, **(variables or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


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


@contextlib.contextmanager
def running(
    config: str | Path,
    *,
    stderr: int | IO[str] = subprocess.PIPE,
    variables: Mapping[str, str] | None = None,
    limit_s: float = 90.0,
) -> Iterator[str]:
    """The URL of `verism-serve CONFIG` on a free port, when it is ready. It ends with the block."""
    port = free_port()
    url, process = f"http://127.0.0.1:{port}", start(config, port, stderr, variables)
    try:
        wait(url, process, limit_s)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def tree(processes: Sequence[subprocess.Popen[Any]]) -> list[psutil.Process]:
    """These that are alive, with all that they started."""
    alive: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            alive += [root, *root.children(recursive=True)]
    return alive


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system time so far, of those that are alive."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """A signal to those that are alive."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end(processes: Sequence[subprocess.Popen[Any]], everything: Sequence[psutil.Process], limit_s: float) -> None:
    """Let `everything`, their `tree`, go on where it was stopped, ask, wait, then kill whatever is left of it."""
    send(everything, signal.SIGCONT)
    for process in processes:
        process.terminate()
    psutil.wait_procs(everything, timeout=limit_s)
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    for process in processes:
        process.wait(limit_s)
