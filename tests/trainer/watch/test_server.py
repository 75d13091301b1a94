"""The page over HTTP: who may see it, what it gives away, what many viewers cost."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.trainer.watch.runs import a_run, append, evaluation, step
from trainer.watch import __main__ as command
from trainer.watch import server as module
from trainer.watch.server import Server, Watch, open_server

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def serving(*paths: Path, host: str = "127.0.0.1", token: str | None = None) -> Iterator[Server]:
    server = Server(Watch(paths), host, 0, token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(server: Server, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{server.server_port}{path}", headers=headers, trust_env=False, timeout=30)


def test_a_run_over_http(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "world", [evaluation(0), step(1), step(2)], grids=[0])
    with serving(folder) as server:
        told = get(server, "/runs").json()["runs"]
        assert [(run["name"], run["step"]) for run in told] == [("world", 2)]
        run = get(server, f"/runs/{told[0]['id']}").json()
        assert run["train"]["at"] == [1, 2] and run["revision"] == told[0]["revision"]
        append(folder, [step(3)])
        server.watch._looked = 0.0  # it looks once a second
        assert get(server, "/runs").json()["runs"][0]["revision"] > run["revision"]
        more = get(server, f"/runs/{told[0]['id']}?steps={run['train']['cursor']}").json()["train"]
        assert more["from"] == 1 and more["at"] == [2, 3]
        picture = get(server, f"/runs/{told[0]['id']}/grids/0.png?v=x")
        assert picture.headers["content-type"] == "image/png"
        assert picture.content == (folder / "grids" / "step_00000.png").read_bytes()
        for name in ("/", "/watch.css", "/watch.js"):
            page = get(server, name)
            assert page.status_code == 200 and page.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert get(server, name, **{"if-none-match": page.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/runs/../../etc/passwd",
        "/runs/ID/config.yaml",
        "/runs/ID/grids/../config.yaml",
        "/runs/ID/grids/..%2f..%2fconfig.yaml",
        "/runs/ID/grids/1.png",
        "/runs/ID/grids/-1.png",
        "/runs/ID/grids/²",
        "/runs/ID/grids/" + "9" * 5000,
        "/runs/other",
        "/watch.py",
    ],
)
def test_nothing_else_is_given_away(tmp_path: Path, path: str) -> None:
    with serving(a_run(tmp_path / "r", [evaluation(0)], grids=[0])) as server:
        wanted = path.replace("ID", get(server, "/runs").json()["runs"][0]["id"]).encode()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as caller:  # httpx would tidy the path
            caller.sendall(b"GET " + wanted + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: caller.recv(65536), b""))
        assert answer.split(b" ")[1] in (b"404", b"400", b"414"), answer[:200]
        assert b"secret" not in answer


def test_only_this_machine_by_its_own_name(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        port = server.server_port
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
            assert get(server, "/runs", host=host).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "[::1].evil"):
            assert get(server, "/runs", host=host).status_code == 403
        assert httpx.post(f"http://127.0.0.1:{port}/runs", trust_env=False).status_code == 501


def test_others_need_the_token(tmp_path: Path) -> None:
    token = "a-token-for-the-test"
    with serving(a_run(tmp_path / "r", [evaluation(0)]), host="0.0.0.0", token=token) as server:
        assert token in server.url
        for path in ("/", "/runs", "/runs?token=", "/runs?token=wrong", "/runs?token=%C3%A9", "/runs/x", "/nothing"):
            assert get(server, path).status_code == 401, path
        assert get(server, "/runs", cookie="a=b; \x7f=;;").status_code == 401
        first = get(server, f"/?token={token}", host="anything.example")
        cookie = first.headers["set-cookie"]
        assert first.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert get(server, "/runs", cookie=cookie.split(";")[0]).status_code == 200
        assert get(server, "/runs", authorization=f"Bearer {token}").status_code == 200


def test_a_folder_of_runs_and_ones_that_come_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)

    def names(server: Server) -> list[tuple[str, str]]:
        return [(run["name"], run["state"]) for run in get(server, "/runs").json()["runs"]]

    with serving(tmp_path / "runs", tmp_path / "later") as server:
        assert names(server) == [("runs", "waiting"), ("later", "waiting")]
        a_run(tmp_path / "runs" / "b", name="b")
        (tmp_path / "runs" / "notes").mkdir()
        assert names(server) == [("b", "running"), ("later", "waiting")]
        a_run(tmp_path / "runs" / "a", name="a")
        a_run(tmp_path / "later", name="late")
        assert names(server) == [("a", "running"), ("b", "running"), ("late", "running")]
        (tmp_path / "runs" / "b").rename(tmp_path / "elsewhere")
        assert names(server) == [("a", "running"), ("late", "running"), ("b", "gone")]


@pytest.mark.parametrize("where", ["look", "brief", "whole"])
def test_a_run_that_cannot_be_read_does_not_take_the_others_down(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bad", "good"):
        a_run(tmp_path / name, [evaluation(0), step(1)], name=name)
    inner = getattr(module.Record, where)

    def stumble(record: module.Record, *args: object) -> object:
        if record.folder.name == "bad" and record.seen | (where == "look"):
            raise TypeError("nobody thought of this")
        return inner(record, *args)

    monkeypatch.setattr(module.Record, where, stumble)
    with serving(tmp_path) as server:
        bad, good = get(server, "/runs").json()["runs"]
        assert (good["name"], good["state"], good["step"]) == ("good", "running", 1)
        assert bad["state"] == ("unreadable" if where == "brief" else "waiting" if where == "look" else "running")
        assert get(server, f"/runs/{good['id']}").json()["train"]["at"] == [1]
        told = get(server, f"/runs/{bad['id']}").json()
        assert told["id"] == bad["id"] and (told["warnings"] or where == "brief")
        if where != "brief":
            assert "TypeError: nobody thought of this" in told["warnings"][0]["text"]


def test_of_many_runs_the_newest_are_shown_and_the_others_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNS", 3)
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    for n, name in enumerate("eabdc"):
        path = a_run(tmp_path / name, [step(1)], name=name) / "metrics.jsonl"
        os.utime(path, (1e9 + n, 1e9 + n))
    with serving(tmp_path) as server:
        told = get(server, "/runs").json()
        assert [run["name"] for run in told["runs"]] == ["c", "d", "b"] and told["left_out"] == 2
        append(tmp_path / "e", [step(2)])
        assert [run["name"] for run in get(server, "/runs").json()["runs"]] == ["e", "c", "d"]
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
        told = get(server, "/runs").json()
        assert [run["name"] for run in told["runs"]] == ["c", "d", "e"] and told["left_out"] == 0


def test_many_viewers_look_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0), *(step(n) for n in range(1, 200))])
    with serving(folder) as server:
        get(server, "/runs")
        looks, record = [], next(iter(server.watch.records.values()))
        inner = record.look
        monkeypatch.setattr(record, "look", lambda until: looks.append(until) or inner(until))
        start = time.monotonic()

        def view() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            for _ in range(50):
                connection.request("GET", "/runs")
                answer = connection.getresponse()
                assert json.loads(answer.read())["runs"][0]["step"] == 199
            connection.close()

        viewers = [threading.Thread(target=view) for _ in range(8)]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join()
        assert len(looks) <= 1 + (time.monotonic() - start) / module.EVERY_S


def test_callers_beyond_the_limit_are_turned_away_and_the_others_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTIONS", 3)
    monkeypatch.setattr(module.Handler, "timeout", 1.0)
    with serving(tmp_path) as server:
        idle = [socket.create_connection(("127.0.0.1", server.server_port), timeout=30) for _ in range(3)]
        time.sleep(0.3)
        with pytest.raises(httpx.HTTPError):
            get(server, "/runs")
        deadline = time.monotonic() + 60
        while True:  # those that say nothing are let go
            try:
                assert get(server, "/runs").status_code == 200
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        for one in idle:
            one.close()


def test_the_next_port_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="give another --port"):
            open_server(Watch([tmp_path]), "127.0.0.1", port, None)
        monkeypatch.setattr(module, "PORT", port)
        server = open_server(Watch([tmp_path]), "127.0.0.1", None, None)
        assert port < server.server_port < port + module.PORTS
        server.server_close()


def test_the_command_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--port", "99999999"])
    assert "no port" in capsys.readouterr().err
    assert command.main([str(tmp_path), "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "192.0.2.1" in capsys.readouterr().err
    monkeypatch.setenv("VERISM_WATCH_TOKEN", "short")
    with pytest.raises(SystemExit):
        command.main([str(tmp_path)])


@pytest.mark.e2e
def test_it_lives_as_long_as_the_trainer_beside_it(tmp_path: Path) -> None:
    """A trainer that is killed closes the pipe; nothing is left running. A `trainer` of the working directory is none of its business."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise RuntimeError('another trainer')")
    folder = a_run(tmp_path / "r", [evaluation(0), step(1)])
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from trainer.watch import __main__ as command
with command.beside(Path({str(folder)!r})) as told:
    print(told, flush=True)
    time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer.stdout:
        told = trainer.stdout.readline().strip()
    [pid] = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
    url = told.removeprefix("watching on ").replace("localhost", "127.0.0.1")
    assert httpx.get(f"{url}runs", trust_env=False, timeout=60).json()["runs"][0]["step"] == 1
    with Path(f"/proc/{pid}/stat").open() as file:
        assert int(file.read().rpartition(")")[2].split()[16]) == 19  # its niceness
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}runs", trust_env=False, timeout=10)
        except httpx.HTTPError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_it_needs_none_of_the_large_libraries() -> None:
    code = "import sys, trainer.watch.__main__; print([m for m in ('torch', 'numpy', 'fastapi', 'pydantic', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
