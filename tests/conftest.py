"""What every test shares: the repository's root, free ports, and a network that ends at this machine."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


class NetworkBlocked(AssertionError):
    """A test reached for another machine: tests may use loopback only."""


def is_loopback(address: Any) -> bool:
    """Whether a socket address stays on this machine: a Unix path, 127.0.0.0/8, ::1, localhost, any."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    return host in ("", "localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but loopback, so that no test depends on the network."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(address: Any) -> None:
        if not is_loopback(address):
            raise NetworkBlocked(f"a test tried to reach {address}; serve what it needs on 127.0.0.1")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        guard(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        guard(address)
        return connect_ex(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
