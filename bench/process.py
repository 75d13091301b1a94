"""Services as processes of their own: a port, and the wait until they are ready."""

import socket
import time

import httpx


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(url: str) -> None:
    """Until /readyz says so; RuntimeError after about a minute."""
    for _ in range(300):
        try:
            if httpx.get(f"{url}/readyz", timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError("the service did not start; try `verism-serve examples/serve/detector.yaml` to see why")
