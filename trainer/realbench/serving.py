"""The services of a bench, as a process of their own for as long as it lasts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from shared.vllm_server import free_port
from trainer.config import ConfigError
from trainer.realbench.config import ROOT

_START_S = 900.0  # a service that ended is noticed at once; one that is slow may be so


@contextlib.contextmanager
def started(config: dict[str, Any], out: Path) -> Iterator[str]:
    """Its URL, once it is ready; ConfigError with the end of its log when it does not start."""
    out.mkdir(parents=True, exist_ok=True)
    told, log, port = out / "services.yaml", out / "services.log", free_port()
    told.write_text(yaml.safe_dump(config, sort_keys=False))
    places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": places}
    command = [sys.executable, "-P", "-m", "services", str(told), "--port", str(port)]  # -P: not the services/ of where one stands
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
