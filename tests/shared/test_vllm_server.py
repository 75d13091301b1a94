"""The supervisor of a server, with real processes of a small server in vLLM's place: its life is what is tested, not its answers."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from shared.vllm_server import Server

SCRIPT = """
import http.server, os, pathlib, subprocess, sys, time
port, state = int(sys.argv[1]), pathlib.Path(sys.argv[2])
print("loading weights", flush=True)
if (state / "broken").exists():
    sys.exit("no such model")
if (state / "slow").exists():
    time.sleep(60)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(state / "child").write_text(str(child.pid))
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if (state / "sick").exists() else 200)
        self.end_headers()
    def log_message(self, *a):
        pass
http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """A process that is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def make(tmp_path: Path, free_port: int) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)

    def one(start_s: float = 20.0, python: Path = Path(sys.executable)) -> Server:
        arguments = [str(script), str(free_port), str(tmp_path)]
        made.append(Server(python, arguments, f"http://127.0.0.1:{free_port}", {}, tmp_path / "log.txt", start_s))
        return made[-1]

    yield one
    for server in made:
        server.close()


def test_a_killed_server_is_not_ready_and_comes_back(make: Callable[..., Server], tmp_path: Path) -> None:
    server = make()
    assert not server.ready
    server.start()
    assert server.ready and httpx.get(f"{server.url}/health").status_code == 200
    child = int((tmp_path / "child").read_text())
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    until(lambda: not server.ready, 2)
    until(lambda: server.ready)
    assert server.starts == 2 and not lives(child), "what the dead server had started is gone too"
    last = int((tmp_path / "child").read_text())
    server.close()
    assert not server.ready
    until(lambda: not lives(last), 2)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_server_whose_engine_is_dead_is_started_again(make: Callable[..., Server], tmp_path: Path) -> None:
    server = make()
    server.start()
    (tmp_path / "sick").touch()
    until(lambda: not server.ready)
    (tmp_path / "sick").unlink()
    until(lambda: server.ready)
    assert server.starts >= 2


def test_a_server_that_does_not_come_up_is_said_with_the_end_of_its_log(make: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(ValueError, match=r"ended with 1 while starting[\s\S]*loading weights\nno such model"):
        make().start()
    with pytest.raises(ValueError, match="cannot run /nowhere/python.*make vllm"):
        make(python=Path("/nowhere/python")).start()
    (tmp_path / "broken").unlink()
    (tmp_path / "slow").touch()
    with pytest.raises(ValueError, match=r"did not start within 1 s \(start_s\)[\s\S]*loading weights"):
        make(start_s=1).start()


def test_one_that_breaks_later_is_tried_again_more_and_more_seldom(
    make: Callable[..., Server], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = make()
    server.start()
    (tmp_path / "broken").touch()
    assert server.process is not None
    with caplog.at_level(logging.ERROR, "verism.vllm"):
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: server.starts >= 3)
    assert not server.ready
    assert (
        "starting it again in 0.5 s" in caplog.text
        and "starting it again in 1.0 s" in caplog.text
        and "no such model" in caplog.text
    )
    (tmp_path / "broken").unlink()
    until(lambda: server.ready)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_server_does_not_outlive_who_started_it(tmp_path: Path, free_port: int, root: Path) -> None:
    (tmp_path / "serve.py").write_text(SCRIPT)
    code = f"""
import pathlib, sys, time
from shared.vllm_server import Server
here = pathlib.Path({str(tmp_path)!r})
arguments = [str(here / "serve.py"), "{free_port}", str(here)]
server = Server(pathlib.Path(sys.executable), arguments, "http://127.0.0.1:{free_port}", {{}}, here / "log.txt", 20.0)
server.start()
print(server.process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert lives(pid)
        owner.kill()
    until(lambda: not lives(pid), 5)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
